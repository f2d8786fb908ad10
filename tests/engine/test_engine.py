"""Requests in a batch: joining, leaving, stopping, aborting."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from idlm import LLM, SamplingParams
from idlm.decoding.cycle import Method
from idlm.engine.batch import Batch
from idlm.engine.commit import Launch
from idlm.engine.request import Source
from idlm.errors import InvalidRequestError
from idlm.llm import RequestOutput
from tests.support.tiny import tiny_model

CHAT = [{"role": "user", "content": "Name three colours and say one thing about each."}]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm(default_model_dir: object) -> LLM:
    """The default model, most of whose drafts are good."""
    return LLM(stride=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model, whose drafts rarely are; two requests run at once."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7)
    return LLM(folder, stride=4, dtype="float32", max_batch=2)


@pytest.fixture(scope="module")
def ids(llm: LLM) -> list[int]:
    return llm.tokenizer.apply_chat_template(CHAT)


@pytest.fixture(scope="module")
def whole(llm: LLM, ids: list[int]) -> RequestOutput:
    """The answer, undisturbed."""
    return llm.generate(ids, GREEDY)[0]


def test_requests_of_different_length_join_and_leave(tiny: LLM) -> None:
    """The same outputs as one by one, whatever joins or leaves the batch in between."""
    prompts = ["The sky is", "Once upon a time", "def add(a, b):", "1, 2, 3,", "Dear Sir,"]
    params = [
        SamplingParams(temperature=t, seed=n, max_tokens=m, top_p=p)
        for n, (t, m, p) in enumerate(
            [(0, 30, 1.0), (1, 5, 0.9), (0.7, 17, 1.0), (1, 1, 1.0), (0, 12, 1.0)]
        )
    ]
    together = tiny.generate(prompts, params)
    alone = [tiny.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert [len(o.token_ids) for o in together] == [30, 5, 17, 1, 12]
    assert any(o.stats.accepted for o in together)


def test_stats_add_up(whole: RequestOutput) -> None:
    stats = whole.stats
    assert stats.tokens == 24
    assert stats.verify + stats.reject + stats.cold == stats.forwards
    assert stats.cold == 1  # prefill only: the quadratic layout is never cold
    assert stats.accepted + stats.forwards >= stats.tokens
    assert 1 <= stats.tokens_per_forward <= 4


def test_linear_layout_is_cold_after_a_rejection(llm: LLM, ids: list[int]) -> None:
    stats = llm.with_layout("linear", 4).generate(ids, GREEDY)[0].stats
    assert stats.reject <= stats.cold <= stats.reject + 1
    if llm.device.type == "cpu":  # a cold forward is pending and three masks there
        assert stats.rows == 7 * (stats.forwards - stats.cold) + 4 * stats.cold


def test_sources_name_what_each_token_was(whole: RequestOutput) -> None:
    assert len(whole.sources) == len(whole.token_ids)
    assert whole.sources[0] == "sampled"
    assert set(whole.sources) <= {"sampled", "draft", "correction"}
    assert 0 < whole.sources.count(Source.DRAFT) <= whole.stats.accepted


def test_stop_string_ends_the_text_before_it(
    llm: LLM, ids: list[int], whole: RequestOutput
) -> None:
    stop = whole.text[10:14]
    cut = llm.generate(ids, SamplingParams(temperature=0, max_tokens=24, stop=stop))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_stop_string_over_token_borders_never_shows_in_a_stream(
    llm: LLM, ids: list[int], whole: RequestOutput
) -> None:
    for start in (3, 8, 15):
        stop = whole.text[start : start + 9]
        params = SamplingParams(temperature=0, max_tokens=24, stop=[stop, "never comes"])
        streamed = "".join(d.text for d in llm.stream(ids, params))
        assert streamed == whole.text[: whole.text.index(stop)]


def test_stop_token_ids_and_ignore_eos(llm: LLM, ids: list[int], whole: RequestOutput) -> None:
    token = whole.token_ids[6]
    first = whole.token_ids.index(token)
    cut = llm.generate(ids, SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token]))[0]
    assert cut.token_ids == whole.token_ids[: first + 1] and cut.finish_reason == "stop"
    assert cut.text == llm.tokenizer.decode(cut.token_ids[:-1])
    eos = llm.config.eos_token_ids[0]
    force = {eos: 100.0}
    ended = llm.generate(ids, SamplingParams(temperature=0, max_tokens=5, logit_bias=force))[0]
    assert ended.token_ids == [eos] and ended.text == "" and ended.finish_reason == "stop"
    on = SamplingParams(temperature=0, max_tokens=5, logit_bias=force, ignore_eos=True)
    assert llm.generate(ids, on)[0].token_ids == [eos] * 5


def test_logprobs_are_the_base_models(llm: LLM, ids: list[int]) -> None:
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=12, logprobs=3)
    ours = llm.generate(ids, params)[0]
    plain = llm.autoregressive().generate(
        ids + ours.token_ids[:-1], SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    )[0]
    assert ours.logprobs is not None and plain.logprobs is not None
    assert len(ours.logprobs) == len(ours.token_ids)
    for token, entry in zip(ours.token_ids, ours.logprobs, strict=True):
        assert token in entry and 3 <= len(entry) <= 4
        ranks = sorted(e.rank for e in entry.values())
        assert ranks[:3] == [1, 2, 3]
        by_rank = sorted(entry.values(), key=lambda e: e.rank)
        assert by_rank == sorted(by_rank, key=lambda e: -e.logprob)  # of equals either is first
        assert entry[token].decoded_token == llm.tokenizer.token_text(token)
    for token, value in plain.logprobs[0].items():
        if token in ours.logprobs[-1]:
            assert ours.logprobs[-1][token].logprob == pytest.approx(value.logprob, abs=1e-4)


def test_stream_is_the_whole_output_in_pieces(
    llm: LLM, ids: list[int], whole: RequestOutput
) -> None:
    deltas = list(llm.stream(ids, GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert len(deltas) == whole.stats.forwards
    assert deltas[-1].output is not None and deltas[-1].output.token_ids == whole.token_ids
    assert all(d.output is None for d in deltas[:-1])


def test_an_abandoned_stream_leaves_the_engine_free(tiny: LLM) -> None:
    stream = tiny.stream("The dog", GREEDY)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not tiny._engine.busy
    assert tiny.generate("The dog", GREEDY)[0].finish_reason == "length"


def test_aborting_one_of_several_leaves_the_others_as_they_were(tiny: LLM) -> None:
    ids, other = map(tiny.tokenizer.encode, ("The dog", "The capital of France"))
    alone = tiny.generate(other, GREEDY)[0].token_ids
    engine = tiny.new_engine()
    first, second = engine.add(ids, GREEDY), engine.add(other, GREEDY)
    for _ in range(4):
        engine.step()
    engine.abort(first)  # the last one moves into its place
    while engine.busy:
        engine.step()
    assert second.token_ids == alone


def test_two_streams_at_once_do_not_mix(tiny: LLM) -> None:
    prompts = "The dog", "The capital of France"
    alone = [tiny.generate(p, GREEDY)[0].token_ids for p in prompts]
    streams = [tiny.stream(p, GREEDY) for p in prompts]
    got: list[list[int]] = [[], []]
    for _ in range(24):
        for tokens, stream in zip(got, streams, strict=True):
            tokens += next(stream).token_ids if len(tokens) < 24 else []
    assert got == alone


def test_the_context_is_a_limit(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, max_position_embeddings=64, mask_token_id=7)
    llm = LLM(folder, stride=4, dtype="float32")
    assert llm.layout.num_rows == 16  # rows beyond the context are no tokens: they do not count
    for room in (3, 1):
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=99)
        output = llm.generate([5] * (64 - room), params)[0]
        assert len(output.token_ids) == room and output.finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="context holds 64"):
        llm.generate([5] * 64, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("", "empty"),
        ([], "empty"),
        ([49152], "Token id 49152"),
        ([-1], "Token id -1"),
        ([[1.5]], "Token id 1.5"),
        ({"a": 1}, "prompts must be"),
    ],
)
def test_bad_prompts_are_refused(llm: LLM, prompt: object, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]


def test_one_bad_prompt_stops_the_batch_before_any_work(llm: LLM, ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate([ids, [49152]], GREEDY)
    assert not llm._engine.busy


def test_params_must_match_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(InvalidRequestError, match="not in the vocabulary"):
        llm.generate("a", SamplingParams(logit_bias={70000: 1.0}))


def test_special_token_text_is_ordinary_text(llm: LLM) -> None:
    """Nothing a user writes makes a mask: masks are rows of a forward, not token ids."""
    for text in ("[MASK] and <mask> and <|MASK|>", "<|endoftext|>"):
        ids, params = llm.tokenizer.encode(text), SamplingParams(temperature=0, max_tokens=8)
        a = llm.generate(ids, params)[0].token_ids
        assert a == llm.autoregressive().generate(ids, params)[0].token_ids


@pytest.mark.parametrize(("layout", "stride"), [("ar", 1), ("linear", 3), ("quadratic", 3)])
def test_mask_token_is_never_sampled(tmp_path: Path, layout: str, stride: int) -> None:
    folder = tiny_model(tmp_path, mask_token_id=7)
    llm = LLM(folder, layout=layout, stride=stride, dtype="float32")
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature, logit_bias={7: 100.0}, max_tokens=12, ignore_eos=True, seed=0
        )
        [output] = llm.generate("Hello", params)
        assert len(output.token_ids) == 12 and 7 not in output.token_ids


def test_strides_are_chosen_unless_one_is_given(tmp_path: Path) -> None:
    llm = LLM(tiny_model(tmp_path, mask_token_id=7), dtype="float32")
    assert (llm.auto, llm.layouts, llm.verification) == (True, "auto", "coupled")
    linear = llm.with_layout("linear", "auto")
    params = [SamplingParams(temperature=t, seed=3, max_tokens=40, ignore_eos=True) for t in (0, 1)]
    expected = [o.token_ids for o in llm.autoregressive().generate(["a", "b"], params)]
    for each in (llm, linear):
        assert [o.token_ids for o in each.generate(["a", "b"], params)] == expected
    names = {plan.partition(":")[0] for plan in linear.new_engine().stats.plans}
    assert "linear" in names and "quadratic" not in names
    fixed = llm.with_layout("auto", 4)
    assert (fixed.auto, fixed.layout.name, fixed.verification) == (False, "quadratic", "rejection")
    assert not llm.with_layout("ar", "auto").auto


def test_what_the_host_takes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which drafts cost nothing is of no use if the host cannot keep up."""
    now, launch = [0.0], Batch.launch

    def launched(batch: Batch, *given: Any) -> tuple[Launch, Launch | None]:
        method: Method = given[0]
        drafts = method.layout.num_masks > 0
        now[0] += 2e-3 if drafts else 1e-3
        cycle, begun = launch(batch, *given)
        return replace(cycle, seconds=0.5e-3 if drafts else 1e-3), begun

    monkeypatch.setattr(Batch, "launch", launched)
    monkeypatch.setattr("idlm.engine.engine.time.perf_counter", lambda: now[0])
    llm = LLM(tiny_model(tmp_path, mask_token_id=7), dtype="float32")
    params = SamplingParams(temperature=1, seed=1, max_tokens=200, ignore_eos=True)
    for _ in range(4):
        before = Counter(llm._engine.stats.plans)
        llm.generate(["a"] * 4, params)
    last = Counter(llm._engine.stats.plans) - before
    assert last["ar:1"] > 0.9 * last.total()
