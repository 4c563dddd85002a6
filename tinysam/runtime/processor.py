"""What the processor can do."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp"}
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


def has_vnni() -> bool:
    """Whether the processor has dot products of 8-bit integers, x86's VNNI or Arm's, without which they gain little.

    True where there is no ``/proc/cpuinfo`` to tell.
    """
    return _has_one_of(_DOT_PRODUCTS)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; others emulate it, many times slower than float32.

    True where there is no ``/proc/cpuinfo`` to tell.
    """
    return _has_one_of(_BFLOAT16)


def _has_one_of(wanted: set[str]) -> bool:
    if not CPUINFO.exists():
        return True
    lines = CPUINFO.read_text().splitlines()
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return not wanted.isdisjoint(flags)
