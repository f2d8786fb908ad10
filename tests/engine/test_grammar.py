"""Constrained texts: valid, exact under every layout, and no stall where drafts are forbidden."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from idlm import LLM, SamplingParams
from idlm.engine.grammar import Grammars
from idlm.errors import InvalidRequestError
from tests.support.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model: what it would say by itself never fits a grammar."""
    return LLM(
        tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7), stride=4, dtype="float32"
    )


@pytest.mark.parametrize("layout", ["ar", "linear", "quadratic"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_fit_the_grammar(llm: LLM, layout: str, temperature: float) -> None:
    llm = llm.with_layout(layout, 4)
    wanted: list[dict[str, Any]] = [
        {"json_schema": {"type": "object", "properties": {"a": {"enum": ["dog", "fox"]}}}},
        {"regex": "(the|dog|fox| ){3,9}!"},
        {"regex": "[0-9]{4}-[0-9]{2}"},
        {},
    ]
    params = [
        SamplingParams(temperature=temperature, seed=n, max_tokens=60, **fields)
        for n, fields in enumerate(wanted)
    ]
    outputs = llm.generate(["The dog"] * 4, params)
    for output, fields in zip(outputs, wanted, strict=True):
        if "regex" in fields:
            assert output.finish_reason == "stop"
            assert re.fullmatch(fields["regex"], output.text), output.text
    [free] = llm.generate("The dog", params[3])
    assert outputs[3].token_ids == free.token_ids  # others' grammars change nothing for it


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_coupled_texts_are_those_of_autoregression(llm: LLM, temperature: float) -> None:
    prompts = ["The dog", "A hen in the", "12"]
    for regex in ("[a-z ]{20,30}", "(dog|fox|hen)( (dog|fox|hen))*"):
        params = SamplingParams(temperature=temperature, seed=3, max_tokens=30, regex=regex)
        runs = [
            [o.token_ids for o in llm.with_layout(*layout, "coupled").generate(prompts, params)]
            for layout in (("ar", 1), ("linear", 4), ("quadratic", 4), ("quadratic", 2))
        ]
        assert runs[1:] == [runs[0]] * 3


def test_rejection_gives_the_distribution_of_autoregression(llm: LLM) -> None:
    """Whole texts of the restricted model, with and without drafts, are equally frequent."""
    draws, counts = 600, []
    for first_seed, (layout, stride) in ((0, ("ar", 1)), (draws, ("quadratic", 4))):
        params = [
            SamplingParams(max_tokens=4, regex="[ab][cd]", seed=first_seed + n)
            for n in range(draws)
        ]
        outputs = llm.with_layout(layout, stride).generate(["The dog"] * draws, params)
        counts.append(Counter(output.text for output in outputs))
    texts = sorted(set(counts[0]) | set(counts[1]))
    assert 2 <= len(texts) <= 4
    table = [[count[text] + 1 for text in texts] for count in counts]  # no empty column
    assert chi2_contingency(table).pvalue > 1e-3


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0, 1.5))
def test_every_json_text_that_ends_is_valid(seed: int, temperature: float) -> None:
    llm = _shared()
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=40, json_schema=SCHEMA)
    output = llm.generate("The dog", params)[0]
    if output.finish_reason == "stop":
        value = json.loads(output.text)
        assert isinstance(value["name"], str) and isinstance(value["age"], int)
        assert len(value) == 2 and len(value["name"]) <= 8
    else:
        assert output.text.startswith("{") and len(output.token_ids) == 40


