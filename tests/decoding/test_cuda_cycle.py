"""Cycles through the CUDA kernels (interpreted on the CPU) are the cycles that torch defines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")
from idlm.decoding.cycle import Method, Outcome, State, decode, prefill
from idlm.decoding.layout import Layout
from idlm.decoding.params import SamplingParams
from idlm.decoding.sampling import Sampling
from idlm.model import cpu_kernels, cuda_head
from tests.support.random_model import random_adapter, random_config, random_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = SamplingParams(temperature=0)
WARM = SamplingParams(temperature=0.8)
CUT = SamplingParams(temperature=0.9, top_p=0.8, top_k=20)
TIRED = SamplingParams(temperature=1.1, repetition_penalty=1.3, logit_bias={3: 1.0})
TIRED_GREEDY = SamplingParams(temperature=0, presence_penalty=0.7)
PROMPTS = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(7)).to(DEVICE)


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """Decode through the CUDA kernels, or through torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_head, "usable", lambda device: wanted)
        patch.setattr(cpu_kernels, "usable", lambda tensor: False)
        yield


class Decoding:
    """Some requests that decode on a small random model."""

    def __init__(self, layout: str, stride: int, rule: str, params: list[SamplingParams]) -> None:
        config = random_config()
        decoder = random_decoder(config, peakedness=1.5).to(DEVICE)
        rows = Layout.named(layout, stride)
        adapter = random_adapter(config).to(DEVICE).freeze() if rows.num_masks else None
        self.method = Method(decoder, adapter, rows, rule)
        self.params, B = params, len(params)
        shape = config.num_layers, B * 12, config.num_kv_heads, 16, config.head_dim
        self.k, self.v = torch.zeros(2, *shape, device=DEVICE).unbind()
        self.table = torch.arange(B * 12, dtype=torch.int32, device=DEVICE).view(B, 12)

    def sampling(self) -> Sampling:
        B, V = len(self.params), self.method.decoder.config.vocab_size
        prompts = PROMPTS[:B].tolist()
        return Sampling.of(self.params, range(B), prompts, [[]] * B, V, DEVICE)

    def begin(self) -> Outcome:
        B = len(self.params)
        start_B = torch.zeros(B, dtype=torch.int64, device=DEVICE)
        given = PROMPTS[:B], torch.full_like(start_B, 9), start_B, self.sampling()
        return prefill(self.method, self.k, self.v, self.table, *given)

    def go_on(self, state: State) -> Outcome:
        return decode(self.method, self.k, self.v, self.table, state, self.sampling())


def assert_same(actual: Outcome, expected: Outcome) -> None:
    N = expected.tokens_BN.shape[1]
    assert torch.equal(actual.packed_BX[:, : N + 2], expected.packed_BX[:, : N + 2])
    torch.testing.assert_close(actual.verdict.overlap_BM, expected.verdict.overlap_BM)
    bits_BM = actual.packed_BX[:, N + 2 :].int()
    assert torch.equal(bits_BM.view(torch.float32), actual.verdict.overlap_BM)
    assert torch.equal(actual.tokens_BN, expected.tokens_BN)
    assert torch.equal(actual.state.pending_B, expected.state.pending_B)
    assert torch.equal(actual.state.length_B, expected.state.length_B)
    ours, theirs = actual.state.drafts, expected.state.drafts
    assert torch.equal(ours.count_B, theirs.count_B)
    assert torch.equal(ours.tokens_BM, theirs.tokens_BM)
    # The candidates are the whole (small) vocabulary, in another order.
    q = [torch.zeros(*d.tokens_BM.shape, 61, device=DEVICE) for d in (ours, theirs)]
    for q_BMV, drafts in zip(q, (ours, theirs), strict=True):
        q_BMV.scatter_add_(2, drafts.ids_BMK, drafts.probs_BMK)
    torch.testing.assert_close(q[0], q[1])


@pytest.mark.parametrize(
    ("layout", "stride", "rule", "params"),
    [
        ("ar", 1, "rejection", [GREEDY] * 3),
        ("linear", 3, "rejection", [GREEDY] * 3),
        ("quadratic", 2, "rejection", [GREEDY] * 2),
        ("quadratic", 4, "rejection", [GREEDY] * 2),
        ("ar", 1, "coupled", [WARM, GREEDY]),
        ("linear", 3, "rejection", [WARM, GREEDY, WARM]),
        ("linear", 3, "coupled", [WARM, WARM]),
        ("quadratic", 3, "rejection", [WARM, GREEDY, WARM]),
        ("quadratic", 3, "coupled", [WARM, GREEDY, WARM]),
        ("quadratic", 2, "rejection", [CUT, TIRED, GREEDY]),
        ("linear", 3, "coupled", [TIRED, CUT]),
        ("linear", 3, "rejection", [TIRED_GREEDY, GREEDY]),
    ],
)
@torch.inference_mode()
def test_cycles(layout: str, stride: int, rule: str, params: list[SamplingParams]) -> None:
    decoding = Decoding(layout, stride, rule, params)
    with kernels(True):
        actual = decoding.begin()
    with kernels(False):
        expected = decoding.begin()
    assert_same(actual, expected)
    for _ in range(4):
        with kernels(True):
            actual = decoding.go_on(expected.state)
        with kernels(False):
            expected = decoding.go_on(expected.state)
        assert_same(actual, expected)
