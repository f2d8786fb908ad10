"""The CPU kernels against fp64 references, and their row invariance bit for bit."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.model.cpu import kernels as cpu_kernels
from tests.support.paged import block_table, contiguous, paged

DTYPES = (torch.float32, torch.bfloat16)
# Relative to the largest value of the result: rounding of sums, and of the result to its dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
dtypes = st.sampled_from(DTYPES)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    assert cpu_kernels.available(), "these tests need a C compiler"
    with torch.inference_mode():
        yield


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE[actual.dtype]


# ---- linear ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "features"),
    [
        (1, 576, 960),
        (7, 72, 100),
        (16, 1536, 64),
        (130, 31, 33),
        (5, 16, 3),
        (3, 1, 1),
        (40, 1301, 50),
        (17, 193, 97),
    ],
)
def test_linear_matches_reference(dtype: torch.dtype, rows: int, width: int, features: int) -> None:
    x, w = randn(rows, width, dtype=dtype), randn(features, width, dtype=dtype, seed=1)
    bias = randn(features, dtype=dtype, seed=2)
    assert_close(cpu_kernels.linear(x, w), x.double() @ w.double().T)
    assert_close(cpu_kernels.linear(x, w, bias), x.double() @ w.double().T + bias.double())


@settings(max_examples=60, deadline=None)
@given(
    dtype=dtypes,
    rows=st.integers(1, 40),
    width=st.integers(1, 200),
    features=st.integers(1, 150),
    data=st.data(),
)
def test_linear_is_row_invariant(
    dtype: torch.dtype, rows: int, width: int, features: int, data: st.DataObject
) -> None:
    x, w = randn(rows, width, dtype=dtype), randn(features, width, dtype=dtype, seed=1)
    everything = cpu_kernels.linear(x, w)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    assert torch.equal(cpu_kernels.linear(x[begin:end], w), everything[begin:end])


@pytest.mark.parametrize("width", [601, 1301, 1536])  # in slices, of one length or not
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_row_invariant_over_row_blocks(dtype: torch.dtype, width: int) -> None:
    x, w = randn(400, width, dtype=dtype), randn(50, width, dtype=dtype, seed=1)
    everything = cpu_kernels.linear(x, w)
    single = torch.cat([cpu_kernels.linear(row[None], w) for row in x])
    assert torch.equal(everything, single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_accumulates_into_a_slice_of_rows(dtype: torch.dtype) -> None:
    x_BRI, w = randn(3, 7, 72, dtype=dtype), randn(100, 72, dtype=dtype, seed=1)
    y_BRO = randn(3, 7, 100, dtype=dtype, seed=2)
    before = y_BRO.clone()
    returned = cpu_kernels.linear(x_BRI[:, 4:], w, out=y_BRO[:, 4:], accumulate=True)
    assert returned.data_ptr() == y_BRO[:, 4:].data_ptr()
    assert torch.equal(y_BRO[:, :4], before[:, :4])
    assert_close(y_BRO[:, 4:], before[:, 4:].double() + x_BRI[:, 4:].double() @ w.double().T)


def test_linear_rounds_the_accumulated_sum_once() -> None:
    # 1 + 2^-9 needs more bits than bf16 has: rounding the product to the sum's precision first,
    # or the sum twice, would lose it.
    x, w = torch.full((1, 2), 2.0**-9).bfloat16(), torch.ones(1, 2).bfloat16()
    y = torch.full((1, 1), 1 + 2.0**-7).bfloat16()
    cpu_kernels.linear(x, w, out=y, accumulate=True)
    assert y.item() == 1 + 2.0**-6  # 1 + 2^-7 + 2^-8: a tie, to even


@pytest.mark.parametrize("shape", [(72,), (2, 3, 4, 72), (0, 72), (2, 0, 72)])
def test_linear_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, w = randn(*shape, dtype=torch.float32), randn(10, 72, dtype=torch.float32, seed=1)
    y = cpu_kernels.linear(x, w)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w))


def test_linear_takes_a_transposed_input() -> None:
    x, w = randn(72, 5, dtype=torch.float32).T, randn(10, 72, dtype=torch.float32, seed=1)
    torch.testing.assert_close(cpu_kernels.linear(x, w), torch.nn.functional.linear(x, w))


def test_linear_propagates_nan() -> None:
    x, w = torch.full((1, 40), torch.nan).bfloat16(), torch.ones(8, 40).bfloat16()
    assert cpu_kernels.linear(x, w).isnan().all()


def test_linear_refuses_what_does_not_fit() -> None:
    x, w = randn(2, 8, dtype=torch.float32), randn(4, 8, dtype=torch.float32)
    for weight in (w[:, :4], w.bfloat16(), randn(8, 4, dtype=torch.float32).T, w[:, :7]):
        with pytest.raises(ValueError, match="linear needs"):
            cpu_kernels.linear(x, weight)
    with pytest.raises(ValueError, match="linear needs"):
        cpu_kernels.linear(x, w, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="linear needs"):
        cpu_kernels.linear(x, w, torch.zeros(5))
    with pytest.raises(ValueError, match="accumulate"):
        cpu_kernels.linear(x, w, accumulate=True)


# ---- attention ----


def reference_attention(
    q_BRQD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    start_B: torch.Tensor,
    visible_BRR: torch.Tensor,
    positions_BR: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    B, R, Q, D = q_BRQD.shape
    G = Q // k_BKSD.shape[1]
    out = torch.zeros(B, R, Q, D, dtype=torch.float64)
    for b in range(B):
        start = int(start_B[b])
        key_positions = torch.cat((torch.arange(start), positions_BR[b]))
        for r in range(R):
            seen = torch.cat((torch.ones(start, dtype=torch.bool), visible_BRR[b, r]))
            if window is not None:
                seen &= positions_BR[b, r] - key_positions < window
            index = seen.nonzero()[:, 0]
            for h in range(Q if len(index) else 0):
                k, v = (x[b, h // G, index].double() for x in (k_BKSD, v_BKSD))
                p = torch.softmax(k @ q_BRQD[b, r, h].double() * D**-0.5, 0)
                out[b, r, h] = p @ v
    return out


def paged_attention(
    q_BRQD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *args: torch.Tensor,
    tokens: int = 16,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The kernel's attention over keys and values that are cut into shuffled blocks."""
    table = block_table(len(q_BRQD), k_BKSD.shape[2], tokens)
    k, v = (paged(x, table, tokens) for x in (k_BKSD, v_BKSD))
    return cpu_kernels.attention(q_BRQD, k, v, table, *args, scale=scale, window=window)


