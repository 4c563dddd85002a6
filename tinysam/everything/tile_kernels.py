"""What ``tiled_decoder`` does with the image tokens of one prompt, a tile of them at a time.

A tile's matrices stay in a core's cache from the first product to the last, where an engine that executes a graph
writes and reads each of them in memory. Products are ``tile_products``'s, of operands in float32 or bfloat16; what lies
between them is one loop each, in float32. Of H heads of d channels, T tokens of a prompt, R = H T, W image tokens of a
tile, C channels. Matrices have image tokens along their rows, so that a loop's neighbours are neighbours in memory.
``low_rank`` derives what is computed.
"""
# mypy: disallow_untyped_defs = false

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from tinysam.everything.tile_products import (
    FAST_MATH,
    NOT_COMPILED,
    add_by_head,
    as_left,
    as_matrix,
    as_right,
    close_operands,
    left_buffer,
    open_operands,
    pair,
    product,
    product_by_head,
    result,
    right_buffer,
    room_for,
    transposed,
)

COMPILED = {**FAST_MATH, "cache": True}
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
# erf(x / sqrt(2)) / 2 is x G(x^2) to 4e-4 up to this x: fitted likewise.
_ROUGH_END = np.float32(3.6)
_G0, _G1, _G2, _G3, _G4, _G5 = (
    np.float32(g) for g in (0.39716357, -0.0634482875, 0.00818874687, -0.000675001181, 3.12369120e-05, -6.10876725e-07)
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
def rough_gelu(x):
    """GELU of a float32, to 4e-4 times x or 1, which bfloat16 rounds to 4e-3 anyway."""
    z = -_ROUGH_END if x < -_ROUGH_END else x
    z = _ROUGH_END if z > _ROUGH_END else z
    t = z * z
    return x * (_HALF + z * (((((_G5 * t + _G4) * t + _G3) * t + _G2) * t + _G1) * t + _G0))


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
        if valid < width:
            logits[r, valid:] = -np.inf
        # A plain maximum is one long chain of comparisons, which compilers leave as it is for the sake of NaN.
        lanes[:] = peak[r]
        for n in range(0, width, LANES):
            for j in range(LANES):
                lanes[j] = max(lanes[j], logits[r, n + j])
        for j in range(8):
            lanes[j] = max(lanes[j], lanes[j + 8])
        for j in range(4):
            lanes[j] = max(lanes[j], lanes[j + 4])
        highest = max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3]))
        added = _ZERO
        for n in range(width):
            logits[r, n] = exp(logits[r, n] - highest)
            added += logits[r, n]
        decay[r] = exp(peak[r] - highest)
        peak[r] = highest
        total[r] = total[r] * decay[r] + added


@numba.njit(**COMPILED)
def add_mixed(columns, weights, decay, added, mixed):
    """Adds the left operand ``columns`` (K, W) by the right one ``weights`` (W, R) to ``mixed`` (K, R), times ``decay``
    (R,)."""
    product(columns, weights, added)
    for k in range(len(mixed)):
        for r in range(mixed.shape[1]):
            mixed[k, r] = mixed[k, r] * decay[r] + added[k, r]


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
def _divide(average, total):
    """Divides weighted sums (B, H, T, d) by the sums of their weights (B, H T), in place."""
    n_prompts, heads, n_queries, channels = average.shape
    for p in range(n_prompts):
        for h in range(heads):
            for t in range(n_queries):
                for c in range(channels):
                    average[p, h, t, c] /= total[p, h * n_queries + t]


@numba.njit(**COMPILED)
def read_shared(image, query, n_tokens, average):
    """Attention of B prompts to image tokens that are the same for all.

    Args:
        image: keys (tiles, H d, W), right operands, and values (tiles, ...) as ``add_by_head`` takes them.
        query: (B, ...) left operands by head, scaled.
        n_tokens: N, image tokens without padding.
        average: (B, H, T, d), the result.
    """
    keys, values = image
    n_prompts, heads, n_queries, channels = average.shape
    rank, width, by_head = heads * n_queries, keys.shape[2], (heads, n_queries)
    weights, added = result(query, rank, width), result(query, rank, heads * channels)
    left, decay = left_buffer(query, rank, width), np.empty(rank, np.float32)
    peak, total = np.full((n_prompts, rank), -np.inf, np.float32), np.zeros((n_prompts, rank), np.float32)
    average[:] = _ZERO
    open_operands(query)
    for i in range(len(keys)):
        for p in range(n_prompts):
            product_by_head(query[p], keys[i], by_head, weights)
            weigh(weights[:rank], min(width, n_tokens - i * width), peak[p], total[p], decay)
            add_by_head(as_left(weights[:rank], left), values[i], by_head, decay, added, average[p])
    close_operands(query)
    _divide(average, total)


