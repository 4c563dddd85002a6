"""What the processor, or the GPU beside it, can do."""

from __future__ import annotations

from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp"}
_BFLOAT16 = {"amx_bf16", "bf16"}


def has_vnni() -> bool:
    """Whether the processor has dot products of 8-bit integers, x86's VNNI or Arm's, without which they gain little.

    True where there is no ``/proc/cpuinfo`` to tell.
    """
    return _has_one_of(_DOT_PRODUCTS)


def prefers_bfloat16(device: str) -> bool:
    """Whether networks run faster in bfloat16 than in float32: on GPUs that multiply it, and on processors that
    multiply matrices of it, x86's AMX or Arm's BF16. AVX-512's products of it were slower in training (measured), and
    other processors emulate it, ten times slower.

    True on a CPU where there is no ``/proc/cpuinfo`` to tell.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _has_one_of(_BFLOAT16)


def _has_one_of(wanted: set[str]) -> bool:
    if not CPUINFO.exists():
        return True
    lines = CPUINFO.read_text().splitlines()
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return not wanted.isdisjoint(flags)
