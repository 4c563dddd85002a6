from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator
from tinysam.runtime import EngineError, choice
from tinysam.runtime.choice import EngineChoice, engine_name, with_engine


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@torch.no_grad()
def test_engines_embed_as_torch_does(tiny_sam: Sam, images: torch.Tensor, graphs: Path, engine: EngineChoice) -> None:
    expected = tiny_sam.image_encoder(images)
    found = with_engine(tiny_sam, engine, graphs=graphs)
    assert engine_name(found) == f"{engine} fp32"
    assert (found.image_encoder(images) - expected).norm() / expected.norm() < 1e-4


def test_auto_takes_openvino_for_a_tiny_vit_on_a_cpu(tiny_sam: Sam, graphs: Path) -> None:
    found = with_engine(tiny_sam, graphs=graphs)
    assert engine_name(found) == "openvino fp32"
    assert engine_name(tiny_sam) == "torch"


def test_auto_takes_torch_where_openvino_fails(
    tiny_sam: Sam, graphs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("this processor is too old")

    monkeypatch.setattr(choice, "EngineImageEncoder", _Refusing(refuse))
    assert with_engine(tiny_sam, graphs=graphs) is tiny_sam
    assert "this processor is too old" in caplog.text
    with pytest.raises(EngineError, match="too old"):
        with_engine(tiny_sam, "openvino", graphs=graphs)


class _Refusing(type):
    """Stands in for a class, so that isinstance() works on it."""

    def __new__(cls, refuse: object) -> type:
        return super().__new__(cls, "EngineImageEncoder", (), {"__init__": refuse})

    def __init__(cls, refuse: object) -> None:
        super().__init__("EngineImageEncoder", (), {})


def test_an_engine_is_not_put_on_top_of_another(tiny_sam: Sam, graphs: Path) -> None:
    found = with_engine(tiny_sam, "onnxruntime", graphs=graphs)
    assert with_engine(found, "openvino", graphs=graphs) is found


def test_a_graph_is_exported_once_and_again_for_other_weights(
    tiny_sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    export = choice.export_graph
    monkeypatch.setattr(choice, "export_graph", lambda *args: exported.append(1) or export(*args))
    with_engine(tiny_sam, "onnxruntime", graphs=tmp_path)
    with_engine(tiny_sam, "openvino", graphs=tmp_path)
    assert len(exported) == 1
    weight = next(tiny_sam.image_encoder.parameters())
    weight.data.mul_(2)
    try:
        with_engine(tiny_sam, "openvino", graphs=tmp_path)
    finally:
        weight.data.div_(2)
    assert len(exported) == 2
    assert len(list(tmp_path.glob("*.onnx"))) == 2


def test_everything_mode_finds_the_same_masks_on_an_engine(tiny_sam: Sam, graphs: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    options = {"points_per_side": 4, "pred_iou_thresh": -10.0, "stability_score_thresh": 0.0}
    expected = SamAutomaticMaskGenerator(tiny_sam, **options).generate(image)
    found = SamAutomaticMaskGenerator(with_engine(tiny_sam, graphs=graphs), **options).generate(image)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        union = (one["segmentation"] | other["segmentation"]).sum()
        assert (one["segmentation"] & other["segmentation"]).sum() >= 0.99 * union


@pytest.mark.parametrize("generator", [SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (17, 31), (64, 64)])
def test_tiny_elongated_and_constant_images_are_segmented_on_an_engine(
    tiny_sam: Sam, graphs: Path, generator: type[SamAutomaticMaskGenerator], size: tuple[int, int]
) -> None:
    options = {"points_per_side": 10, "pred_iou_thresh": -10.0, "stability_score_thresh": 0.0}  # enough for engines
    image = np.full((*size, 3), 128, np.uint8)
    found = generator(with_engine(tiny_sam, graphs=graphs), **options).generate(image)
    assert len(found) == len(generator(tiny_sam, **options).generate(image)) > 0
    assert all(record["segmentation"].shape == size for record in found)
    nothing = generator(with_engine(tiny_sam, graphs=graphs), **options | {"pred_iou_thresh": 100.0})
    assert nothing.generate(image) == []


def test_damaged_weights_are_reported(tiny_sam: Sam, graphs: Path) -> None:
    damaged = copy.deepcopy(tiny_sam)
    next(damaged.image_encoder.parameters()).data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="damaged"):
        with_engine(damaged, graphs=graphs)


def test_an_encoder_that_is_an_engine_stays(tiny_sam: Sam, graphs: Path) -> None:
    found = with_engine(tiny_sam, "openvino", graphs=graphs)
    assert with_engine(found, "openvino", graphs=graphs) is found
    assert with_engine(found, graphs=graphs) is found