@settings(max_examples=40, deadline=None)
@given(
    dtype=dtypes,
    batch=st.integers(1, 3),
    rows=st.integers(1, 18),
    tokens=st.sampled_from((3, 4, 16, 32)),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from((1, 3, 8)),
    head_dim=st.sampled_from((8, 20, 64, 80, 96, 128, 256)),
    window=st.sampled_from((None, 1, 5, 30)),
    seed=st.integers(0, 2**31),
)
def test_attention_matches_reference(
    dtype: torch.dtype,
    batch: int,
    rows: int,
    tokens: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    S = rows + 40
    q = randn(batch, rows, kv_heads * group, head_dim, dtype=dtype, seed=seed)
    k, v = randn(2, batch, kv_heads, S, head_dim, dtype=dtype, seed=seed + 1)
    start = torch.randint(0, S - rows + 1, (batch,), generator=random)
    visible = torch.rand(batch, rows, rows, generator=random) < 0.5
    positions = start[:, None] + torch.randint(0, rows, (batch, rows), generator=random)
    out = paged_attention(
        q, k, v, start, visible, positions, tokens=tokens, scale=head_dim**-0.5, window=window
    )
    assert_close(out, reference_attention(q, k, v, start, visible, positions, window))


def test_attention_of_a_long_prompt() -> None:
    q = randn(1, 90, 3, 64, dtype=torch.bfloat16)
    k, v = randn(2, 1, 1, 160, 64, dtype=torch.bfloat16, seed=1)
    start, visible = torch.tensor([70]), torch.ones(1, 90, 90, dtype=torch.bool).tril()
    positions = start[:, None] + torch.arange(90)
    out = paged_attention(q, k, v, start, visible, positions, scale=0.125)
    assert_close(out, reference_attention(q, k, v, start, visible, positions, None))


@settings(max_examples=40, deadline=None)
@given(
    dtype=dtypes,
    cached=st.integers(0, 40),
    accepted=st.integers(0, 9),
    dead=st.integers(0, 9),
    head_dim=st.sampled_from((20, 64, 80)),
    group=st.sampled_from((1, 3, 8)),
    window=st.sampled_from((None, 7)),
    seed=st.integers(0, 2**31),
)
def test_in_flight_key_counts_as_a_cached_one(
    dtype: torch.dtype,
    cached: int,
    accepted: int,
    dead: int,
    head_dim: int,
    group: int,
    window: int | None,
    seed: int,
) -> None:
    """One row after ``cached + accepted`` tokens, whose last are in the cache or in flight.

    In flight, dead rows that it must not see stand between them and it, full of NaN.
    """
    random = torch.Generator().manual_seed(seed)
    tokens = cached + accepted + 1
    keys = randn(2, 1, 2, tokens, head_dim, dtype=dtype, seed=seed)
    q = randn(1, 1, 2 * group, head_dim, dtype=dtype, seed=seed + 1)
    scale = head_dim**-0.5

    k, v = keys
    alone = paged_attention(
        q,
        k,
        v,
        torch.tensor([tokens - 1]),
        torch.ones(1, 1, 1, dtype=torch.bool),
        torch.tensor([[tokens - 1]]),
        scale=scale,
        window=window,
    )

    rows = accepted + dead + 1
    order = torch.randperm(accepted + dead, generator=random)[:accepted].sort().values
    live = torch.cat((order, torch.tensor([rows - 1])))
    cache = torch.full((2, 1, 2, cached + rows + 3, head_dim), torch.nan, dtype=dtype)
    cache[:, :, :, :cached] = keys[:, :, :, :cached]
    cache[:, :, :, cached + live] = keys[:, :, :, cached:]
    visible = torch.rand(1, rows, rows, generator=random) < 0.5
    visible[0, -1] = False
    visible[0, -1, live] = True
    positions = torch.full((1, rows), cached)
    positions[0, live] = torch.arange(cached, tokens)
    queries = randn(1, rows, 2 * group, head_dim, dtype=dtype, seed=seed + 2)
    queries[:, -1] = q[:, 0]
    k, v = cache
    together = paged_attention(
        queries, k, v, torch.tensor([cached]), visible, positions, scale=scale, window=window
    )
    assert torch.equal(together[:, -1], alone[:, 0])


def test_attention_of_a_row_that_sees_nothing_is_zero() -> None:
    x = randn(1, 1, 1, 64, dtype=torch.float32)
    start, visible = torch.tensor([0]), torch.zeros(1, 1, 1, dtype=torch.bool)
    out = paged_attention(x, x, x, start, visible, torch.tensor([[0]]), scale=1.0)
    assert torch.equal(out, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("start", "table"), [(-1, [1, 2]), (7, [1, 2]), (3, [1, 3]), (3, [1, -1]), (0, [])]
)
def test_rows_must_fit_into_their_blocks(start: int, table: list[int]) -> None:
    x, cache = randn(1, 2, 1, 64, dtype=torch.float32), torch.zeros(3, 1, 4, 64)
    visible, positions = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64)
    start_B, table_BP = torch.tensor([start]), torch.tensor([table], dtype=torch.int32)
    with pytest.raises(ValueError, match="exceed the cache"):
        cpu_kernels.attention(x, cache, cache, table_BP, start_B, visible, positions, scale=1.0)
    with pytest.raises(ValueError, match="exceed the cache"):
        cpu_kernels.append(x, cache, table_BP, start_B)
    assert not cache.any()


