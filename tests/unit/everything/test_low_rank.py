from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling import Sam, TwoWayTransformer
from torch import Tensor, nn

from tinysam.everything import amx
from tinysam.everything.low_rank import ALL_MASKS, MULTIMASK, LowRankDecoder, is_supported
from tinysam.everything.tile_operands import Bfloat16Operands, Float32Operands
from tinysam.everything.tiled_decoder import TILE, TiledDecoder

SHAPES = (
    {},
    {"heads": 4, "grid": (3, 7)},
    {"downsample": 1, "heads": 2},
    {"channels": 64, "grid": (2, 2)},
    {"heads": 16, "grid": (1, 1)},
)
BUILDERS = (LowRankDecoder, TiledDecoder)
needs_tiles = pytest.mark.skipif(not amx.is_available(), reason="this CPU cannot multiply tiles of bfloat16")
PROMPTS = ("point", "several points", "box", "box and points")


def prompt_tokens(sam: Sam, kind: str, n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    height, width = sam.prompt_encoder.input_image_size
    size = torch.tensor([width, height])
    points = torch.rand((n, 1 if kind == "point" else 3, 2), generator=generator) * size
    labels = torch.randint(0, 2, points.shape[:2], generator=generator)
    boxes = torch.rand((n, 2, 2), generator=generator).sort(1).values * size
    sparse, _ = sam.prompt_encoder(
        points=None if kind == "box" else (points, labels),
        boxes=boxes.flatten(1) if "box" in kind else None,
        masks=None,
    )
    return sparse


def embedding_for(sam: Sam) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((1, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size), generator=generator)


def in_double(sam: Sam) -> Sam:
    """``sam`` with a decoder in float64; its prompt encoder can only be float32."""
    sam = copy.deepcopy(sam)
    sam.mask_decoder.double()
    sam.prompt_encoder.no_mask_embed.double()
    return sam


def reference(sam: Sam, embedding: Tensor, sparse: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    masks, iou = sam.mask_decoder.predict_masks(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe().to(embedding.dtype),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=no_mask.expand(len(sparse), *embedding.shape[1:]),
    )
    return masks[:, chosen], iou[:, chosen]


def by_low_rank(
    decoder: LowRankDecoder, embedding: Tensor, sparse: Tensor, chosen: slice = MULTIMASK
) -> tuple[Tensor, Tensor]:
    image = decoder.share(embedding)
    decoded = decoder.decode(image, sparse, chosen)
    return decoder.upscale(image, decoded, torch.arange(len(sparse))), decoded.predicted_iou


def relative_error(masks: Tensor, exact: Tensor) -> float:
    return float((masks - exact).norm() / exact.norm())


@pytest.mark.parametrize("chosen", [MULTIMASK, slice(1), ALL_MASKS])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_sams_decoder_in_exact_arithmetic(
    build_decoder: Callable[..., Sam], shape: dict, prompt: str, chosen: slice
) -> None:
    sam = build_decoder(**shape)
    sparse, embedding = prompt_tokens(sam, prompt).double(), embedding_for(sam).double()
    exact = in_double(sam)
    masks, iou = reference(exact, embedding, sparse, chosen)
    our_masks, our_iou = by_low_rank(LowRankDecoder(exact), embedding, sparse, chosen)
    assert masks.std(0).mean() > 0.02 * masks.std(), "masks must depend on the prompt"
    torch.testing.assert_close(our_masks, masks, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(our_iou, iou, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chosen", [MULTIMASK, slice(1), ALL_MASKS])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("shape", [*SHAPES, {"grid": (TILE // 8, 9)}], ids=str)
def test_tiles_of_any_number_round_no_worse_than_sams_decoder(
    build_decoder: Callable[..., Sam], shape: dict, prompt: str, chosen: slice
) -> None:
    sam = build_decoder(**shape)
    sparse, embedding = prompt_tokens(sam, prompt), embedding_for(sam)
    exact, exact_iou = reference(in_double(sam), embedding.double(), sparse.double(), chosen)
    masks, iou = by_low_rank(TiledDecoder(sam), embedding, sparse, chosen)
    assert masks.dtype == iou.dtype == torch.float32
    assert relative_error(masks, exact) < 5e-6
    torch.testing.assert_close(iou.double(), exact_iou, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_rounds_no_worse_than_sams_decoder_in_float32(
    build_decoder: Callable[..., Sam], prompt: str, build: type[LowRankDecoder]
) -> None:
    sam = build_decoder(channels=128, grid=(16, 16))
    sparse, embedding = prompt_tokens(sam, prompt), embedding_for(sam)
    exact, _ = reference(in_double(sam), embedding.double(), sparse.double(), MULTIMASK)
    ours = relative_error(by_low_rank(build(sam), embedding, sparse)[0], exact)
    assert ours < 1e-5
    assert ours < 1.5 * relative_error(reference(sam, embedding, sparse, MULTIMASK)[0], exact)


def test_bfloat16_products_keep_two_digits(build_decoder: Callable[..., Sam]) -> None:
    sam = build_decoder(channels=64, grid=(8, 8))
    sparse, embedding = prompt_tokens(sam, "point"), embedding_for(sam)
    masks, iou = reference(sam, embedding, sparse, MULTIMASK)
    our_masks, our_iou = by_low_rank(LowRankDecoder(sam, torch.bfloat16), embedding, sparse)
    assert our_masks.dtype == our_iou.dtype == torch.float32
    assert 1e-4 < (our_masks - masks).norm() / masks.norm() < 3e-2
    torch.testing.assert_close(our_iou, iou, rtol=3e-2, atol=3e-2)


@needs_tiles
@pytest.mark.parametrize("chosen", [MULTIMASK, slice(1), ALL_MASKS])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("shape", [*SHAPES, {"channels": 64, "grid": (TILE // 8, 9)}], ids=str)
def test_tiles_in_bfloat16_keep_two_digits(
    build_decoder: Callable[..., Sam], shape: dict, prompt: str, chosen: slice
) -> None:
    sam = build_decoder(**{"channels": 64, **shape})
    sparse, embedding = prompt_tokens(sam, prompt), embedding_for(sam)
    decoder = TiledDecoder(sam, torch.bfloat16)
    assert isinstance(decoder.operands, Bfloat16Operands)
    masks, iou = by_low_rank(decoder, embedding, sparse, chosen)
    exact, exact_iou = reference(sam, embedding, sparse, chosen)
    assert masks.dtype == iou.dtype == torch.float32
    assert 1e-4 < relative_error(masks, exact) < 3e-2
    torch.testing.assert_close(iou, exact_iou, rtol=3e-2, atol=3e-2)


@needs_tiles
def test_bfloat16_is_not_taken_where_heads_leave_registers_half_full(build_decoder: Callable[..., Sam]) -> None:
    assert isinstance(TiledDecoder(build_decoder(channels=32), torch.bfloat16).operands, Float32Operands)


def test_cpus_without_tile_registers_multiply_in_float32(
    build_decoder: Callable[..., Sam], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "is_available", lambda: False)
    assert isinstance(TiledDecoder(build_decoder(channels=64), torch.bfloat16).operands, Float32Operands)


@pytest.mark.parametrize("build", BUILDERS)
def test_prompts_do_not_depend_on_those_beside_them(
    build_decoder: Callable[..., Sam], build: type[LowRankDecoder]
) -> None:
    sam = build_decoder()
    decoder, sparse, embedding = build(sam), prompt_tokens(sam, "point"), embedding_for(sam)
    together, _ = by_low_rank(decoder, embedding, sparse)
    alone = torch.cat([by_low_rank(decoder, embedding, one)[0] for one in sparse.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("chosen", [[3, 1], [2], []])
def test_chosen_prompts_are_upscaled_alone(
    build_decoder: Callable[..., Sam], build: type[LowRankDecoder], chosen: list[int]
) -> None:
    sam = build_decoder()
    decoder, some = build(sam), torch.tensor(chosen, dtype=torch.int64)
    image = decoder.share(embedding_for(sam))
    decoded = decoder.decode(image, prompt_tokens(sam, "box"))
    every = decoder.upscale(image, decoded, torch.arange(5))
    torch.testing.assert_close(decoder.upscale(image, decoded, some), every[some], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_tiles_are_the_same_on_any_number_of_threads(
    build_decoder: Callable[..., Sam], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = build_decoder(grid=(12, 12))
    decoder, sparse, embedding = TiledDecoder(sam), prompt_tokens(sam, "point"), embedding_for(sam)
    expected, _ = by_low_rank(decoder, embedding, sparse)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    masks, _ = by_low_rank(decoder, embedding, sparse)
    torch.testing.assert_close(masks, expected, rtol=0, atol=0)


def test_no_prompts_are_no_masks(build_decoder: Callable[..., Sam]) -> None:
    sam = build_decoder()
    masks, iou = by_low_rank(TiledDecoder(sam), embedding_for(sam), torch.zeros(0, 2, 32))
    assert masks.shape == (0, 3, 24, 20)
    assert iou.shape == (0, 3)


def test_other_decoders_are_refused(build_decoder: Callable[..., Sam]) -> None:
    sam = build_decoder()
    assert is_supported(sam.mask_decoder)
    sam.mask_decoder.transformer = TwoWayTransformer(depth=3, embedding_dim=32, num_heads=8, mlp_dim=64)
    assert not is_supported(sam.mask_decoder)
    assert not is_supported(nn.Identity())
    with pytest.raises(ValueError, match="two layers"):
        LowRankDecoder(sam)
