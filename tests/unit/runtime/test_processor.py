from pathlib import Path

import pytest

from tinysam.runtime import processor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nbugs\t\t:\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("Features\t: fp asimd asimddp\n", True),
        ("model name\t: avx512_vnni\nflags\t\t: fpu avx2 avx512f\n", False),
    ],
)
def test_vnni_is_read_from_the_processors_flags(
    text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert processor.has_vnni(), "nothing says that it has not"
    (tmp_path / "cpuinfo").write_text(text)
    assert processor.has_vnni() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
    ],
)
def test_bfloat16_is_read_from_the_processors_flags(
    text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert processor.has_bfloat16(), "nothing says that it has not"
    (tmp_path / "cpuinfo").write_text(text)
    assert processor.has_bfloat16() == expected
