"""How a projection's work is cut: which tiles for how many rows."""

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton

# The matrix units want 16 rows at least.
MIN_ROWS = 16
BOX_ROWS = 64  # tiles of so many rows are fetched as boxes; fewer gain nothing from it
# Memory of a program of few rows that shares a multiprocessor, of one of three that read heavy
# weights, of one of more rows, and the most.
SHARED_BYTES, HEAVY_BYTES, BOXES_BYTES, ALONE_BYTES = 65_536, 81_920, 98_304, 147_456
WIDE_STEP = 64  # inputs of a step at most, in fp32
PROGRAMS = 132  # multiprocessors, about
ENOUGH = 100  # programs that keep most of them busy


@dataclass(frozen=True)
class Tile:
    """How the work is cut: rows, outputs and inputs of a program's step; warps and stages."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def tile_of(
    parts: tuple[int, ...], outputs: int, inputs: int, modules: tuple[int, ...], itemsize: int = 2
) -> Tile:
    """The tile for a product of so many outputs and inputs (docs/benchmarks.md, "Tiles").

    Args:
        parts: rows of each part that has weights of its own; no tile has rows of two.
        modules: outputs of each; no tile has outputs of two.
        itemsize: bytes of an element.
    """
    rows, tiles = sum(parts), tiles_of(parts, MIN_ROWS)
    # What costs: of heavy products to read the weights, of others that all wait for one another.
    heavy, broad, deep = outputs * inputs >= 1 << 22, outputs >= 2048, inputs >= 1024
    few = rows <= (32 if broad else 64) if heavy else tiles <= 3
    some = not heavy and 3 < tiles <= 8
    many = not few and not some
    if heavy or many:
        parts = (rows,)  # so it was measured
    # No tile has outputs of two modules; a box has the most of which there are enough.
    widest = gcd(*modules) & -gcd(*modules) if len(modules) > 1 else 128
    box = min(widest, 64 if some and broad else _box(parts, outputs, itemsize))

    # Rows, outputs and inputs of a step, warps, stages; the last two cases are boxes.
    if heavy and rows <= 16:
        # One program on each multiprocessor, or three: where their numbers differ, some stand idle.
        width = next((w for w in (16, 32) if outputs <= w * PROGRAMS), 64)
        cut = 16, width, 128, 4 if width > 16 else 2, 12
    elif heavy and few:
        cut = 32, 32, 64, 4, 6
    elif few and deep and itemsize == 2:
        cut = (16, 32, 128, 2, 5) if broad else (16, 16, 256, 2, 4)
    elif few:
        cut = 16, 32 if broad else 16, 64, 2, 8
    elif some and broad and rows <= 64:
        cut = 16, 64, 64, 4, 6
    elif some and not broad and tiles_of(parts, 32) == 2:
        cut = 32, 16, 64, 4, 6
    elif some and not (broad or deep) and (len(modules) > 1 or tiles_of(parts, 64) <= 2):
        cut = 16, 64, 128, 4, 6
    elif many and rows * outputs >= 1 << 22:
        cut = 128, 128, 64, 8, 6
    elif box == 32:
        cut = 64, 32, 128, 4, 6
    else:
        cut = 64, box, 64, 4, 6

    height, width, step, warps, stages = cut
    width, step = min(width, widest), step if itemsize == 2 else min(step, WIDE_STEP)
    # Stages are as many as there are steps and memory for.
    if few:
        alone = tiles_of(parts, height) * triton.cdiv(outputs, width) <= PROGRAMS
        shared = _memory() if alone else HEAVY_BYTES if heavy else SHARED_BYTES
    else:
        shared = BOXES_BYTES if height <= BOX_ROWS else _memory()
    room = shared // ((height + width) * step * itemsize)
    return Tile(height, width, step, warps, max(2, min(stages, triton.cdiv(inputs, step), room)))


def _box(parts: tuple[int, ...], outputs: int, itemsize: int) -> int:
    """Most outputs of a box of which there are enough to keep the GPU busy; 32 if there are not."""
    tiles, widths = tiles_of(parts, BOX_ROWS), (128, 64) if itemsize == 2 else (64,)
    return next((w for w in widths if tiles * triton.cdiv(outputs, w) >= ENOUGH), 32)


def tiles_of(parts: tuple[int, ...], height: int) -> int:
    """Tiles of so many rows that hold all ``parts``, none of them rows of two."""
    return sum(triton.cdiv(rows, height) for rows in parts)


@cache
def _memory() -> int:
    """Bytes for the operands of a program that has a multiprocessor to itself."""
    if not torch.cuda.is_available():
        return ALONE_BYTES
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(torch.cuda.current_device())
    return min(ALONE_BYTES, int(properties["max_shared_mem"]) - 8192)
