"""The fused CUDA layers against their definition: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from idlm.model import cuda_stack
from idlm.model.attention import PagedAttention
from tests.support.paged import block_table, contiguous, paged
from tests.support.random_model import random_adapter, random_config, random_decoder

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qk norm, window": {"qk_norm": True, "sliding_window": 6, "head_dim": 16},
}


@pytest.mark.parametrize("fused_rows", [0, 1000])
@pytest.mark.parametrize(("clean", "masks", "adapted"), [(1, 0, False), (4, 3, True), (2, 6, True)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_is_the_layers(
    shape: str,
    clean: int,
    masks: int,
    adapted: bool,
    fused_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_stack, "FUSED_ROWS", fused_rows)
    config = random_config(**SHAPES[shape])
    decoder = random_decoder(config).to(DEVICE)
    for name, parameter in decoder.named_parameters():
        if "norm" in name or "bias" in name:  # norms at 1 and biases at 0 would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.3)
    adapter = random_adapter(config).to(DEVICE).freeze() if adapted else None
    B, R, length = 3, clean + masks, 40
    table_BP = block_table(B, length)
    shape_LBKSD = (config.num_layers, B, config.num_kv_heads, length, config.head_dim)
    kept = torch.randn(2, *shape_LBKSD)
    start_B = torch.tensor([0, 13, 30])
    visible_BRR = torch.ones(R, R, dtype=torch.bool).tril().repeat(B, 1, 1)
    positions_BR = start_B[:, None] + torch.arange(R)
    x_BRH = torch.randn(B, R, config.hidden_size, device=DEVICE)
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
    hidden_BRH = cuda_stack.run(decoder, x_BRH.clone(), cos, sin, attention(caches), masks, adapter)
    for layer in decoder.layers:
        x_BRH = layer(x_BRH, cos, sin, attention(expected_caches), masks, adapter)
    torch.testing.assert_close(hidden_BRH, decoder.norm(x_BRH), atol=1e-4, rtol=1e-3)
    for b, start in enumerate(start_B.tolist()):
        written, expected = (
            contiguous(c.cpu(), table_BP, length)[:, :, b, :, : start + R]
            for c in (caches, expected_caches)
        )
        torch.testing.assert_close(written, expected, atol=1e-4, rtol=1e-3)
