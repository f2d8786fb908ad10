"""The text of an I-DLM is the base model's own: greedy, coupled and in distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats

from idlm.decoding import cycle
from idlm.decoding.cycle import Method, State, decode, prefill
from idlm.decoding.layout import Layout
from idlm.decoding.params import SamplingParams
from idlm.decoding.sampling import Sampling, distribution
from idlm.model.attention import CausalAttention
from idlm.model.decoder import Decoder
from tests.support.random_model import random_adapter, random_config, random_decoder

LAYOUTS = [("linear", s) for s in (2, 3, 4, 8, 16)] + [("quadratic", s) for s in (2, 3, 4, 8)]
SAMPLED = {
    "plain": SamplingParams(temperature=1.0),
    "cool": SamplingParams(temperature=0.7),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "top_k": SamplingParams(temperature=1.0, top_k=5),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "penalties": SamplingParams(
        temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "all": SamplingParams(
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        logit_bias={3: 2.0, 5: -100.0},
    ),
}


@torch.inference_mode()
def run(
    method: Method, prompt_BP: torch.Tensor, params: list[SamplingParams], count: int
) -> tuple[torch.Tensor, int]:
    """The first ``count`` tokens of every request, and the number of forwards it took."""
    decoder = method.decoder
    c = decoder.config
    B, P = prompt_BP.shape
    room = P + 4 * count + method.layout.num_rows
    blocks = -(-room // 16)
    k = torch.zeros(c.num_layers, B * blocks, c.num_kv_heads, 16, c.head_dim)
    v = torch.zeros_like(k)
    table = torch.arange(B * blocks, dtype=torch.int32).view(B, blocks)
    start = torch.zeros(B, dtype=torch.int64)
    sampling = Sampling.of(
        params, list(range(B)), prompt_BP.tolist(), [[]] * B, c.vocab_size, k.device
    )
    outcome = prefill(method, k, v, table, prompt_BP, torch.full_like(start, P), start, sampling)
    texts = [[t[0]] for t in outcome.tokens_BN.tolist()]
    forwards = 1
    while min(map(len, texts)) < count:
        outcome = decode(method, k, v, table, outcome.state, sampling)
        forwards += 1
        accepted = outcome.verdict.accepted_B.tolist()
        for text, tokens, n in zip(texts, outcome.tokens_BN.tolist(), accepted, strict=True):
            text += tokens[: n + 1]
        assert int(outcome.state.length_B.max()) + method.layout.num_rows < room
    return torch.tensor([text[:count] for text in texts]), forwards


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(random_config(), peakedness=1.5)


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(0, 61, (6, 9), generator=torch.Generator().manual_seed(7))


def method(decoder: Decoder, layout: str, stride: int, rule: str) -> Method:
    adapter = None if layout == "ar" else random_adapter(decoder.config)
    return Method(decoder, adapter, Layout.named(layout, stride), rule)


def naive_greedy(decoder: Decoder, prompt_BP: torch.Tensor, count: int) -> torch.Tensor:
    tokens = prompt_BP
    for _ in range(count):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        hidden = decoder(tokens, positions, CausalAttention(positions))
        tokens = torch.cat((tokens, decoder.logits(hidden[:, -1:]).argmax(-1)), dim=1)
    return tokens[:, prompt_BP.shape[1] :]


@pytest.fixture(scope="module")
def greedy(decoder: Decoder, prompts: torch.Tensor) -> torch.Tensor:
    """What the base model says."""
    return naive_greedy(decoder, prompts, 40)


@pytest.mark.parametrize(("layout", "stride"), [("ar", 1), *LAYOUTS])
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_greedy_is_the_base_models_greedy(
    decoder: Decoder,
    prompts: torch.Tensor,
    greedy: torch.Tensor,
    layout: str,
    stride: int,
    rule: str,
) -> None:
    text, _ = run(
        method(decoder, layout, stride, rule), prompts, [SamplingParams(temperature=0)] * 6, 40
    )
    assert torch.equal(text, greedy)


@pytest.fixture(scope="module", params=SAMPLED)
def sampled(
    request: pytest.FixtureRequest, decoder: Decoder, prompts: torch.Tensor
) -> tuple[list[SamplingParams], torch.Tensor]:
    """Parameters, and what the base model says by them."""
    params = [SAMPLED[request.param]] * 6
    expected, _ = run(method(decoder, "ar", 1, "coupled"), prompts, params, 24)
    return params, expected


@pytest.mark.parametrize(("layout", "stride"), LAYOUTS)
def test_coupled_is_the_base_models_sample(
    decoder: Decoder,
    prompts: torch.Tensor,
    sampled: tuple[list[SamplingParams], torch.Tensor],
    layout: str,
    stride: int,
) -> None:
    params, expected = sampled
    text, _ = run(method(decoder, layout, stride, "coupled"), prompts, params, 24)
    assert torch.equal(text, expected)


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_a_request_does_not_see_the_rest_of_the_batch(
    decoder: Decoder, prompts: torch.Tensor, rule: str
) -> None:
    params = [SamplingParams(temperature=0), *list(SAMPLED.values())[2:]]
    assert len(params) == 6
    m = method(decoder, "quadratic", 4, rule)
    together, _ = run(m, prompts, params, 30)
    for row in range(6):
        text = _run_one(m, prompts[row], params[row], seed=row, count=30)
        assert torch.equal(text, together[row])


@torch.inference_mode()
def _run_one(
    method: Method, prompt_P: torch.Tensor, params: SamplingParams, seed: int, count: int
) -> torch.Tensor:
    c = method.decoder.config
    k = torch.zeros(c.num_layers, 16, c.num_kv_heads, 16, c.head_dim)
    v = torch.zeros_like(k)
    table = torch.arange(16, dtype=torch.int32)[None]
    start = torch.zeros(1, dtype=torch.int64)
    sampling = Sampling.of([params], [seed], [prompt_P.tolist()], [[]], c.vocab_size, k.device)
    length = torch.full_like(start, len(prompt_P))
    outcome = prefill(method, k, v, table, prompt_P[None], length, start, sampling)
    text = [int(outcome.tokens_BN[0, 0])]
    while len(text) < count:
        outcome = decode(method, k, v, table, outcome.state, sampling)
        text += outcome.tokens_BN[0, : int(outcome.verdict.accepted_B[0]) + 1].tolist()
    return torch.tensor(text[:count])


def joint_distribution(
    decoder: Decoder, prompt: torch.Tensor, params: SamplingParams, depth: int
) -> torch.Tensor:
    """Exact probabilities of all ``V ** depth`` continuations, by enumeration."""
    V = decoder.config.vocab_size
    joint = torch.ones(1)
    prefixes = prompt[None]
    for _ in range(depth):
        B = prefixes.shape[0]
        positions = torch.arange(prefixes.shape[1]).expand_as(prefixes)
        logits = decoder.logits(decoder(prefixes, positions, CausalAttention(positions))[:, -1:])
        output = prefixes[:, len(prompt) :].tolist()
        sampling = Sampling.of(
            [params] * B, [0] * B, [prompt.tolist()] * B, output, V, prompt.device
        )
        p = distribution(logits, sampling, torch.zeros(B, 1, 0, dtype=torch.int64))[:, 0]
        joint = (joint[:, None] * p).flatten()
        prefixes = torch.cat(
            (prefixes.repeat_interleave(V, 0), torch.arange(V).repeat(B)[:, None]), dim=1
        )
    return joint


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """p-value of the counts under ``probs``; cells that expect under 5 are put together."""
    expected = probs.double() * counts.sum()
    assert int(counts[probs == 0].sum()) == 0, "a token that the distribution forbids was chosen"
    small = expected < 5
    observed = torch.cat((counts[~small], counts[small].sum()[None])).double()
    wanted = torch.cat((expected[~small], expected[small].sum()[None]))
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep] / wanted.sum() * counts.sum()).pvalue)


CHI_PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "top_k_top_p": SamplingParams(temperature=1.0, top_k=4, top_p=0.9),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.5, presence_penalty=0.4),
}


def small_decoder() -> Decoder:
    """Of a vocabulary of 6; as little else as there can be, for many requests."""
    config = random_config(
        6,
        num_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    return random_decoder(config, seed=3, peakedness=0.4)


def sample_counts(rule: str, layout: str, stride: int, params: SamplingParams) -> torch.Tensor:
    V, depth, batch = 6, 3, 25_000
    decoder = small_decoder()
    m = method(decoder, layout, stride, rule)
    text, forwards = run(m, PROMPT.expand(batch, -1), [params] * batch, depth)
    assert forwards > 1
    code = (text * torch.tensor([V * V, V, 1])).sum(1)
    return torch.bincount(code, minlength=V**depth)


PROMPT = torch.tensor([1, 4, 4])


def exact(params: SamplingParams) -> torch.Tensor:
    decoder = small_decoder()
    return joint_distribution(decoder, PROMPT, params, 3)


@pytest.mark.parametrize("name", CHI_PARAMS)
@pytest.mark.parametrize(
    ("rule", "layout", "stride"),
    [
        ("rejection", "linear", 3),
        ("rejection", "quadratic", 3),
        ("rejection", "linear", 4),
        ("coupled", "quadratic", 3),
    ],
)
def test_joint_distribution_is_the_base_models(
    rule: str, layout: str, stride: int, name: str
) -> None:
    counts = sample_counts(rule, layout, stride, CHI_PARAMS[name])
    assert chi_square(counts, exact(CHI_PARAMS[name])) > 1e-3


def test_the_test_notices_argmax_drafts_with_softmax_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the authors' code does: the likeliest token is drafted, the softmax is divided by."""
    honest = cycle.propose

    def argmax_drafts(*args: object, **kwargs: object) -> object:
        drafts = honest(*args, **kwargs)  # type: ignore[arg-type]
        best = drafts.probs_BMK.argmax(-1, keepdim=True)
        return replace(drafts, tokens_BM=drafts.ids_BMK.gather(2, best).squeeze(2))

    monkeypatch.setattr(cycle, "propose", argmax_drafts)
    counts = sample_counts("rejection", "quadratic", 3, CHI_PARAMS["plain"])
    assert chi_square(counts, exact(CHI_PARAMS["plain"])) < 1e-9


