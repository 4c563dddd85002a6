from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tinysam.runtime import processor

on_cpu = partial(processor.prefers_bfloat16, "cpu")


@pytest.mark.parametrize(
    ("has", "text", "expected"),
    [
        (processor.has_vnni, "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nbugs\t\t:\n", True),
        (processor.has_vnni, "flags\t\t: fpu avx2 avx_vnni\n", True),
        (processor.has_vnni, "Features\t: fp asimd asimddp\n", True),
        (processor.has_vnni, "model name\t: avx512_vnni\nflags\t\t: fpu avx2 avx512f\n", False),
        (on_cpu, "flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        (on_cpu, "flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        (on_cpu, "Features\t: fp asimd bf16\n", True),
        (on_cpu, "flags\t\t: fpu avx2 avx512f\n", False),
    ],
)
def test_integer_and_bfloat16_products_are_read_from_the_processors_flags(
    has: Callable[[], bool], text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert has(), "nothing says that it has not"
    (tmp_path / "cpuinfo").write_text(text)
    assert has() == expected


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_for_bfloat16_of_its_own(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(processor.torch.cuda, "is_bf16_supported", is_supported)
    assert processor.prefers_bfloat16("cuda") == supported
