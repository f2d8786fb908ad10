"""The metrics, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from idlm import LLM, SamplingParams
from tests.server.live import Live, serving
from tests.support.tiny import tiny_model

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def samples(live: Live) -> dict[str, float]:
    lines = live.http.get("/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_metrics_count_what_was_done(tiny_llm: LLM) -> None:
    with serving(tiny_llm) as live:
        prompt = [5, 6, 7]
        params = {"max_tokens": 20, "ignore_eos": True, "temperature": 0.9, "seed": 3}
        assert live.complete(prompt, **params).status_code == 200
        assert live.complete(prompt, n=0).status_code == 400
        [offline] = tiny_llm.generate(prompt, SamplingParams(**params))  # type: ignore[arg-type]
        got = samples(live)
    method = 'layout="quadratic",stride="4",verification="rejection"'
    assert got[f"idlm_generated_tokens_total{{{method}}}"] == 20
    assert got["idlm_prompt_tokens_total"] == 3
    stats = offline.stats
    for outcome in ("verify", "reject", "cold"):
        name = f'idlm_forwards_total{{layout="quadratic",outcome="{outcome}",stride="4",'
        assert got[f'{name}verification="rejection"}}'] == getattr(stats, outcome)
    assert got['idlm_drafts_reached_total{place="1",stride="4"}'] == stats.reached_at[1]
    assert got['idlm_drafts_accepted_total{place="1",stride="4"}'] == stats.accepted_at[1]
    assert got['idlm_texts_total{finish_reason="length"}'] == 1
    assert got['idlm_http_requests_total{path="/v1/completions",status="400"}'] == 1
    assert got["idlm_time_to_first_token_seconds_count"] == 1
    assert got["idlm_kv_cache_capacity_tokens"] > 0 == got["idlm_kv_cache_tokens"]


def test_metrics_of_the_kv_cache(tmp_path: Path) -> None:
    """Six blocks: two answers of four blocks do not fit at once, nor do three ended ones."""
    llm = LLM(tiny_model(tmp_path), adapter="none", dtype="float32", kv_cache_tokens=96)
    with serving(llm) as live:
        params = {"max_tokens": 40, "ignore_eos": True, "seed": 1}
        for first in (5, 5, 40):
            assert live.complete([first] * 17, **params).status_code == 200
        got = samples(live)
        assert got["idlm_prefix_cache_queries_total"] == 51
        assert got["idlm_prefix_cache_hits_total"] == 16  # the whole block of the second
        assert got["idlm_kv_cache_evictions_total"] > 0 == got["idlm_num_preemptions_total"]
        assert live.complete([[60] * 17, [80] * 17], **params).status_code == 200
        got = samples(live)
    assert got["idlm_num_preemptions_total"] > 0 == got["idlm_kv_cache_tokens"]


def test_the_dashboard_shows_metrics_that_exist(tmp_path: Path) -> None:
    llm = LLM(tiny_model(tmp_path, mask_token_id=7), dtype="float32", stride="auto")
    with serving(llm) as live:
        live.complete(max_tokens=40, ignore_eos=True)
        existing = {re.split(r"[{]", name)[0] for name in samples(live)}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for e in expressions for name in re.findall(r"idlm_\w+", e)}
    assert len(used) > 10 and used <= existing
