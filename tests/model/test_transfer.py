"""Arrays that go to a device together arrive as they were."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm.model.transfer import ALIGNED, upload_all

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [np.int32, np.int64, np.float32, np.bool_]
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


@given(kinds=st.lists(st.tuples(st.sampled_from(KINDS), shapes, st.booleans()), max_size=6))
def test_all_arrive_as_they_were(
    kinds: list[tuple[type[np.generic], tuple[int, ...], bool]],
) -> None:
    random = np.random.default_rng(0)
    arrays = [
        array.T if turned else array
        for kind, shape, turned in kinds
        for array in [random.integers(0, 100, shape).astype(kind)]
    ]
    there = upload_all(arrays, DEVICE)
    for array, tensor in zip(arrays, there, strict=True):
        expected = torch.from_numpy(array)
        assert tensor.dtype is expected.dtype
        assert torch.equal(tensor.cpu(), expected)
        assert tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0
