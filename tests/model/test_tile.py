"""How products are cut into tiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from idlm.model.cuda.tile import ALONE_BYTES, BOX_ROWS, MIN_ROWS, tile_of, tiles_of

# Outputs, inputs and modules of the default model's products, heads told apart in the first one.
SHAPES = {
    "qkv": (960, 576, (576, 192, 192, 64)),
    "o": (576, 576, (576,)),
    "gate_up": (3072, 576, (3072,)),
    "down": (576, 1536, (576,)),
}
rows = st.integers(1, 2000)


@given(
    parts=st.tuples(rows) | st.tuples(rows, rows),
    shape=st.sampled_from([*SHAPES.values(), (24576, 4096, (24576,)), (100, 40, (60, 20, 20))]),
    itemsize=st.sampled_from([2, 4]),
)
def test_a_tile_fits(
    parts: tuple[int, ...], shape: tuple[int, int, tuple[int, ...]], itemsize: int
) -> None:
    outputs, inputs, modules = shape
    tile = tile_of(parts, outputs, inputs, modules, itemsize)
    if len(modules) > 1:
        assert all(module % tile.outputs == 0 for module in modules)
    steps = (tile.rows + tile.outputs) * tile.inputs * itemsize
    # Two stages there are at least, whatever they take; more only where there is room.
    assert tile.stages == 2 or tile.stages * steps <= ALONE_BYTES
    assert tiles_of(parts, tile.rows) * tile.rows >= sum(parts)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("clean", "masks"), [(2, 2), (4, 12), (5, 20), (6, 30)])
def test_a_request_has_low_tiles(
    clean: int, masks: int, shape: tuple[int, int, tuple[int, ...]]
) -> None:
    """Its clean and mask rows have weights of their own, and with them tiles of their own."""
    assert tile_of((clean, masks), *shape).rows == MIN_ROWS


@given(parts=st.tuples(rows) | st.tuples(rows, rows))
def test_a_box_of_gates_is_not_narrow(parts: tuple[int, ...]) -> None:
    """A box has one of gate and up; narrower ones were the slowest tiles."""
    tile = tile_of(parts, *SHAPES["gate_up"])
    assert tile.rows < BOX_ROWS or tile.outputs // 2 >= 32


@given(clean=rows, masks=rows, shape=st.sampled_from([(24576, 4096), (4096, 12288), (1536, 8960)]))
def test_large_weights_are_cut_by_the_rows_of_all_parts(
    clean: int, masks: int, shape: tuple[int, int]
) -> None:
    outputs, inputs = shape
    together = tile_of((clean + masks,), outputs, inputs, (outputs,))
    assert tile_of((clean, masks), outputs, inputs, (outputs,)) == together


@given(parts=st.lists(rows, min_size=1, max_size=3), height=st.sampled_from([16, 32, 64]))
def test_no_tile_has_rows_of_two_parts(parts: list[int], height: int) -> None:
    alone = [tiles_of((rows,), height) for rows in parts]
    assert tiles_of(tuple(parts), height) == sum(alone)
    assert all(
        0 <= tiles * height - rows < height for tiles, rows in zip(alone, parts, strict=True)
    )
