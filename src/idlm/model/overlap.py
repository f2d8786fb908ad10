"""Kernels that are set up while the one before them still runs (programmatic dependent launch)."""

# No deferred annotations here: Triton reads them.
from functools import cache

import torch
import triton
import triton.language as tl


@cache
def overlaps() -> bool:
    """Whether this GPU can do it (from compute capability 9.0)."""
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def begin(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel be set up, and wait for the end of the last one.

    Every kernel that is launched in this way begins with it, so what a kernel finds is what all
    those before it have written.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
