"""Verification by the CUDA kernels (interpreted on the CPU) is the verification of `verify`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from idlm.decoding.params import SamplingParams
from idlm.decoding.random import Stream, exponential, uniform
from idlm.decoding.sampling import Sampling, sample
from idlm.decoding.settle import settle
from idlm.decoding.verify import Drafts, Verdict, verify
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cuda import head as cuda_head
from idlm.model.cuda import noise as noise_kernel
from idlm.model.cuda.choice import CHUNK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY, WARM, HOT = (SamplingParams(temperature=t) for t in (0, 0.7, 1.3))
V, K = 2 * CHUNK + 100, 40


def sampling_of(params: list[SamplingParams]) -> Sampling:
    B = len(params)
    seeds = [17 * b - 40 for b in range(B)]
    return Sampling.of(params, seeds, [[]] * B, [[]] * B, V, DEVICE)


def case(params: list[SamplingParams], M: int, seed: int) -> tuple[torch.Tensor, Drafts]:
    """Logits that agree with their drafts more often than chance has it."""
    draw = torch.Generator().manual_seed(seed)
    B = len(params)
    logits_BNV = torch.randn(B, M + 2, V, generator=draw)[:, 1:]
    # Candidates of all chunks.
    ids_BMK = torch.rand(B, M, V, generator=draw).topk(K, dim=-1).indices
    top_BMK = logits_BNV[:, :M].gather(2, ids_BMK)
    logits_BNV[:, :M].scatter_(2, ids_BMK, top_BMK + 7)
    probs_BMK = (top_BMK + 0.2 * torch.randn(B, M, K, generator=draw)).softmax(-1)
    for b, p in enumerate(params):
        if p.greedy:
            probs_BMK[b] = (probs_BMK[b] == probs_BMK[b].amax(-1, keepdim=True)).float()
    choice_BM1 = torch.multinomial(probs_BMK.flatten(0, 1), 1, generator=draw).view(B, M, 1)
    count_B = torch.randint(0, M + 1, (B,), generator=draw)
    count_B[: B // 2] = M
    drafts = Drafts(ids_BMK.gather(2, choice_BM1).squeeze(2), ids_BMK, probs_BMK, count_B)
    return logits_BNV.to(DEVICE), Drafts(*(x.to(DEVICE) for x in vars(drafts).values()))


def verdicts(
    rule: str, logits_BNV: torch.Tensor, drafts: Drafts, params: list[SamplingParams]
) -> tuple[Verdict, Verdict]:
    """By the kernels, and by torch."""
    position_B = torch.arange(len(params), device=DEVICE) * 3 + 5
    found = []
    for wanted in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_head, "usable", lambda device, wanted=wanted: wanted)
            patch.setattr(cpu_kernels, "usable", lambda tensor: False)
            found.append(verify(rule, logits_BNV, drafts, position_B, sampling_of(params)))
    return found[0], found[1]


def assert_same(actual: Verdict, expected: Verdict) -> None:
    assert torch.equal(actual.accepted_B, expected.accepted_B)
    assert torch.equal(actual.next_B, expected.next_B)
    torch.testing.assert_close(actual.overlap_BM, expected.overlap_BM, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("params", [[GREEDY] * 6, [WARM, HOT, GREEDY, WARM, HOT, GREEDY]])
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("M", [0, 1, 3])
def test_verdicts(M: int, rule: str, params: list[SamplingParams]) -> None:
    accepted = set()
    for seed in range(3):
        logits_BNV, drafts = case(params, M, seed)
        # A graph's drafts are cut out of longer ones.
        longer = drafts.resized(M + 2).resized(M)
        actual, expected = verdicts(rule, logits_BNV, longer, params)
        assert_same(actual, expected)
        accepted |= set(expected.accepted_B.tolist())
    assert {0, M} <= accepted


def test_nothing_left_over() -> None:
    """A rejection where p = q: then the draw is from p."""
    logits_BNV, drafts = case([WARM] * 4, 1, 0)
    dense = torch.softmax(logits_BNV[:, :1] / WARM.temperature, -1)
    ids = torch.arange(V, device=DEVICE).expand_as(dense)
    # A draft that cannot stand: q says more than it says of the others.
    probs = dense.clone()
    token = dense.argmin(-1)
    probs.scatter_(2, token[..., None], 1.0)
    drafts = replace(drafts, tokens_BM=token, ids_BMK=ids.contiguous(), probs_BMK=probs)
    drafts.count_B.fill_(1)
    actual, expected = verdicts("rejection", logits_BNV, drafts, [WARM] * 4)
    assert expected.accepted_B.tolist() == [0] * 4
    assert torch.equal(actual.accepted_B, expected.accepted_B)
    # Rounding decides whether a grain of a token is left over; what cannot be is the draft.
    assert bool((actual.next_B != token[:, 0]).all())


@pytest.mark.parametrize(("M", "blocks", "size"), [(3, 4, 3), (3, 1, 3), (0, 1, 5), (0, 0, 0)])
def test_settle(M: int, blocks: int, size: int) -> None:
    B, draw = 7, torch.Generator().manual_seed(M)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draw).to(DEVICE)

    count_B = whole(0, M + 1, B)
    accepted_B = torch.minimum(whole(0, M + 1, B), count_B)
    verdict = Verdict(accepted_B, whole(0, V, B), torch.rand(B, M, device=DEVICE))
    drafts = Drafts.certain(whole(0, V, B, M + 2)[:, :M], count_B)
    given = verdict, drafts, whole(0, 99, B), whole(-1, blocks, M + 1, M + 1), 20, size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_head, "usable", lambda device: True)
        actual = settle(*given)
        patch.setattr(cuda_head, "usable", lambda device: False)
        expected = settle(*given)
    for ours, theirs in zip(vars(actual).values(), vars(expected).values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("X", [5, CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("some", [True, False])
def test_samples(X: int, some: bool) -> None:
    draw = torch.Generator().manual_seed(X)
    B, R = 3, 2
    probs_BRX = torch.randn(B, R + 1, X, generator=draw).softmax(-1).to(DEVICE)[:, 1:]
    probs_BRX[0, 0] *= torch.rand(X, generator=draw).to(DEVICE) < 0.5
    ids_BRX = torch.rand(B, R + 1, X, generator=draw).argsort(-1).to(DEVICE)[:, :R]
    seed_B, position_BR = (torch.arange(n, device=DEVICE) for n in (B, B * R))
    found = []
    for wanted in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_head, "usable", lambda device, wanted=wanted: wanted)
            given = probs_BRX, seed_B, position_BR.view(B, R), Stream.DRAFT
            found.append(sample(*given, ids_BRX if some else None))
    assert torch.equal(*found)


@triton.jit
def _numbers(seed_ptr, position_ptr, u_ptr, e_ptr, STREAM: tl.constexpr, X: tl.constexpr):  # type: ignore[no-untyped-def]
    b, token = tl.program_id(0), tl.arange(0, X)
    key = noise_kernel.key_of(tl.load(seed_ptr + b), tl.load(position_ptr + b), STREAM)
    tl.store(u_ptr + b, noise_kernel.uniform(key))
    tl.store(e_ptr + b * X + token, noise_kernel.exponential(key, token))


def test_random_numbers() -> None:
    seed_B = torch.tensor([0, 1, -1, 2**62, -(2**63), 12345], device=DEVICE)
    position_B = torch.tensor([0, 7, 1, 2**40, 5, 99], device=DEVICE)
    u_B = torch.zeros(6, dtype=torch.float64, device=DEVICE)
    e_BX = torch.zeros(6, 512, device=DEVICE)
    _numbers[(6,)](seed_B, position_B, u_B, e_BX, STREAM=int(Stream.DRAFT), X=512)
    assert torch.equal(u_B, uniform(seed_B, position_B, Stream.DRAFT))
    token_X = torch.arange(512, device=DEVICE)
    expected = exponential(seed_B[:, None], position_B[:, None], Stream.DRAFT, token_X)
    torch.testing.assert_close(e_BX, expected, rtol=1e-6, atol=0)
