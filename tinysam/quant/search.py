"""The search for scales: TinySAM's Hessian-guided one, and the baselines that it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from segment_anything.modeling import Sam

from tinysam.quant.calibrate import CalibrationConfig, Seen, calibrate
from tinysam.quant.grids import Grid, GridFamily
from tinysam.quant.observe import Range
from tinysam.quant.products import Product
from tinysam.quant.samples import Sample
from tinysam.quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The candidates and how often they are tried; the defaults are the paper's."""

    candidates: int = 100
    """Factors on the scale that covers everything."""
    lowest: float = 0.01
    """The first factor."""
    highest: float = 1.2
    """The last factor."""
    rounds: int = 3
    """Times that each side's scale is chosen, the other's being fixed. Ends early when a round changes nothing."""
    floor: float = 0.1
    """Part of the mean curvature that every output counts at least. Our choice: where masks are certain the curvature
    is 0, and without a floor the search clips what makes them so."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """How much of the calibration images is looked at."""

    def __post_init__(self) -> None:
        if self.candidates < 2 or self.rounds < 1:
            raise ValueError("a search needs at least 2 candidates and 1 round")
        if self.floor < 0:
            raise ValueError(f"floor must not be negative, got {self.floor}")
        if not 0 < self.lowest < self.highest:
            raise ValueError(f"the factors must satisfy 0 < lowest < highest, got {self.lowest} and {self.highest}")

    def factors(self) -> list[float]:
        """All candidates."""
        return np.linspace(self.lowest, self.highest, self.candidates).tolist()


@dataclass(frozen=True, kw_only=True)
class ProductGrids:
    """How a product's sides are rounded."""

    product: Product
    families: tuple[GridFamily, GridFamily]
    factors: tuple[torch.Tensor, torch.Tensor]
    """(cells,) each: which grids of the families."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """In which the scales broadcast to the values."""
    relative_error: float | None
    """On the samples: length of the product's error over the length of the product. None without samples."""

    def grid(self, side: int) -> Grid:
        """The grid of one side, ready to round its values."""
        family, shape = self.families[side], self.shapes[side]
        return family.grid(self.factors[side]).select(torch.arange(family.cells).view(shape))

    def covered(self, side: int) -> Range:
        """What the integers of an activation with one scale cover."""
        family, factor = self.families[side], float(self.factors[side])
        # Of an affine family the factor shrinks both ends, which leaves the zero point as it is.
        low, high = float(family.low), float(family.high)
        if family.kind == "symmetric":
            high = max(-low, high)
            low = -high
        return Range(low=factor * low, high=factor * high)

    def weight_bounds(self) -> np.ndarray:
        """(cells,) the largest absolute value that the integers of each channel cover."""
        family = self.families[1]
        return (self.factors[1] * torch.maximum(-family.low, family.high)).numpy()

    @property
    def is_constant(self) -> bool:
        """Whether an activation of it is 0 on every calibration image, so that no scale can be derived."""
        sides = self.families if self.product.kind == "matmul" else self.families[:1]
        return any(bool(((family.low == 0) & (family.high == 0)).all()) for family in sides)


def find_grids(
    sam: Sam,
    images: Sequence[np.ndarray],
    scheme: Scheme,
    config: SearchConfig | None = None,
    *,
    on_image: Callable[[], None] = lambda: None,
    on_product: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, ProductGrids]:
    """Finds the grids of every product of a Sam. Deterministic.

    Products whose activation is 0 on every image are left out: no scale can be derived from zeros, and one that is
    made up would round other images to nothing.

    Args:
        sam: on the CPU, in eval mode, in its :func:`tinysam.quant.engine_form.engine_form`.
        images: calibration images, (H, W, 3) uint8 RGB.
        scheme: what to quantize, and how.
        config: candidates and calibration.
        on_image: called after each calibration image.
        on_product: called with the name of each product done, and the number of products.

    Raises:
        FloatingPointError: if an activation is not finite.
    """
    config = config or SearchConfig()
    seen = calibrate(sam, images, scheme, config.calibration, on_image=on_image)
    return choose_grids(seen, scheme, config, on_product=on_product)