def test_the_cache_must_be_in_order() -> None:
    x, start = randn(1, 1, 1, 64, dtype=torch.float32), torch.tensor([0])
    table = torch.tensor([[1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="dense rows"):
        cpu_kernels.append(x, torch.zeros(3, 1, 64, 6).transpose(2, 3), table, start)
    with pytest.raises(ValueError, match="int32"):
        cpu_kernels.append(x, torch.zeros(3, 1, 4, 64), table.long(), start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_every_request_at_its_own_index(dtype: torch.dtype) -> None:
    x_BRKD = randn(3, 4, 10, 20, dtype=dtype)[:, :, 3:5]  # a slice of heads
    table = block_table(3, 12, tokens=4)
    cache = torch.zeros(len(table.flatten()) + 1, 2, 4, 20, dtype=dtype)
    start = torch.tensor([0, 5, 8])
    cpu_kernels.append(x_BRKD, cache, table, start)
    expected = torch.zeros(3, 2, 12, 20, dtype=dtype)
    for b, first in enumerate(start.tolist()):
        expected[b, :, first : first + 4] = x_BRKD[b].transpose(0, 1)
    assert torch.equal(contiguous(cache, table, 12), expected)
    assert not cache[0].any()


# ---- rms_norm, choosing tokens ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 576), (2, 5, 33), (2, 3, 4, 64), (64,), (0, 5)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, w = randn(*shape, dtype=dtype) * 3, randn(shape[-1], dtype=dtype, seed=1)
    scale = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = cpu_kernels.rms_norm(x, w, 1e-5)
    assert y.shape == x.shape
    if y.numel():
        assert_close(y, x.double() * scale * w.double())


@settings(max_examples=60, deadline=None)
@given(
    dtype=dtypes,
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    levels=st.sampled_from((1, 3, 1000)),
    seed=st.integers(0, 2**31),
)
def test_argmax_is_the_first_of_the_largest(
    dtype: torch.dtype, rows: int, width: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randint(-levels, levels + 1, (rows, 2, width), generator=generator) / 7).to(dtype)
    largest = x == x.amax(-1, keepdim=True)
    assert torch.equal(cpu_kernels.argmax(x), largest.int().argmax(-1))


def test_argmax_takes_infinities() -> None:
    x = torch.full((2, 40), -torch.inf)
    x[1, 33] = torch.inf
    assert cpu_kernels.argmax(x).tolist() == [0, 33]


@settings(max_examples=60, deadline=None)
@given(
    dtype=dtypes,
    rows=st.integers(1, 4),
    width=st.integers(1, 300),
    levels=st.sampled_from((1, 3, 1000)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_top_takes_the_largest_and_of_equals_the_first(
    dtype: torch.dtype, rows: int, width: int, levels: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/8 of up to 8 bits: equal in their leading 16 bits only if equal.
    levels = min(levels, 255)
    x = (torch.randint(-levels, levels + 1, (rows, width), generator=generator) / 8).to(dtype)
    k = data.draw(st.integers(1, width))
    expected = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(cpu_kernels.top(x, k), expected.sort(-1).values)


def test_top_of_a_slice_of_a_large_vocabulary() -> None:
    x = randn(2, 3, 49155, dtype=torch.bfloat16)[:, 1:]
    ids = cpu_kernels.top(x, 256)
    assert ids.shape == (2, 2, 256)
    assert torch.equal(x.gather(2, ids).sort(-1).values, x.topk(256).values.sort(-1).values)
    with pytest.raises(ValueError, match="largest"):
        cpu_kernels.top(x, 50000)


@settings(max_examples=30, deadline=None)
@given(
    dtype=dtypes,
    batch=st.integers(1, 3),
    width=st.integers(1, 100),
    count=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_score_matches_reference(
    dtype: torch.dtype, batch: int, width: int, count: int, seed: int
) -> None:
    x, w = randn(batch, width, dtype=dtype, seed=seed), randn(90, width, dtype=dtype, seed=seed + 1)
    ids = torch.randint(0, 90, (batch, count), generator=torch.Generator().manual_seed(seed))
    scores = cpu_kernels.score(x, w, ids)
    assert scores.dtype is torch.float32
    assert_close(scores, (x.double() @ w.double().T).gather(1, ids))


def test_score_refuses_what_does_not_fit() -> None:
    x, w = randn(2, 8, dtype=torch.float32), randn(4, 8, dtype=torch.float32)
    for ids in (torch.tensor([[0], [4]]), torch.tensor([[0], [-1]]), torch.tensor([[0]])):
        with pytest.raises(ValueError, match="score needs"):
            cpu_kernels.score(x, w, ids)
    with pytest.raises(ValueError, match="score needs"):
        cpu_kernels.score(x, w.bfloat16(), torch.tensor([[0], [1]]))


# ---- building and loading ----


def test_usable_means_cpu_bf16_or_fp32_without_gradients() -> None:
    assert cpu_kernels.usable(torch.empty(1))
    assert cpu_kernels.usable(torch.empty(1, dtype=torch.bfloat16))
    assert not cpu_kernels.usable(torch.empty(1, dtype=torch.float16))
    assert not cpu_kernels.usable(torch.empty(1, device="meta"))
    with torch.inference_mode(False):
        assert not cpu_kernels.usable(torch.empty(1))


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    x, w = randn(16, 576, dtype=torch.bfloat16), randn(3072, 576, dtype=torch.bfloat16, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpu_kernels.linear(x, w))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    source = Path(cpu_kernels.__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(source)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"  # without optimisation, which takes most of the time
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(cpu_kernels._compiler())} "$@" -O0\n')
    compiler.chmod(0o755)
    code = (
        "import torch; from idlm.model.cpu import kernels as c\n"
        "with torch.inference_mode(): print(c.linear(torch.ones(2, 8), torch.ones(1, 8)).sum())"
    )
    settings = {"IDLM_CACHE": str(tmp_path), "CC": str(compiler)}
    processes = [run_python(code, **settings) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == ["tensor(16.)\n"] * 2, outputs
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_without_a_compiler_one_warning_says_what_to_do(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("IDLM_CACHE", str(tmp_path))
    # The undecorated function: the result that the process keeps is not touched.
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels._library.__wrapped__() is None
    [record] = caplog.records
    assert "install a C compiler" in record.getMessage()


def test_runs_on_the_thread_pool_of_torch() -> None:
    code = (
        "import torch, os; from idlm.model.cpu import kernels as c\n"
        "torch.set_num_threads(2)\n"
        "x, w = torch.ones(8, 512), torch.ones(4096, 512)\n"
        "with torch.inference_mode():\n"
        "    torch.mm(torch.ones(512, 512), w.T)\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    c.linear(x, w)\n"
        "    print(len(os.listdir('/proc/self/task')) - before)"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads through /proc")
    out, error = run_python(code).communicate()
    assert out == "0\n", error