@numba.njit(**COMPILED)
def write_and_read(image, prompts, n_tokens, channels, epsilon, columns, inverse, mixed, average):
    """Layer 0's update of the image tokens, and layer 1's attention of B prompts' tokens to them.

    Args:
        image: queries and cross of layer 0 (tiles, H d, W), right operands, and squares (tiles, W); of layer 1 keys
            with those of the positions behind them (tiles, H d, 2 W), right operands, and values (tiles, ...).
        prompts: left operands (B, ...): key and value of layer 0 by head, the gram matrix of the update's rows (R, R);
            the query of layer 1 by head, and its product with those rows (R, R).
        n_tokens: N, image tokens without padding.
        channels, epsilon: of LayerNorm.
        columns: (B, tiles, 2, ...), two right operands (R, W) each, of which the first becomes the weights A1.
        inverse: (B, tiles, W), becomes r1.
        mixed: (B, R, R), becomes A1 by the attention's weights times r1.
        average: (B, H, T, d), becomes the attention's weights times r1 by the values.
    """
    queries_0, cross_0, squares_0, keys_1, values_1 = image
    key, value, gram, query, absorbed = prompts
    n_prompts, heads, n_queries, head_channels = average.shape
    rank, width, by_head = heads * n_queries, queries_0.shape[2], (heads, n_queries)
    floats, products, weights = result(key, rank, width), result(key, rank, width), result(key, rank, width)
    placed, added = result(key, rank, 2 * width), result(key, rank, heads * head_channels)
    left, added_mixed = left_buffer(key, rank, width), result(key, rank, rank)
    left_weights, right_weights = left_buffer(key, rank, width), right_buffer(key, width, rank)
    square, decay = np.empty(width, np.float32), np.empty(rank, np.float32)
    peak, total = np.full((n_prompts, rank), -np.inf, np.float32), np.zeros((n_prompts, rank), np.float32)
    mixed[:] = _ZERO
    average[:] = _ZERO
    open_operands(key)
    for i in range(len(queries_0)):
        for p in range(n_prompts):
            first, r1 = columns[p, i, 0], inverse[p, i]
            a = room_for(first, floats)
            product_by_head(key[p], queries_0[i], by_head, a)
            softmax_over_tokens(a[:rank], heads)
            as_right(a[:rank], first)

            product(gram[p], first, products)
            product_by_head(value[p], cross_0[i], by_head, weights)
            square[:] = squares_0[i]
            for r in range(rank):
                for n in range(width):
                    square[n] += a[r, n] * (products[r, n] + weights[r, n])
            _inverse_deviation(square, channels, epsilon, r1)

            product(absorbed[p], first, weights)
            product_by_head(query[p], keys_1[i], by_head, placed)
            for r in range(rank):
                for n in range(width):
                    weights[r, n] = (weights[r, n] + placed[r, n]) * r1[n] + placed[r, width + n]
            weigh(weights[:rank], min(width, n_tokens - i * width), peak[p], total[p], decay)
            _scale(weights[:rank], r1)
            scaled = as_left(weights[:rank], left_weights)
            add_mixed(as_left(a[:rank], left), transposed(scaled, right_weights), decay, added_mixed, mixed[p])
            add_by_head(scaled, values_1[i], by_head, decay, added, average[p])
    close_operands(key)
    for p in range(n_prompts):
        mixed[p] /= total[p]
    _divide(average, total)


