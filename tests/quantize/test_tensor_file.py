import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from agq_tvm.quantize.tensor_file import write_tensors

ARRAYS = st.tuples(
    st.sampled_from(["float32", "float16", "uint8", "int8", "int32"]),
    st.lists(st.integers(0, 5), min_size=1, max_size=2),
)


def header_of(path) -> tuple[dict, int]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


@settings(deadline=None, max_examples=50)
@given(st.lists(ARRAYS, max_size=6))
def test_safetensors_reads_what_is_written(tmp_path_factory, described):
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"{i}.ä": (100 * rng.random(shape)).astype(dtype) for i, (dtype, shape) in enumerate(described)}
    write_tensors(path, reversed(arrays), iter(arrays.items()), {"format": "agq"})
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "agq"}
    header, start = header_of(path)
    assert start % 8 == 0
    for name, array in arrays.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_each_tensor_is_written_when_it_comes(tmp_path):
    path, sizes = tmp_path / "t.safetensors", []

    def tensors():
        for i in range(4):
            yield str(i), np.full((1 << 10, 1 << 10), i, "float32")
            sizes.append(path.stat().st_size)

    write_tensors(path, map(str, range(4)), tensors(), {})
    assert all(size >= (i + 1) << 22 for i, size in enumerate(sizes))
    np.testing.assert_array_equal(load_file(path)["3"], 3)


def test_other_tensors_than_those_named_are_refused(tmp_path):
    row = np.zeros(8, "float32")
    with pytest.raises(ValueError, match="twice"):
        write_tensors(tmp_path / "a", ["x"], [("x", row), ("x", row)], {})
    with pytest.raises(ValueError, match="tensor y was not named"):
        write_tensors(tmp_path / "b", ["x"], [("x", row), ("y", row)], {})
    with pytest.raises(ValueError, match="tensor y did not come"):
        write_tensors(tmp_path / "c", ["x", "y"], [("x", row)], {})
