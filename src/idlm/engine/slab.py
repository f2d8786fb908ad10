"""Arrays of the same rows in one piece of memory, of which the host changes any part at once.

What costs the host is the number of copies to a device, not what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from idlm.model.transfer import ALIGNED, upload_all

Field = tuple[tuple[int, ...], torch.dtype]  # shape of a row, and of what
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


class Slab:
    """Arrays by name, of so many rows each; zeros at first.

    Args:
        fields: what lies in one memory.
        wide: arrays of long rows, each in memory of its own: these are not changed by the host.
    Attributes:
        memory_X: uint8, where the arrays of ``fields`` lie one after the other.
        wide: the others.
    """

    def __init__(
        self,
        rows: int,
        fields: Mapping[str, Field],
        device: torch.device,
        wide: Mapping[str, Field] | None = None,
    ) -> None:
        self.rows, self._device, self._fields = rows, device, fields
        sizes = [_row_bytes(*field) for field in fields.values()]
        ends = np.cumsum([rows * size + -rows * size % ALIGNED for size in sizes])
        self._row_bytes = dict(zip(fields, sizes, strict=True))
        self._starts = dict(zip(fields, [0, *ends.tolist()], strict=False))
        self._layouts: dict[tuple[str, ...], tuple[Places, Places]] = {}
        memory_X = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        own = {
            name: torch.zeros((rows, *tail), dtype=dtype, device=device)
            for name, (tail, dtype) in (wide or {}).items()
        }
        self._lie_in(memory_X, own)

    def _lie_in(self, memory_X: torch.Tensor, wide: dict[str, torch.Tensor]) -> None:
        self.memory_X, self.wide = memory_X, wide
        self._arrays = {
            name: memory_X[start : start + self.rows * self._row_bytes[name]]
            .view(self._fields[name][1])
            .view(self.rows, *self._fields[name][0])
            for name, start in self._starts.items()
        } | wide

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._arrays[name]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All memory there is."""
        return [self.memory_X, *self.wide.values()]

    def clone(self) -> Slab:
        """The same in memory of its own."""
        other = object.__new__(Slab)
        vars(other).update(vars(self))
        other._lie_in(self.memory_X.clone(), {n: x.clone() for n, x in self.wide.items()})
        return other

    def places(self, names: Iterable[str], rows: Sequence[int] | Places) -> Places:
        """Where in the memory the bytes of ``rows`` are, ``[R, bytes of the arrays' rows]``."""
        names = tuple(names)
        if names not in self._layouts:
            sizes = [self._row_bytes[name] for name in names]
            firsts = [
                np.arange(size) + self._starts[n] for n, size in zip(names, sizes, strict=True)
            ]
            self._layouts[names] = np.concatenate(firsts), np.repeat(sizes, sizes)
        first_S, step_S = self._layouts[names]
        places_RS: Places = first_S + np.array(rows, np.int64)[:, None] * step_S
        return places_RS

    def places_of(self, name: str, rows_X: Places, places_X: Places, itemsize: int) -> Places:
        """Where in the memory the bytes of single numbers are, one after the other."""
        starts_X = self._starts[name] + rows_X * self._row_bytes[name] + places_X * itemsize
        places_X8: Places = starts_X[:, None] + np.arange(itemsize)
        return places_X8.ravel()

    def image(self, like: Bytes) -> tuple[torch.Tensor, dict[str, npt.NDArray[Any]]]:
        """Memory of the host for all of it, the same as ``like`` at first, and its arrays."""
        memory_X = torch.empty(len(like), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        host = memory_X.numpy()
        host[:] = like
        arrays = {
            name: host[start : start + self.rows * self._row_bytes[name]]
            .view(_numpy(self._fields[name][1]))
            .reshape(self.rows, *self._fields[name][0])
            for name, start in self._starts.items()
        }
        return memory_X, arrays


Move = tuple[Sequence[str], Sequence[int], Slab, Sequence[int], Mapping[str, torch.Tensor]]


class Changes:
    """What is to be written into a slab, with one upload for all of it."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._places: list[Places] = []
        self._values: list[Bytes] = []
        self._moves: list[Move] = []

    def put(self, name: str, rows_X: Places, places_X: Places, values_X: npt.NDArray[Any]) -> None:
        """Let ``values`` (of the array's type) stand at places of rows of an array."""
        self._places.append(self._slab.places_of(name, rows_X, places_X, values_X.itemsize))
        self._values.append(values_X.view(np.uint8))

    def put_rows(
        self, columns: Mapping[str, npt.NDArray[Any]], rows: Sequence[int] | Places
    ) -> None:
        """Let ``columns`` be the rows of arrays; of each row one value."""
        bytes_RS = np.hstack([c.view(np.uint8).reshape(len(rows), -1) for c in columns.values()])
        self._places.append(self._slab.places(columns, rows).ravel())
        self._values.append(bytes_RS.ravel())

    def move(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        source: Slab,
        sources: Sequence[int],
        wide: Mapping[str, torch.Tensor],
    ) -> None:
        """Let rows of another slab, of arrays that are alike in both, be ``rows``.

        ``wide`` are those of long rows, of which the same rows are taken.
        """
        self._moves.append((names, rows, source, sources, wide))

    def make(self) -> None:
        """Write it all."""
        slab, given = self._slab, list[npt.NDArray[Any]]()
        for names, rows, source, sources, wide in self._moves:
            given += [slab.places(names, rows).ravel(), source.places(names, sources).ravel()]
            if wide:
                given += [np.array(rows), np.array(sources)]
        if self._places:
            given += [np.concatenate(self._places), np.concatenate(self._values)]
        there = iter(upload_all(given, slab.memory_X.device) if given else ())
        for _, _, source, _, wide in self._moves:
            to_X, from_X = next(there), next(there)
            slab.memory_X.index_copy_(0, to_X, source.memory_X.index_select(0, from_X))
            if wide:
                rows_R, sources_R = next(there), next(there)
            for name, tensor in wide.items():
                slab.wide[name].index_copy_(0, rows_R, tensor.index_select(0, sources_R))
        for places_X, values_X in zip(there, there, strict=True):
            slab.memory_X.index_copy_(0, places_X, values_X)


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))
