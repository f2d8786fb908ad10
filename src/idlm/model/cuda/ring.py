"""Results of a captured graph, which the device writes into memory of the host.

A copy behind the graph would hold up the next one while the copy engine is told and heard.
"""

# No deferred annotations here: Triton reads them.
import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

WARPS = 4


class Ring:
    """Results of the last ``slots`` replays of a graph that ends with `write`.

    Args:
        results: what a replay brings, dense, int64.
    """

    def __init__(self, results: torch.Tensor, slots: int) -> None:
        shape = slots, *results.shape
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=results.is_cuda)
        self._slots: list[npt.NDArray[np.int64]] = list(self._host.numpy())
        # Counted by both sides: the graph is the same every time.
        self._count_1 = torch.zeros(1, dtype=torch.int64, device=results.device)
        self._next = 0

    def write(self, results: torch.Tensor) -> None:
        """Write what a replay brings into the next slot; captured at the end of the graph."""
        size = results.numel()
        _write[(1,)](
            results,
            self._host,
            self._count_1,
            size,
            SLOTS=len(self._slots),
            SIZE=triton.next_power_of_2(size),
            num_warps=WARPS,
        )

    def restart(self) -> None:
        """Begin again with the first slot, for the replays to come."""
        self._count_1.zero_()
        self._next = 0

    def following(self) -> npt.NDArray[np.int64]:
        """Where the results of the next replay will be, once it is over."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return slot


@triton.jit(do_not_specialize=["size"])
def _write(  # type: ignore[no-untyped-def]
    results_ptr, ring_ptr, count_ptr, size, SLOTS: tl.constexpr, SIZE: tl.constexpr
):
    """``results`` into a slot of the ring, and on to the next; by one program alone."""
    count = tl.load(count_ptr)
    place = tl.arange(0, SIZE)
    there = place < size
    results = tl.load(results_ptr + place, mask=there)
    tl.store(ring_ptr + (count % SLOTS) * size + place, results, mask=there)
    tl.debug_barrier()  # everybody has read the count
    tl.store(count_ptr, count + 1)
