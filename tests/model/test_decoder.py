"""The decoder against `transformers`: same weights, same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from idlm.model.attention import CausalAttention, PagedAttention
from idlm.model.checkpoint import load_decoder
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from tests.support.paged import block_table, paged
from tests.support.tiny import tiny_model

TOLERANCE = 1e-4
LENGTH = 40
MASK_ID = 7


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-without-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-linear-rope": ("llama", _rope("linear", factor=3.0)),
    "llama-llama3-rope": ("llama", _rope("llama3", **LLAMA3)),
    "llama-yarn": ("llama", _rope("yarn", **YARN)),
    "llama-yarn-untruncated": ("llama", _rope("yarn", **YARN, truncate=False, beta_fast=16.0)),
    "llama-yarn-attention-factor": ("llama", _rope("yarn", **YARN, attention_factor=0.8)),
    "llama-yarn-mscale": ("llama", _rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.2)),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True} | _rope("yarn", **YARN)),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, PreTrainedModel]:
    """A decoder of ours and the same model in `transformers`."""
    family, overrides = MODELS[request.param]
    overrides = overrides | {"mask_token_id": MASK_ID}  # what mask rows embed without an adapter
    folder = tmp_path_factory.mktemp("model")
    return _pair(tiny_model(folder, family, vocab_size=61, **overrides))


def _pair(folder: Path) -> tuple[Decoder, PreTrainedModel]:
    decoder = load_decoder(folder, device="cpu", dtype=torch.float32)
    # Eager attention takes any mask.
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return decoder, reference.eval()


@torch.no_grad()
def _causal_logits(decoder: Decoder, tokens_BR: torch.Tensor) -> torch.Tensor:
    positions_BR = torch.arange(tokens_BR.shape[1]).expand_as(tokens_BR)
    attention = CausalAttention(positions_BR, decoder.config.sliding_window)
    return decoder.logits(decoder(tokens_BR, positions_BR, attention))


class _Cache:
    """A KV cache of one decoder and the number of tokens in it."""

    def __init__(self, decoder: Decoder, batch: int, length: int) -> None:
        config = decoder.config
        shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
        self.decoder = decoder
        self.table_BP = block_table(batch, length)
        self.k_LNKTD, self.v_LNKTD = (paged(torch.zeros(shape), self.table_BP) for _ in "kv")
        self.start_B = torch.zeros(batch, dtype=torch.int64)

    def one(self, b: int) -> _Cache:
        """The cache of request ``b`` alone, over the same memory, empty."""
        cache = copy.copy(self)
        cache.table_BP = self.table_BP[b : b + 1]
        cache.start_B = torch.zeros(1, dtype=torch.int64)
        return cache

    @torch.no_grad()
    def logits(
        self,
        tokens_BC: torch.Tensor,
        positions_BR: torch.Tensor,
        visible_BRR: torch.Tensor,
        num_masks: int = 0,
    ) -> torch.Tensor:
        attention = PagedAttention(
            self.k_LNKTD,
            self.v_LNKTD,
            self.table_BP,
            self.start_B,
            positions_BR,
            visible_BRR,
            self.decoder.config.sliding_window,
        )
        hidden = self.decoder(tokens_BC, positions_BR, attention, num_masks=num_masks)
        return self.decoder.logits(hidden)

    def append(self, tokens_BR: torch.Tensor) -> torch.Tensor:
        """Run and keep rows that follow what is there, as in a prefill or a decode step."""
        B, R = tokens_BR.shape
        positions_BR = self.start_B[:, None] + torch.arange(R)
        causal_BRR = torch.ones(B, R, R, dtype=torch.bool).tril()
        logits_BRV = self.logits(tokens_BR, positions_BR, causal_BRR)
        self.start_B += R
        return logits_BRV


def _random_tokens(batch: int, length: int, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


def test_logits_equal_transformers(pair: tuple[Decoder, PreTrainedModel]) -> None:
    decoder, reference = pair
    tokens_BR = _random_tokens(2, LENGTH)
    with torch.no_grad():
        expected_BRV = reference(tokens_BR).logits
    assert expected_BRV.std() > 0.1  # the comparison would mean little on flat logits
    torch.testing.assert_close(
        _causal_logits(decoder, tokens_BR), expected_BRV, atol=TOLERANCE, rtol=0
    )


def test_chunked_prefill_and_decode_equal_one_pass(pair: tuple[Decoder, PreTrainedModel]) -> None:
    decoder, _ = pair
    tokens_BR = _random_tokens(2, LENGTH)
    cache = _Cache(decoder, batch=2, length=LENGTH)
    chunks = tokens_BR.split([17, 1, 9, 1, 1, 11], dim=1)
    logits_BRV = torch.cat([cache.append(chunk) for chunk in chunks], dim=1)
    torch.testing.assert_close(
        logits_BRV, _causal_logits(decoder, tokens_BR), atol=TOLERANCE, rtol=0
    )


def test_in_flight_visibility_equals_dense_mask(pair: tuple[Decoder, PreTrainedModel]) -> None:
    """Requests of different length, rows that see some other rows only, masks at the end."""
    decoder, reference = pair
    starts, C, M = (9, 14), 3, 4
    R = C + M
    generator = torch.Generator().manual_seed(5)
    prompts_BS = _random_tokens(2, max(starts))
    rows_BC = torch.randint(61, (2, C), generator=generator)
    offsets_R = torch.tensor([0, 1, 2, 1, 2, 3, 4])
    visible_BRR = (torch.rand(2, R, R, generator=generator) < 0.5).tril()
    visible_BRR |= torch.eye(R, dtype=torch.bool)

    cache = _Cache(decoder, batch=2, length=max(starts) + R)
    for b, start in enumerate(starts):
        cache.one(b).append(prompts_BS[b : b + 1, :start])
        cache.start_B[b] = start
    positions_BR = cache.start_B[:, None] + offsets_R
    logits_BRV = cache.logits(rows_BC, positions_BR, visible_BRR, num_masks=M)

    for b, start in enumerate(starts):
        masks_M = torch.full((M,), MASK_ID)
        tokens_T = torch.cat((prompts_BS[b, :start], rows_BC[b], masks_M))
        positions_T = torch.cat((torch.arange(start), positions_BR[b]))
        visible_TT = torch.ones(start + R, start + R, dtype=torch.bool).tril()
        visible_TT[start:, start:] = visible_BRR[b]
        if (window := decoder.config.sliding_window) is not None:
            visible_TT &= positions_T[:, None] - positions_T < window
        mask_TT = torch.zeros(start + R, start + R).masked_fill(~visible_TT, float("-inf"))
        with torch.no_grad():
            expected_TV = reference(
                tokens_T[None], attention_mask=mask_TT[None, None], position_ids=positions_T[None]
            ).logits[0]
        torch.testing.assert_close(logits_BRV[b], expected_TV[start:], atol=TOLERANCE, rtol=0)


def test_rows_are_invisible_unless_named(tmp_path: Path) -> None:
    """What stands in a row nobody sees, or beyond the committed tokens, changes nothing."""
    decoder = load_decoder(
        tiny_model(tmp_path / "m", vocab_size=61), device="cpu", dtype=torch.float32
    )
    tokens_BS = _random_tokens(1, 12)
    visible_BRR = torch.eye(3, dtype=torch.bool)[None]
    visible_BRR[0, 2, 0] = True

    def last_row(hidden_token: int, stale: float) -> torch.Tensor:
        cache = _Cache(decoder, batch=1, length=16)
        cache.append(tokens_BS)
        cache.k_LNKTD[..., 12:, :] = stale
        cache.v_LNKTD[..., 12:, :] = stale
        rows_BR = torch.tensor([[5, hidden_token, 9]])
        return cache.logits(rows_BR, torch.tensor([[12, 13, 13]]), visible_BRR)[0, 2]

    assert torch.equal(last_row(1, stale=0.0), last_row(44, stale=1e4))


def test_default_model_logits_equal_transformers(default_model_dir: Path) -> None:
    decoder, reference = _pair(default_model_dir)
    tokenizer = Tokenizer.load(default_model_dir)
    messages = [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}]
    tokens_BR = torch.tensor([tokenizer.apply_chat_template(messages)])
    with torch.no_grad():
        # In fp64: transformers' own fp32 rounding takes 7e-5 of the tolerance by itself.
        expected_BRV = reference.double()(tokens_BR).logits.float()
    torch.testing.assert_close(
        _causal_logits(decoder, tokens_BR), expected_BRV, atol=TOLERANCE, rtol=0
    )
    cache = _Cache(decoder, batch=1, length=tokens_BR.shape[1])
    logits_BRV = torch.cat([cache.append(chunk) for chunk in tokens_BR.split(10, dim=1)], dim=1)
    torch.testing.assert_close(logits_BRV, expected_BRV, atol=TOLERANCE, rtol=0)
