"""The fused CUDA layers against their definition: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from idlm.model.adapter import Adapter
from idlm.model.attention import PagedAttention
from idlm.model.cuda import head as cuda_head
from idlm.model.cuda import stack as cuda_stack
from idlm.model.decoder import Decoder, Part
from tests.support.paged import block_table, contiguous, paged
from tests.support.random_model import random_adapter, random_config, random_decoder

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qk norm, window": {"qk_norm": True, "sliding_window": 6, "head_dim": 16},
}


def model_of(
    shape: str, adapted: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Decoder, Adapter | None]:
    """Random; its projections are one launch each, or the library's product and one."""
    if not fused:
        monkeypatch.setattr(cuda_stack, "FUSED_ROWS", 0)
        monkeypatch.setattr(cuda_stack, "SMALL_WEIGHT", 0)
    config = random_config(**SHAPES[shape])
    decoder = random_decoder(config).to(DEVICE)
    for name, parameter in decoder.named_parameters():
        if "norm" in name or "bias" in name:  # norms at 1 and biases at 0 would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.3)
    adapter = random_adapter(config).to(DEVICE).freeze() if adapted else None
    if adapter is not None and not fused:
        monkeypatch.setattr(cuda_stack, "usable", lambda device: True)
        cuda_stack.prepare(decoder, adapter)
    return decoder, adapter


