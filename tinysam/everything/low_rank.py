"""SAM's mask decoder for many prompts of one image: the same masks for a quarter of the arithmetic.

SAM's decoder keeps a copy of the image's N tokens of C channels for every prompt (4096 x 256 at 1024 pixels), updates
it twice and projects it ten times. But all copies start equal, and what a prompt adds to its own has low rank.

Notation: ``*`` multiplies the rows of an N x C matrix by a vector of N numbers, ``1`` is the vector of N ones. A prompt
has T tokens (5 output tokens, and 2 for a point or a box) and the attention H heads of d channels; R = H T, 56 for a
point. Everything that carries no prompt of its own is *shared*, that is, computed once an image.

**Layer 0.** The image tokens are ``K0``, shared. The tokens' attention to the image needs its keys and values: shared
projections. The image's attention to the tokens then adds ``A1' M1 + 1 b_o`` to it, where ``A1`` (R x N) holds the
attention weights, one row per head and token, and ``M1`` (R x C) the tokens' values, each through its own head's part
of the output projection. LayerNorm, with gain g and bias b, subtracts each row's mean, which is the same as centring
the rows of ``K0 + 1 b_o`` and of ``M1`` once (a centred matrix is marked with ^), and divides by the deviation::

    K1 = r1 * (S1 + A1' F1) + 1 b        S1 = (K0 + 1 b_o)^ diag(g), shared      F1 = M1^ diag(g)

``1 / r1^2`` is the mean square of each row of ``X = (K0 + 1 b_o)^ + A1' M1^``, which expands into R-wide products::

    |X|^2 = |(K0 + 1 b_o)^|^2 + sum over R of A1 (2 M1^ (K0 + 1 b_o)^' + M1^ M1^' A1)

and since ``M1`` is the tokens' values times fixed weights, its product with ``K0`` is those values times a shared
d x N matrix.

**Layer 1** projects ``K1`` three times. With q a token's query in one head and W that head's rows of a projection::

    q W K1' = r1 * (q (W S1') + (q W F1') A1) + q W b

a shared product and an R-wide one; likewise, ``P K1 W'`` for attention weights P. Positional encodings are shared, and
terms that are constant over what a softmax runs over drop out. The second update and LayerNorm give, in the same way::

    K2 = r2 * (r1 * S2 + A2' F2 + 1 c) + 1 b        S2 = S1^ diag(g), shared      c = (b + b_o)^ diag(g), shared

where the rank is 2R: ``A2`` stacks ``r1 * A1`` on the new attention weights. **The final attention** projects ``K2``,
for the tokens of the predicted IoU and of the masks asked for.
**Upscaling** starts with a transposed convolution of stride 2 and size 2, a product per token, so it splits too; only
what follows is done token by token, and only for prompts that have a mask of sufficient predicted IoU.

No N x C matrix of a prompt is ever formed before upscaling. ``tinysam.everything.flops`` counts when that pays.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from tinysam.everything.algebra import (
    absorbed,
    as_linear,
    average_shared,
    by_shared,
    centred,
    input_by_head,
    inverse_deviation,
    join_heads,
    output_by_head,
    scaled,
    self_attention,
    split_heads,
)
from tinysam.everything.factored import DecodedTokens, SharedImage, Update

MULTIMASK, ALL_MASKS = slice(1, None), slice(None)
"""Which of the decoder's masks: those of SAM's ``multimask_output=True``; the single mask and these."""


def is_supported(decoder: nn.Module) -> bool:
    """Whether ``decoder`` is SAM's, with its transformer of two layers."""
    return isinstance(decoder, MaskDecoder) and len(decoder.transformer.layers) == 2


