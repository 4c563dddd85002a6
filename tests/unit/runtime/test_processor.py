from collections.abc import Callable
from pathlib import Path

import pytest

from tinysam.runtime import processor


@pytest.mark.parametrize(
    ("has", "text", "expected"),
    [
        (processor.has_vnni, "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nbugs\t\t:\n", True),
        (processor.has_vnni, "flags\t\t: fpu avx2 avx_vnni\n", True),
        (processor.has_vnni, "Features\t: fp asimd asimddp\n", True),
        (processor.has_vnni, "model name\t: avx512_vnni\nflags\t\t: fpu avx2 avx512f\n", False),
        (processor.has_bfloat16, "flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        (processor.has_bfloat16, "flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        (processor.has_bfloat16, "Features\t: fp asimd bf16\n", True),
        (processor.has_bfloat16, "flags\t\t: fpu avx2 avx512f\n", False),
    ],
)
def test_integer_and_bfloat16_products_are_read_from_the_processors_flags(
    has: Callable[[], bool], text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert has(), "nothing says that it has not"
    (tmp_path / "cpuinfo").write_text(text)
    assert has() == expected
