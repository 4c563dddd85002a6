"""What ``tiled_decoder`` does with the image tokens of one prompt, a tile of them at a time.

A tile's matrices stay in a core's cache from the first product to the last, where an engine that executes a graph
writes and reads each of them in memory. Products are BLAS's; what lies between them is one loop each. Of H heads of d
channels, T tokens of a prompt, R = H T, W image tokens of a tile, C channels; float32, and everything contiguous.
``low_rank`` derives what is computed.
"""
# mypy: disallow_untyped_defs = false

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# NaN must come through, or damaged weights would go unnoticed: only what may reorder sums is allowed.
FAST = {"contract", "nsz", "reassoc", "arcp"}
# Python's division would ask before each whether the divisor is 0.
COMPILED = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": FAST}

LANES = 16
"""Float32 numbers of a vector register, which a tile's width is a multiple of."""
_LOWEST = np.float32(-87.0)
"""exp of less is not a normal float32."""
_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_HALF, _ONE, _TWO, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(2.0), np.float32(0.0)
# Taylor's series of exp on half an octave around 0; the first term left out is below 2^-24.
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / factorial) for factorial in (2, 6, 24, 120, 720, 5040))
# erf(x / sqrt(2)) is x P(x^2) / Q(x^2) to 3e-7 up to this x, and 1 beyond it: our fit by least squares, reweighted to
# even out the error.
_ERF_END = np.float32(5.5)
_P0, _P1, _P2, _P3, _P4 = (
    np.float32(p) for p in (0.797883161, 0.116333679, 0.0122915292, 0.00081935349, 1.47016185e-05)
)
_Q1, _Q2, _Q3, _Q4, _Q5 = (
    np.float32(q) for q in (0.312458163, 0.0425015866, 0.0032588274, 0.000147143671, 6.03774204e-07)
)


