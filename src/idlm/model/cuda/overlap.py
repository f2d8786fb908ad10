"""Kernels that are set up while the one before them still runs (programmatic dependent launch).

A kernel that is launched with `overlap` begins with `wait`. What it does before that overlaps with
the end of the kernel before: it may read what that one does not write, and nothing else.
"""

# No deferred annotations here: Triton reads them.
from functools import cache

import torch
import triton
import triton.language as tl


def overlap() -> dict[str, bool]:
    """Options of such a launch, for the kernel and for the launcher."""
    here = not triton.knobs.runtime.interpret and _can(torch.cuda.current_device())
    return {"OVERLAP": here, "launch_pdl": here}


@cache
def _can(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the end of the kernel before, then let the next one be set up.

    In this order no more than two kernels are under way: all before those are over.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(ptrs):  # type: ignore[no-untyped-def]
    """Have the cache lines at these addresses brought into L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