def test_drafts_are_often_wrong_but_not_always(decoder: Decoder, prompts: torch.Tensor) -> None:
    """The tests above mean something only if both accepting and rejecting happen."""
    m = method(decoder, "quadratic", 4, "rejection")
    _, forwards = run(m, prompts, [SAMPLED["plain"]] * 6, 40)
    assert 14 < forwards < 40


def test_state_rows_can_be_selected_and_joined() -> None:
    decoder = random_decoder(random_config())
    m = method(decoder, "linear", 3, "rejection")
    c = decoder.config
    k = torch.zeros(c.num_layers, 3, c.num_kv_heads, 16, c.head_dim)
    table = torch.arange(3, dtype=torch.int32)[:, None]
    start = torch.zeros(3, dtype=torch.int64)
    prompt = torch.tensor([[1, 2], [3, 4], [5, 6]])
    params = [SamplingParams(temperature=1.0)] * 3
    sampling = Sampling.of(params, [1, 2, 3], prompt.tolist(), [[]] * 3, c.vocab_size, k.device)
    with torch.inference_mode():
        v, length = torch.zeros_like(k), torch.full_like(start, 2)
        state = prefill(m, k, v, table, prompt, length, start, sampling).state
    back = State.cat([state.select(torch.tensor([0])), state.select(torch.tensor([1, 2]))])
    for name in ("pending_B", "length_B"):
        assert torch.equal(getattr(back, name), getattr(state, name))
    for name in ("tokens_BM", "ids_BMK", "probs_BMK", "count_B"):
        assert torch.equal(getattr(back.drafts, name), getattr(state.drafts, name))
