"""The ``tinysam`` command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from segment_anything.modeling import Sam

from tinysam import SamAutomaticMaskGenerator, SamPredictor, save_checkpoint
from tinysam.cli import ENGINES, EXIT_ERROR, EXIT_OK, EXIT_USAGE, PRESETS, main
from tinysam.everything.config import Preset
from tinysam.lake.rle import decode_rle
from tinysam.runtime.choice import EngineChoice
from tinysam.synthetic import scene


@pytest.fixture(scope="module")
def checkpoint(tiny_sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model") / "tiny.safetensors")
    save_checkpoint(tiny_sam, path)
    return path


@pytest.fixture
def photo(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture in a folder of its own, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a photo.jpg"
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC).save(path)
    return path


def test_help_is_there_before_anything_heavy_is_imported() -> None:
    code = "import sys; from tinysam.cli import build_parser; build_parser(); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'torch'", "'numpy'", "'PIL'", "'pyarrow'", "'rich'"):
        assert heavy not in modules


@pytest.mark.parametrize("command", [[], ["segment"], ["everything"], ["weights"], ["verify"], ["export"], ["report"]])
def test_help_names_what_there_is(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == EXIT_OK
    shown = capsys.readouterr().out
    expected = {"segment": "--point X,Y", "everything": "--points-per-side", "weights": "--from", "report": "--stages"}
    expected |= {"verify": "--repair", "export": "label-studio"}
    for word in (expected[command[0]],) if command else expected:
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["segment", "PHOTO", "--point", "12"], "'12' is not X,Y"),
        (["segment", "PHOTO", "--point", "nan,3"], "'nan,3' is not X,Y"),
        (["segment", "PHOTO", "--box", "1,2,3"], "'1,2,3' is not X0,Y0,X1,Y1"),
        (["segment", "PHOTO"], "say what to segment"),
        (["segment", "PHOTO", "--point", "1,2", "--label", "1", "--label", "0"], "1 points and 2 labels"),
        (["segment", "PHOTO", "--point", "1,2", "--box", "1,1,5,5", "--box", "2,2,6,6"], "without points"),
        (["segment", "PHOTO", "--point", "96,10"], "outside the image of 96 x 72 pixels"),
        (["segment", "PHOTO", "--box", "50,50,10,60"], "the box 50,50,10,60 is empty: X0,Y0 is its upper left corner"),
        (["segment", "PHOTO", "--box", "5,9,8,9"], "the box 5,9,8,9 is empty"),
        (["segment", "PHOTO", "--box", "5,5,9,9", "--box=-9,5,0,9"], "box -9,5,0,9 lies outside the image of 96 x 72"),
        (["segment", "PHOTO", "--point", "1,2", "--out", "PHOTO"], "is the photo itself"),
        (["segment", "PHOTO", "--point", "1,2", "--mask", "mask.txt"], "pictures are written as"),
        (["everything", "PHOTO", "--out", "overlay"], "pictures are written as"),
        (["everything", "PHOTO", "--flat", "--preset", "paper"], "not allowed with argument --flat"),
        (["weights", "sam_vit_x"], "'sam_vit_x' is not one of sam_vit_h,"),
        (["report", "labels", "--images", "-1"], "images must lie in"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_says_why(
    arguments: list[str], message: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([str(photo) if word == "PHOTO" else word for word in arguments])
    except SystemExit as stop:  # argparse's way
        code = int(stop.code or 0)
    assert code == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_options_of_everything_mode_are_checked(
    photo: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["everything", str(photo), "--model", checkpoint, "--points-per-side", "0"]) == EXIT_USAGE
    assert "points_per_side must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "nowhere.jpg", "--point", "1,2"], "nowhere.jpg does not exist"),
        (["segment", "broken.jpg", "--point", "1,2"], "broken.jpg: the first bytes are those of none of"),
        (["everything", "PHOTO", "--model", "nowhere.safetensors"], "no such checkpoint"),
        (["everything", "PHOTO", "--model", "mobile_sam"], "run `tinysam weights mobile_sam`"),
        (["weights", "mobile_sam", "--from", "nowhere.pt"], "nowhere.pt does not exist"),
        (["weights", "mobile_sam", "--folder", "broken.jpg"], "broken.jpg: a file stands where a folder is needed"),
        (["report", "nowhere"], "holds no shards of masks"),
    ],
)
def test_a_failure_ends_with_code_1_and_no_traceback(
    arguments: list[str], message: str, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYSAM_HOME", str(photo.parent / "home"))
    (photo.parent / "broken.jpg").write_text("hello")
    assert main([str(photo) if word == "PHOTO" else word for word in arguments]) == EXIT_ERROR
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("tinysam: error: ")
    assert "Traceback" not in shown


def test_a_grid_that_no_memory_holds_ends_without_a_traceback(
    photo: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["everything", str(photo), "--model", checkpoint, "--points-per-side", "10000000"]) == EXIT_ERROR
    assert "out of memory" in capsys.readouterr().err


def test_segment_gives_the_predictors_best_mask(
    photo: Path, checkpoint: str, tiny_sam: Sam, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["segment", photo.name, "--point", "40,30", "--model", checkpoint, "--device", "cpu"]
    assert main([*arguments, "--mask", "mask.png", "--json", "mask.json"]) == EXIT_OK

    pixels = np.asarray(Image.open(photo))
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(pixels)
    masks, scores, _ = predictor.predict(np.array([[40.0, 30.0]]), np.array([1]), multimask_output=True)
    expected = masks[scores.argmax()]
    assert ((np.asarray(Image.open("mask.png")) > 0) == expected).all()
    (annotation,) = json.loads(Path("mask.json").read_text())["annotations"]
    assert (decode_rle(annotation["segmentation"]) == expected).all()
    assert annotation["area"] == expected.sum()
    assert annotation["predicted_iou"] == pytest.approx(scores.max(), abs=1e-5)
    drawing = np.asarray(Image.open("a photo-segment.png"))
    assert drawing.shape == pixels.shape
    assert f"{expected.sum():,} pixels" in capsys.readouterr().out


def test_points_off_the_object_and_a_box_are_passed_on(photo: Path, checkpoint: str, tiny_sam: Sam) -> None:
    arguments = ["segment", str(photo), "--point", "40,30", "--label", "1", "--point", "10,60", "--label", "0"]
    arguments += ["--box", "20,10,70,60", "--model", checkpoint, "--mask", "mask.png", "--device", "cpu"]
    assert main(arguments) == EXIT_OK
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(np.asarray(Image.open(photo)))
    points, labels, box = np.array([[40.0, 30.0], [10.0, 60.0]]), np.array([1, 0]), np.array([20.0, 10.0, 70.0, 60.0])
    masks, _, _ = predictor.predict(points, labels, box, multimask_output=False)
    assert ((np.asarray(Image.open("mask.png")) > 0) == masks[0]).all()


def test_each_of_several_boxes_gives_an_object(photo: Path, checkpoint: str) -> None:
    boxes = ["--box", "5,5,40,40", "--box", "50,20,120,70"]  # the second reaches over the edge
    assert main(["segment", str(photo), *boxes, "--model", checkpoint, "--json", "out.json"]) == EXIT_OK
    assert [a["id"] for a in json.loads(Path("out.json").read_text())["annotations"]] == [0, 1]


@pytest.mark.parametrize("grid", [[], ["--flat"]])
def test_everything_writes_a_picture_and_sa1bs_json(
    grid: list[str], photo: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["everything", str(photo), "--model", checkpoint, "--points-per-side", "4", "--device", "cpu", *grid]
    arguments += ["--pred-iou-thresh", "-100", "--stability-score-thresh", "0"]
    assert main([*arguments, "--out", "all.jpg", "--json", "all.json", "--points", "--boxes"]) == EXIT_OK
    written = json.loads(Path("all.json").read_text())
    assert written["image"] == {"file_name": photo.name, "height": 72, "width": 96}
    assert written["annotations"]
    for annotation in written["annotations"]:
        assert decode_rle(annotation["segmentation"]).sum() == annotation["area"]
    assert Image.open("all.jpg").size == (96, 72)
    assert f"{len(written['annotations'])} mask" in capsys.readouterr().out


def test_choices_are_those_of_the_library() -> None:
    assert get_args(EngineChoice) == ENGINES
    assert get_args(Preset) == PRESETS


@pytest.mark.parametrize(("engine", "graphs"), [("torch", 0), ("openvino", 1)])
def test_everything_runs_on_the_engine_asked_for(
    engine: str, graphs: int, photo: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = photo.parent / "home"
    monkeypatch.setenv("TINYSAM_HOME", str(home))
    arguments = ["everything", str(photo), "--model", checkpoint, "--points-per-side", "2", "--device", "cpu"]
    assert main([*arguments, "--engine", engine]) == EXIT_OK
    assert len(list(home.glob("graphs/*.onnx"))) == graphs


@pytest.mark.parametrize(("preset", "rounds"), [("paper", 2), ("adaptive", 6)])
def test_everything_prompts_by_the_preset(
    preset: str, rounds: int, photo: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    prompt = SamAutomaticMaskGenerator._prompt

    def note(self: Any, scene: Any, points: np.ndarray, **options: Any) -> Any:
        calls.append(len(points))
        return prompt(self, scene, points, **options)

    monkeypatch.setattr(SamAutomaticMaskGenerator, "_prompt", note)
    arguments = ["everything", str(photo), "--model", checkpoint, "--points-per-side", "4", "--engine", "torch"]
    assert main([*arguments, "--preset", preset, "--device", "cpu"]) == EXIT_OK
    assert len(calls) == rounds
    assert calls[0] == 1


def test_weights_lists_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYSAM_HOME", str(tmp_path))
    assert main(["weights"]) == EXIT_OK
    shown = capsys.readouterr().out
    for name in ("sam_vit_h", "sam_vit_l", "sam_vit_b", "tinysam", "mobile_sam", "demo_teacher", "demo_student"):
        assert name in shown


def test_weights_that_come_with_the_package_are_only_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "demo_student"]) == EXIT_OK
    assert "demo_student.safetensors" in capsys.readouterr().out


def test_the_models_that_ship_find_something_by_default_and_nothing_found_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(scene(10, size=(256, 256), style="microscopy").pixels).save(tmp_path / "cells.png")
    arguments = [
        "everything",
        str(tmp_path / "cells.png"),
        "--out",
        str(tmp_path / "out.png"),
        "--points-per-side",
        "8",
    ]
    assert main(arguments) == EXIT_OK
    assert int(capsys.readouterr().out.split()[0]) > 0
    assert main([*arguments, "--pred-iou-thresh", "2"]) == EXIT_OK
    assert "no mask passed --pred-iou-thresh 2 and --stability-score-thresh 0.7: lower them" in capsys.readouterr().out
