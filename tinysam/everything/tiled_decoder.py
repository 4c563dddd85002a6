"""The low-rank decoder on a CPU: float32, a tile of image tokens at a time.

What a prompt does with its R x N matrices is bound by memory wherever each operation reads and writes all of them.
Here three sweeps over tiles of the image tokens do all of it, one up to each point where the prompt's tokens must have
seen the whole image: ``tile_kernels`` has them, and needs no library but Numba and BLAS. Upscaling is a fourth.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import cast

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401
import torch
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.modeling.transformer import Attention
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn
from torch.nn import functional as F

from tinysam.everything import amx, tile_kernels
from tinysam.everything.algebra import absorbed, by_shared
from tinysam.everything.factored import DecodedTokens, SharedImage, Update
from tinysam.everything.low_rank import LowRankDecoder
from tinysam.everything.tile_operands import Bfloat16Operands, Float32Operands, Operands

TILE = 128
"""Image tokens of a tile: enough for BLAS, and few enough for a tile's matrices to stay in a core's cache."""


class TiledDecoder(LowRankDecoder):
    """``LowRankDecoder`` of a ``Sam`` on a CPU, on as many threads as torch uses.

    What has N image tokens in ``SharedImage`` and ``Update`` has tiles of W here, as ``tile_kernels`` takes them. Keys
    and queries of later layers have those of the positions behind them. The columns that ``decode`` returns are valid
    until its next call.

    Args:
        sam: in float32.
        dtype: bfloat16 rounds what is multiplied, where the CPU has tile registers; all else is float32.
    """

    @torch.no_grad()
    def __init__(self, sam: Sam, dtype: torch.dtype | None = None) -> None:
        super().__init__(sam, torch.float32)
        in_bfloat16 = dtype == torch.bfloat16 and multiplies_bfloat16(self.decoder)
        self.operands: Operands = Bfloat16Operands() if in_bfloat16 else Float32Operands()
        self.constant = np.float32(self.offset.square().sum())
        norm: nn.LayerNorm = self.decoder.output_upscaling[1]
        bias = self.norms[1].bias @ self.up_weight + self.up_bias
        channels = len(norm.weight) // 2
        self._after_first_convolution = (
            *_arrays(self.offset_2 @ self.up_weight, bias, norm.weight, norm.bias),
            np.float32(norm.eps),
            *_arrays(self.operands.left(self.up_weight_2.mT.unflatten(0, (4, -1))), self.up_bias_2[:channels]),
        )
        self._columns = torch.empty(0)

    @torch.no_grad()
    def share(self, embedding: Tensor) -> SharedImage:
        image = super().share(embedding)
        values = ("values_0", "values_1", "values_2")
        upright = (*values, "upscaled")  # whose image tokens are rows
        tiled = {name: _tiles(tensor.mT if name in upright else tensor) for name, tensor in image._asdict().items()}
        positions = {
            "keys_1": self.position_keys[1],
            "queries_1": self.position_queries,
            "keys_2": self.position_keys[2],
        }
        for name, position in positions.items():
            tiled[name] = torch.cat([tiled[name], _tiles(position)], dim=-1)
        for name in ("keys_0", "queries_0", "cross_0", "cross_10", "cross_11", *positions):
            tiled[name] = self.operands.right(tiled[name].flatten(1, 2))
        for name in values:
            tiled[name] = self.operands.values(tiled[name].mT)
        return SharedImage(**{name: tensor.contiguous() for name, tensor in tiled.items()})

    @torch.no_grad()
    def upscale(self, image: SharedImage, decoded: DecodedTokens, prompts: Tensor) -> Tensor:
        update = decoded.image
        [upscaled] = _arrays(image.upscaled)
        rows = (update.rows[prompts] @ self.up_weight).mT.unflatten(1, (4, -1))
        chosen = _arrays(prompts, self.operands.left_of_halves(rows), self.operands.left(decoded.hyper[prompts]))
        every = _arrays(update.columns, update.inverse, cast(Tensor, update.previous))
        shape = (len(prompts), decoded.hyper.shape[1], 4 * self.grid[0], 4 * self.grid[1])
        logits = np.empty(shape, np.float32)

        def run(part: slice) -> None:
            own = (array[part] for array in chosen)
            weights = self._after_first_convolution
            tile_kernels.upscale(upscaled, weights, *own, *every, self.grid, logits[part])

        _in_threads(run, len(prompts))
        return torch.from_numpy(logits)

    def _read_shared(self, image: SharedImage, query: Tensor) -> Tensor:
        shared = _arrays(image.keys_0, image.values_0)
        [queries] = _arrays(self.operands.left_by_head(query))
        average = np.empty(query.shape, np.float32)

        def run(part: slice) -> None:
            tile_kernels.read_shared(shared, queries[part], self.n_tokens, average[part])

        _in_threads(run, len(query))
        return torch.from_numpy(average)

    def _write_and_read(self, image: SharedImage, key: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Update]:
        shared = _arrays(image.queries_0, image.cross_0, image.squares_0, image.keys_1, image.values_1)
        n_prompts, heads, n_queries, _ = query.shape
        rank, n_tiles = heads * n_queries, len(image.squares_0)
        left, by_head = self.operands.left, self.operands.left_by_head
        centred_rows = by_shared(value, self.rows_0).flatten(1, 2)
        rows = centred_rows * self.norms[0].weight
        gram = centred_rows @ centred_rows.mT
        against_rows = absorbed(query, self.to_image[1].k_proj) @ rows.mT
        prompts = _arrays(by_head(key), by_head(value), left(gram), by_head(query), left(against_rows))
        columns = (n_prompts, n_tiles, 2, *self.operands.right_shape(rank, TILE))
        if self._columns.shape != columns:
            self._columns = torch.zeros(columns, dtype=self.operands.dtype)
        inverse = np.empty((n_prompts, n_tiles, TILE), np.float32)
        mixed, average = np.empty((n_prompts, rank, rank), np.float32), np.empty(query.shape, np.float32)
        results = (*_arrays(self._columns), inverse, mixed, average)

        def run(part: slice) -> None:
            own, becomes = (tuple(array[part] for array in arrays) for arrays in (prompts, results))
            tile_kernels.write_and_read(shared, own, self.n_tokens, *self._norm(0), *becomes)

        _in_threads(run, n_prompts)
        by_rows = (torch.from_numpy(mixed).mT @ rows).unflatten(1, (heads, n_queries))
        update = Update(torch.from_numpy(inverse), None, self._columns, rows, None)
        return torch.from_numpy(average) + self._values_of(1, by_rows), update

    def _write_and_read_again(
        self, image: SharedImage, key: Tensor, values: tuple[Tensor, Tensor], query: Tensor, update: Update
    ) -> tuple[Tensor, Update]:
        shared = (
            *_arrays(image.queries_1, image.cross_10, image.cross_11, image.squares_1, image.offset_1),
            *(self.constant, *_arrays(image.keys_2, image.values_2)),
        )
        n_prompts, heads, n_final, _ = query.shape
        left, by_head = self.operands.left, self.operands.left_by_head
        against_rows = absorbed(key, self.to_tokens[1].q_proj) @ update.rows.mT
        centred_rows = self._centred_rows(values)
        first, second = centred_rows.chunk(2, dim=1)
        rank = first.shape[1]
        rows = centred_rows * self.norms[1].weight
        final = absorbed(query, self.to_image[2].k_proj)
        prompts = _arrays(
            *(by_head(key), left(against_rows), *map(by_head, values)),
            *map(left, (first @ first.mT, 2 * second @ first.mT, second @ second.mT)),
            *(by_head(query), self.operands.left_of_halves(final @ rows.mT)),
            *((2 * centred_rows @ self.offset).unflatten(1, (2, rank)), final @ self.offset_2),
        )
        columns, inverse = _arrays(update.columns, update.inverse)
        previous, average = np.empty_like(inverse), np.empty(query.shape, np.float32)
        mixed = np.empty((n_prompts, 2, rank, heads * n_final), np.float32)
        sums = np.empty((n_prompts, heads * n_final), np.float32)
        results = (columns, inverse, previous, mixed, sums, average)

        def run(part: slice) -> None:
            own, becomes = (tuple(array[part] for array in arrays) for arrays in (prompts, results))
            tile_kernels.write_and_read_again(shared, own, self.n_tokens, *self._norm(1), *becomes)

        _in_threads(run, n_prompts)
        by_rows = torch.from_numpy(mixed).flatten(1, 2).mT @ rows + torch.from_numpy(sums)[..., None] * self.offset_2
        update = Update(update.inverse, torch.from_numpy(previous), update.columns, rows, self.offset_2)
        return torch.from_numpy(average) + self._values_of(2, by_rows.unflatten(1, (heads, n_final))), update

    def _norm(self, i: int) -> tuple[np.float32, np.float32]:
        norm: nn.LayerNorm = self.norms[i]
        return np.float32(norm.normalized_shape[0]), np.float32(norm.eps)

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.position)


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """The tensors, contiguous, for a kernel."""
    arrays = (tensor.detach().contiguous().numpy() for tensor in tensors)
    return tuple(array.view(np.uint32) if array.dtype == np.int32 else array for array in arrays)


def multiplies_bfloat16(decoder: MaskDecoder) -> bool:
    """Whether this CPU multiplies the decoder's matrices in bfloat16, whose heads must fill whole registers."""
    attentions = (module for module in decoder.transformer.modules() if isinstance(module, Attention))
    return all(attention.internal_dim % amx.SUMMED == 0 for attention in attentions) and amx.is_available()


def _tiles(matrix: Tensor) -> Tensor:
    """(..., N) as (tiles, ..., W), padded with zeros."""
    padded = F.pad(matrix, (0, -matrix.shape[-1] % TILE))
    return padded.unflatten(-1, (-1, TILE)).movedim(-2, 0).contiguous()


def _in_threads(run: Callable[[slice], None], count: int) -> None:
    """Runs parts of ``count`` prompts on torch's number of threads, with one thread of BLAS for each."""
    threads = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // threads for i in range(threads + 1)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    with _blas().limit(limits=1):
        if threads == 1:
            run(parts[0])
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, parts))


@cache
def _blas() -> ThreadpoolController:
    """SciPy's BLAS, which Numba calls, and which must have been imported to be found."""
    return ThreadpoolController().select(internal_api="openblas")
