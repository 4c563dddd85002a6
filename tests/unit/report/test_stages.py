"""What the report reads from the outputs of other jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tinysam.lake.filesystem import LakeError
from tinysam.lake.run_record import RunRecord
from tinysam.report.stages import Stage, in_order, read_stage

MakeStages = Callable[[], dict[str, Path]]


def test_stages_come_in_the_order_of_the_work(make_stages: MakeStages, tmp_path: Path) -> None:
    folders = make_stages()
    RunRecord(job="something else", config={}, fingerprint="x").write(str(tmp_path / "other"))
    given = [tmp_path / "other", *(folders[name] for name in ("scores", "quantized", "cache", "student"))]
    stages = in_order([read_stage(str(folder)) for folder in given])
    assert [stage.title for stage in stages] == ["Cache", "Distil", "Quantize", "Evaluate", "something else"]


def test_training_curves_skip_what_is_not_a_number(make_stages: MakeStages) -> None:
    stage = read_stage(str(make_stages()["student"]))
    assert stage.losses == {"total": ([1, 2, 4], [4.0, 2.0, 1.0]), "embedding": ([1, 3], [1.0, 0.25])}
    assert stage.scores == {"box": ([2, 4], [0.5, 0.75])}


def test_an_evaluation_has_tables_clicks_and_a_part_for_each_model(make_stages: MakeStages) -> None:
    stage = read_stage(str(make_stages()["scores"]))
    (table,) = stage.quality
    assert table.columns == ("demo_teacher", "demo_student")
    rows = {meaning: [cell and cell.value for cell in cells] for _, meaning, cells in table.rows}
    assert rows["box mIoU"] == [0.9, 0.8]
    assert rows["mask AP"] == [None, None]
    assert table.clicks["demo_student"] == ([1.0, 2.0], pytest.approx([0.6, 0.7]))
    assert [part.url for part in stage.parts] == ["demo_teacher", "demo_student"]
    assert stage.time_order == ["decoder", "encoder"]


def test_time_and_facts_are_written_for_people(make_stages: MakeStages) -> None:
    folders = make_stages()
    cache, quantized = read_stage(str(folders["cache"])), read_stage(str(folders["quantized"]))
    assert cache.time_parts == [("embed", 9.0, "9.0 s (100 %)")]
    assert quantized.facts == [("engine", "openvino"), ("calibration bytes", "3.0 MiB")]
    assert "hunter2" not in quantized.config_text


def test_quantization_is_set_against_the_float_model(make_stages: MakeStages, tmp_path: Path) -> None:
    shown = {title: (value, note) for title, value, note in read_stage(str(make_stages()["quantized"])).quantization}
    assert shown["Encoder in int8"] == ("2.0 MiB", "25 % of 8.0 MiB")
    assert shown["Encoder, an image"] == ("50 ms", "float 100 ms, torch 200 ms")
    assert shown["Agreement of masks"][0] == "0.971"
    assert shown["Layers in int8"] == ("38", "of 40")
    RunRecord(job="quantize", config={}, fingerprint="f", extra={"layers": 3}).write(str(tmp_path / "unfinished"))
    assert read_stage(str(tmp_path / "unfinished")).quantization == []


def test_secrets_are_blanked_even_in_a_record_that_another_program_wrote(tmp_path: Path) -> None:
    record = {
        "job": "label_images",
        "config": {"lake": "s3://key:secret@bucket/x", "aws_secret_access_key": "hunter2"},
        "fingerprint": "f",
        "extra": {"session_token": "hunter2"},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    stage = read_stage(str(tmp_path))
    for text in (stage.config_text, str(stage.facts)):
        assert "hunter2" not in text
        assert "key:secret" not in text


def test_a_configuration_of_any_length_is_cut(tmp_path: Path) -> None:
    RunRecord(job="label_images", config={"list": ["x" * 100] * 5000}, fingerprint="f").write(str(tmp_path))
    assert len(read_stage(str(tmp_path)).config_text) < 21_000


def test_a_folder_of_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match=r"neither run\.json nor results"):
        read_stage(str(tmp_path))


@pytest.mark.parametrize("text", ["not json", "[]", '{"datasets": {"x": {}}}', '{"datasets": 3}'])
def test_results_of_another_program_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(LakeError, match=r"results\.json is not what pipelines/evaluate\.py writes"):
        read_stage(str(tmp_path))


def test_a_run_that_says_little_is_shown_with_what_there_is(tmp_path: Path) -> None:
    RunRecord(job="label_images", config={}, fingerprint="f", versions={}, machine={}).write(str(tmp_path))
    stage: Stage = read_stage(str(tmp_path))
    assert (stage.time_parts, stage.facts, stage.machine, stage.finished) == ([], [], "", None)
