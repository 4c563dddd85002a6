"""Ground truth in one COCO ``instances.json``, matched to the images of a lake by file name."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from typing import Any

import pyarrow as pa

from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, read_bytes, redact_url

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoFile:
    """Images and annotations of a COCO file."""

    url: str
    """Where it was read from."""
    images: dict[str, dict[str, Any]]
    """COCO's ``images`` by file name, with ``/`` and without leading ``./``."""
    annotations: dict[Any, list[dict[str, Any]]]
    """COCO's ``annotations`` by image id; an image without any has an empty list."""

    @classmethod
    def read(cls, url: str) -> CocoFile:
        """Reads a COCO file.

        Raises:
            LakeError: If it cannot be read, is not COCO's layout, or names an image twice.
        """
        data = read_bytes(url)
        try:
            content = json.loads(data)
            entries, annotations = content["images"], content["annotations"]
            images = {_normal(_file_name(entry)): entry for entry in entries}
            by_image: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in entries}
            for annotation in annotations:
                by_image[annotation["image_id"]].append(annotation)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LakeError(
                f"{redact_url(url)} is not a COCO instances file ({type(error).__name__}: {error}). It needs 'images' "
                "with id and file_name, and 'annotations' with image_id and segmentation."
            ) from error
        if len(images) != len(entries) or len(by_image) != len(entries):
            raise LakeError(f"{redact_url(url)} names two images alike: file_name and id must be unique.")
        return cls(url=url, images=images, annotations=by_image)

    def attach_to(self, index: pa.Table) -> pa.Table:
        """Sets ``annotations``, ``width`` and ``height`` of the images that the file names; others stay null.

        A file name is matched to the id that equals it; else to the only id that ends in it, or that it ends in, at a
        folder's boundary; else by the last component, where that is unique on both sides.

        Args:
            index: ``schema.INDEX``, all of the lake.

        Raises:
            LakeError: If no image matches.
        """
        matched = self._match(index.column("image_id").to_pylist())
        if not matched:
            example = next(iter(self.images), "none")
            raise LakeError(
                f"{redact_url(self.url)} names none of the lake's images: it says {example!r}, the lake has "
                f"{index.column('image_id')[0].as_py()!r}. Point --lake at the folder that file_name is relative to."
            )
        if len(matched) < len(self.images):
            absent = len(self.images) - len(matched)
            logger.warning("%d of the %d images in %s are not in the lake", absent, len(self.images), self.url)
        columns: dict[str, list[Any]] = {"width": [], "height": [], "annotations": []}
        for image_id in index.column("image_id").to_pylist():
            entry = matched.get(image_id)
            columns["width"].append(entry and entry.get("width"))
            columns["height"].append(entry and entry.get("height"))
            columns["annotations"].append(None if entry is None else self._inlined(entry["id"]))
        for name, values in columns.items():
            field = schema.INDEX.field(name)
            index = index.set_column(schema.INDEX.get_field_index(name), field, pa.array(values, field.type))
        return index

    def _inlined(self, image_id: Any) -> bytes:
        return json.dumps(self.annotations[image_id], separators=(",", ":")).encode()

    def _match(self, image_ids: list[str]) -> dict[str, dict[str, Any]]:
        by_last = collections.defaultdict(list)
        for image_id in image_ids:
            by_last[_last(image_id)].append(image_id)
        same_last = collections.Counter(_last(name) for name in self.images)
        matched = {}
        for name, entry in self.images.items():
            candidates = by_last.get(_last(name), [])
            if name in candidates:
                matched[name] = entry
                continue
            endings = [c for c in candidates if c.endswith("/" + name) or name.endswith("/" + c)]
            if len(endings) == 1:
                matched.setdefault(endings[0], entry)
            elif len(candidates) == 1 and same_last[_last(name)] == 1:
                matched.setdefault(candidates[0], entry)
        return matched


def _file_name(entry: dict[str, Any]) -> str:
    """COCO's file name; LVIS has the image's URL at COCO's in its place, of which the folder is the split."""
    if "file_name" in entry or "coco_url" not in entry:
        return entry["file_name"]
    return "/".join(entry["coco_url"].split("/")[-2:])


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _normal(name: str) -> str:
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
