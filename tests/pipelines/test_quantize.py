import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from segment_anything.modeling import Sam

from pipelines import quantize
from pipelines.common.cli import EXIT_OK, EXIT_TOO_MANY_ERRORS, JobError
from tinysam import load
from tinysam.lake.filesystem import LakeError, list_files
from tinysam.lake.run_record import read_run_record
from tinysam.runtime import EngineImageEncoder

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
        *("encoder.onnx", "decoder.safetensors", "config.json", "calibration.json", "report.json", "run.json")
    }


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
