from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tinysam.everything import amx, decoders
from tinysam.everything.decoders import ImageDecoders, LowRankImageDecoder, PlainDecoder, decoder_precision
from tinysam.everything.flops import DecoderShape, low_rank_cost, low_rank_pays, plain_cost
from tinysam.everything.low_rank import LowRankDecoder
from tinysam.everything.tiled_decoder import TiledDecoder

BuildSam = Callable[..., Sam]


def points(sam: Sam, n: int) -> Tensor:
    height, width = sam.prompt_encoder.input_image_size
    coords = torch.rand((n, 1, 2), generator=torch.Generator().manual_seed(3)) * torch.tensor([width, height])
    return sam.prompt_encoder(points=(coords, torch.ones(n, 1)), boxes=None, masks=None)[0]


def embedding_for(sam: Sam) -> Tensor:
    shape = (1, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("quantile", [None, 0.6, 1.0])
def test_both_decoders_keep_the_same_masks(build_decoder: BuildSam, quantile: float | None) -> None:
    sam = build_decoder()
    sparse, embedding = points(sam, 11), embedding_for(sam)
    plain = PlainDecoder(sam, embedding)
    low_rank = LowRankImageDecoder(LowRankDecoder(sam), embedding)
    everything = plain.decode(sparse, -torch.inf)
    assert everything.kept.all()
    min_iou = -torch.inf if quantile is None else float(everything.predicted_iou.quantile(quantile))
    a, b = (decoder.decode(sparse, min_iou + 1e-4) for decoder in (plain, low_rank))
    torch.testing.assert_close(a.kept, b.kept)
    torch.testing.assert_close(a.predicted_iou, b.predicted_iou, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    assert len(a.logits) == a.kept.sum()
    assert a.kept.any() == (quantile != 1.0)


@pytest.mark.parametrize("prompts", [1, 5])
def test_all_masks_are_those_of_sams_decoder(
    build_decoder: BuildSam, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "CPU_DECODED_TOGETHER", 2)
    sam = build_decoder()
    sparse, embedding = points(sam, prompts), embedding_for(sam)
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    dense = no_mask.expand(prompts, *embedding.shape[1:])
    logits, iou = sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)
    our_logits, our_iou = LowRankImageDecoder(LowRankDecoder(sam), embedding).decode_all(sparse)
    assert our_logits.shape[:2] == (prompts, 4)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_iou, iou, rtol=1e-5, atol=1e-5)


def test_only_prompts_that_keep_a_mask_are_upscaled(build_decoder: BuildSam, monkeypatch: pytest.MonkeyPatch) -> None:
    sam = build_decoder()
    sparse, embedding = points(sam, 9), embedding_for(sam)
    low_rank = LowRankImageDecoder(LowRankDecoder(sam), embedding)
    best = low_rank.decode(sparse, -torch.inf).predicted_iou.amax(1)
    upscaled = []
    upscale = LowRankDecoder.upscale
    monkeypatch.setattr(
        LowRankDecoder, "upscale", lambda self, *args: upscaled.append(len(args[-1])) or upscale(self, *args)
    )
    low_rank.decode(sparse, float(best.sort().values[5:7].mean()))
    assert sum(upscaled) == 3


@pytest.mark.parametrize(
    "damaged",
    ["layers.0.cross_attn_image_to_token.v_proj", "final_attn_token_to_image.k_proj", "norm_final_attn", "upscaling"],
)
@pytest.mark.parametrize("kind", ["plain", "low-rank", "tiled", "tiled in bfloat16"])
def test_damaged_weights_are_reported(build_decoder: BuildSam, kind: str, damaged: str) -> None:
    sam = build_decoder(channels=64)
    decoder = sam.mask_decoder
    module = decoder.output_upscaling[3] if damaged == "upscaling" else decoder.transformer.get_submodule(damaged)
    module.weight.view(-1)[0] = torch.nan
    embedding = embedding_for(sam)
    build = {
        "plain": lambda: PlainDecoder(sam, embedding),
        "low-rank": lambda: LowRankImageDecoder(LowRankDecoder(sam), embedding),
        "tiled": lambda: LowRankImageDecoder(TiledDecoder(sam), embedding),
        "tiled in bfloat16": lambda: LowRankImageDecoder(TiledDecoder(sam, torch.bfloat16), embedding),
    }
    with pytest.raises(FloatingPointError, match="damaged"):
        build[kind]().decode(points(sam, 2), -torch.inf)


def test_the_cheaper_decoder_is_chosen(build_decoder: BuildSam, monkeypatch: pytest.MonkeyPatch) -> None:
    sam = build_decoder()
    image_decoders = ImageDecoders(sam)
    for pays, kind in ((True, LowRankImageDecoder), (False, PlainDecoder)):
        monkeypatch.setattr(decoders, "low_rank_pays", lambda *_, pays=pays: pays)
        assert isinstance(image_decoders.of(embedding_for(sam), prompts=64, tokens=2), kind)


def test_a_decoder_that_is_not_sams_is_used_as_it_is(blob_sam: Sam) -> None:
    assert isinstance(ImageDecoders(blob_sam).of(torch.zeros(1, 32, 8, 8), prompts=10_000, tokens=2), PlainDecoder)


def test_low_rank_pays_for_many_prompts_of_few_tokens() -> None:
    shape = DecoderShape(image_tokens=4096, channels=256, attention_channels=128, heads=8, masks=3)
    assert low_rank_pays(shape, prompts=1024, tokens=7)
    assert not low_rank_pays(shape, prompts=1, tokens=7)
    assert not low_rank_pays(shape, prompts=1024, tokens=40)


@pytest.mark.parametrize("n_points", [1, 4])
def test_the_counted_costs_are_the_measured_ones(build_decoder: BuildSam, n_points: int) -> None:
    sam = build_decoder(channels=64, grid=(40, 40))
    embedding = embedding_for(sam)
    sparse = points(sam, 3)[:, :1].repeat(1, n_points + 1, 1)
    shape, tokens = DecoderShape.of(sam), 5 + n_points + 1

    def multiply_adds(function: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 2

    plain = PlainDecoder(sam, embedding)
    measured = multiply_adds(lambda: plain.decode(sparse, -torch.inf)) / len(sparse)
    assert plain_cost(shape, tokens) == pytest.approx(measured, rel=0.05)

    low_rank = LowRankDecoder(sam)
    image, prompt = low_rank_cost(shape, tokens)
    assert image == pytest.approx(multiply_adds(lambda: low_rank.share(embedding)), rel=0.01)
    images = LowRankImageDecoder(low_rank, embedding)
    assert prompt == pytest.approx(multiply_adds(lambda: images.decode(sparse, -torch.inf)) / len(sparse), rel=0.05)


def test_run_records_name_the_precision_that_the_cpu_has(
    build_decoder: BuildSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = build_decoder(channels=64)
    for available, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(amx, "is_available", lambda available=available: available)
        assert decoder_precision(sam, "bfloat16") == precision
        assert decoder_precision(sam, "float32") == "float32"
