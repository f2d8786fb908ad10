"""The paged attention kernels, interpreted on the CPU or compiled on a GPU, against SDPA."""

from __future__ import annotations

import itertools

import pytest
import torch

from idlm.model.attention import grouped_attention, visibility_bias, within_window
from idlm.model.decoder import rotate

pytest.importorskip("triton")
from idlm.model.cuda.paged_attention import PART_KEYS, attend, cut_of
from idlm.model.cuda.rotation import Heads, rotate_and_append
from idlm.model.cuda.rows import Rows
from tests.support.paged import cells, flat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = 16
# The interpreter's matrix product takes bf16 for integers.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case:
    """Random requests of one batch: contiguous keys, and the same in scattered blocks."""

    def __init__(
        self,
        starts: list[int],
        R: int,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        masks: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        B, S = len(starts), max(starts) + R
        P = -(-S // T)
        self.starts, self.masks = starts, masks
        self.q_BRQD = torch.randn(B, R, heads, dim, generator=draw).to(dtype)
        self.k_BSKD, self.v_BSKD = torch.randn(2, B, P * T, kv_heads, dim, generator=draw).to(dtype)
        self.start_B = torch.tensor(starts)
        # Rows at any distance after the committed tokens, each seeing itself.
        self.positions_BR = self.start_B[:, None] + torch.arange(R)
        self.visible_BRR = torch.rand(B, R, R, generator=draw) < 0.5
        self.visible_BRR |= torch.eye(R, dtype=torch.bool)
        blocks = torch.randperm(B * P + 3, generator=draw)[: B * P]
        self.table_BP = blocks.view(B, P).int()
        shape = (B * P + 3, kv_heads, T, dim)
        # Poison: a cell that nobody wrote must not count.
        self.k_NKTD, self.v_NKTD = torch.full((2, *shape), float("nan")).to(dtype)
        for b, start in enumerate(starts):
            for cache, source in ((self.k_NKTD, self.k_BSKD), (self.v_NKTD, self.v_BSKD)):
                padded_PTKD = source[b].unflatten(0, (P, T))
                for p in range(-(-start // T)):
                    rows = min(T, start - p * T)
                    cache[self.table_BP[b, p].long(), :, :rows] = padded_PTKD[p, :rows].transpose(
                        0, 1
                    )

    def run(self, window: int | None = None, rows: slice = slice(None)) -> torch.Tensor:
        """The kernels on the requests at ``rows``."""
        R = self.q_BRQD.shape[1]
        index_BR = self.positions_BR
        batch_B1 = torch.arange(len(self.starts))[:, None]
        k, v = (x[batch_B1, index_BR][rows].to(DEVICE) for x in (self.k_BSKD, self.v_BSKD))
        k_cache, v_cache = self.k_NKTD.to(DEVICE), self.v_NKTD.to(DEVICE)
        table, start = self.table_BP[rows].to(DEVICE), self.start_B[rows].to(DEVICE)
        clean = R - self.masks
        flight = Rows(
            requests=len(k),
            clean=clean,
            masks=self.masks,
            table_BP=table,
            start_B=start,
            positions_BR=self.positions_BR[rows].to(DEVICE),
            visible_BRR=self.visible_BRR[rows].to(DEVICE),
            first_clean=0,
            first_mask=len(k) * clean,
        )
        # An angle of 0: what is appended stays as it is.
        qkv_BRW = torch.cat((self.q_BRQD[rows].to(DEVICE), k, v), dim=2).flatten(2)
        qkv_NW = flat(qkv_BRW, clean)
        cos_ND = torch.ones(len(qkv_NW), k.shape[-1], dtype=k.dtype, device=DEVICE)
        where = cells(table, start, R, clean)
        heads = Heads(cos_ND, torch.zeros_like(cos_ND), where, k_cache, v_cache)
        rotate_and_append(qkv_NW, heads)
        out_NX = attend(qkv_NW, k_cache, v_cache, [flight], window)
        return flight.unflat(out_NX).view(self.q_BRQD[rows].shape).cpu()

    def expected(self, window: int | None = None) -> torch.Tensor:
        """SDPA in fp64."""
        B, R = self.positions_BR.shape
        S = self.k_BSKD.shape[1]
        visible_BRS = (torch.arange(S) < self.start_B[:, None])[:, None].repeat(1, R, 1)
        index_BRR = self.positions_BR[:, None].expand(B, R, R)
        visible_BRS.scatter_(2, index_BRR, self.visible_BRR)
        keys_BS = torch.arange(S).repeat(B, 1)
        visible_BRS &= within_window(self.positions_BR, keys_BS, window)
        return grouped_attention(
            self.q_BRQD.double(),
            self.k_BSKD.double().transpose(1, 2),
            self.v_BSKD.double().transpose(1, 2),
            visibility_bias(visible_BRS, torch.float64),
        )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("starts", "R", "heads", "kv_heads", "dim"),
    [
        ([0, 1, 40], 7, 9, 3, 64),
        ([PART_KEYS - 3, PART_KEYS, 5], 4, 4, 4, 80),
        ([PART_KEYS + 5, 17], 16, 4, 2, 96),
        ([31], 1, 8, 1, 128),
        ([20, 300], 25, 3, 1, 256),
    ],
)
def test_matches_sdpa(starts: list[int], R: int, heads: int, kv_heads: int, dim: int) -> None:
    case = Case(starts, R, heads, kv_heads, dim, masks=R // 2)
    assert relative_error(case.run(), case.expected()) < 1e-5


@pytest.mark.parametrize(
    ("starts", "R", "heads", "kv_heads", "rows"),
    [([40] * 16, 16, 9, 3, 64), ([5, 70], 88, 3, 1, 64), ([9] * 16, 5, 9, 3, 16)],
)
def test_high_tiles(starts: list[int], R: int, heads: int, kv_heads: int, rows: int) -> None:
    """Many rows that see the same keys, of many requests or of a prompt, share what they read."""
    packed, texts = R * heads // kv_heads, len(starts) * kv_heads
    assert cut_of(texts, packed, 64, itemsize=2).rows == rows
    case = Case(starts, R, heads, kv_heads, 64, torch.float16, masks=R // 2)
    assert relative_error(case.run(), case.expected()) < BOUNDS[torch.float16]


@pytest.mark.parametrize("window", [1, 270])
def test_sliding_window(window: int) -> None:
    case = Case([300, 3], 3, 4, 2, 64)
    assert relative_error(case.run(window), case.expected(window)) < 1e-5


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = Case([0], 3, 4, 2, 64)
    case.visible_BRR[:, 1] = False
    out_BRQD = case.run()
    assert torch.equal(out_BRQD[:, 1], torch.zeros_like(out_BRQD[:, 1]))
    assert (out_BRQD[:, [0, 2]] != 0).all()


def test_a_request_does_not_depend_on_the_batch() -> None:
    case = Case([300, 20, 77], 4, 6, 3, 64)
    together = case.run()
    for b in range(3):
        torch.testing.assert_close(case.run(rows=slice(b, b + 1)), together[b : b + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("R", [1, 7, 16, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (32, 8, 128), (4, 4, 80), (8, 2, 96), (4, 1, 256)]
)
def test_head_sizes(heads: int, kv_heads: int, dim: int, R: int, dtype: torch.dtype) -> None:
    case = Case([1, 600, 2048], R, heads, kv_heads, dim, dtype, masks=R // 2)
    assert relative_error(case.run(), case.expected()) < BOUNDS[dtype]
    assert relative_error(case.run(100), case.expected(100)) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("start", [8192, 32_000])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("R", [1, 16, 519])
def test_long_contexts(start: int, heads: int, kv_heads: int, dim: int, R: int) -> None:
    case = Case([start, start // 2], R, heads, kv_heads, dim, torch.bfloat16)
    assert relative_error(case.run(), case.expected()) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("normed", [False, True])
def test_rotation_norms_and_cache(normed: bool) -> None:
    B, R, Q, K, D, eps = 2, 3, 4, 2, 80, 1e-5
    draw = torch.Generator().manual_seed(0)
    qkv_BRND = torch.randn(B, R, Q + 2 * K, D, generator=draw)
    norms_2D = torch.rand(2, D, generator=draw) + 0.5
    angles_BR1F = torch.randn(B, R, 1, D // 2, generator=draw)
    cos_BR1D = torch.cat((angles_BR1F.cos(),) * 2, dim=-1)
    sin_BR1D = torch.cat((-angles_BR1F.sin(), angles_BR1F.sin()), dim=-1)
    caches_2NKTD = torch.zeros(2, 8, K, T, D)
    table_BP, start_B = torch.tensor([[5, 2], [7, 1]]).int(), torch.tensor([15, 3])
    on_device = caches_2NKTD.to(DEVICE)
    clean = 2
    qkv_NW, cos_ND, sin_ND = (
        flat(x.flatten(2), clean).to(DEVICE) for x in (qkv_BRND, cos_BR1D, sin_BR1D)
    )
    where = cells(table_BP, start_B, R, clean).to(DEVICE)
    q_norm_D, k_norm_D = norms_2D.to(DEVICE).unbind() if normed else (None, None)
    heads = Heads(cos_ND, sin_ND, where, *on_device.unbind())
    rotate_and_append(qkv_NW, heads, q_norm_D, k_norm_D, eps)
    q_NQD = qkv_NW.cpu().view(B * R, -1, D)[:, :Q]
    q, k, v = qkv_BRND.split((Q, K, K), dim=2)
    if normed:
        q = torch.nn.functional.rms_norm(q, (D,), norms_2D[0], eps)
        k = torch.nn.functional.rms_norm(k, (D,), norms_2D[1], eps)
    q, k = rotate(q, cos_BR1D, sin_BR1D), rotate(k, cos_BR1D, sin_BR1D)
    for b, r in itertools.product(range(B), range(R)):
        index = int(start_B[b]) + r
        block = int(table_BP[b, index // T])
        caches_2NKTD[0, block, :, index % T] = k[b, r]
        caches_2NKTD[1, block, :, index % T] = v[b, r]
    torch.testing.assert_close(q_NQD, flat(q, clean), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(on_device.cpu(), caches_2NKTD, atol=1e-5, rtol=1e-4)
