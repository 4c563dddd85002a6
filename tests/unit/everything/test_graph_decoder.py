from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from tinysam.everything import decoders, graph_decoder
from tinysam.everything.decoders import ImageDecoders, LowRankImageDecoder
from tinysam.everything.graph_decoder import PROMPTS, DecoderEngines, GraphDecoder
from tinysam.everything.low_rank import LowRankDecoder
from tinysam.runtime.engine import EngineName


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def sam(build_decoder: Callable[..., Sam]) -> Sam:
    return build_decoder()


@pytest.fixture(scope="module")
def embedding(sam: Sam) -> Tensor:
    shape = (1, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def prompts(sam: Sam, n: int, points: int = 1) -> Tensor:
    height, width = sam.prompt_encoder.input_image_size
    coords = torch.rand((n, points, 2), generator=torch.Generator().manual_seed(n)) * torch.tensor([width, height])
    return sam.prompt_encoder(points=(coords, torch.ones(n, points)), boxes=None, masks=None)[0]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("n", [1, PROMPTS, 2 * PROMPTS + 3])
def test_points_are_decoded_as_by_torch(sam: Sam, embedding: Tensor, graphs: Path, engine: EngineName, n: int) -> None:
    sparse = prompts(sam, n)
    expected = LowRankImageDecoder(LowRankDecoder(sam), embedding).decode(sparse, -torch.inf)
    decoder = LowRankImageDecoder(DecoderEngines(engine, graphs).open(sam, bf16=False), embedding)
    found = decoder.decode(sparse, -torch.inf)
    decoder.decode(sparse.flip(0), -torch.inf)  # what was found before stays
    torch.testing.assert_close(found.predicted_iou, expected.predicted_iou, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


def test_bfloat16_differs_by_little(sam: Sam, embedding: Tensor, graphs: Path) -> None:
    sparse = prompts(sam, 5)
    expected = LowRankImageDecoder(LowRankDecoder(sam), embedding).decode(sparse, -torch.inf).logits
    decoder = DecoderEngines("openvino", graphs).open(sam, bf16=True)
    found = LowRankImageDecoder(decoder, embedding).decode(sparse, -torch.inf).logits
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(("points", "multimask_output"), [(2, True), (1, False)])
def test_prompts_of_other_shapes_are_decoded_by_torch(
    sam: Sam, embedding: Tensor, graphs: Path, points: int, multimask_output: bool
) -> None:
    sparse = prompts(sam, 3, points)
    expected = LowRankImageDecoder(LowRankDecoder(sam), embedding).decode(sparse, -torch.inf, multimask_output)
    decoder = DecoderEngines("openvino", graphs).open(sam, bf16=False)
    found = LowRankImageDecoder(decoder, embedding).decode(sparse, -torch.inf, multimask_output)
    torch.testing.assert_close(found.logits, expected.logits)


def test_no_prompts_give_no_masks(sam: Sam, embedding: Tensor, graphs: Path) -> None:
    decoder = LowRankImageDecoder(DecoderEngines("openvino", graphs).open(sam, bf16=False), embedding)
    assert len(decoder.decode(prompts(sam, 3)[:0], 0.0).logits) == 0


def test_graphs_are_exported_once_and_again_for_other_weights(
    sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam, exported = copy.deepcopy(sam), []
    for name in ("export_decode", "export_upscale"):
        export = getattr(graph_decoder, name)
        monkeypatch.setattr(graph_decoder, name, lambda d, export=export: exported.append(1) or export(d))
    engines = DecoderEngines("onnxruntime", tmp_path)
    first = engines.open(sam, bf16=False)
    assert engines.open(sam, bf16=False)._decode_engine is first._decode_engine
    DecoderEngines("openvino", tmp_path).open(sam, bf16=False)
    assert len(exported) == 2
    sam.mask_decoder.iou_token.weight.mul_(2)
    assert engines.open(sam, bf16=False)._decode_engine is not first._decode_engine
    assert len(exported) == 4


def test_copies_and_pickles_open_their_own_engines(sam: Sam, graphs: Path) -> None:
    engines = DecoderEngines("openvino", graphs)
    opened = engines.open(sam, bf16=False)
    for other in (copy.deepcopy(engines), pickle.loads(pickle.dumps(engines))):
        assert other.open(sam, bf16=False)._decode_engine is not opened._decode_engine


@pytest.mark.parametrize(("n", "on_engine"), [(1024, True), (10, False)])
def test_engines_are_opened_for_many_prompts(
    sam: Sam, embedding: Tensor, graphs: Path, n: int, on_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "low_rank_pays", lambda *_: True)
    carrier = copy.deepcopy(sam)
    carrier.decoder_engines = DecoderEngines("openvino", graphs)
    decoder = ImageDecoders(carrier).of(embedding, prompts=n, tokens=2)
    assert isinstance(decoder, LowRankImageDecoder)
    assert isinstance(decoder.decoder, GraphDecoder) == on_engine


def test_damaged_weights_are_reported(sam: Sam, tmp_path: Path) -> None:
    damaged = copy.deepcopy(sam)
    damaged.mask_decoder.transformer.norm_final_attn.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="damaged"):
        DecoderEngines("openvino", tmp_path).open(damaged, bf16=False)
