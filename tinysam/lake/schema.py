"""The tables that travel through the lake: the only module that knows a column's name, type and meaning.

Coordinates are pixels, x to the right and y down. A *frame* is the pixel grid that they refer to:

* the original frame: the image as decoded, EXIF orientation applied;
* the input frame: the image after its longest side was resized to the model's ``image_size``, before padding;
* the mask frame: the input frame shrunk by ``MASK_STRIDE``, padding included, so always
  ``(image_size // MASK_STRIDE, image_size // MASK_STRIDE)``.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1

# SAM's low-resolution masks have stride 4. Ground truth is kept at twice that resolution, to which training resizes the
# logits: from a binary low-resolution mask, a student cannot learn where a boundary lies within a pixel, which is most
# of a small object's IoU. Our choice.
MASK_STRIDE = 2

OK = "ok"
"""``status`` of an image that was processed. Any other status names why it was not, and ``error`` says more."""

INDEX = pa.schema(
    [
        # Stable and unique within the lake: the path relative to the lake's root, with the member's name for a tar
        # ("a/b.tar/c.jpg") and the row's number for parquet ("a/b.parquet#12").
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),  # what to open: the image, the tar or the parquet file
        pa.field("offset", pa.int64(), nullable=False),  # first byte (tar) or row (parquet); 0 for a file of its own
        pa.field("size", pa.int64(), nullable=False),  # bytes; -1 where the listing does not tell
        pa.field("width", pa.int32()),  # original frame, where the source tells it without opening the image
        pa.field("height", pa.int32()),
        pa.field("annotations_uri", pa.string()),  # the SA-1B JSON beside the image
        pa.field("annotations", pa.binary()),  # JSON list of COCO annotations, where they came in one file
        pa.field("shard_id", pa.string()),  # set by the plan
    ]
)

TRAINING_MASK = pa.struct(
    [
        pa.field("size", pa.list_(pa.int32(), 2)),  # mask frame (height, width)
        pa.field("counts", pa.binary()),  # COCO run lengths, pycocotools' compressed string
        pa.field("bbox", pa.list_(pa.float32(), 4)),  # XYWH, input frame
        pa.field("area", pa.float32()),  # pixels of the input frame
        pa.field("point_coords", pa.list_(pa.list_(pa.float32(), 2))),  # interior points (x, y), input frame
    ]
)

EMBEDDING = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("height", pa.int32()),  # original frame
        pa.field("width", pa.int32()),
        pa.field("input_height", pa.int32()),  # input frame, before padding
        pa.field("input_width", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("image", pa.binary()),  # JPEG of the input frame, as the teacher saw it
        pa.field("embedding", pa.binary()),  # C order; null without a teacher; see tinysam.lake.codecs
        pa.field("masks", pa.list_(TRAINING_MASK)),  # null where the lake has no ground truth for the image
    ]
)

MASK = pa.struct(
    [
        pa.field("size", pa.list_(pa.int32(), 2)),  # original frame (height, width)
        pa.field("counts", pa.string()),  # COCO run lengths, pycocotools' compressed string
        pa.field("bbox", pa.list_(pa.float32(), 4)),  # XYWH, original frame
        pa.field("area", pa.int64()),  # pixels
        pa.field("predicted_iou", pa.float32()),
        pa.field("stability_score", pa.float32()),
        pa.field("point_coords", pa.list_(pa.list_(pa.float32(), 2))),  # the prompt (x, y), original frame
    ]
)

MASKS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("masks", pa.list_(MASK)),
    ]
)
