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
