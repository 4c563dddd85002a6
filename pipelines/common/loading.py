"""The model of a job that segments everything, loaded in a worker."""

from __future__ import annotations

from segment_anything.modeling import Sam

from tinysam import load, with_engine
from tinysam.everything import MaskGeneratorConfig
from tinysam.runtime.choice import EngineChoice


def load_on_engine(path_or_name: str, device: str, engine: EngineChoice, everything: MaskGeneratorConfig) -> Sam:
    """What ``tinysam.load`` finds, on its device and engine, in the precision that everything mode asks for."""
    return with_engine(load(path_or_name).to(device), engine, bf16=everything.precision == "bfloat16")
