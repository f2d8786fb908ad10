"""Kernels that choose tokens, interpreted on the CPU or compiled on a GPU, against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from idlm.model.cuda.choice import CHUNK, argmax, best_of_groups
from idlm.model.cuda.head import Draw
from idlm.model.cuda.score import begin_chain, draft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 61, CHUNK, CHUNK + 1, 3 * CHUNK + 17]


def strided(B: int, R: int, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits with many ties, cut out of a larger tensor."""
    draw = torch.Generator().manual_seed(V)
    logits = torch.randint(-20, 20, (B, R + 2, V + 3), generator=draw).to(dtype)
    return logits.to(DEVICE)[:, 1 : R + 1, :V]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", SIZES)
def test_argmax_is_the_first_of_equals(V: int, dtype: torch.dtype) -> None:
    logits_BRV = strided(3, 2, V, dtype)
    # The first of equals, which torch does not promise on every device.
    best_BR1 = logits_BRV.amax(-1, keepdim=True)
    expected = (logits_BRV == best_BR1).int().cpu().argmax(-1)
    assert torch.equal(argmax(logits_BRV).cpu(), expected)


def test_argmax_of_nothing_finite_can_be_used() -> None:
    logits_BRV = torch.full((2, 1, CHUNK + 9), torch.nan, device=DEVICE)
    logits_BRV[1] = -torch.inf
    index_BR = argmax(logits_BRV)
    assert 0 <= int(index_BR[0, 0]) < CHUNK + 9
    assert int(index_BR[1, 0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "k"), [(61, 61), (61, 9), (100, 64), (2500, 70), (9, 1), (4096, 128)]
)
def test_the_best_of_each_group(V: int, k: int, dtype: torch.dtype) -> None:
    logits_BRV = strided(2, 3, V, dtype)
    depth = -(-V // k)
    padded = torch.nn.functional.pad(logits_BRV.float().cpu(), (0, depth * k - V), value=-torch.inf)
    groups = padded.unflatten(-1, (depth, k))
    first = (groups == groups.amax(-2, keepdim=True)).int().argmax(-2)
    expected = first * k + torch.arange(k)
    top = groups.amax(-2)
    near = top >= top.amax(-1, keepdim=True) - 6
    ids_BRK, near_BR = (x.cpu() for x in best_of_groups(logits_BRV, k, 6.0))
    assert torch.equal(near_BR, near.sum(-1).int())
    order = (~near).to(torch.uint8).argsort(dim=-1, stable=True)
    assert torch.equal(ids_BRK, expected.gather(-1, order))


def test_the_best_of_nothing_finite_can_be_used() -> None:
    logits_BRV = torch.full((3, 1, 100), torch.nan, device=DEVICE)
    logits_BRV[1] = -torch.inf
    logits_BRV[2, 0, 40] = torch.inf
    ids_BRK, near_BR = best_of_groups(logits_BRV, 48, 6.0)
    assert near_BR.flatten().tolist() == [48, 48, 1]
    assert bool(((ids_BRK >= 0) & (ids_BRK < 100)).all())
    assert int(ids_BRK[2, 0, 0]) == 40


def check_drafts(B: int, M: int, K: int, H: int, V: int, dtype: torch.dtype, times: int) -> None:
    """Drafts of all places are the likeliest, every time, and a draw's come from its ``q``."""
    maker = torch.Generator().manual_seed(H)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=maker).to(DEVICE, dtype)

    hidden_BMH, state_BH, norm_H = random(B, M, H), random(B, H), random(H)
    weight_VH, embedding_VH = random(V, H) * H**-0.5, random(V, H)
    ids_BMK = torch.rand(B * M, V, generator=maker).topk(K).indices.view(B, M, K).to(DEVICE)
    seed_B = position_B = torch.arange(B, device=DEVICE)
    greedy_B = seed_B % 3 == 0
    draw = Draw(seed_B, position_B, 2, torch.full((B,), 0.8, device=DEVICE), greedy_B)
    summed_BMH = (hidden_BMH + state_BH[:, None]).float()
    logits_BMV = summed_BMH.double() @ weight_VH.double().T
    logits_BMK = logits_BMV.gather(2, ids_BMK)
    near_BM = torch.randint(1, K + 1, (B, M), generator=maker).to(DEVICE)
    near_BM[0], near_BM[1:2] = K, 1
    logits_BMK[torch.arange(K, device=DEVICE) >= near_BM[..., None]] = -torch.inf
    q_BMK = (logits_BMK / 0.8).softmax(-1).float()
    best_BMK = logits_BMK == logits_BMK.amax(-1, keepdim=True)
    q_BMK = torch.where(greedy_B[:, None, None], best_BMK.float(), q_BMK)
    found = []
    for _ in range(times):  # a race would show now and then only
        for given in (None, draw):
            token_BH, _, finished_MB = begin_chain(seed_B, embedding_VH, norm_H, 1e-5, M)
            tokens_BM = torch.full((B, M), -1, device=DEVICE)
            probs_BMK = None if given is None else torch.full((B, M, K), -1.0, device=DEVICE)
            for place in range(M):
                token_BH = draft(
                    hidden_BMH,
                    state_BH,
                    weight_VH,
                    ids_BMK,
                    near_BM.int(),
                    embedding_VH,
                    norm_H,
                    1e-5,
                    finished_MB,
                    place,
                    tokens_BM,
                    probs_BMK,
                    given,
                )
                expected_BH = torch.nn.functional.rms_norm(
                    embedding_VH[tokens_BM[:, place]].float(), (H,), norm_H.float(), 1e-5
                )
                torch.testing.assert_close(token_BH.float(), expected_BH, atol=2e-2, rtol=2e-2)
            at_BMK = ids_BMK == tokens_BM[..., None]
            assert bool((at_BMK.sum(-1) == 1).all())
            if probs_BMK is None:
                chosen_BM = logits_BMK.where(at_BMK, 0.0).sum(-1)
                torch.testing.assert_close(chosen_BM, logits_BMK.amax(-1), atol=1e-4, rtol=1e-4)
            else:
                torch.testing.assert_close(probs_BMK, q_BMK, atol=1e-4, rtol=1e-3)
            found.append(tokens_BM)
    for index in (0, 1):
        assert all(torch.equal(tokens, found[index]) for tokens in found[index::2])


def test_drafts() -> None:
    check_drafts(B=4, M=2, K=37, H=48, V=90, dtype=torch.float32, times=1)
    # More candidates than the programs of a launch take at once, and than whose noise is made.
    check_drafts(B=2, M=1, K=300, H=48, V=400, dtype=torch.float32, times=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "H"), [(1, 576), (128, 576), (16, 4096)])
def test_real_drafts(B: int, H: int, dtype: torch.dtype) -> None:
    check_drafts(B, M=3, K=1024, H=H, V=8192, dtype=dtype, times=20)
