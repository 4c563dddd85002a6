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
from segment_anything.modeling import Sam
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn
from torch.nn import functional as F

from tinysam.everything import tile_kernels
from tinysam.everything.algebra import input_by_head
from tinysam.everything.factored import DecodedTokens, SharedImage, Update
from tinysam.everything.low_rank import LowRankDecoder

TILE = 128
"""Image tokens of a tile: enough for BLAS, and few enough for a tile's matrices to stay in a core's cache."""


class TiledDecoder(LowRankDecoder):
    """``LowRankDecoder`` of a ``Sam`` on a CPU in float32, on as many threads as torch uses.

    What has N image tokens in ``SharedImage`` and ``Update`` has tiles of W here: (H, d, N) is (tiles, H, d, W),
    (H, N, d) is (tiles, H, W, d), (B, R, N) is (B, tiles, R, W). Keys and queries of later layers have those of the
    positions behind them, (tiles, H, d, 2 W). The columns that ``decode`` returns are valid until its next call.
    """

    @torch.no_grad()
    def __init__(self, sam: Sam) -> None:
        super().__init__(sam, torch.float32)
        self.constant = np.float32(self.offset.square().sum())
        norm: nn.LayerNorm = self.decoder.output_upscaling[1]
        bias = self.norms[1].bias @ self.up_weight + self.up_bias
        self._after_first_convolution = (
            *_arrays(self.offset_2 @ self.up_weight, bias, norm.weight, norm.bias),
            np.float32(norm.eps),
            *_arrays(self.up_weight_2, self.up_bias_2),
        )
        self._columns = np.empty(0, np.float32)

    @torch.no_grad()
    def share(self, embedding: Tensor) -> SharedImage:
        image = super().share(embedding)
        tiled = {name: _tiles(tensor) for name, tensor in image._asdict().items()}
        for name in ("values_0", "values_1", "values_2", "upscaled"):
            tiled[name] = _tiles(getattr(image, name).mT).mT.contiguous()
        positions = {
            "keys_1": self.position_keys[1],
            "queries_1": self.position_queries,
            "keys_2": self.position_keys[2],
        }
        for name, position in positions.items():
            tiled[name] = torch.cat([tiled[name], _tiles(position)], dim=-1)
        return SharedImage(**tiled)

    @torch.no_grad()
    def upscale(self, image: SharedImage, decoded: DecodedTokens, prompts: Tensor) -> Tensor:
        update = decoded.image
        [upscaled] = _arrays(image.upscaled)
        chosen = _arrays(prompts, update.rows[prompts] @ self.up_weight, decoded.hyper[prompts].mT)
        every = _arrays(update.columns, update.inverse, cast(Tensor, update.previous))
        logits = np.empty((len(prompts), chosen[2].shape[2], 4 * self.grid[0], 4 * self.grid[1]), np.float32)

        def run(part: slice) -> None:
            own = (array[part] for array in chosen)
            weights = self._after_first_convolution
            tile_kernels.upscale(upscaled, weights, *own, *every, self.grid, logits[part])

        _in_threads(run, len(prompts))
        return torch.from_numpy(logits)

    def _read_shared(self, image: SharedImage, query: Tensor) -> Tensor:
        shared = _arrays(image.keys_0, image.values_0)
        [queries] = _arrays(query)
        average = np.empty_like(queries)

        def run(part: slice) -> None:
            tile_kernels.read_shared(shared, queries[part], self.n_tokens, average[part])

        _in_threads(run, len(query))
        return torch.from_numpy(average)

    def _write_and_read(self, image: SharedImage, key: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Update]:
        shared = _arrays(image.queries_0, image.cross_0, image.squares_0, image.keys_1, image.values_1)
        n_prompts, heads, n_queries, _ = query.shape
        rank, n_tiles = heads * n_queries, len(image.squares_0)
        centred_rows, rows = ((value @ by_head).flatten(1, 2) for by_head in (self.rows_0, self.rows_0_scaled))
        prompts = _arrays(key, value, centred_rows @ centred_rows.mT, query, self._absorbed(1, query) @ rows.mT)
        if self._columns.shape != (n_prompts, n_tiles, 2 * rank, TILE):
            self._columns = np.empty((n_prompts, n_tiles, 2 * rank, TILE), np.float32)
        inverse = np.empty((n_prompts, n_tiles, TILE), np.float32)
        mixed, average = np.empty((n_prompts, rank, rank), np.float32), np.empty(query.shape, np.float32)
        results = (self._columns, inverse, mixed, average)

        def run(part: slice) -> None:
            own, becomes = (tuple(array[part] for array in arrays) for arrays in (prompts, results))
            tile_kernels.write_and_read(shared, own, self.n_tokens, *self._norm(0), *becomes)

        _in_threads(run, n_prompts)
        by_rows = (torch.from_numpy(mixed) @ rows).unflatten(1, (heads, n_queries))
        update = Update(torch.from_numpy(inverse), None, torch.from_numpy(self._columns), rows, None)
        return torch.from_numpy(average) + self._values_of(1, by_rows), update

    def _write_and_read_again(
        self, image: SharedImage, key: Tensor, values: tuple[Tensor, Tensor], query: Tensor, update: Update
    ) -> tuple[Tensor, Update]:
        shared = (
            *_arrays(image.queries_1, image.cross_10, image.cross_11, image.squares_1, image.offset_1),
            *(self.constant, *_arrays(image.keys_2, image.values_2)),
        )
        n_prompts, heads, n_queries, _ = query.shape
        n_final = heads * n_queries
        absorbed = (key @ input_by_head(self.to_tokens[1].q_proj, heads)).flatten(1, 2) @ update.rows.mT
        first, second = (values[0] @ self.rows_10).flatten(1, 2), (values[1] @ self.rows_11).flatten(1, 2)
        centred_rows = torch.cat([first, second], dim=1)
        rows = centred_rows * self.norms[1].weight
        final = self._absorbed(2, query)
        prompts = _arrays(
            *(key, absorbed, *values),
            *(torch.cat([first, 2 * second], dim=1) @ first.mT, second @ second.mT),
            *(2 * centred_rows @ self.offset, query, final @ rows.mT, final @ self.offset_2),
        )
        columns, inverse = _arrays(update.columns, update.inverse)
        previous, average = np.empty_like(inverse), np.empty(query.shape, np.float32)
        mixed = np.empty((n_prompts, n_final, columns.shape[2]), np.float32)
        sums = np.empty((n_prompts, n_final), np.float32)
        results = (columns, inverse, previous, mixed, sums, average)

        def run(part: slice) -> None:
            own, becomes = (tuple(array[part] for array in arrays) for arrays in (prompts, results))
            tile_kernels.write_and_read_again(shared, own, self.n_tokens, *self._norm(1), *becomes)

        _in_threads(run, n_prompts)
        by_rows = torch.from_numpy(mixed) @ rows + torch.from_numpy(sums)[..., None] * self.offset_2
        update = Update(update.inverse, torch.from_numpy(previous), update.columns, rows, self.offset_2)
        return torch.from_numpy(average) + self._values_of(2, by_rows.unflatten(1, (heads, n_queries))), update

    def _absorbed(self, i: int, query: Tensor) -> Tensor:
        """Queries of attention ``i`` taken back through its projection of keys, (B, R, C)."""
        return (query @ input_by_head(self.to_image[i].k_proj, query.shape[1])).flatten(1, 2)

    def _values_of(self, i: int, tokens: Tensor) -> Tensor:
        """The values (B, H, T, d) of tokens that differ by head, (B, H, T, C)."""
        return tokens @ input_by_head(self.to_image[i].v_proj, tokens.shape[1]).mT

    def _norm(self, i: int) -> tuple[np.float32, np.float32]:
        norm: nn.LayerNorm = self.norms[i]
        return np.float32(norm.normalized_shape[0]), np.float32(norm.eps)

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.position)


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """The tensors, contiguous, for a kernel."""
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


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
