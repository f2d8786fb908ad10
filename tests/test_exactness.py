"""The default model with its shipped adapter says what the base model says, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from idlm import LLM, SamplingParams
from idlm.decoding.metrics import DecodeStats
from idlm.model.cpu import kernels as cpu_kernels

COUNT = 96
# From the longest on.
LAYOUTS = [(layout, stride) for stride in (8, 4, 2) for layout in ("quadratic", "linear")]
CHATS = [
    "Why do leaves change colour in autumn?",
    "Write a haiku about a slow train.",
    "What is 17 times 23? Work it out step by step.",
    "Translate 'good morning, my friend' into French, Spanish and German.",
    "Write a Python function that reverses the words of a sentence.",
    "List five things to pack for a day in the mountains.",
    "Explain recursion to a ten-year-old.",
    "Who was Ada Lovelace?",
    "Give me a recipe for pancakes.",
    "Turn this into a JSON object: Anna is 31 and lives in Oslo.",
    "Sum up the plot of Romeo and Juliet in three sentences.",
    "How does a bicycle stay upright?",
    "Write an email that asks to move a meeting from Monday to Thursday.",
    "What is the difference between a virus and a bacterium?",
    "Make up a name and a slogan for a bakery.",
    "Is it ever right to lie? Argue both sides.",
    "Count backwards from twenty in steps of three.",
    "Name the planets in order, with one fact about each.",
    "Correct the grammar: He don't has no time for they.",
    "Tell a joke about a computer that cannot sleep.",
]
TEXTS = [
    "The lighthouse keeper opened the door and",
    "import math\n\n\ndef area(radius):\n    ",
    "1, 1, 2, 3, 5, 8, 13,",
    "The three laws of thermodynamics are",
    "# Installation\n\n1.",
    "SELECT name, age FROM people WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at 100 degrees because",
    '{"name": "Bob", "languages": [',
    "Once upon a time, in a kingdom by the sea,",
    "Q: What is the capital of Peru?\nA:",
    "The stock market fell on Tuesday after",
    "<html>\n<head>\n<title>",
    "Monday\nTuesday\nWednesday\n",
    "In conclusion,",
    "Die Sonne scheint und",
    "He looked at the map again. There was no road",
    "for (int i = 0; i < n; i++) {",
    "Ingredients:\n- 2 eggs\n- 100 g flour\n-",
    "x^2 - 5x + 6 = 0. To solve this,",
]
SAMPLED = [
    SamplingParams(temperature=0.7, seed=1, max_tokens=32, ignore_eos=True),
    SamplingParams(temperature=1, seed=2, max_tokens=32, ignore_eos=True, top_p=0.9),
    SamplingParams(temperature=0.7, seed=3, max_tokens=32, ignore_eos=True, top_k=40, min_p=0.05),
    SamplingParams(
        temperature=1,
        seed=4,
        max_tokens=32,
        ignore_eos=True,
        top_k=50,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
    ),
]


@pytest.fixture(scope="module")
def llm(default_model_dir: Path) -> LLM:
    return LLM(stride=4, dtype="float32", max_batch=20)


def encode(llm: LLM, kind: str) -> list[list[int]]:
    if kind == "texts":
        return [llm.tokenizer.encode(text) for text in TEXTS]
    return [llm.tokenizer.apply_chat_template([{"role": "user", "content": c}]) for c in CHATS]


@pytest.fixture(scope="module", params=["chats", "texts"])
def prompts(request: pytest.FixtureRequest, llm: LLM) -> list[list[int]]:
    """The 40 prompts in two halves, so that two processes can share them."""
    return encode(llm, request.param)


@pytest.fixture(scope="module")
def greedy(default_model_dir: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What `transformers` says, the prompts in one batch, padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(default_model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # COUNT tokens, whatever they are
    width = max(map(len, prompts))
    pad = [width - len(p) for p in prompts]
    output_BT = model.generate(
        torch.tensor([[0] * n + p for n, p in zip(pad, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in pad]),
        do_sample=False,
        max_new_tokens=COUNT,
        pad_token_id=0,
    )
    new: list[list[int]] = output_BT[:, width:].tolist()
    return new


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "stride"), [*LAYOUTS, ("ar", 1)])
def test_greedy_is_that_of_transformers(
    llm: LLM, prompts: list[list[int]], greedy: list[list[int]], layout: str, stride: int
) -> None:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    outputs = llm.with_layout(layout, stride).generate(prompts, params)
    assert len(outputs) == 20 and all(len(tokens) == COUNT for tokens in greedy)
    assert [o.token_ids for o in outputs] == greedy
    if layout != "ar":  # drafts were taken and refused
        total = sum((o.stats for o in outputs), DecodeStats())
        assert 0 < total.accepted < total.drafted


@pytest.fixture(
    scope="module",
    params=[
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                not cpu_kernels.available(), reason="needs the row-invariant CPU kernels"
            ),
        ),
    ],
)
def coupled(request: pytest.FixtureRequest, default_model_dir: Path) -> LLM:
    return LLM(stride=4, dtype=request.param, verification="coupled", device="cpu")


@pytest.fixture(scope="module")
def mixed(coupled: LLM) -> list[list[int]]:
    """Two chats and two texts."""
    return encode(coupled, "chats")[-2:] + encode(coupled, "texts")[:2]


@pytest.fixture(scope="module")
def sampled(coupled: LLM, mixed: list[list[int]]) -> list[list[int]]:
    """What the bare base model says, one token per forward."""
    outputs = coupled.autoregressive().generate(mixed, SAMPLED)
    return [o.token_ids for o in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "stride"), LAYOUTS)
def test_coupled_is_the_base_models_sample(
    coupled: LLM, mixed: list[list[int]], sampled: list[list[int]], layout: str, stride: int
) -> None:
    outputs = coupled.with_layout(layout, stride).generate(mixed, SAMPLED)
    assert [o.token_ids for o in outputs] == sampled
    assert sum(o.stats.accepted for o in outputs) > 0
