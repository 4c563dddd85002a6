"""Images one at a time: which of a shard's images is to blame when the shard cannot be computed as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import pyarrow as pa

from pipelines.common.ledger import IMAGE_ATTEMPTS
from tinysam.lake.filesystem import LakeError

logger = logging.getLogger(__name__)

CRASHED, OUT_OF_MEMORY, FAILED = "crashed", "out_of_memory", "failed"


def process_one_by_one(
    process: Callable[[pa.Table], pa.Table],
    rows: pa.Table,
    *,
    schema: pa.Schema,
    given_up: Collection[str],
    begin_image: Callable[[str], None],
) -> pa.Table:
    """Processes each image alone, so that one which fails becomes a row with a status:

    * ``crashed``: in ``given_up``, as its process died with it;
    * ``out_of_memory``: it does not fit into memory, not even alone;
    * ``failed``: any other error.

    Args:
        process: Turns index rows into result rows.
        rows: ``tinysam.lake.schema.INDEX``.
        schema: Of the result rows; it has ``image_id``, ``uri``, ``status`` and ``error``.
        given_up: Images not to try.
        begin_image: Called before each image with its id.

    Returns:
        One row an image, in the same order.

    Raises:
        LakeError: if the storage fails.
        Exception: whatever the last image failed by, if all that were tried did, and not for lack of memory: then it
            is the job that is wrong, and no image.
    """
    tables: list[pa.Table] = []
    good = 0
    error: Exception | None = None
    for number in range(rows.num_rows):
        row = rows.slice(number, 1)
        image_id = row["image_id"][0].as_py()
        if image_id in given_up:
            why = f"the process died {IMAGE_ATTEMPTS} times while it had this image alone in hand"
            tables.append(_failed(row, schema, CRASHED, why))
            continue
        begin_image(image_id)
        try:
            tables.append(process(row))
            good += 1
        except LakeError:
            raise
        except Exception as reason:
            logger.exception("image %s failed alone", image_id)
            if is_out_of_memory(reason):
                tables.append(_failed(row, schema, OUT_OF_MEMORY, str(reason) or type(reason).__name__))
                good += 1
            else:
                tables.append(_failed(row, schema, FAILED, f"{type(reason).__name__}: {reason}"))
                error = reason
    if error is not None and not good:
        raise error
    return pa.concat_tables(tables)


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether Python, numpy or torch (on whatever device) could not get memory."""
    # By name, as a job without a model need not load torch. On CPUs torch raises a mere RuntimeError.
    by_name = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or by_name or "can't allocate memory" in str(error)


def _failed(row: pa.Table, schema: pa.Schema, status: str, error: str) -> pa.Table:
    identity = {name: row[name][0].as_py() for name in ("image_id", "uri")}
    return pa.Table.from_pylist([identity | {"status": status, "error": error}], schema=schema)
