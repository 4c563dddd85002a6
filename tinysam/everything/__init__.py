"""Everything mode: masks for all objects of an image, from a grid of point prompts."""

from tinysam.everything.config import HierarchicalConfig, MaskGeneratorConfig
from tinysam.everything.generator import SamAutomaticMaskGenerator
from tinysam.everything.hierarchical import SamHierarchicalMaskGenerator

__all__ = ["HierarchicalConfig", "MaskGeneratorConfig", "SamAutomaticMaskGenerator", "SamHierarchicalMaskGenerator"]
