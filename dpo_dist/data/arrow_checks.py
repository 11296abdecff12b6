"""Whether a record batch can be read at all: a wrong offset in a damaged file would end the process by a signal."""

from typing import Any

import numpy as np
import pyarrow as pa


def checked_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, whose every offset lies inside of its buffers; text that is not UTF-8 is found row by row later.

    Raises:
        pa.ArrowInvalid: it is damaged.
    """
    batch.validate()
    for column in batch.columns:
        _check(column)
    return batch


def _check(array: Any) -> None:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        _check(array.storage)
    elif pa.types.is_struct(kind):
        array.validate()
        for index in range(kind.num_fields):
            _check(array.field(index))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        array.validate()
        _check_offsets(np.from_dlpack(array.offsets), len(array.values))
        _check(array.values)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        # As bytes: whether they are UTF-8 is a matter of single rows.
        raw = pa.binary() if pa.types.is_string(kind) else pa.large_binary()
        pa.Array.from_buffers(raw, len(array), array.buffers(), offset=array.offset).validate(full=True)
    else:
        array.validate(full=True)


def _check_offsets(offsets: np.ndarray, length: int) -> None:
    if len(offsets) and (offsets[0] < 0 or offsets[-1] > length or (np.diff(offsets) < 0).any()):
        raise pa.ArrowInvalid("the offsets of a list lie outside of its values")
