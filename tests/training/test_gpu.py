"""The CUDA paths against the dense CPU ones. By hand: `pytest -m gpu tests/training`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from idlm.model.config import ModelConfig, RopeConfig
from idlm.model.decoder import Decoder
from idlm.training.conversion import FullConversion
from idlm.training.full import FullObjective
from idlm.training.lossless import LosslessObjective
from idlm.training.parallel import torchrun
from idlm.training.sampler import BatchSampler, Limits, Script
from idlm.training.slot_attention import SlotAttention
from idlm.training.trainer import Trainer
from tests.training.test_objective import (
    M,
    make_adapter,
    make_batch,
    make_config,
    make_corpus,
)

pytestmark = pytest.mark.gpu


def make_decoder() -> Decoder:
    """Head size 64, so that the kernels are the real ones."""
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama",
        vocab_size=61,
        hidden_size=96,
        intermediate_size=128,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope=RopeConfig(10000.0),
        tie_word_embeddings=True,
    )
    return Decoder(config).requires_grad_(False).eval()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 8, 80), (32, 8, 128)])
def test_slot_attention(heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(0)
    B, S = 5, 200
    index_B = torch.tensor([0, 1, 63, 64, 199])
    q_B1QD = torch.randn(B, 1, heads, dim)
    k_B1KD, v_B1KD = torch.randn(2, B, 1, kv_heads, dim)
    caches = torch.randn(2, 1, B, kv_heads, S, dim)
    on_gpu = caches.cuda()
    expected = SlotAttention(caches[0], caches[1], index_B)(0, q_B1QD, k_B1KD, v_B1KD)
    actual = SlotAttention(on_gpu[0], on_gpu[1], index_B.cuda())(
        0, q_B1QD.cuda(), k_B1KD.cuda(), v_B1KD.cuda()
    )
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(on_gpu.cpu(), caches)


def test_objective_value_and_gradient() -> None:
    decoder = make_decoder()
    adapter = make_adapter(decoder)
    # At least 128 mask rows: FlexAttention has another kernel for fewer.
    config = make_config(tv_weight=0.5, anchors=32)
    batch = make_batch(anchors=32)
    outcomes, gradients = [], []
    for device in ("cpu", "cuda"):
        adapter.to(device).zero_grad()
        outcome = LosslessObjective(decoder.to(device), adapter, config)(
            batch.to(torch.device(device))
        )
        outcome.losses.sum().backward()
        outcomes.append(outcome)
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in adapter.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(outcomes[1].losses.cpu(), outcomes[0].losses, rtol=1e-3, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()
    assert outcomes[0].valid_BAM.shape[-1] == M


def test_evaluation_is_what_is_trained() -> None:
    """Without gradients, too, the compiled objective computes what the dense one does."""
    decoder = make_decoder()
    adapter = make_adapter(decoder)
    config, batch = make_config(anchors=32), make_batch(anchors=32)
    overlaps = []
    for device in ("cpu", "cuda"):
        adapter.to(device)
        with torch.no_grad():
            objective = LosslessObjective(decoder.to(device), adapter, config)
            overlaps.append(objective(batch.to(torch.device(device))).overlap_BAM.cpu())
    torch.testing.assert_close(overlaps[1], overlaps[0], atol=1e-2, rtol=0)


def test_full_objective_value_and_gradient() -> None:
    decoder = make_decoder()
    decoder.config = replace(decoder.config, mask_token_id=7)
    config, batch = make_config(anchors=32), make_batch(anchors=32)
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        decoder.to(device).zero_grad()
        objective = FullObjective(decoder, config, torch.float32)
        outcome = objective(batch.to(torch.device(device)))
        outcome.losses.sum().backward()
        losses.append(outcome.losses.cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in decoder.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


def test_full_steps_in_bf16_follow_those_in_fp32() -> None:
    """Sharded over one GPU, with compiled layers."""
    corpus, curves = make_corpus(64), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        config = make_config(kind="full", anchors=32, steps=10, lr=3e-3, warmup=0.2, eval_rows=2)
        with torchrun(torch.device(device)):
            conversion = FullConversion(
                make_decoder().to(device),
                config,
                "random",
                dtype=dtype,
                mask_token_id=7,
                source=Path("unused"),
            )
            trainer = Trainer(conversion, corpus, corpus, config, None)
            curves.append(torch.stack([trainer.train_step()[0].cpu() for _ in range(10)]))
    assert curves[0][-1] < 0.95 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-2, atol=0)


def test_captured_steps_sample_as_the_cpu_does() -> None:
    """Greedy, fp32: the same conversations, transitions included."""
    conversations = []
    for device in ("cpu", "cuda"):
        decoder = make_decoder().to(device)
        sampler = BatchSampler(
            decoder, (2, 7), (2, 9), [2], slots=3, limits=Limits(120, 20, 30), seed=0
        )
        scripts = (Script((5, 6 + i % 40), False, 1, 0.0, 0.0) for i in itertools.count())
        ended = [e for group in itertools.islice(sampler.run(scripts), 16) for e in group]
        conversations.append({script.prefix: tuple(ids) for script, ids in ended})
    common = conversations[0].keys() & conversations[1].keys()
    assert len(common) >= 3
    for prefix in common:
        assert conversations[0][prefix] == conversations[1][prefix]


def test_noise_of_a_captured_graph_changes_at_every_step() -> None:
    decoder = make_decoder().cuda()
    decoder.embed.weight.mul_(0.05)  # else every token is followed by itself
    sampler = BatchSampler(decoder, (), (), [], slots=2, limits=Limits(100, 10, 90), seed=0)
    scripts = (Script((5,), True, 0, 1.0, 1.0) for _ in itertools.count())
    ended = [e for group in itertools.islice(sampler.run(scripts), 10) for e in group]
    texts = {tuple(ids) for _, ids in ended}
    assert len(texts) == len(ended) >= 2
    assert all(len(set(ids)) > 10 for ids in texts)
