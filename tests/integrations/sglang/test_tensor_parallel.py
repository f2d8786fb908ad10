"""Two ranks that share one model say what one does, in as many forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pad_heads import pad_default_model
from idlm import LLM, SamplingParams
from tests.integrations.sglang.prompts import prompts
from tests.integrations.sglang.server import server

pytestmark = pytest.mark.sglang

SPEC = ("--speculative-algorithm", "IDLM")
LENGTH = 32
EACH: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.0, "frequency_penalty": 0.7},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2},
]


def test_text_and_forwards_of_one_rank(default_model_dir: Path, tmp_path: Path) -> None:
    model, adapter = pad_default_model(tmp_path, default_model_dir)
    asked = prompts(default_model_dir)[: len(EACH)]
    llm = LLM(stride=4, layout="linear", verification="coupled", dtype="float32")
    params = [SamplingParams(**p, max_tokens=LENGTH, ignore_eos=True) for p in EACH]
    outputs = llm.generate(asked, params)
    options = (*SPEC, "--speculative-draft-model-path", str(adapter))
    with server(model, tmp_path / "log", *options, ranks=2, IDLM_VERIFICATION="coupled") as s:
        replies = [
            s.generate([prompt], **_as_host(p))[0] for prompt, p in zip(asked, EACH, strict=True)
        ]
    assert [r["output_ids"] for r in replies] == [o.token_ids for o in outputs]
    # The host reads a prompt without masks, so its second token needs a forward of its own.
    forwards = sum(r["meta_info"]["spec_verify_ct"] - 1 for r in replies)
    embedded = sum(o.stats.forwards - 1 for o in outputs)
    print({"two ranks": forwards, "embedded": embedded})
    # That shifts where forwards begin: over so few tokens, by which drafts fall differently.
    assert forwards / (LENGTH - 2) == pytest.approx(embedded / (LENGTH - 1), rel=0.1)


def test_a_model_that_two_cannot_share_is_refused(default_model_dir: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"--tp-size 2 does not divide this model: .* Use 1, 3,"),
        server(default_model_dir, tmp_path / "log", *SPEC, ranks=2),
    ):
        pass


def _as_host(params: dict[str, Any]) -> dict[str, Any]:
    given = {"max_new_tokens": LENGTH, "ignore_eos": True, **params}
    if "seed" in given:
        given["sampling_seed"] = given.pop("seed")
    return given
