"""Which rows one forward pass holds, where they stand and what they see.

A forward of stride ``N`` holds the *pending* token (offset 0), up to ``N - 1`` *drafts* (offsets
1 .. N-1) and blocks of ``N - 1`` *masks*. A block belongs to a *point* ``p``, the number of
drafts accepted before it: it sees pending, ``d_1 .. d_p`` and its own earlier masks. If
verification stops after ``p`` drafts, this forward samples the token at offset ``p + 1``, where
the block's first mask stands; mask ``j`` proposes the token ``j`` places after that one.

    ar         pending                                   N = 1
    linear     pending drafts | block at N-1             2N - 1 rows (arXiv 2604.11035)
    quadratic  pending drafts | block at 0 | ... | N-1   N * N rows (arXiv 2507.11851)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from idlm.errors import InvalidRequestError

LAYOUTS = ("ar", "linear", "quadratic")
MAX_STRIDE = 16


@dataclass(frozen=True)
class Layout:
    """Rows of one forward: ``stride`` clean rows, then one mask block for each of ``points``."""

    name: str
    stride: int
    points: tuple[int, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Layouts are looked up in every forward."""
        return hash((self.name, self.stride, self.points))

    @classmethod
    def named(cls, name: str, stride: int) -> Layout:
        """The layout ``name`` at ``stride`` (1 to 16; 1 is plain autoregression).

        Raises:
            InvalidRequestError: unknown name, or stride out of range.
        """
        if name not in LAYOUTS:
            raise InvalidRequestError(f"layout must be one of {', '.join(LAYOUTS)}, not {name!r}.")
        if isinstance(stride, bool) or not isinstance(stride, int):
            raise InvalidRequestError(f"stride must be a whole number, not {stride!r}.")
        if not 1 <= stride <= MAX_STRIDE:
            raise InvalidRequestError(f"stride must be between 1 and {MAX_STRIDE}, not {stride}.")
        if name == "ar" or stride == 1:
            return cls("ar", 1, ())
        points = (stride - 1,) if name == "linear" else tuple(range(stride))
        return cls(name, stride, points)

    @property
    def block_size(self) -> int:
        """Masks in a block, and drafts in a forward: ``stride - 1``."""
        return self.stride - 1

    @property
    def num_masks(self) -> int:
        """Mask rows in a forward."""
        return len(self.points) * self.block_size

    @property
    def num_rows(self) -> int:
        """Rows in a forward: the paper's query size."""
        return self.stride + self.num_masks

    @cached_property
    def rows_by_drafts(self) -> tuple[Rows, ...]:
        """The rows of a forward that holds ``n`` drafts, for ``n`` = 0 .. stride - 1."""
        return tuple(self._rows(n) for n in range(self.stride))

    def _rows(self, num_drafts: int) -> Rows:
        # With fewer drafts a block stands after the last one there is: a cold forward of the
        # linear layout proposes right after the pending token.
        points = [min(point, num_drafts) for point in self.points]
        offsets = list(range(self.stride))
        visible = [
            [c <= r if r <= num_drafts else c == r for c in range(self.num_rows)]
            for r in range(self.stride)
        ]
        for block, point in enumerate(points):
            first = self.stride + block * self.block_size
            for j in range(self.block_size):
                offsets.append(point + 1 + j)
                visible.append(
                    [c <= point or first <= c <= first + j for c in range(self.num_rows)]
                )
        block_after = [points.index(a) if a in points else -1 for a in range(self.stride)]
        return Rows(tuple(offsets), tuple(map(tuple, visible)), tuple(block_after))


@dataclass(frozen=True)
class Rows:
    """The rows of one forward.

    Attributes:
        offsets: position of each row relative to the pending token.
        visible: ``visible[r][c]``: row ``r`` sees in-flight row ``c``.
        block_after: the mask block to use after ``a`` accepted drafts, -1 where there is none.
    """

    offsets: tuple[int, ...]
    visible: tuple[tuple[bool, ...], ...]
    block_after: tuple[int, ...]


@dataclass(frozen=True)
class RowTables:
    """`Rows` for every number of drafts, as tensors: index them by ``num_drafts``.

    Attributes:
        offsets_NR: int64.
        visible_NRR: bool.
        block_after_NN: int64, ``[num_drafts, accepted]``.
    """

    offsets_NR: torch.Tensor
    visible_NRR: torch.Tensor
    block_after_NN: torch.Tensor


@lru_cache
def row_tables(layout: Layout, device: torch.device) -> RowTables:
    """The tables of ``layout`` on ``device``, built once."""
    rows = layout.rows_by_drafts
    return RowTables(
        torch.tensor([r.offsets for r in rows], device=device),
        torch.tensor([r.visible for r in rows], device=device),
        torch.tensor([r.block_after for r in rows], device=device),
    )