@pytest.mark.parametrize(
    ("shape", "clean", "masks", "adapted", "fused"),
    [
        ("llama", 1, 0, False, True),
        ("llama", 2, 6, True, True),
        ("llama", 5, 0, False, False),
        ("biases", 4, 3, True, False),
        ("qk norm, window", 4, 3, True, False),
        ("biases", 4, 3, True, True),
        ("qk norm, window", 4, 3, True, True),
    ],
)
@torch.inference_mode()
def test_is_the_layers(
    shape: str,
    clean: int,
    masks: int,
    adapted: bool,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, adapter = model_of(shape, adapted, fused, monkeypatch)
    config = decoder.config
    B, R, length = 3, clean + masks, 40
    table_BP = block_table(B, length)
    shape_LBKSD = (config.num_layers, B, config.num_kv_heads, length, config.head_dim)
    kept = torch.randn(2, *shape_LBKSD)
    start_B = torch.tensor([0, 13, 30])
    visible_BRR = torch.ones(R, R, dtype=torch.bool).tril().repeat(B, 1, 1)
    positions_BR = start_B[:, None] + torch.arange(R)
    tokens_BC = torch.randint(config.vocab_size, (B, clean + 1), device=DEVICE)[:, :clean]
    x_BRH = decoder._embed(tokens_BC, masks, adapter)
    cos, sin = decoder._rope(positions_BR.to(DEVICE), torch.float32)

    def attention(caches: torch.Tensor) -> PagedAttention:
        k_LNKTD, v_LNKTD = caches.unbind()
        return PagedAttention(
            k_LNKTD,
            v_LNKTD,
            table_BP.to(DEVICE),
            start_B.to(DEVICE),
            positions_BR.to(DEVICE),
            visible_BRR.to(DEVICE),
            config.sliding_window,
        )

    caches, expected_caches = (paged(kept, table_BP).to(DEVICE) for _ in range(2))
    part = Part(tokens_BC, attention(caches), masks)
    (hidden_BRH,) = cuda_stack.run(decoder, [part], adapter)
    for layer in decoder.layers:
        x_BRH = layer(x_BRH, cos, sin, attention(expected_caches), masks, adapter)
    torch.testing.assert_close(hidden_BRH, decoder.norm(x_BRH), atol=1e-4, rtol=1e-3)
    for b, start in enumerate(start_B.tolist()):
        written, expected = (
            contiguous(c.cpu(), table_BP, length)[:, :, b, :, : start + R]
            for c in (caches, expected_caches)
        )
        torch.testing.assert_close(written, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "masks", "fused"),
    [("llama", 0, True), ("llama", 3, True), ("biases", 3, False), ("qk norm, window", 3, False)],
)
@torch.inference_mode()
def test_parts_run_together(
    shape: str, masks: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some that decode, and texts, of which two rows are one text: as if each ran by itself."""
    decoder, adapter = model_of(shape, masks > 0, fused, monkeypatch)
    config = decoder.config
    table_BP = block_table(5, 60) + 1
    kept = torch.randn(2, config.num_layers, 22, config.num_kv_heads, 16, config.head_dim)

    def part(rows: list[int], starts: list[int], clean: int, ends: list[bool]) -> Any:
        R = clean + masks
        start_B = torch.tensor(starts, device=DEVICE)
        offsets_R = torch.arange(R, device=DEVICE)
        kept_BR = torch.tensor(ends, device=DEVICE)[:, None] | (offsets_R < clean)
        visible_BRR = torch.ones(R, R, dtype=torch.bool, device=DEVICE).tril()
        tokens_BC = torch.randint(config.vocab_size, (len(rows), clean), device=DEVICE)

        def over(caches: torch.Tensor) -> Part:
            k_LNKTD, v_LNKTD = caches.unbind()
            attention = PagedAttention(
                k_LNKTD,
                v_LNKTD,
                table_BP[rows].to(DEVICE),
                start_B,
                start_B[:, None] + offsets_R,
                visible_BRR.repeat(len(rows), 1, 1),
                config.sliding_window,
                kept_BR,
            )
            return Part(tokens_BC, attention, masks)

        return over

    parts = [
        part([0, 1, 2], [0, 13, 30], 2, [True] * 3),
        part([3, 4, 3], [13, 5, 7], 6, [True, True, False]),  # the last one comes before the first
    ]
    caches, expected_caches = (kept.to(DEVICE, copy=True) for _ in range(2))
    actual = cuda_stack.run(decoder, [over(caches) for over in parts], adapter)
    monkeypatch.setattr(cuda_stack, "takes", lambda *_: False)
    expected = decoder.together([over(expected_caches) for over in parts], adapter)
    # Of the text's first part only the clean rows are wanted: its masks see keys of the second.
    wanted = [actual[0], actual[1][:2], actual[1][2:, :6]]
    for hidden, other in zip(
        wanted, [expected[0], expected[1][:2], expected[1][2:, :6]], strict=True
    ):
        torch.testing.assert_close(hidden, other, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(caches[:, :, 1:], expected_caches[:, :, 1:], atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_head() -> None:
    config = random_config()
    decoder, adapter = random_decoder(config).to(DEVICE), random_adapter(config).to(DEVICE)
    head = adapter.head
    assert head is not None
    projected_BMW = torch.randn(5, 3, head.from_token.out_features, device=DEVICE)
    token_BH, state_BH = torch.randn(2, 5, config.hidden_size, device=DEVICE).unbind()
    place = projected_BMW[:, 1]
    expected = head.cpu().step(place.cpu(), token_BH.cpu(), state_BH.cpu())
    actual = cuda_head.step(head.to(DEVICE), place, token_BH, state_BH)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-3)
    logits_BV = cuda_head.logits(projected_BMW[:, :2, : config.hidden_size], decoder.output_weight)
    expected = F.linear(projected_BMW[:, :2, : config.hidden_size], decoder.output_weight)
    torch.testing.assert_close(logits_BV, expected, atol=1e-4, rtol=1e-3)
    ids_BMK = torch.randint(config.vocab_size, (5, 3, 21), device=DEVICE)
    scores_BK = cuda_head.score(actual, decoder.output_weight, ids_BMK[:, 1])
    expected = F.linear(actual, decoder.output_weight).gather(1, ids_BMK[:, 1])
    torch.testing.assert_close(scores_BK, expected, atol=1e-4, rtol=1e-3)


@given(vocab_size=st.integers(9, 100), groups=st.integers(1, 9), seed=st.integers(0, 99))
def test_candidates(vocab_size: int, groups: int, seed: int) -> None:
    logits_BV = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed))
    ids_B1K, near_B1 = cuda_head.best_of_groups(logits_BV[:, None].to(DEVICE), groups, 1.0)
    ids_BK = ids_B1K[:, 0].cpu()
    assert (ids_BK == logits_BV.argmax(-1, keepdim=True)).any(-1).all()
    for ids, logits_V in zip(ids_BK.tolist(), logits_BV, strict=True):
        assert len(set(ids)) == groups and max(ids) < vocab_size
        for token in ids:
            assert logits_V[token] == logits_V[token % groups :: groups].max()
    near_BK = logits_BV.gather(1, ids_BK) >= logits_BV.amax(-1, keepdim=True) - 1.0
    assert torch.equal(near_BK, torch.arange(groups) < near_B1.cpu())