@intrinsic
def _as_float(_, bits):
    """The float32 of 32 bits."""

    def generate(_, builder, __, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@numba.njit(**COMPILED)
def exp(x):
    """exp of a float32 that is not above 88, which, unlike libm's, compiles to vector instructions."""
    x = _LOWEST if x < _LOWEST else x
    power = np.floor(x * _LOG2_E + _HALF)
    x = x - power * _LN_2_HIGH - power * _LN_2_LOW
    series = ((((_E7 * x + _E6) * x + _E5) * x + _E4) * x + _E3) * x + _E2
    return (series * x * x + x + _ONE) * _as_float((np.int32(power) + np.int32(127)) << np.int32(23))


@numba.njit(**COMPILED)
def gelu(x):
    """GELU of a float32, to 3e-7 times x or 1."""
    z = -_ERF_END if x < -_ERF_END else x
    z = _ERF_END if z > _ERF_END else z
    t = z * z
    p = (((_P4 * t + _P3) * t + _P2) * t + _P1) * t + _P0
    q = ((((_Q5 * t + _Q4) * t + _Q3) * t + _Q2) * t + _Q1) * t + _ONE
    return _HALF * x * (_ONE + z * p / q)


@numba.njit(**COMPILED)
def softmax_over_tokens(logits, heads):
    """Softmax of (R, W) in place, over the T tokens of each head."""
    rank, width = logits.shape
    n_tokens = rank // heads
    peak, total = np.empty(width, np.float32), np.empty(width, np.float32)
    for first in range(0, rank, n_tokens):
        peak[:] = logits[first]
        for r in range(first + 1, first + n_tokens):
            for n in range(width):
                peak[n] = max(peak[n], logits[r, n])
        total[:] = _ZERO
        for r in range(first, first + n_tokens):
            for n in range(width):
                logits[r, n] = exp(logits[r, n] - peak[n])
                total[n] += logits[r, n]
        for n in range(width):
            total[n] = _ONE / total[n]
        for r in range(first, first + n_tokens):
            for n in range(width):
                logits[r, n] *= total[n]


@numba.njit(**COMPILED)
def weigh(logits, valid, peak, total, decay):
    """One tile of a softmax over all image tokens, whose weights are divided by ``total`` in the end.

    Args:
        logits: (R, W), replaced by weights relative to ``peak``.
        valid: columns from here on are padding and get no weight.
        peak, total: (R,) the greatest logit and the sum of weights so far; both updated.
        decay: (R,) what sums of earlier tiles must be multiplied by.
    """
    rank, width = logits.shape
    lanes = np.empty(LANES, np.float32)
    for r in range(rank):
        logits[r, valid:] = -np.inf
        # A plain maximum is one long chain of comparisons, which compilers leave as it is for the sake of NaN.
        lanes[:] = peak[r]
        for n in range(0, width, LANES):
            for j in range(LANES):
                lanes[j] = max(lanes[j], logits[r, n + j])
        highest = peak[r]
        for j in range(LANES):
            highest = max(highest, lanes[j])
        added = _ZERO
        for n in range(width):
            logits[r, n] = exp(logits[r, n] - highest)
            added += logits[r, n]
        decay[r] = exp(peak[r] - highest)
        peak[r] = highest
        total[r] = total[r] * decay[r] + added


@numba.njit(**COMPILED)
def by_head(left, right, out):
    """(H, T, d) by (H, d, K), into (H T, K)."""
    n_tokens = left.shape[1]
    for h in range(len(left)):
        np.dot(left[h], right[h], out[h * n_tokens : (h + 1) * n_tokens])


@numba.njit(**COMPILED)
def add_average(weights, values, decay, average):
    """Adds (H T, W) by (H, W, d) to ``average`` (H, T, d), times ``decay`` (H T,)."""
    heads, n_tokens, channels = average.shape
    added = np.empty((n_tokens, channels), np.float32)
    for h in range(heads):
        np.dot(weights[h * n_tokens : (h + 1) * n_tokens], values[h], added)
        for t in range(n_tokens):
            for c in range(channels):
                average[h, t, c] = average[h, t, c] * decay[h * n_tokens + t] + added[t, c]


@numba.njit(**COMPILED)
def add_mixed(weights, columns, decay, added, mixed):
    """Adds ``weights`` (R, W) by ``columns`` (K, W) to ``mixed`` (R, K), times ``decay`` (R,)."""
    np.dot(weights, columns.T, added)
    for r in range(len(mixed)):
        for k in range(mixed.shape[1]):
            mixed[r, k] = mixed[r, k] * decay[r] + added[r, k]


@numba.njit(**COMPILED)
def _scale(weights, factors):
    """Multiplies the columns of (R, W) by (W,), in place."""
    for r in range(len(weights)):
        for n in range(len(factors)):
            weights[r, n] *= factors[n]


@numba.njit(**COMPILED)
def _inverse_deviation(square, channels, epsilon, inverse):
    """``algebra.inverse_deviation`` of a tile's sums of squares (W,), to ``inverse`` (W,)."""
    for n in range(len(square)):
        inverse[n] = _ONE / np.sqrt(max(square[n], _ZERO) / channels + epsilon)


@numba.njit(**COMPILED)
def _divide(sums, total):
    """Divides weighted sums (B, R, K) by the sums of their weights (B, R), in place."""
    for p in range(len(sums)):
        for r in range(sums.shape[1]):
            sums[p, r] /= total[p, r]


@numba.njit(**COMPILED)
def read_shared(image, query, n_tokens, average):
    """Attention of B prompts to image tokens that are the same for all.

    Args:
        image: keys (tiles, H, d, W) and values (tiles, H, W, d).
        query: (B, H, T, d), scaled.
        n_tokens: N, image tokens without padding.
        average: (B, H, T, d), the result.
    """
    keys, values = image
    n_prompts, heads, n_queries, _ = query.shape
    rank, width = heads * n_queries, keys.shape[3]
    weights, decay = np.empty((rank, width), np.float32), np.empty(rank, np.float32)
    peak, total = np.full((n_prompts, rank), -np.inf, np.float32), np.zeros((n_prompts, rank), np.float32)
    average[:] = _ZERO
    for i in range(len(keys)):
        for p in range(n_prompts):
            by_head(query[p], keys[i], weights)
            weigh(weights, min(width, n_tokens - i * width), peak[p], total[p], decay)
            add_average(weights, values[i], decay, average[p])
    _divide(average.reshape(n_prompts, rank, -1), total)


@numba.njit(**COMPILED)
def write_and_read(image, prompts, n_tokens, channels, epsilon, columns, inverse, mixed, average):
    """Layer 0's update of the image tokens, and layer 1's attention of B prompts' tokens to them.

    Args:
        image: queries (tiles, H, d, W) and cross (the same) of layer 0, squares (tiles, W); of layer 1 keys with those
            of the positions behind them (tiles, H, d, 2 W), and values (tiles, H, W, d).
        prompts: key (B, H, T, d) and value (B, H, T, d) of layer 0, the gram matrix of the update's rows (B, R, R); the
            query of layer 1 (B, H, T, d) and its product with those rows (B, R, R).
        n_tokens: N, image tokens without padding.
        channels, epsilon: of LayerNorm.
        columns: (B, tiles, 2 R, W), whose first half becomes the weights A1.
        inverse: (B, tiles, W), becomes r1.
        mixed: (B, R, R), becomes the attention's weights times r1 by A1'.
        average: (B, H, T, d), becomes the attention's weights times r1 by the values.
    """
    queries_0, cross_0, squares_0, keys_1, values_1 = image
    key, value, gram, query, absorbed = prompts
    n_prompts, heads, n_queries, _ = key.shape
    rank, width = heads * n_queries, queries_0.shape[3]
    product, weights = np.empty((rank, width), np.float32), np.empty((rank, width), np.float32)
    pair, added = np.empty((rank, 2 * width), np.float32), np.empty((rank, rank), np.float32)
    square, decay = np.empty(width, np.float32), np.empty(rank, np.float32)
    peak, total = np.full((n_prompts, rank), -np.inf, np.float32), np.zeros((n_prompts, rank), np.float32)
    mixed[:] = _ZERO
    average[:] = _ZERO
    for i in range(len(queries_0)):
        for p in range(n_prompts):
            a, r1 = columns[p, i, :rank], inverse[p, i]
            by_head(key[p], queries_0[i], a)
            softmax_over_tokens(a, heads)

            np.dot(gram[p], a, product)
            by_head(value[p], cross_0[i], weights)
            square[:] = squares_0[i]
            for r in range(rank):
                for n in range(width):
                    square[n] += a[r, n] * (product[r, n] + weights[r, n])
            _inverse_deviation(square, channels, epsilon, r1)

            np.dot(absorbed[p], a, weights)
            by_head(query[p], keys_1[i], pair)
            for r in range(rank):
                for n in range(width):
                    weights[r, n] = (weights[r, n] + pair[r, n]) * r1[n] + pair[r, width + n]
            weigh(weights, min(width, n_tokens - i * width), peak[p], total[p], decay)
            _scale(weights, r1)
            add_mixed(weights, a, decay, added, mixed[p])
            add_average(weights, values_1[i], decay, average[p])
    _divide(mixed, total)
    _divide(average.reshape(n_prompts, rank, -1), total)


@numba.njit(**COMPILED)
def write_and_read_again(image, prompts, n_tokens, channels, epsilon, columns, inverse, previous, mixed, sums, average):
    """Layer 1's update of the image tokens, and the final attention of F of B prompts' tokens to them.

    Args:
        image: of layer 1 queries with those of the positions behind them (tiles, H, d, 2 W), cross with layer 0's and
            with its own rows (tiles, H, d, W), squares and offset (tiles, W), the constant's square; of the final
            attention keys with those of the positions (tiles, H, d, 2 W) and values (tiles, H, W, d).
        prompts: key of layer 1 (B, H, T, d) and its product with the rows of layer 0's update (B, R, R); values of both
            layers (B, H, T, d); the gram matrix of both updates' rows as ``[G11; 2 G21]`` (B, 2 R, R) and ``G22``
            (B, R, R); twice the rows' product with the offset (B, 2 R); the final query (B, H, F, d), and its products
            with the rows (B, H F, 2 R) and with the offset (B, H F).
        columns: (B, tiles, 2 R, W), whose first half is A1 and becomes r1 A1; the second half becomes A2.
        inverse: (B, tiles, W), is r1 and becomes r2.
        previous: (B, tiles, W), becomes r1.
        mixed: (B, H F, 2 R), becomes the attention's weights times r2 by the columns.
        sums: (B, H F), becomes the sum of the weights times r2.
        average: (B, H, F, d), becomes the attention's weights times r2 r1 by the values.
    """
    queries_1, cross_10, cross_11, squares_1, offset_1, constant, keys_2, values_2 = image
    key, absorbed, value_0, value_1, gram_0, gram_1, rows_offset, query, final, final_offset = prompts
    n_prompts, heads, n_queries, _ = key.shape
    rank, n_final, width = heads * n_queries, final.shape[1], queries_1.shape[3] // 2
    product, cross = np.empty((2 * rank, width), np.float32), np.empty((2 * rank, width), np.float32)
    own, weights = np.empty((rank, width), np.float32), np.empty((n_final, width), np.float32)
    pair, final_pair = np.empty((rank, 2 * width), np.float32), np.empty((n_final, 2 * width), np.float32)
    added, decay = np.empty((n_final, 2 * rank), np.float32), np.empty(n_final, np.float32)
    square = np.empty(width, np.float32)
    peak, total = np.full((n_prompts, n_final), -np.inf, np.float32), np.zeros((n_prompts, n_final), np.float32)
    mixed[:] = _ZERO
    sums[:] = _ZERO
    average[:] = _ZERO
    for i in range(len(queries_1)):
        for p in range(n_prompts):
            both, r1, r2 = columns[p, i], previous[p, i], inverse[p, i]
            a, b = both[:rank], both[rank:]
            r1[:] = r2

            np.dot(absorbed[p], a, b)
            by_head(key[p], queries_1[i], pair)
            for r in range(rank):
                for n in range(width):
                    b[r, n] = (b[r, n] + pair[r, n]) * r1[n] + pair[r, width + n]
                    a[r, n] *= r1[n]
            softmax_over_tokens(b, heads)

            np.dot(gram_0[p], a, product)
            np.dot(gram_1[p], b, own)
            by_head(value_0[p], cross_10[i], cross[:rank])
            by_head(value_1[p], cross_11[i], cross[rank:])
            for n in range(width):
                square[n] = r1[n] * (r1[n] * squares_1[i, n] + _TWO * offset_1[i, n]) + constant
            for r in range(rank):
                for n in range(width):
                    square[n] += a[r, n] * (product[r, n] + r1[n] * cross[r, n] + rows_offset[p, r])
            for r in range(rank):
                for n in range(width):
                    others = product[rank + r, n] + r1[n] * cross[rank + r, n] + rows_offset[p, rank + r]
                    square[n] += b[r, n] * (own[r, n] + others)
            _inverse_deviation(square, channels, epsilon, r2)

            np.dot(final[p], both, weights)
            by_head(query[p], keys_2[i], final_pair)
            for r in range(n_final):
                for n in range(width):
                    moved = weights[r, n] + r1[n] * final_pair[r, n] + final_offset[p, r]
                    weights[r, n] = moved * r2[n] + final_pair[r, width + n]
            weigh(weights, min(width, n_tokens - i * width), peak[p], total[p], decay)
            for r in range(n_final):
                added_sum = _ZERO
                for n in range(width):
                    weights[r, n] *= r2[n]
                    added_sum += weights[r, n]
                sums[p, r] = sums[p, r] * decay[r] + added_sum
            add_mixed(weights, both, decay, added, mixed[p])
            _scale(weights, r1)
            add_average(weights, values_2[i], decay, average[p])
    _divide(mixed, total)
    _divide(sums.reshape(n_prompts, n_final, 1), total)
    _divide(average.reshape(n_prompts, n_final, -1), total)


@numba.njit(**COMPILED)
def upscale(image, weights, prompts, rows, hyper, columns, inverse, previous, grid, logits):
    """The logits of the masks of K prompts among B.

    Args:
        image: (tiles, W, C), S2 through the first transposed convolution.
        weights: what follows it: offset (C,) and bias (C,) before LayerNorm, its weight and bias (C / 4,) and epsilon,
            the second convolution as a product (C / 4, C / 2) and its bias (C / 2,).
        prompts: (K,) positions among the B.
        rows: (K, 2 R, C), the updates' rows through the first convolution.
        hyper: (K, C / 8, M), what each mask multiplies pixels by.
        columns, inverse, previous: as ``write_and_read_again`` leaves them, of all B.
        grid: (h, w) of the image tokens.
        logits: (K, M, 4 h, 4 w), the result.
    """
    offset, bias, gain, shift, epsilon, second, second_bias = weights
    n_tiles, width, channels = image.shape
    quarter, n_masks = channels // 4, hyper.shape[2]
    x, y = np.empty((width, channels), np.float32), np.empty((4 * width, channels // 2), np.float32)
    corners, by_pixel = x.reshape(4 * width, quarter), y.reshape(16 * width, channels // 8)
    pixels = np.empty((16 * width, n_masks), np.float32)
    for i in range(n_tiles):
        for k, p in enumerate(prompts):
            np.dot(columns[p, i].T, rows[k], x)
            for n in range(width):
                r1, r2 = previous[p, i, n], inverse[p, i, n]
                for c in range(channels):
                    x[n, c] = (x[n, c] + r1 * image[i, n, c] + offset[c]) * r2 + bias[c]
            for n in range(4 * width):
                _normalize(corners[n], gain, shift, epsilon)
            for n in range(width):
                for c in range(channels):
                    x[n, c] = gelu(x[n, c])
            np.dot(corners, second, y)
            for n in range(4 * width):
                for c in range(channels // 2):
                    y[n, c] = gelu(y[n, c] + second_bias[c])
            np.dot(by_pixel, hyper[k], pixels)
            for n in range(min(width, grid[0] * grid[1] - i * width)):
                row, column = divmod(i * width + n, grid[1])
                # Each token became 2 x 2 pixels, and each of those 2 x 2 again.
                for m in range(n_masks):
                    for c in range(16):
                        down, right = 2 * (c >> 3) + ((c >> 1) & 1), 2 * ((c >> 2) & 1) + (c & 1)
                        logits[k, m, 4 * row + down, 4 * column + right] = pixels[16 * n + c, m]


@numba.njit(**COMPILED)
def _normalize(x, gain, shift, epsilon):
    """LayerNorm of (C,) in place."""
    mean, square = _ZERO, _ZERO
    for c in range(len(x)):
        mean += x[c]
    mean /= np.float32(len(x))
    for c in range(len(x)):
        square += (x[c] - mean) * (x[c] - mean)
    scale = _ONE / np.sqrt(square / np.float32(len(x)) + epsilon)
    for c in range(len(x)):
        x[c] = (x[c] - mean) * scale * gain[c] + shift[c]
