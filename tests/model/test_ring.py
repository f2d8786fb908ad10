"""What a device writes into memory of the host by itself: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from idlm.model.cuda.ring import Ring

SLOTS = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shape", [(1, 3), (5, 9), (128, 5)])
def test_results_are_there_for_as_many_replays_as_there_are_slots(shape: tuple[int, int]) -> None:
    results = torch.arange(shape[0] * shape[1], device=DEVICE).view(shape)
    ring = Ring(results, SLOTS)
    ring.write(results)
    ring.restart()
    written, places = [], []
    for _ in range(2 * SLOTS + 1):
        results += 1 << 33
        ring.write(results)
        written.append(results.cpu().numpy().copy())
        places.append(ring.following())
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for expected, place in list(zip(written, places, strict=True))[-SLOTS:]:
        assert (place == expected).all()
