"""Several models on the same images of a lake, in this process: what was lost between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from segment_anything.modeling import Sam

from tinysam.eval.ground_truth import read_objects
from tinysam.eval.image import EvalConfig, evaluate_image
from tinysam.eval.reduce import Reduction, annotations_by_image, reduce_scores
from tinysam.eval.rows import SCORES, to_row
from tinysam.lake import schema
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.index import read_image_bytes


def compare_models(
    models: Mapping[str, Sam],
    index: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    *,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Reduction]:
    """Scores each model on each image, as ``pipelines/evaluate.py`` does on many machines.

    Args:
        models: by label, in eval mode.
        index: rows of the lake's index, with annotations or with SA-1B's JSON files beside the images.
        config: what is measured.
        on_image: called after each image.

    Returns:
        By label. Images that cannot be read are counted in ``Reduction.statuses``, those without ground truth in
        ``Reduction.without_ground_truth``.

    Raises:
        LakeError: if the annotations do not belong to the images, or the storage cannot be read.
    """
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in models}
    for entry in index:
        common = {"image_id": entry["image_id"], "uri": entry["uri"], "status": schema.OK, "objects": None}
        try:
            pixels = decode_image(read_image_bytes(entry))
            objects = read_objects(entry, *pixels.shape[:2])
        except ImageError as error:
            common |= {"status": error.status, "error": str(error)}
            objects = None
        for label, sam in models.items():
            row = dict(common)
            if objects is not None:
                row |= {"height": pixels.shape[0], "width": pixels.shape[1]}
                scores = evaluate_image(sam, pixels, objects.rles, config=config)
                row |= to_row(scores, objects.rles, objects.categories, None)
            rows[label].append(row)
        on_image()
    return {
        label: reduce_scores(
            pa.Table.from_pylist(found, schema=SCORES).to_pylist(), lambda: annotations_by_image(index)
        )
        for label, found in rows.items()
    }
