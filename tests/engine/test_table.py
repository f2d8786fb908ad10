"""What a table says has moved is all that has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm.engine.blocks import BlockPool, Lease
from idlm.engine.table import Table

CPU = torch.device("cpu")
WIDTH = 40
ACTIONS = ["grow", "end", "replace", "append", "leave"]


def request_of(pool: BlockPool, length: int) -> Any:
    lease = Lease()
    assert pool.grow(lease, length)
    return SimpleNamespace(lease=lease)


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9), st.integers(1, 60), st.booleans()),
        max_size=25,
    )
)
def test_what_has_moved_makes_the_table_of_before_that_of_now(
    actions: list[tuple[str, int, int, bool]],
) -> None:
    pool = BlockPool(500, 4)
    requests = [request_of(pool, 7), request_of(pool, 30)]
    table = Table(requests, pool)
    told_BP, real_B = np.zeros((30, WIDTH), np.int64), np.zeros(30, np.int64)
    for action, number, length, told in [*actions, ("none", 0, 0, True)]:
        row = number % len(requests)
        if action == "grow" and requests[row].lease.ids:
            held = len(requests[row].lease.ids) * pool.block_tokens
            pool.grow(requests[row].lease, min(held + length, WIDTH * pool.block_tokens))
        elif action in ("end", "leave"):
            pool.release(requests[row].lease)
            if action == "leave":
                left = table.leave([row])
                told_BP[left], real_B[left] = 0, 0
        elif action == "append":
            requests.append(request_of(pool, length))
            table.replace(len(requests) - 1, requests[-1])
        elif action == "replace":
            pool.release(requests[row].lease)
            requests[row] = request_of(pool, length)
            table.replace(row, requests[row])
        if told and (moved := table.moved()) is not None:
            told_BP[moved.rows_X, moved.places_X] = moved.blocks_X
            real_B[moved.rows_R] = moved.real_R
        if told:
            for at, request in enumerate(requests):
                ids = request.lease.ids
                assert told_BP[at].tolist() == ids + [0] * (WIDTH - len(ids))
                assert real_B[at] == bool(ids)
            if any(request.lease.ids for request in requests):
                on_BP = table.on(CPU).numpy()
                assert np.array_equal(on_BP, told_BP[: len(requests), : on_BP.shape[1]])
