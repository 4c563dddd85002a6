import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam

from pipelines import quantize
from pipelines.common.cli import EXIT_OK, EXIT_TOO_MANY_ERRORS, JobError
from tinysam import load
from tinysam.eval import EvalConfig, evaluate_images
from tinysam.eval.ground_truth import read_objects
from tinysam.lake.filesystem import LakeError, list_files, read_bytes
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes
from tinysam.lake.run_record import read_run_record
from tinysam.quant.engine_form import engine_form
from tinysam.runtime import EngineConfig, EngineError, EngineImageEncoder, openvino_engine, processor
from tinysam.runtime.openvino_engine import OpenVinoEngine

FEW = ("--calibration-images", "2", "--held-out-images", "1", "--engine.num-threads", "1")


@pytest.fixture(scope="module")
def lake(make_lake: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good images and three broken ones: with seed 0 at least one of these is drawn."""
    folder = make_lake(tmp_path_factory.mktemp("lakes") / "mixed", 4)
    for number in range(3):
        (folder / f"00{number}-broken.jpg").write_bytes(b"this is no image at all")
    return folder


@pytest.fixture(scope="module")
def command(tiny_checkpoint: str, lake: Path, s3: object) -> list[str]:
    return ["--student", tiny_checkpoint, "--lake", str(lake), "--output", "s3://tests/quantized/model", *FEW]


@pytest.fixture(scope="module")
def finished(command: list[str]) -> str:
    """The output of a run, on object storage."""
    assert quantize.main([*command, "--max-error-rate", "1"]) == EXIT_OK
    return command[command.index("--output") + 1]


def test_the_output_loads_as_a_sam(finished: str, tiny_sam: Sam) -> None:
    sam = load(finished)
    assert isinstance(sam.image_encoder, EngineImageEncoder)
    assert sam.config == tiny_sam.config


def test_the_run_record_and_the_report_say_what_was_done(finished: str) -> None:
    record = read_run_record(finished)
    assert record is not None
    assert record.job == "quantize"
    assert record.extra["finished"] is True
    assert record.counts["ok"] == 3
    assert record.counts["not_an_image"] >= 1
    report = record.extra
    assert 0 < report["embedding_relative_error"] < 0.05
    assert report["mask_iou"] > 0.9
    # A graph this small is half names.
    assert report["bytes_int8_encoder"] < 0.6 * report["bytes_float_encoder"]
    names = {url.rsplit("/", 1)[-1] for url in list_files(finished)}
    assert names == {
        *("encoder.onnx", "decoder.safetensors", "config.json", "calibration.json", "report.json", "run.json"),
        "report.html",
    }


def test_the_report_and_its_page_have_every_layer_the_worst_first(finished: str, tiny_sam: Sam) -> None:
    layers = json.loads(read_bytes(f"{finished}/report.json"))["layers"]
    weighted = {
        name
        for name, module in engine_form(tiny_sam).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d)
        and not name.startswith("prompt_encoder.")
    }
    assert {layer["name"] for layer in layers if layer["kind"] != "matmul"} == weighted
    errors = [layer["relative_error"] for layer in layers if layer["relative_error"] is not None]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0
    for layer in layers:
        in_decoder = layer["name"].startswith("mask_decoder.")
        assert layer["precision"] == ("float32" if in_decoder or layer["kind"] == "matmul" else "int8")
        assert bool(layer["activation_scales"]) == (in_decoder or layer["kind"] != "matmul")
    page = read_bytes(f"{finished}/report.html").decode()
    places = [page.index(f"<bdi>{layer['name']}</bdi>") for layer in layers]
    assert places == sorted(places)


def test_the_model_is_scored_before_and_after_where_ground_truth_is_given(
    command: list[str], lake: Path, tiny_sam: Sam, tmp_path: Path
) -> None:
    images = [{"id": n, "file_name": f"00{n}.jpg", "height": 90, "width": 120} for n in range(4)]
    for image in images:
        with Image.open(lake / str(image["file_name"])) as opened:
            image["width"], image["height"] = opened.size
    box = [10.0, 12.0, 30.0, 25.0]
    outline = [10.0, 12.0, 40.0, 12.0, 40.0, 37.0, 10.0, 37.0]
    common = {"bbox": box, "area": 750.0, "iscrowd": 0, "category_id": 1, "segmentation": [outline]}
    annotations = tmp_path / "instances.json"
    annotations.write_text(
        json.dumps(
            {
                "images": images,
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [{**common, "id": n + 1, "image_id": n} for n in range(4)],
            }
        )
    )
    output = tmp_path / "output"
    flags = ["--evaluate-lake", str(lake), "--evaluate-annotations", str(annotations), "--evaluate-tasks", "box"]
    assert quantize.main([*command, "--output", str(output), "--max-error-rate", "1", *flags]) == EXIT_OK
    [dataset] = json.loads((output / "results.json").read_text())["datasets"].values()
    assert dataset["images"] == 4
    scores = {label: entry["metrics"] for label, entry in dataset["checkpoints"].items()}
    assert scores.keys() == {"float", "int8"}
    index = build_index(IndexConfig(lake=str(lake), annotations=str(annotations))).to_pylist()
    pairs = [
        (pixels, objects.rles)
        for row in index
        if "broken" not in row["image_id"]
        for pixels in [decode_image(read_image_bytes(row))]
        if (objects := read_objects(row, *pixels.shape[:2])) is not None
    ]
    expected = evaluate_images(tiny_sam, pairs, config=EvalConfig(tasks=("box",)))
    assert scores["float"]["box_miou"]["value"] == pytest.approx(expected["box_miou"].value, abs=1e-9)
    assert scores["int8"]["box_miou"]["value"] == pytest.approx(expected["box_miou"].value, abs=0.1)
    assert {"ap", "ap_single"} <= scores["int8"].keys()
    assert "mask AP" in (output / "report.html").read_text()


def test_annotations_without_a_lake_end_with_code_2(command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        quantize.main([*command, "--evaluate-annotations", "instances.json"])
    assert exit_info.value.code == 2


def test_an_engine_without_a_kernel_and_a_processor_without_vnni_are_named_in_the_record(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t: fpu avx2\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")

    class NoKernel(OpenVinoEngine):
        def __init__(self, model: bytes, config: EngineConfig) -> None:
            raise EngineError("OpenVINO has no kernel for it")

    monkeypatch.setattr(openvino_engine, "OpenVinoEngine", NoKernel)
    output = tmp_path / "output"
    assert quantize.main([*command, "--output", str(output), "--max-error-rate", "1"]) == EXIT_OK
    record = read_run_record(str(output))
    assert record is not None
    assert (record.extra["engine"], record.extra["precision"]) == ("onnxruntime", "fp32")
    assert record.extra["vnni"] is False
    assert "has no VNNI" in capsys.readouterr().err
    assert "onnxruntime" in (output / "report.html").read_text()


def test_the_same_command_again_finds_it_done(
    finished: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_run_record(finished)
    assert quantize.main(command) == EXIT_OK
    assert "done already" in capsys.readouterr().out
    assert read_run_record(finished) == before


def test_another_setting_is_refused_in_the_same_folder(finished: str, command: list[str]) -> None:
    with pytest.raises(LakeError, match="holds another run"):
        quantize.main([*command, "--seed", "1"])


def test_a_quantized_model_is_refused_as_student(finished: str, command: list[str], tmp_path: Path) -> None:
    again = [*command, "--student", finished, "--output", str(tmp_path)]
    with pytest.raises(JobError, match="quantized already"):
        quantize.main(again)
    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_the_model_and_broken_images_count(command: list[str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path)]
    (tmp_path / "encoder.onnx").write_bytes(b"left by a run that was killed")
    assert quantize.main([*command, *output, "--max-error-rate", "0"]) == EXIT_TOO_MANY_ERRORS
    first = json.loads((tmp_path / "config.json").read_text())
    assert load(str(tmp_path)).config is not None, "broken images are replaced, so the model is good in any case"
    changed = [*command, *output, "--quantization.float-layers", "neck.*", "--overwrite", "--max-error-rate", "1"]
    assert quantize.main(changed) == EXIT_OK
    second = json.loads((tmp_path / "config.json").read_text())
    assert second["layers_int8"] == first["layers_int8"] - 2
    record = read_run_record(str(tmp_path))
    assert record is not None
    assert record.config["quantization"]["float_layers"] == ["neck.*"]


def test_a_dry_run_names_the_images_and_writes_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert quantize.main([*command, "--output", str(output), "--dry-run"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "calibration" in out
    assert ".jpg" in out
    assert not output.exists()


@pytest.mark.parametrize("flag", ["--calibration-images", "--held-out-images"])
def test_too_few_images_are_refused_before_anything_is_read(flag: str, command: list[str], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds 7 images, but"):
        quantize.main([*command, "--output", str(tmp_path), flag, "7"])


def test_too_few_good_images_are_refused(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="has only good ones: 4 images, but 5 are needed"):
        quantize.main([*command, "--output", str(tmp_path), "--calibration-images", "5"])
    assert not list(tmp_path.iterdir())


def test_limit_draws_from_the_first_images_alone(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize.main([*command, "--output", str(tmp_path), "--limit", "3", "--dry-run"]) == EXIT_OK
    out = capsys.readouterr().out
    assert set(re.findall(r"00\d[^ ]*\.jpg", out)) == {"000-broken.jpg", "000.jpg", "001-broken.jpg"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--calibration-images", "0"),
        ("--limit", "0"),
        ("--seed", "-1"),
        ("--max-error-rate", "2"),
        ("--quantization.percentile", "0"),
        ("--engine.num-threads", "0"),
    ],
)
def test_values_out_of_range_end_with_code_2(flags: tuple[str, str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        quantize.main([*command, *flags])
    assert exit_info.value.code == 2