def choose_grids(
    seen: Mapping[str, Seen],
    scheme: Scheme,
    config: SearchConfig,
    *,
    on_product: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, ProductGrids]:
    """The second half of :func:`find_grids`: schemes that differ in bits, or in which of the two searches they do, can
    share the first.

    Args:
        seen: of ``calibrate``, with a scheme that has the same products, scales and observers as ``scheme``.
        scheme: how to quantize.
        config: candidates.
        on_product: see :func:`find_grids`.
    """
    found = {}
    for name, entry in seen.items():
        grids = _find(entry, scheme, config)
        if not grids.is_constant:
            found[name] = grids
        on_product(name, len(seen))
    return found


@torch.no_grad()
def _find(entry: Seen, scheme: Scheme, config: SearchConfig) -> ProductGrids:
    left = scheme.activation_family(entry.product, 0, *entry.extremes(0))
    right = (
        scheme.activation_family(entry.product, 1, *entry.extremes(1))
        if entry.weight is None
        else scheme.weight_family(*entry.extremes(1))
    )
    factors = torch.ones(left.cells), torch.ones(right.cells)
    error = None
    if entry.samples:
        sample = entry.sample()
        curvature = (
            torch.ones_like(sample.curvature)
            if scheme.method == "mse"
            else sample.curvature + config.floor * sample.curvature.mean()
        )
        sample = replace(sample, curvature=curvature)
        factors = search(sample, (left, right), config)
        error = relative_error(sample, (left, right), factors)
    return ProductGrids(
        product=entry.product,
        families=(left, right),
        factors=factors,
        shapes=entry.shapes,
        relative_error=error,
    )


def search(
    sample: Sample, families: tuple[GridFamily, GridFamily], config: SearchConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of both sides that minimise the weighted squared error of the product, chosen in turns.

    All cells are searched at once, since the error of each depends on its own factor alone. Of equals, the largest
    factor wins, which clips least.

    Returns:
        (cells,) float32 for each side.
    """
    exact = sample.left @ sample.right
    factors = torch.ones(families[0].cells), torch.ones(families[1].cells)
    candidates = torch.tensor(config.factors()[::-1])
    for _ in range(config.rounds):
        before = factors
        right = _round_right(sample, families[1], factors[1])
        errors = [_error(sample, _round_left(sample, families[0], factor), right, exact) for factor in candidates]
        sums = torch.stack([_sum_left(sample, error, families[0].cells) for error in errors])
        factors = candidates[sums.argmin(0)], factors[1]
        left = _round_left(sample, families[0], factors[0])
        errors = [_error(sample, left, _round_right(sample, families[1], factor), exact) for factor in candidates]
        sums = torch.stack([_sum_right(sample, error, families[1].cells) for error in errors])
        factors = factors[0], candidates[sums.argmin(0)]
        if all(torch.equal(a, b) for a, b in zip(before, factors, strict=True)):
            break
    return factors


def relative_error(
    sample: Sample, families: tuple[GridFamily, GridFamily], factors: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Length of the error that rounding both sides makes, over the length of the exact product; unweighted."""
    exact = sample.left @ sample.right
    rounded = _round_left(sample, families[0], factors[0]) @ _round_right(sample, families[1], factors[1])
    return float((rounded - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _round_left(sample: Sample, family: GridFamily, factor: torch.Tensor) -> torch.Tensor:
    return family.grid(factor).select(sample.left_cell[:, None, None]).round(sample.left)


def _round_right(sample: Sample, family: GridFamily, factor: torch.Tensor) -> torch.Tensor:
    return family.grid(factor).select(sample.right_cell[:, None, :]).round(sample.right)


def _error(sample: Sample, left: torch.Tensor, right: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """(G, M), summed over the rows."""
    return (left @ right).sub_(exact).square_().mul_(sample.curvature).sum(1)


def _sum_left(sample: Sample, errors: torch.Tensor, cells: int) -> torch.Tensor:
    return torch.zeros(cells).index_add_(0, sample.left_cell, errors.sum(1))


def _sum_right(sample: Sample, errors: torch.Tensor, cells: int) -> torch.Tensor:
    return torch.zeros(cells).index_add_(0, sample.right_cell.flatten(), errors.flatten())
