"""Command lines and configuration files, and what a person sees when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pipelines.common.cli import JobError, parse_config, run_main
from tinysam.lake.filesystem import LakeError


@dataclass(frozen=True, kw_only=True)
class Inner:
    points: int = 32
    """Points."""
    fast: bool = True
    """Fast."""


@dataclass(frozen=True, kw_only=True)
class Config:
    lake: str
    """Lake."""
    max_masks: int | None = 5
    """Masks."""
    include: tuple[str, ...] = ()
    """Patterns."""
    overwrite: bool = False
    """Overwrite."""
    inner: Inner = field(default_factory=Inner)
    """Inner."""

    def __post_init__(self) -> None:
        if self.lake == "nowhere":
            raise ValueError("there is no such lake")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a config.yaml"
    path.write_text(
        "lake: from file\nmax_masks: null\ninclude: [a*, 'b c*']\noverwrite: true\n"
        "inner:\n  points: 16\n  fast: false\n"
    )
    return path


def test_a_file_sets_every_kind_of_field(file: Path) -> None:
    config = parse_config(Config, ["--config", str(file)])
    assert config == Config(
        lake="from file",
        max_masks=None,
        include=("a*", "b c*"),
        overwrite=True,
        inner=Inner(points=16, fast=False),
    )


def test_flags_win_over_the_file(file: Path) -> None:
    config = parse_config(Config, ["--inner.points", "8", f"--config={file}", "--lake", "flag", "--no-overwrite"])
    assert (config.lake, config.inner.points, config.inner.fast, config.overwrite) == ("flag", 8, False, False)


def test_the_resolved_configuration_is_printed_without_secrets(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parse_config(Config, ["--config", str(file), "--lake", "s3://key:secret@bucket/images"])
    printed = capsys.readouterr().err
    assert yaml.safe_load(printed) == {
        "lake": "s3://***@bucket/images",
        "max_masks": None,
        "include": ["a*", "b c*"],
        "overwrite": True,
        "inner": {"points": 16, "fast": False},
    }


def test_help_mentions_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(Config, ["--help"])
    assert exit_.value.code == 0
    assert "--config FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lake: x\nmax_maks: 3\n", "max-maks"),
        ("lake: x\ninner:\n  points: many\n", "many"),
        ("lake: nowhere\n", "there is no such lake"),
        ("- a list\n", "mapping"),
        ("lake: [unclosed\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_exits_with_2_and_says_what_is_wrong(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parse_config(Config, ["--config", str(path)])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


def test_a_missing_file_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(Config, ["--config", "/no/such/file.yaml"])
    assert exit_.value.code == 2
    assert "/no/such/file.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("error", [JobError("shard 3: buy more memory"), LakeError("s3://x [red]: no bucket")])
def test_errors_for_people_come_without_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_bugs_keep_their_traceback() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main)


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_mains(code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: code)
    assert exit_.value.code == code


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
