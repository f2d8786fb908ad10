"""What an engine did, and how full it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine's beginning, and how full it is now.

    Attributes:
        kv_tokens, kv_capacity: tokens of the blocks that requests hold, and of all blocks.
        prefix_hit_tokens: of prompts, found in the cache when a request was first admitted.
        preemptions: times that a request had to leave because blocks ran out.
        evictions: cached blocks that nobody held and whose place was needed.
        failed_forwards: those that raised; each request of one was then tried alone.
        plans: forwards of each layout and stride (``quadratic:4``) that a policy chose.
        waited: seconds for which the host had nothing to do but to wait for the device.
    """

    waiting: int
    running: int
    kv_tokens: int
    kv_capacity: int
    prefix_hit_tokens: int
    preemptions: int
    evictions: int
    failed_forwards: int
    waited: float
    plans: dict[str, int]