def test_masks_are_those_of_the_text_with_the_drafts(llm: LLM) -> None:
    grammars = Grammars(llm.tokenizer, llm.config.vocab_size, frozenset({2}))
    params = SamplingParams(regex="(dog|fox)+!")
    ids = {c: llm.tokenizer.encode(c)[0] for c in "dogfx!"}
    grammar = grammars.start(params)
    good, bad = [ids["d"], ids["o"]], [ids["d"], ids["x"]]
    allowed = grammars.allowed([grammar, None, grammar], [good, [], bad], rows=3)
    assert allowed.shape == (3, 3, llm.config.vocab_size) and allowed[1].all()
    assert allowed[0, 0, ids["d"]] and allowed[0, 0, ids["f"]] and not allowed[0, 0, ids["o"]]
    assert not allowed[2, 1, ids["x"]]  # so the second draft of the third text is rejected
    for tokens, row in (([ids["d"]], 1), (good, 2)):
        other = grammars.start(params)
        assert other is not None
        for token in tokens:
            other.advance(token)
        assert torch.equal(grammars.allowed([other], [[]], rows=1)[0, 0], allowed[0, row])
    assert torch.equal(grammars.allowed([grammar], [[]], rows=1)[0, 0], allowed[0, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "(a"}, "regex cannot be used"),
        ({"json_schema": {"type": "no"}}, "json_schema cannot be used"),
        ({"json_schema": {"const": float("nan")}}, "json_schema cannot be used"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema cannot be used"),
        ({"json_schema": {}, "regex": "a"}, "not both"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"regex": "a\\"}, "backslash"),
        ({"regex": r"[^\s\S]"}, "no text"),
        ({"regex": r"\b"}, "regex cannot be used"),
        ({"json_schema": {"$ref": "#"}}, "no text"),
    ],
)
def test_bad_grammars_are_refused(llm: LLM, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.check([5, 6, 7], SamplingParams(**fields))


@pytest.mark.parametrize(
    ("regex", "text"),
    [("a/b", "a/b"), (r"a\/b", "a/b"), (r"\\\\", r"\\"), ("/", "/"), ("a\nb", "a\nb"), ("", "")],
)
def test_any_character_may_stand_in_an_expression(llm: LLM, regex: str, text: str) -> None:
    [output] = llm.generate("The dog", SamplingParams(regex=regex, max_tokens=8))
    assert (output.text, output.finish_reason) == (text, "stop")


# Like the default model's, this vocabulary has no token for some control characters, and none for
# the first bytes of characters from U+40000 to U+BFFFF.
MISSING = b"\x04\x06\xf1\xf2"
RARE = "\U00040000"


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tiny_model(tmp_path_factory.mktemp("poor"), mask_token_id=7)
    return LLM(tiny_tokenizer(folder, without=MISSING), stride=4, dtype="float32")


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "\x04"},
        {"regex": "(a|b)*c?\x06"},
        {"regex": f"a{RARE}"},
        {"regex": "[\U00040000-\U000bffff]+"},
        {"json_schema": {"const": RARE}},
        {"json_schema": {"type": "object", "properties": {RARE: {}}, "required": [RARE]}},
    ],
)
def test_what_no_tokens_can_write_is_refused(poor: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="no text of this model"):
        poor.check([5, 6, 7], SamplingParams(**fields))


@settings(max_examples=200)
@given(
    st.text(alphabet="ab()|*?\\.{2}/\n\x04" + RARE, max_size=12),
    st.randoms(use_true_random=False),
)
def test_an_expression_is_refused_or_kept_to(regex: str, random: Random) -> None:
    llm = _shared()
    grammars = Grammars(llm.tokenizer, llm.config.vocab_size, frozenset({2}))
    try:
        grammar = grammars.start(SamplingParams(regex=regex))
        assert grammar is not None
        tokens: list[int] = []
        while len(tokens) < 20 and 2 not in tokens:
            allowed_V = grammars.allowed([grammar], [[]], rows=1)[0, 0]
            tokens.append(random.choice(allowed_V.nonzero().flatten().tolist()))
            grammar.advance(tokens[-1])
    except InvalidRequestError:
        return
    if tokens[-1] == 2:
        with contextlib.suppress(re.error):  # in Python, `a**` is one
            assert re.fullmatch(regex, llm.tokenizer.decode(tokens[:-1]))


@pytest.mark.parametrize(
    "fields",
    [{"regex": f"a{RARE}|b\x06|cc"}, {"json_schema": {"enum": [f"a{RARE}", f"b{RARE}"]}}],
)
def test_a_text_that_cannot_go_on_says_so_and_harms_nobody(
    poor: LLM, fields: dict[str, Any]
) -> None:
    """One way of the expression can be written; what a schema needs is not looked for."""
    params = SamplingParams(regex="[0-9]{4}", seed=1)
    [alone] = poor.generate("The dog", params)
    prompt = poor.tokenizer.encode("The dog")
    engine = poor.new_engine()
    other = engine.add(prompt, params)
    bad = [engine.add(prompt, SamplingParams(seed=n, **fields)) for n in range(8)]
    while engine.busy:
        engine.step()
    for request in bad:
        if request.finish_reason == "stop":
            assert request.text == "cc"
        else:
            assert request.finish_reason == "error" and "cannot go on" in str(request.error)
            assert isinstance(request.error, InvalidRequestError)
    assert any(request.error for request in bad)
    assert other.token_ids == alone.token_ids and other.finish_reason == "stop"


_CACHE: list[LLM] = []


def _shared() -> LLM:
    """One model for all examples."""
    if not _CACHE:
        from tempfile import mkdtemp

        folder = tiny_model(Path(mkdtemp()), mask_token_id=7)
        _CACHE.append(LLM(tiny_tokenizer(folder, without=MISSING), stride=4, dtype="float32"))
    return _CACHE[0]
