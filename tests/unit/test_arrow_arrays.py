"""Arrow arrays are those that pyarrow makes itself of the same numpy arrays."""

import numpy as np
import pyarrow as pa
import pytest

from dpo_dist.data.arrow_arrays import arrow_array, arrow_strings, numpy_array


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint64", "float32", "float64", "bool"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_values_and_type(dtype: str, count: int) -> None:
    values = np.random.default_rng(count).integers(0, 3, count).astype(dtype)
    for given in (values, np.repeat(values, 2)[::2]):  # one that does not lie in a row, too
        made = arrow_array(given)
        made.validate(full=True)
        assert made.equals(pa.array(values)) and made.null_count == 0
        assert np.array_equal(numpy_array(made), values) and numpy_array(made).dtype == values.dtype
        assert np.array_equal(numpy_array(made.slice(1)), values[1:])


def test_nulls_and_texts() -> None:
    assert numpy_array(pa.array([1.5, None], pa.float32())).tolist() == [1.5, 0.0]
    assert numpy_array(pa.array([True, None, True])).tolist() == [True, False, True]
    texts = ["a.jsonl:1", "", "ö/日.jsonl:2"]
    made = arrow_strings(texts)
    made.validate(full=True)
    assert made.equals(pa.array(texts)) and arrow_strings([]).equals(pa.array([], pa.string()))
