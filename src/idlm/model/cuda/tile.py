"""How a projection's work is cut: which tiles for how many rows."""

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton

# The matrix units want 16 rows at least.
MIN_ROWS = 16
BOX_ROWS = 64  # tiles of so many rows are fetched as boxes; fewer gain nothing from it
# Memory of a program that shares a multiprocessor with others, and of one that need not.
SHARED_BYTES, BOXES_BYTES, ALONE_BYTES = 65_536, 98_304, 131_072
PROGRAMS = 132  # multiprocessors, about
ENOUGH = 100  # programs that keep most of them busy
MOST_FEW, MOST_SOME = 3, 8  # tiles of the least height that few rows make, and some


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
    rows = sum(parts)
    heavy = outputs * inputs >= 1 << 22  # its bytes are what it costs; else, that all wait
    light = not heavy and tiles_of(parts, MIN_ROWS) <= MOST_SOME
    deep, broad = inputs >= 1024, outputs >= 2048
    if not light:
        parts = (rows,)  # so it was measured
    few = tiles_of(parts, MIN_ROWS) <= (MOST_FEW if light else 1)
    some = light and not few
    warps = 4
    if few:
        height, width, warps = MIN_ROWS, 32 if outputs >= (8192 if heavy else 2048) else 16, 2
    elif some and broad:
        height, width = MIN_ROWS if rows <= 64 else 64, 64
    elif some and tiles_of(parts, 32) <= 2:
        height, width = 32, 16
    elif some and not deep and (len(modules) > 1 or tiles_of(parts, 64) <= 2):
        height, width = MIN_ROWS, 64
    elif not light and (rows <= 32 or (rows <= 64 and not broad)):
        height, width = 32, 32
    elif rows * outputs < 1 << 22:
        height, tiles = 64, tiles_of(parts, 64)
        widths = (128, 64) if itemsize == 2 else (64,)
        width = next((w for w in widths if tiles * triton.cdiv(outputs, w) >= ENOUGH), 32)
    else:
        height, width, warps = 128, 128, 8
    if len(modules) > 1:
        width = min(width, gcd(*modules) & -gcd(*modules))
    if few:
        far = heavy or deep
    else:
        far = (height, width) == (64, 32) or (height == MIN_ROWS and not broad)
    step = 128 if far and itemsize == 2 else 64
    alone = tiles_of(parts, height) * triton.cdiv(outputs, width) <= PROGRAMS
    # One program on a multiprocessor may have more of its memory than those that share one.
    shared = _memory() if alone or height > BOX_ROWS else SHARED_BYTES
    if some or height == BOX_ROWS:
        shared = BOXES_BYTES
    most = 6
    if few and heavy:
        most = 3 if not alone and width > 16 else 8
    elif few:
        most = 8 if step == 64 else 5
    stages = min(most, triton.cdiv(inputs, step), shared // ((height + width) * step * itemsize))
    return Tile(height, width, step, warps, max(2, stages))


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
