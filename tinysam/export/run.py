"""Exporting a whole output: which format makes which files."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tinysam.export.coco import write_coco, write_cvat
from tinysam.export.label_studio import write_label_studio
from tinysam.export.labels import LabelledImage, LabelReader
from tinysam.export.names import FileNames, safe_path
from tinysam.export.per_image import to_label_map, to_sa1b, to_yolo
from tinysam.lake.filesystem import join, write_once

WRITERS = 8
"""Files written at a time; object storage takes tens of milliseconds for each."""

Progress = Callable[[str, int, int | None], None]

_WHOLE: Mapping[str, tuple[str, Callable[[Iterable[LabelledImage], str], None]]] = {
    "coco": ("instances.json", write_coco),
    "cvat": ("annotations/instances_default.json", write_cvat),
    "label-studio": ("tasks.json", write_label_studio),
}
_BY_IMAGE: Mapping[str, tuple[str, str, Callable[[LabelledImage], bytes]]] = {
    "sa1b": ("", ".json", lambda image: to_sa1b(image, safe_path(image.image_id).rsplit("/", 1)[-1])),
    "yolo": ("labels", ".txt", to_yolo),
    "png": ("", ".png", to_label_map),
}
FORMATS = (*_WHOLE, *_BY_IMAGE)
"""What ``export`` writes."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    url: str
    """The file, or the folder of the files."""
    images: int
    """Images with masks, those without any included."""
    masks: int
    """Masks."""
    left_out: Mapping[str, int]
    """Images that could not be labelled, by status."""


def export(labels_url: str, kind: str, to_url: str, *, progress: Progress | None = None) -> Exported:
    """Writes the masks of a label job for another tool.

    Memory is that of a few images and, for formats with a file for each image, 8 bytes an image.

    Args:
        labels_url: Output of ``label_images``.
        kind: One of ``FORMATS``.
        to_url: Folder to write into. Files of an earlier export are replaced, others left alone.
        progress: Called with a label, how many images are done, and None.

    Raises:
        ExportError: If there are no masks, or the format cannot hold them.
        LakeError: If a shard is damaged, or the storage refuses.
        ValueError: If there is no such format.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}; choose one of {', '.join(FORMATS)}")
    reader = LabelReader(labels_url)
    counts: Counter[str] = Counter()

    def counted() -> Iterator[LabelledImage]:
        for image in reader:
            yield image
            counts.update(images=1, masks=len(image.masks))
            if progress is not None:
                progress(f"exporting {kind}", counts["images"], None)

    if kind in _WHOLE:
        name, write = _WHOLE[kind]
        url = join(to_url, name)
        write(counted(), url)
    else:
        url = to_url
        _write_by_image(kind, counted(), FileNames(reader.image_ids()), to_url)
    return Exported(url=url, images=counts["images"], masks=counts["masks"], left_out=dict(reader.left_out))


def _write_by_image(kind: str, images: Iterable[LabelledImage], names: FileNames, to_url: str) -> None:
    folder, suffix, encode = _BY_IMAGE[kind]

    def write(image: LabelledImage) -> None:
        path = f"{folder}/{names.path_of(image.image_id)}{suffix}".lstrip("/")
        write_once(join(to_url, path), encode(image))

    with ThreadPoolExecutor(WRITERS) as pool:
        waiting: deque[Future[None]] = deque()
        for image in images:
            waiting.append(pool.submit(write, image))
            if len(waiting) > 2 * WRITERS:
                waiting.popleft().result()
        for future in waiting:
            future.result()