class LowRankDecoder:
    """The decoder of a ``Sam`` for points and boxes. Rearranges its weights: build it anew when they change or move.

    Args:
        sam: its mask decoder must be supported, see ``is_supported``.
        dtype: of the products with N tokens; statistics of LayerNorm and all that is done on the prompts' tokens keep
            the model's type. Defaults to the model's type.
    """

    @torch.no_grad()
    def __init__(self, sam: Sam, dtype: torch.dtype | None = None) -> None:
        decoder = sam.mask_decoder
        if not is_supported(decoder):
            raise ValueError("the low-rank decoder needs segment-anything's MaskDecoder with two layers")
        self.decoder = decoder
        self.dtype = dtype or decoder.iou_token.weight.dtype
        self.no_mask = sam.prompt_encoder.no_mask_embed.weight
        self.grid = tuple(sam.prompt_encoder.image_embedding_size)
        first, second = decoder.transformer.layers
        self.to_image = [
            first.cross_attn_token_to_image,
            second.cross_attn_token_to_image,
            decoder.transformer.final_attn_token_to_image,
        ]
        self.to_tokens = [first.cross_attn_image_to_token, second.cross_attn_image_to_token]
        self.norms = [first.norm4, second.norm4]

        # What an update adds to the image tokens is the tokens' values times these (H, d, C), centred along C.
        outputs = [centred(output_by_head(attention.out_proj, attention.num_heads)) for attention in self.to_tokens]
        self.rows_0 = outputs[0]
        self.rows_10, self.rows_11 = centred(self.rows_0 * first.norm4.weight), outputs[1]
        self.offset = centred(first.norm4.bias + self.to_tokens[1].out_proj.bias)
        self.offset_2 = self.offset * second.norm4.weight

        self.position = sam.prompt_encoder.get_dense_pe()[0].flatten(1).t().to(self.no_mask.dtype)  # (N, C)
        self.position_keys = {
            i: self._keys(self.position, self.to_image[i].k_proj.weight, self.to_image[i].num_heads) for i in (1, 2)
        }
        # The image's queries in layer 1 add the bias of the LayerNorm before them and their own to every token.
        attention = self.to_tokens[1]
        self.position_queries = self._keys(
            self.position + first.norm4.bias, attention.q_proj.weight, attention.num_heads, attention.q_proj.bias
        )
        self.up_weight, self.up_bias = as_linear(decoder.output_upscaling[0])
        self.up_weight_2, self.up_bias_2 = as_linear(decoder.output_upscaling[3])

    @torch.no_grad()
    def share(self, embedding: Tensor) -> SharedImage:
        """The work done once an image, for its embedding (1, C, h, w)."""
        tokens = embedding[0].flatten(1).t() + self.no_mask
        placed = tokens + self.position
        read, write = self.to_image, self.to_tokens
        heads = write[0].num_heads
        s0 = centred(tokens + write[0].out_proj.bias)
        s1 = s0 * self.norms[0].weight
        s1_centred = centred(s1)
        s2 = s1_centred * self.norms[1].weight
        return SharedImage(
            keys_0=self._keys(placed, read[0].k_proj.weight, read[0].num_heads, read[0].k_proj.bias),
            values_0=self._values(tokens, read[0], read[0].v_proj.bias),
            queries_0=self._keys(placed, write[0].q_proj.weight, heads, write[0].q_proj.bias),
            squares_0=s0.square().sum(1),
            cross_0=self._keys(2 * s0, self.rows_0.flatten(0, 1), heads),
            keys_1=self._keys(s1, read[1].k_proj.weight, read[1].num_heads),
            values_1=self._values(s1, read[1]),
            queries_1=self._keys(s1, write[1].q_proj.weight, write[1].num_heads),
            squares_1=s1_centred.square().sum(1),
            offset_1=s1_centred @ self.offset,
            cross_10=self._keys(2 * s1_centred, self.rows_10.flatten(0, 1), heads),
            cross_11=self._keys(2 * s1_centred, self.rows_11.flatten(0, 1), write[1].num_heads),
            keys_2=self._keys(s2, read[2].k_proj.weight, read[2].num_heads),
            values_2=self._values(s2, read[2]),
            upscaled=(s2 @ self.up_weight).to(self.dtype),
        )

    @torch.no_grad()
    def decode(self, image: SharedImage, sparse: Tensor, masks: slice = MULTIMASK) -> DecodedTokens:
        """Decodes B prompts as far as their predicted IoU.

        Args:
            sparse: (B, T - 5, C), the prompt encoder's tokens.
            masks: which of the decoder's four to make, the single mask and three ambiguous ones.
        """
        decoder, transformer = self.decoder, self.decoder.transformer
        first, second = transformer.layers
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)

        queries = self_attention(first, tokens, tokens)
        average = self._read_shared(image, self._query(0, queries + tokens))
        queries = first.norm2(queries + self._out(0, average))
        queries = first.norm3(queries + first.mlp(queries))
        key, value_0 = self._key(0, queries + tokens), self._value(0, queries)

        queries = self_attention(second, queries, tokens)
        average, update = self._write_and_read(image, key, value_0, self._query(1, queries + tokens))
        queries = second.norm2(queries + self._out(1, average, bias=first.norm4.bias))
        queries = second.norm3(queries + second.mlp(queries))
        key, value_1 = self._key(1, queries + tokens), self._value(1, queries)

        # Tokens of the prompt and of masks not asked for end here: nothing reads what they would learn.
        chosen = range(decoder.num_mask_tokens)[masks]
        read = [0, *(1 + i for i in chosen)]
        queries = queries[:, read]
        query = self._query(2, queries + tokens[:, read])
        average, update = self._write_and_read_again(image, key, (value_0, value_1), query, update)
        queries = queries + self._out(2, average, bias=second.norm4.bias)
        iou_query, *mask_queries = transformer.norm_final_attn(queries).unbind(1)

        networks = [decoder.output_hypernetworks_mlps[i] for i in chosen]
        hyper = torch.stack([mlp(query) for mlp, query in zip(networks, mask_queries, strict=True)], dim=1)
        predicted_iou = decoder.iou_prediction_head(iou_query)[:, masks]
        return DecodedTokens(predicted_iou, hyper, update)

    @torch.no_grad()
    def upscale(self, image: SharedImage, decoded: DecodedTokens, prompts: Tensor) -> Tensor:
        """The (K, masks, 4 h, 4 w) low-resolution logits of the prompts at those positions (K,)."""
        decoded = decoded.select(prompts)
        upscaling, update = self.decoder.output_upscaling, decoded.image
        assert update.previous is not None, "decode() always ends with the second update"
        assert update.offset is not None, "decode() always ends with the second update"
        height, width = self.grid
        n_prompts, n_masks = decoded.hyper.shape[:2]
        rows = (update.rows @ self.up_weight).to(self.dtype)
        inverse, previous = (x.transpose(1, 2).to(self.dtype) for x in (update.inverse, update.previous))
        x = torch.bmm(update.columns.transpose(1, 2), rows)  # (B, N, 2 * 2 * C / 4)
        x += previous * image.upscaled
        x += (update.offset @ self.up_weight).to(self.dtype)
        x *= inverse
        x += (self.norms[1].bias @ self.up_weight + self.up_bias).to(self.dtype)
        norm = upscaling[1]
        x = x.view(n_prompts * 4 * height * width, len(norm.weight))
        x = F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        x = torch.addmm(self.up_bias_2.to(x.dtype), upscaling[2](x), self.up_weight_2.to(x.dtype))
        x = upscaling[4](x).view(n_prompts, 16 * height * width, decoded.hyper.shape[2])
        logits = torch.bmm(decoded.hyper.to(x.dtype), x.transpose(1, 2)).to(decoded.hyper.dtype)
        # Each token became 2 x 2 pixels, and each of those 2 x 2 again.
        logits = logits.view(n_prompts, n_masks, height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return logits.reshape(n_prompts, n_masks, 4 * height, 4 * width)

    def _keys(self, tokens: Tensor, weight: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
        """Image tokens (N, C) projected by ``weight`` (H d, C), as (H, d, N)."""
        return F.linear(tokens, weight, bias).t().reshape(heads, -1, len(tokens)).to(self.dtype)

    def _values(self, tokens: Tensor, attention: Attention, bias: Tensor | None = None) -> Tensor:
        """Image tokens (N, C) as an attention's values, (H, N, d)."""
        values = F.linear(tokens, attention.v_proj.weight, bias)
        return values.view(len(tokens), attention.num_heads, -1).transpose(0, 1).contiguous().to(self.dtype)

    def _query(self, i: int, tokens: Tensor) -> Tensor:
        """The scaled query (B, H, T, d) of attention ``i`` from tokens to image."""
        attention = self.to_image[i]
        return scaled(split_heads(attention.q_proj(tokens), attention.num_heads))

    def _key(self, i: int, tokens: Tensor) -> Tensor:
        """The key (B, H, T, d) of attention ``i`` from image to tokens, scaled in place of the image's query."""
        attention = self.to_tokens[i]
        return scaled(split_heads(attention.k_proj(tokens), attention.num_heads))

    def _value(self, i: int, tokens: Tensor) -> Tensor:
        """The value (B, H, T, d) of attention ``i`` from image to tokens."""
        attention = self.to_tokens[i]
        return split_heads(attention.v_proj(tokens), attention.num_heads)

    def _out(self, i: int, average: Tensor, bias: Tensor | None = None) -> Tensor:
        """What attention ``i`` from tokens to image tells the tokens.

        Args:
            average: (B, H, T, d) of the values.
            bias: (C,) what every image token has added, which ``average`` leaves out, as it does the values' bias.
        """
        attention = self.to_image[i]
        average = join_heads(average)
        if bias is not None:
            average = average + (attention.v_proj.bias + attention.v_proj.weight @ bias)
        return attention.out_proj(average)

    def _read_shared(self, image: SharedImage, query: Tensor) -> Tensor:
        """Layer 0's attention from tokens to image, whose tokens are the same for all prompts: (B, H, T, d)."""
        weights = by_shared(query.to(self.dtype), image.keys_0).softmax(-1)
        return average_shared(weights, image.values_0).to(query.dtype)

    def _write_and_read(self, image: SharedImage, key: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Update]:
        """Layer 0's update of the image, by ``key`` and ``value``, and layer 1's attention to it, (B, H, T, d)."""
        weights = by_shared(key.to(self.dtype), image.queries_0).softmax(2).flatten(1, 2)
        cross = by_shared(value.to(self.dtype), image.cross_0).flatten(1, 2)
        centred_rows = by_shared(value, self.rows_0).flatten(1, 2)
        square = image.squares_0 + self._weighted(weights, centred_rows, cross)
        inverse = inverse_deviation(square, self.norms[0])
        update = Update(inverse, None, weights, centred_rows * self.norms[0].weight, None)
        return self._read(1, query, image.keys_1, image.values_1, update), update

    def _write_and_read_again(
        self, image: SharedImage, key: Tensor, values: tuple[Tensor, Tensor], query: Tensor, update: Update
    ) -> tuple[Tensor, Update]:
        """Layer 1's update of the image, by ``key``, and the final attention to it; ``values`` are of both layers."""
        taken_back = absorbed(key, self.to_tokens[1].q_proj)
        logits = self._logits(key, taken_back, image.queries_1, self.position_queries, update)
        weights = logits.unflatten(1, key.shape[1:3]).softmax(2).flatten(1, 2)
        update = self._second_update(image, values, weights, update)
        return self._read(2, query, image.keys_2, image.values_2, update), update

    def _read(self, i: int, query: Tensor, shared_keys: Tensor, shared_values: Tensor, update: Update) -> Tensor:
        """Attention ``i`` from tokens to an updated image, without the biases that ``_out`` adds."""
        taken_back = absorbed(query, self.to_image[i].k_proj)
        logits = self._logits(query, taken_back, shared_keys, self.position_keys[i], update)
        weights = logits.softmax(-1) * update.inverse.to(self.dtype)
        mixed = torch.bmm(weights, update.columns.transpose(1, 2)).to(query.dtype) @ update.rows
        if update.offset is not None:
            mixed += weights.sum(-1, keepdim=True, dtype=query.dtype) * update.offset
        if update.previous is not None:
            weights *= update.previous.to(self.dtype)
        by_head = query.shape[1:3]
        output = self._values_of(i, mixed.unflatten(1, by_head))
        return output + average_shared(weights.unflatten(1, by_head), shared_values).to(query.dtype)

    def _values_of(self, i: int, tokens: Tensor) -> Tensor:
        """The values (B, H, T, d) in attention ``i`` of tokens that differ by head, (B, H, T, C)."""
        return by_shared(tokens, input_by_head(self.to_image[i].v_proj, tokens.shape[1]).mT)

    def _logits(self, query: Tensor, taken_back: Tensor, shared: Tensor, position: Tensor, update: Update) -> Tensor:
        """Products of ``query`` (B, H, T, d) with updated and projected image tokens, (B, R, N).

        Args:
            taken_back: (B, R, C), the query ``absorbed`` by that projection.
        """
        query = query.to(self.dtype)
        by_head = query.shape[1:3]
        logits = torch.bmm((taken_back @ update.rows.transpose(1, 2)).to(self.dtype), update.columns)
        if update.offset is not None:
            logits += (taken_back @ update.offset)[..., None].to(self.dtype)
        product = by_shared(query, shared)
        if update.previous is not None:
            product = product * update.previous[:, None].to(self.dtype)
        logits.unflatten(1, by_head).add_(product)
        logits *= update.inverse.to(self.dtype)
        logits.unflatten(1, by_head).add_(by_shared(query, position))
        return logits

    def _second_update(
        self, image: SharedImage, values: tuple[Tensor, Tensor], weights: Tensor, update: Update
    ) -> Update:
        value_0, value_1 = values
        previous = update.inverse
        rows = self._centred_rows(values)
        columns = torch.cat([update.columns * previous.to(self.dtype), weights], dim=1)
        cross = torch.cat(
            [
                by_shared(value_0.to(self.dtype), image.cross_10),
                by_shared(value_1.to(self.dtype), image.cross_11),
            ],
            dim=1,
        ).flatten(1, 2)
        cross = cross * previous.to(self.dtype)
        cross += 2 * (rows @ self.offset)[..., None].to(self.dtype)
        scale = previous[:, 0]
        square = scale.square() * image.squares_1 + 2 * scale * image.offset_1 + self.offset.square().sum()
        inverse = inverse_deviation(square + self._weighted(columns, rows, cross), self.norms[1])
        return Update(inverse, previous, columns, rows * self.norms[1].weight, self.offset_2)

    def _centred_rows(self, values: tuple[Tensor, Tensor]) -> Tensor:
        """What both updates' columns are multiplied by, (B, 2 R, C), before the second LayerNorm's gain."""
        by_layer = [by_shared(value, rows) for value, rows in zip(values, (self.rows_10, self.rows_11), strict=True)]
        return torch.cat(by_layer, dim=1).flatten(1, 2)

    def _weighted(self, columns: Tensor, rows: Tensor, cross: Tensor) -> Tensor:
        """Sum over R of columns * (cross + rows rows' columns), (B, N): what an update adds to the tokens' squares."""
        gram = (rows @ rows.transpose(1, 2)).to(self.dtype)
        return (columns * torch.baddbmm(cross, gram, columns)).sum(1, dtype=rows.dtype)
