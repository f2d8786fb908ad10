"""The default model with its adapter: the same tokens as SGLang without us, in fewer forwards."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from idlm import LLM, SamplingParams
from idlm.llm import DEFAULT_ADAPTER
from tests.integrations.sglang.prompts import prompts
from tests.integrations.sglang.server import Server, server

pytestmark = pytest.mark.sglang

ADAPTER = str(files("idlm") / "adapters" / DEFAULT_ADAPTER)
LENGTH = 48
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": LENGTH, "ignore_eos": True}
PENALISED: list[dict[str, Any]] = [
    GREEDY | {"max_new_tokens": 24} | extra
    for extra in (
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 0.9},
        {"logit_bias": {"260": -20.0, "28": 3.0}},
        {},
        {"frequency_penalty": 0.4, "presence_penalty": 0.4},
    )
]
CHUNK = 64


@dataclass
class Plain:
    """What SGLang itself says."""

    greedy: list[list[int]]
    penalised: list[list[int]]
    long: list[list[int]]


def long_prompts(model: Path) -> list[list[int]]:
    """Prompts of several chunks, two of which begin alike."""
    parts = prompts(model)
    return [list(itertools.chain(*p)) for p in (parts[:5], parts[:6], parts[3:8])]


@pytest.fixture(scope="module")
def plain(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    log = tmp_path_factory.mktemp("plain") / "log"
    asked = prompts(default_model_dir)
    with server(default_model_dir, log, "--disable-radix-cache") as s:
        return Plain(
            s.tokens(asked, **GREEDY),
            s.one_by_one(asked[: len(PENALISED)], PENALISED, 3),
            s.tokens(long_prompts(default_model_dir), **GREEDY | {"max_new_tokens": 24}),
        )


@pytest.fixture(scope="module")
def idlm(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Our server; prompts are read in chunks of `CHUNK` tokens and kept in the radix cache."""
    options = ("--speculative-algorithm", "IDLM", "--speculative-draft-model-path", ADAPTER)
    log = tmp_path_factory.mktemp("idlm") / "log"
    with server(default_model_dir, log, *options, "--chunked-prefill-size", str(CHUNK)) as s:
        yield s


def test_greedy_text_is_that_of_sglang(plain: Plain, idlm: Server, default_model_dir: Path) -> None:
    replies = idlm.generate(prompts(default_model_dir), **GREEDY)
    assert [r["output_ids"] for r in replies] == plain.greedy
    assert {len(r["output_ids"]) for r in replies} == {LENGTH}


def test_tokens_per_forward_are_those_of_the_embedded_engine(
    plain: Plain, idlm: Server, default_model_dir: Path
) -> None:
    asked = prompts(default_model_dir)
    replies = idlm.generate(asked, **GREEDY)
    # The host reads a prompt without masks, so its second token needs a forward of its own.
    tokens = sum(len(r["output_ids"]) - 2 for r in replies)
    ours = tokens / sum(r["meta_info"]["spec_verify_ct"] - 1 for r in replies)
    llm = LLM(stride=4, layout="linear", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    outputs = llm.generate(asked, params)
    assert [o.token_ids for o in outputs] == plain.greedy
    embedded = sum(LENGTH - 1 for _ in outputs) / sum(o.stats.forwards - 1 for o in outputs)
    print(json.dumps({"sglang": ours, "embedded": embedded}))
    assert ours == pytest.approx(embedded, rel=0.02)


def test_cached_and_chunked_prompts(plain: Plain, idlm: Server, default_model_dir: Path) -> None:
    asked = long_prompts(default_model_dir)
    assert max(len(p) for p in asked) > 2 * CHUNK
    idlm.flush()
    params = GREEDY | {"max_new_tokens": 24}
    cold = idlm.generate(asked, **params)
    warm = idlm.generate(asked, **params)
    assert [r["output_ids"] for r in cold] == plain.long
    assert [r["output_ids"] for r in warm] == plain.long
    assert all(r["meta_info"]["cached_tokens"] > CHUNK for r in warm)
    # What was generated is in the cache, too: the accepted drafts' entries must be the model's own.
    again = [a + r["output_ids"][:16] for a, r in zip(asked, warm, strict=True)]
    replies = idlm.generate(again, **GREEDY | {"max_new_tokens": 8})
    assert [r["output_ids"] for r in replies] == [t[16:] for t in plain.long]
    assert all(
        r["meta_info"]["cached_tokens"] >= len(a) - 2 for a, r in zip(again, replies, strict=True)
    )


def test_penalties_and_bias_in_a_mixed_batch(
    plain: Plain, idlm: Server, default_model_dir: Path
) -> None:
    asked = prompts(default_model_dir)[: len(PENALISED)]
    assert idlm.one_by_one(asked, PENALISED, 3) == plain.penalised
    assert plain.penalised[0] != plain.greedy[0][:24]


def test_aborts_harm_nobody(plain: Plain, idlm: Server, default_model_dir: Path) -> None:
    asked = prompts(default_model_dir)[:6]

    def leave(prompt: list[int]) -> None:
        body = {"input_ids": prompt, "sampling_params": GREEDY, "stream": True}
        with (
            httpx.Client(base_url=idlm.url, timeout=60) as client,
            client.stream("POST", "/generate", json=body) as reply,
        ):
            next(reply.iter_lines())

    leaving = [threading.Thread(target=leave, args=(p,)) for p in asked[3:]]
    for thread in leaving:
        thread.start()
    stayed = idlm.tokens(asked[:3], **GREEDY)
    for thread in leaving:
        thread.join()
    assert stayed == plain.greedy[:3]
    assert idlm.tokens(asked[3:], **GREEDY | {"max_new_tokens": 16}) == [
        t[:16] for t in plain.greedy[3:6]
    ]


def test_openai_client(idlm: Server, default_model_dir: Path) -> None:
    client = openai.OpenAI(base_url=f"{idlm.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "Name the days of the week."}]
    whole = client.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=40
    )
    stream = client.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=40, stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text == whole.choices[0].message.content
    llm = LLM(layout="ar", dtype="float32")
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40))[0]
    assert text == expected.text
    seeded = [
        client.completions.create(
            model="default", prompt="Once", temperature=1.0, seed=7, max_tokens=16
        )
        .choices[0]
        .text
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize(
    "field",
    [
        {"logprobs": True},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
        {"extra_body": {"min_tokens": 4}},
        {"logit_bias": {"5": 1000}},
    ],
    ids=lambda f: next(iter(f)),
)
def test_what_is_not_supported_is_refused(idlm: Server, field: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{idlm.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.BadRequestError, match=r"IDLM does not support|logit_bias"):
        client.chat.completions.create(model="default", messages=messages, max_tokens=8, **field)
