import json
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

import tinysam
from tests.integer_cpus import needs_vnni
from tinysam import CheckpointError, SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from tinysam.modeling.checkpoint import checkpoint_bytes, with_image_size
from tinysam.quant import QuantizationConfig, QuantizedEncoder, load_quantized, quantize_encoder, save_quantized
from tinysam.quant.folder import CALIBRATION_FILE, CONFIG_FILE, DECODER_FILE, ENCODER_FILE, stored_weights
from tinysam.runtime import EngineConfig, EngineImageEncoder

ONE_THREAD = EngineConfig(num_threads=1)


@pytest.fixture(scope="module")
def saved(tiny_sam: Sam, quantized: QuantizedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "int8 model"
    save_quantized(
        str(folder), tiny_sam, quantized, QuantizationConfig(), calibration_images=["a.jpg"], source={"model": "tiny"}
    )
    return folder


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Sam:
    return load_quantized(str(saved), ONE_THREAD)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, **values: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_loaded_model_has_the_same_decoder_with_matrices_in_half_precision(tiny_sam: Sam, loaded: Sam) -> None:
    assert isinstance(loaded, Sam)
    assert not loaded.training
    assert loaded.config == tiny_sam.config
    assert loaded.image_encoder.img_size == 128
    for part in ("prompt_encoder", "mask_decoder"):
        expected, actual = getattr(tiny_sam, part).state_dict(), getattr(loaded, part).state_dict()
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            is_matrix = value.ndim > 1 and "gaussian" not in key
            assert actual[key].dtype == torch.float32
            assert torch.equal(actual[key], value.half().float() if is_matrix else value), key
    assert torch.equal(loaded.pixel_mean, tiny_sam.pixel_mean)


def test_a_matrix_beyond_half_precision_is_kept_whole(tiny_sam: Sam) -> None:
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 1e5)
    stored = stored_weights(layer)
    assert torch.equal(stored["weight"], layer.weight)
    assert stored["bias"].dtype == torch.float32


def test_the_predictor_gives_nearly_the_same_masks(tiny_sam: Sam, loaded: Sam, images: list[np.ndarray]) -> None:
    logits = []
    for sam in (tiny_sam, loaded):
        predictor = SamPredictor(sam)
        predictor.set_image(images[3])
        point = np.array([[60, 40]])
        logits.append(predictor.predict(point, np.array([1]), multimask_output=True)[2])
    error = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
    assert 0 < error < 0.1


def test_the_mask_generator_runs_it(loaded: Sam, images: list[np.ndarray]) -> None:
    generator = SamAutomaticMaskGenerator(
        loaded, points_per_side=2, pred_iou_thresh=-1e9, stability_score_thresh=0.0, box_nms_thresh=1.0
    )
    records = generator.generate(images[3])
    assert records
    assert all(record["segmentation"].shape == images[3].shape[:2] for record in records)


def test_tinysam_load_takes_the_folder(saved: Path) -> None:
    sam = tinysam.load(str(saved))
    assert isinstance(sam.image_encoder, EngineImageEncoder)


@needs_vnni
def test_every_convolution_and_linear_layer_runs_on_integers(loaded: Sam, quantized: QuantizedEncoder) -> None:
    executed = loaded.image_encoder.engine.executed_layers()
    for kind, name in (("conv", "Convolution"), ("linear", "FullyConnected")):
        layers = sum(layer.kind == kind for layer in quantized.layers)
        precisions = [layer.precision for layer in executed if layer.kind == name]
        assert len(precisions) == layers
        assert set(precisions) <= {"i8", "u8"}, name


def test_a_folder_of_vit_t_has_at_most_40_percent_of_the_float_bytes(images: list[np.ndarray], tmp_path: Path) -> None:
    torch.manual_seed(0)
    # At this size the weights and the graph are those of 1024 pixels but for a few shapes, and exporting is quick.
    sam = with_image_size(sam_model_registry["vit_t"](), 64)
    config = QuantizationConfig(method="minmax")
    encoder = quantize_encoder(sam, images[:1], images[3:4], config, num_threads=1)
    sizes = save_quantized(str(tmp_path / "int8"), sam, encoder, config)
    assert sum(sizes.values()) <= 0.4 * len(checkpoint_bytes(sam))


def test_calibration_lists_images_scales_and_errors_of_every_layer(saved: Path, quantized: QuantizedEncoder) -> None:
    calibration = json.loads((saved / CALIBRATION_FILE).read_text())
    assert calibration["images"] == ["a.jpg"]
    assert [layer["name"] for layer in calibration["layers"]] == [layer.name for layer in quantized.layers]
    assert all(layer["activation_scales"] and layer["relative_error"] > 0 for layer in calibration["layers"])


@pytest.mark.parametrize("name", [ENCODER_FILE, DECODER_FILE])
def test_a_missing_or_damaged_part_is_named(name: str, copy: Path) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{name} is not the file"):
        load_quantized(str(copy))
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_quantized(str(copy))


def test_a_folder_without_config_is_no_model(copy: Path) -> None:
    (copy / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"pipelines/quantize\.py"):
        load_quantized(str(copy))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"format_version": 99}, "format_version 99"), ({"sam": {"encoder": {"kind": "Other"}}}, "unknown image encoder")],
)
def test_a_config_of_another_version_is_refused(values: dict[str, object], message: str, copy: Path) -> None:
    change_config(copy, **values)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(str(copy))


def test_a_config_that_is_cut_short_is_refused(copy: Path) -> None:
    (copy / CONFIG_FILE).write_bytes((copy / CONFIG_FILE).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_quantized(str(copy))


def test_an_encoder_of_another_size_than_the_decoder_is_refused(copy: Path) -> None:
    config = json.loads((copy / CONFIG_FILE).read_text())
    change_config(copy, sam=config["sam"] | {"image_size": 256})
    with pytest.raises(CheckpointError, match="128 pixels"):
        load_quantized(str(copy), ONE_THREAD)


def test_an_engine_that_cannot_run_it_is_a_checkpoint_error(copy: Path) -> None:
    import hashlib

    (copy / ENCODER_FILE).write_bytes(b"no graph")
    config = json.loads((copy / CONFIG_FILE).read_text())
    digest = hashlib.sha256(b"no graph").hexdigest()
    change_config(copy, sha256=config["sha256"] | {ENCODER_FILE: digest})
    with pytest.raises(CheckpointError, match="cannot run this graph"):
        load_quantized(str(copy), ONE_THREAD)
