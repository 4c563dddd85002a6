"""The page as a whole."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tinysam.cli import EXIT_OK, main
from tinysam.lake.filesystem import LakeError
from tinysam.report import ReportConfig, ReportError, page, write_report

MakeLabels = Callable[..., Path]
MakeStages = Callable[[], dict[str, Path]]

VOID = {"meta", "img", "input", "br", "link"}


class Document(HTMLParser):
    """Checks that tags are balanced, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def rendered(labels: Path, **options: object) -> tuple[str, Document]:
    text = page.render_report(ReportConfig(labels=str(labels), **options))  # type: ignore[arg-type]
    return text, Document(text)


def test_the_page_says_what_the_output_holds(make_labels: MakeLabels) -> None:
    labels = make_labels(
        {f"img{i}.png": [0.95] * 3 for i in range(8)} | {"none.png": [], "bad.png": ("truncated", "cut <short>")}
    )
    text, document = rendered(labels)
    for expected in (
        "Images labelled 9 of 10",
        "Masks 24 2.67 an image",
        "Throughput 3.2/s",
        "Predicted IoU 0.95",
        "Failed 1 10 % of images",
        "made by demo_student",
        "1 failed",
        "1 such images",
        "cut <short>",
        "truncated",
    ):
        assert expected in document.text
    assert "<short>" not in text.replace("cut &lt;short&gt;", "")
    photos = [attrs for tag, attrs in document.tags if tag == "img" and "layer" not in str(attrs.get("class"))]
    # 9 random, 8 least certain, 1 without masks; the broken one has none.
    assert len(photos) == 9 + 8 + 1


def test_all_stages_of_a_demo_are_on_one_page(make_labels: MakeLabels, make_stages: MakeStages) -> None:
    labels, stages = make_labels({f"img{i}.png": [0.95] for i in range(3)}), make_stages()
    _, document = rendered(labels, stages=tuple(map(str, stages.values())))
    anchors = {attrs.get("id") for _, attrs in document.tags}
    assert {"pictures", "distributions", "speed", "training", "quantization", "quality", "provenance"} <= anchors
    links = {str(attrs["href"]) for tag, attrs in document.tags if tag == "a"}
    assert {link.removeprefix("#") for link in links} <= anchors
    for expected in ("Cache 5.0 s 8 images/s", "Distil 1 min 0 s", "Box mIoU 0.800 held out", "mIoU after 2 clicks"):
        assert expected in document.text
    assert document.text.index("Cache") < document.text.index("Distil") < document.text.index("Quantize")


def test_the_page_needs_nothing_but_itself(make_labels: MakeLabels, make_stages: MakeStages) -> None:
    labels, stages = make_labels({"a.png": [0.9], "b.png": ("died", "x")}), make_stages()
    text, document = rendered(labels, stages=tuple(map(str, stages.values())))
    for tag, attrs in document.tags:
        for name in ("src", "href", "action", "data"):
            value = attrs.get(name) or "#"
            assert value.startswith(("data:image/webp;base64,", "#")), (tag, name)
        assert not any(name.startswith("on") for name in attrs)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert "@import" not in text
    assert "url(" not in text
    assert re.search(r"https?://", re.sub(r"http://www\.w3\.org/\S+", "", text)) is None


def test_only_our_own_script_may_run(make_labels: MakeLabels) -> None:
    text, document = rendered(make_labels({"a.png": [0.9]}))
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    (policy,) = [str(attrs["content"]) for tag, attrs in document.tags if attrs.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>.png", "\"quoted\" & 'odd'.png", "{{ 7*7 }}.png", "ünï空.png"]
)
def test_names_from_strangers_are_text_and_nothing_else(make_labels: MakeLabels, name: str) -> None:
    text, document = rendered(
        make_labels({name: [0.9], f"bad {name}": ("died", f"{name} </p><script>alert(1)</script>")})
    )
    assert text.count("<script") == 1
    assert name in document.text
    assert f"bad {name}" in document.text
    assert not any(attrs.get("src") == "x" for _, attrs in document.tags)


def test_long_names_and_messages_are_cut(make_labels: MakeLabels) -> None:
    text, _ = rendered(make_labels({"a.png": ("died", "x" * 100_000)}))
    assert len(text) < 100_000


