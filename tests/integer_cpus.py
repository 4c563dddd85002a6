"""Which tests need a processor that multiplies 8-bit integers."""

from __future__ import annotations

import platform

import pytest

from tinysam.runtime.processor import CPUINFO, has_vnni

needs_vnni = pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists() or not has_vnni(),
    reason="this CPU has no VNNI, so int8 layers may run in float",
)
