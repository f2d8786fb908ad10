"""`idlm bench` against a real server, and its arithmetic."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm import LLM, SamplingParams
from idlm.cli.main import main
from idlm.server.limits import Limits
from idlm.server.load import Load, Pattern, Sample, Spread, Summary, Target
from tests.server.live import Live, serving, until


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_ordered_and_within(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread is not None
    assert min(values) <= spread.p50 <= spread.p95 <= spread.p99 <= max(values)
    assert min(values) * (1 - 1e-9) <= spread.mean <= max(values) * (1 + 1e-9)


def test_the_summary_counts_what_it_should() -> None:
    samples = [
        Sample(0, 10.0, first=11.0, last=14.0, tokens=4),
        Sample(1, 10.0, first=10.5, last=10.5, tokens=1),
        Sample(2, 10.0, error="status 500"),
        Sample(3, 10.0, first=12.0, last=13.0, tokens=5, left=True),
    ]
    summary = Summary.of(Pattern(clients=2), samples, seconds=5.0)
    assert (summary.requests, summary.finished, summary.left) == (4, 2, 1)
    assert summary.errors == {"status 500": 1}
    assert summary.tokens_per_second == 2.0 and summary.requests_per_second == 0.4
    assert summary.ttft is not None and summary.ttft.mean == 0.75
    assert summary.tpot is not None and summary.tpot.mean == 1.0
    assert summary.latency is not None and summary.latency.mean == 2.25


def test_answers_are_those_of_the_model(live: Live, tiny_llm: LLM) -> None:
    target = Target(live.url, prompts=("The dog", "The sun"), max_tokens=8, temperature=1, seed=7)

    async def run() -> list[Sample]:
        async with Load(target) as load:
            return await load.run(Pattern(clients=3, requests=6))

    samples = sorted(asyncio.run(run()), key=lambda sample: sample.number)
    assert [sample.number for sample in samples] == list(range(6))
    for sample in samples:
        message = {"role": "user", "content": target.prompts[sample.number % 2]}
        params = SamplingParams(temperature=1, seed=7 + sample.number, max_tokens=8)
        [offline] = tiny_llm.chat([message], params)
        assert sample.text == offline.text and sample.tokens == len(offline.token_ids)
        assert sample.started <= sample.first <= sample.last or not sample.text


def test_open_loop_and_clients_that_leave(live: Live) -> None:
    target = Target(live.url, max_tokens=60, extra={"ignore_eos": True})

    async def run() -> list[Sample]:
        async with Load(target) as load:
            return await load.run(Pattern(rate=50, requests=10, leave=0.5))

    samples = asyncio.run(run())
    assert len(samples) == 10 and all(sample.error is None for sample in samples)
    assert 0 < sum(sample.left for sample in samples) < 10
    assert all(sample.tokens == 60 for sample in samples if not sample.left)
    until(live.idle, 5)


def test_the_command(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--clients", "1,3", "--requests", "4", "--max-tokens", "5"]
    files = ["--json", str(out), "--plot", str(picture), "--body", '{"ignore_eos": true}']
    assert main(["bench", "--url", f"{live.url}/v1", *options, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 client " in lines[1] and "3 clients" in lines[2] and "4/4" in lines[2]
    runs = json.loads(out.read_text())["runs"]
    assert [run["tokens"] for run in runs] == [20, 20] and all(run["errors"] == {} for run in runs)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_errors_are_counted(tiny_llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tiny_llm, Limits(max_waiting=0)) as live:
        options = ["--clients", "12", "--requests", "12", "--max-tokens", "30"]
        assert main(["bench", "--url", live.url, *options]) == 0
        assert "x status 429" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "check the URL"),
        (["--url", "127.0.0.1:9"], "must begin with"),
        (["--clients", "0"], "--clients"),
        (["--rate", "a"], "--rate"),
        (["--requests", "0"], "--requests"),
        (["--prompts", "/nothing"], "Cannot read"),
        (["--body", "[1]"], "JSON object"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