def test_the_page_stays_small_whatever_the_lake_holds(make_labels: MakeLabels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PICTURE_BYTES", 60_000)
    images: dict[str, object] = {f"{i:03}.png": [0.9] * (i % 6) for i in range(60)}
    images |= {f"bad{i:02}.png": (f"status{i % 30}", "x" * 500) for i in range(60)}
    text, _ = rendered(make_labels(images, images_per_shard=40), images=96)
    assert sum(map(len, re.findall(r'src="(data:[^"]*)"', text))) <= 60_000
    assert len(text) < 60_000 + 250_000


def test_a_job_that_is_not_done_is_shown_as_far_as_it_got(make_labels: MakeLabels) -> None:
    labels = make_labels({f"{i:02}.png": [0.9] for i in range(12)}, done=1, record=False)
    _, document = rendered(labels)
    assert "7 images still to do" in document.text
    assert "Images labelled 5 of 12" in document.text
    assert "Throughput" not in document.text


def test_an_output_where_every_image_failed_is_a_page_about_failures(make_labels: MakeLabels) -> None:
    _, document = rendered(make_labels({f"{i}.png": ("died", "again") for i in range(3)}))
    assert "Images labelled 0 of 3" in document.text
    assert "No values." in document.text
    assert "Random images" not in document.text


def test_a_lake_that_has_moved_is_found(make_labels: MakeLabels, tmp_path: Path) -> None:
    labels = make_labels({"sub/a.png": [0.9]})
    (tmp_path / "lake").rename(tmp_path / "moved")
    assert "gone since the lake was indexed" in rendered(labels)[1].text
    text, document = rendered(labels, lake=str(tmp_path / "moved"))
    assert "gone since" not in document.text
    assert "data:image/webp" in text


def test_without_an_index_there_are_figures_and_no_pictures(make_labels: MakeLabels) -> None:
    labels = make_labels({"a.png": [0.9]})
    (labels / "index.parquet").unlink()
    _, document = rendered(labels)
    assert "not in the index" in document.text
    assert "Images labelled 1 of 1" in document.text


def test_the_same_seed_gives_the_same_page(make_labels: MakeLabels) -> None:
    labels = make_labels({f"{i:02}.png": [0.9] * (i % 3) for i in range(30)})

    def body(seed: int) -> str:
        return re.sub(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC", "", rendered(labels, images=4, seed=seed)[0])

    assert body(3) == body(3)
    assert body(3) != body(4)


def test_no_random_images_may_be_asked_for(make_labels: MakeLabels) -> None:
    _, document = rendered(make_labels({"a.png": [0.9]}), images=0)
    assert "Random images" not in document.text
    assert "Least certain" in document.text


def test_a_folder_without_masks_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no shards of masks.*label_images\.py"):
        write_report(ReportConfig(labels=str(tmp_path)))


def test_a_stage_that_is_no_jobs_output_is_named(make_labels: MakeLabels, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(LakeError, match="nothing holds neither"):
        rendered(make_labels({"a.png": [0.9]}), stages=(str(tmp_path / "nothing"),))


def test_the_command_writes_the_page(
    make_labels: MakeLabels, make_stages: MakeStages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, stages, out = make_labels({"a.png": [0.9]}), make_stages(), tmp_path / "pages" / "report.html"
    arguments = ["report", str(labels), "--stages", *map(str, stages.values()), "--output", str(out)]
    assert main([*arguments, "--seed", "3", "--images", "5"]) == EXIT_OK
    assert "seed 3" in out.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == str(out)


def test_an_evaluation_has_a_page_of_its_own(make_stages: MakeStages) -> None:
    text, document = rendered(make_stages()["scores"])
    for expected in (
        "4 images with ground truth",
        "Evaluation of held out",
        "demo_teacher",
        "demo_student",
        "Box mIoU",
        "mIoU after 2 clicks",
    ):
        assert expected.lower() in document.text.lower()
    assert "<script" not in text


def test_a_teacher_in_the_place_of_ground_truth_is_named(make_stages: MakeStages) -> None:
    scores = make_stages()["scores"]
    results = json.loads((scores / "results.json").read_text())
    results["datasets"]["held out"]["teacher"] = "sam_vit_h"
    (scores / "results.json").write_text(json.dumps(results))
    _, document = rendered(scores)
    assert "4 images with the masks of sam_vit_h as ground truth" in document.text
