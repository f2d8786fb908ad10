"""Arrays in one piece of memory change as arrays of their own would."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm.engine.slab import Changes, Field, Slab

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS: dict[str, Field] = {
    "flag": ((), torch.bool),
    "wide": ((5,), torch.int32),
    "number": ((), torch.int64),
    "pair": ((2,), torch.int64),
    "part": ((), torch.float32),
}
WIDE: dict[str, Field] = {"vocabulary": ((3, 4), torch.float32)}
ROWS, OTHERS = 5, 3


def random_slab(random: np.random.Generator, rows: int) -> Slab:
    slab = Slab(rows, FIELDS, DEVICE, WIDE)
    for name, (shape, dtype) in {**FIELDS, **WIDE}.items():
        values = random.integers(0, 2, (rows, *shape))
        slab[name].copy_(torch.from_numpy(values).to(dtype))
    return slab


def arrays_of(slab: Slab) -> dict[str, Any]:
    return {name: slab[name].cpu().numpy().copy() for name in (*FIELDS, *WIDE)}


@given(
    seed=st.integers(0, 1000),
    columns=st.sets(st.sampled_from(["flag", "number", "part"]), min_size=1),
    count=st.integers(0, 3),
    numbers=st.sets(st.tuples(st.integers(0, ROWS - 1), st.integers(0, 4)), max_size=6),
)
def test_changes_are_made_where_they_belong(
    seed: int, columns: set[str], count: int, numbers: set[tuple[int, int]]
) -> None:
    random = np.random.default_rng(seed)
    slab, other = random_slab(random, ROWS), random_slab(random, OTHERS)
    expected, given_arrays = arrays_of(slab), arrays_of(other)
    changes = Changes(slab)
    rows = random.permutation(ROWS)[:count].tolist()
    sources = random.integers(0, OTHERS, count).tolist()
    names = [name for name in ("pair", "part") if name not in columns]
    if count:
        wide = {"vocabulary": other["vocabulary"]}
        changes.move(names, rows, other, sources, wide)
        values = {n: random.integers(0, 2, count).astype(expected[n].dtype) for n in columns}
        changes.put_rows(values, rows)
        for name in (*names, *wide):
            expected[name][rows] = given_arrays[name][sources]
        for name, column in values.items():
            expected[name][rows] = column
    if numbers:
        rows_X, places_X = np.array(sorted(numbers)).T
        values_X = random.integers(0, 99, len(numbers)).astype(np.int32)
        changes.put("wide", rows_X, places_X, values_X)
        expected["wide"][rows_X, places_X] = values_X
    changes.make()
    for name, array in arrays_of(slab).items():
        assert np.array_equal(array, expected[name]), name
    for name, array in arrays_of(other).items():
        assert np.array_equal(array, given_arrays[name]), name


def test_a_clone_is_apart() -> None:
    slab = random_slab(np.random.default_rng(0), ROWS)
    before, clone = arrays_of(slab), slab.clone()
    for tensor in slab.tensors:
        tensor.zero_()
    for name, array in arrays_of(clone).items():
        assert np.array_equal(array, before[name])


def test_an_image_has_the_same_form() -> None:
    slab = Slab(ROWS, FIELDS, DEVICE)
    memory_X, arrays = slab.image(np.zeros(slab.memory_X.nbytes, np.uint8))
    for number, array in enumerate(arrays.values()):
        array[:] = number
    slab.memory_X.copy_(memory_X)
    for number, name in enumerate(FIELDS):
        assert torch.equal(slab[name], torch.full_like(slab[name], number))