@numba.njit(**COMPILED)
def write_and_read_again(image, prompts, n_tokens, channels, epsilon, columns, inverse, previous, mixed, sums, average):
    """Layer 1's update of the image tokens, and the final attention of F of B prompts' tokens to them.

    Args:
        image: of layer 1 queries with those of the positions behind them (tiles, H d, 2 W), cross with layer 0's and
            with its own rows (tiles, H d, W), right operands, squares and offset (tiles, W), the constant's square; of
            the final attention keys with those of the positions (tiles, H d, 2 W), right operands, and values (tiles,
            ...).
        prompts: left operands (B, ...): key of layer 1 by head and its product with the rows of layer 0's update
            (R, R); values of both layers by head; the gram matrix of both updates' rows as G11, 2 G21 and G22 (R, R);
            the final query by head (H, F, d), and its product with those rows (H F, 2 R), of halves. Behind them twice
            the rows' product with the offset (B, 2, R) and the final query's with it (B, H F), float32.
        columns: (B, tiles, 2, ...), two right operands (R, W) each. The first is A1 and becomes r1 A1; the second
            becomes A2.
        inverse: (B, tiles, W), is r1 and becomes r2.
        previous: (B, tiles, W), becomes r1.
        mixed: (B, 2, R, H F), becomes the columns by the attention's weights times r2.
        sums: (B, H F), becomes the sum of the weights times r2.
        average: (B, H, F, d), becomes the attention's weights times r2 r1 by the values.
    """
    queries_1, cross_10, cross_11, squares_1, offset_1, constant, keys_2, values_2 = image
    key, absorbed, value_0, value_1, gram_11, gram_21, gram_22, query, final, rows_offset, final_offset = prompts
    n_prompts, heads, n_final, head_channels = average.shape
    rank, width = rows_offset.shape[2], cross_10.shape[2]
    by_head, final_by_head = (heads, rank // heads), (heads, n_final)
    n_weights = heads * n_final
    floats, more_floats = result(key, rank, width), result(key, rank, width)
    placed, final_placed = result(key, rank, 2 * width), result(key, n_weights, 2 * width)
    own, others, crossed = result(key, rank, width), result(key, rank, width), result(key, rank, width)
    weights = result(key, n_weights, width)
    added, added_mixed = result(key, n_weights, heads * head_channels), result(key, rank, n_weights)
    left, left_weights = left_buffer(key, rank, width), left_buffer(key, n_weights, width)
    right_weights = right_buffer(key, width, n_weights)
    square, decay = np.empty(width, np.float32), np.empty(n_weights, np.float32)
    peak, total = np.full((n_prompts, n_weights), -np.inf, np.float32), np.zeros((n_prompts, n_weights), np.float32)
    mixed[:] = _ZERO
    sums[:] = _ZERO
    average[:] = _ZERO
    open_operands(key)
    for i in range(len(cross_10)):
        for p in range(n_prompts):
            first, second, r1, r2 = columns[p, i, 0], columns[p, i, 1], previous[p, i], inverse[p, i]
            r1[:] = r2

            b = room_for(second, more_floats)
            product(absorbed[p], first, b)
            product_by_head(key[p], queries_1[i], by_head, placed)
            a = as_matrix(first, floats[:rank])
            for r in range(rank):
                for n in range(width):
                    b[r, n] = (b[r, n] + placed[r, n]) * r1[n] + placed[r, width + n]
                    a[r, n] *= r1[n]
            softmax_over_tokens(b[:rank], heads)
            as_right(a, first)
            as_right(b[:rank], second)

            for n in range(width):
                square[n] = r1[n] * (r1[n] * squares_1[i, n] + _TWO * offset_1[i, n]) + constant
            product(gram_11[p], first, own)
            product_by_head(value_0[p], cross_10[i], by_head, crossed)
            for r in range(rank):
                for n in range(width):
                    square[n] += a[r, n] * (own[r, n] + r1[n] * crossed[r, n] + rows_offset[p, 0, r])
            product(gram_21[p], first, others)
            product(gram_22[p], second, own)
            product_by_head(value_1[p], cross_11[i], by_head, crossed)
            for r in range(rank):
                for n in range(width):
                    moved = others[r, n] + r1[n] * crossed[r, n] + rows_offset[p, 1, r]
                    square[n] += b[r, n] * (own[r, n] + moved)
            _inverse_deviation(square, channels, epsilon, r2)

            product(final[p], columns[p, i].reshape(-1, width), weights)
            product_by_head(query[p], keys_2[i], final_by_head, final_placed)
            for r in range(n_weights):
                for n in range(width):
                    moved = weights[r, n] + r1[n] * final_placed[r, n] + final_offset[p, r]
                    weights[r, n] = moved * r2[n] + final_placed[r, width + n]
            weigh(weights[:n_weights], min(width, n_tokens - i * width), peak[p], total[p], decay)
            for r in range(n_weights):
                added_sum = _ZERO
                for n in range(width):
                    weights[r, n] *= r2[n]
                    added_sum += weights[r, n]
                sums[p, r] = sums[p, r] * decay[r] + added_sum
            by_columns = transposed(as_left(weights[:n_weights], left_weights), right_weights)
            add_mixed(as_left(a, left), by_columns, decay, added_mixed, mixed[p, 0])
            add_mixed(as_left(b[:rank], left), by_columns, decay, added_mixed, mixed[p, 1])
            _scale(weights[:n_weights], r1)
            add_by_head(
                as_left(weights[:n_weights], left_weights), values_2[i], final_by_head, decay, added, average[p]
            )
    close_operands(key)
    for p in range(n_prompts):
        mixed[p] /= total[p]
        sums[p] /= total[p]
    _divide(average, total)


@numba.njit(**COMPILED)
def upscale(image, weights, prompts, rows, hyper, columns, inverse, previous, grid, logits):
    """The logits of the masks of K prompts among B.

    Args:
        image: (tiles, C, W), S2 through the first transposed convolution.
        weights: what follows it: offset (C,) and bias (C,) before LayerNorm, its weight and bias (C / 4,) and epsilon,
            the second convolution for each of its 4 pixels (4, C / 8, C / 4), left operands, and its bias (C / 8,).
        prompts: (K,) positions among the B.
        rows: (K, 4, C / 4, 2 R), left operands of halves: both updates' rows through the first convolution, for each of
            its 4 pixels.
        hyper: (K, M, C / 8), left operands: what each mask multiplies pixels by.
        columns, inverse, previous: as ``write_and_read_again`` leaves them, of all B.
        grid: (h, w) of the image tokens.
        logits: (K, M, 4 h, 4 w), the result.
    """
    offset, bias, gain, shift, epsilon, second, second_bias = weights
    n_tiles, channels, width = image.shape
    quarter, eighth, n_masks = channels // 4, channels // 8, logits.shape[1]
    x, y, pixels = result(rows, quarter, width), result(rows, eighth, width), result(rows, n_masks, width)
    right_x, right_y = right_buffer(rows, quarter, width), right_buffer(rows, eighth, width)
    mean, scale = np.empty(width, np.float32), np.empty(width, np.float32)
    open_operands(rows)
    for i in range(n_tiles):
        valid = min(width, grid[0] * grid[1] - i * width)
        for k, p in enumerate(prompts):
            r1, r2 = previous[p, i], inverse[p, i]
            both = columns[p, i].reshape(-1, width)
            for corner in range(4):
                product(rows[k, corner], both, x)
                first = corner * quarter
                mean[:] = _ZERO
                for c in range(quarter):
                    for n in range(width):
                        moved = x[c, n] + r1[n] * image[i, first + c, n] + offset[first + c]
                        x[c, n] = moved * r2[n] + bias[first + c]
                        mean[n] += x[c, n]
                _normalize(x[:quarter], mean, gain, epsilon, scale)
                after = activated(x[:quarter], shift, right_x)
                for pixel in range(4):
                    product(second[pixel], after, y)
                    product(hyper[k], activated(y[:eighth], second_bias, right_y), pixels)
                    # Each token became 2 x 2 pixels, and each of those 2 x 2 again.
                    down, right = 2 * (corner >> 1) + (pixel >> 1), 2 * (corner & 1) + (pixel & 1)
                    for m in range(n_masks):
                        _spread(pixels[m, :valid], i * width, grid[1], logits[k, m, down::4, right::4])
    close_operands(rows)


@numba.njit(**COMPILED)
def _normalize(x, total, gain, epsilon, scale):
    """LayerNorm without its bias over the channels of (C, W), in place.

    Args:
        total: (W,) sums over the channels; becomes the means.
        scale: (W,), for what is in between.
    """
    channels, width = x.shape
    scale[:] = _ZERO
    for n in range(width):
        total[n] /= np.float32(channels)
    for c in range(channels):
        for n in range(width):
            x[c, n] -= total[n]
            scale[n] += x[c, n] * x[c, n]
    for n in range(width):
        scale[n] = _ONE / np.sqrt(scale[n] / np.float32(channels) + epsilon)
    for c in range(channels):
        for n in range(width):
            x[c, n] *= scale[n] * gain[c]


@numba.njit(**COMPILED)
def _spread(values, start, grid_width, image):
    """Writes the values of consecutive image tokens, from ``start`` on, to their places in ``image`` (h, w)."""
    done = 0
    while done < len(values):
        row, column = divmod(start + done, grid_width)
        count = min(grid_width - column, len(values) - done)
        for n in range(count):
            image[row, column + n] = values[done + n]
        done += count


def activated(matrix, bias, operand):
    """The right operand of GELU(matrix + bias), which is written to ``operand`` unless it is the matrix itself.

    Args:
        matrix: (C, W).
        bias: (C,).
    """
    raise TypeError(NOT_COMPILED)


@overload(activated, jit_options=FAST_MATH)
def _activated(matrix, bias, operand):
    def in_float32(matrix, bias, operand):
        for c in range(len(matrix)):
            for n in range(matrix.shape[1]):
                matrix[c, n] = gelu(matrix[c, n] + bias[c])
        return matrix

    def in_bfloat16(matrix, bias, operand):
        for c in range(0, len(matrix), 2):
            for n in range(matrix.shape[1]):
                first, second = rough_gelu(matrix[c, n] + bias[c]), rough_gelu(matrix[c + 1, n] + bias[c + 1])
                operand[c // 2, n] = pair(first, second)
        return operand

    return in_bfloat16 if operand.dtype == types.uint32 else in_float32
