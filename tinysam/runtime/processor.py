"""What the processor can do."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp"}


def has_vnni() -> bool:
    """Whether the processor has dot products of 8-bit integers, x86's VNNI or Arm's, without which they gain little.

    True where there is no ``/proc/cpuinfo`` to tell.
    """
    if not CPUINFO.exists():
        return True
    lines = CPUINFO.read_text().splitlines()
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return not _DOT_PRODUCTS.isdisjoint(flags)
