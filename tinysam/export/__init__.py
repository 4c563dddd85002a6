"""The masks of a label job in the formats of other tools; each format is written while the shards are read."""

from tinysam.export.labels import ExportError
from tinysam.export.run import FORMATS, Exported, export

__all__ = ["FORMATS", "ExportError", "Exported", "export"]
