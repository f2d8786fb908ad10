"""The objective's geometry, its independence of the future, and its invariance to splitting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from idlm.model.adapter import Adapter, AdapterConfig
from idlm.model.attention import CausalAttention, PagedAttention
from idlm.model.config import ModelConfig, RopeConfig
from idlm.model.decoder import Decoder
from idlm.training.config import ConvertConfig
from idlm.training.data import Batch, Corpus, Loader
from idlm.training.lossless import LosslessObjective, _visits, unroll
from idlm.training.objective import Blocks

M = 5
VOCAB = 61


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope=RopeConfig(10000.0),
        tie_word_embeddings=True,
    )
    return Decoder(config).requires_grad_(False).eval()


def make_adapter(decoder: Decoder) -> Adapter:
    """An adapter whose every part has an effect."""
    torch.manual_seed(1)
    config = AdapterConfig(
        rank=4,
        alpha=8.0,
        projections=("qkv", "o", "gate_up", "down"),
        block_size=M,
        head_width=16,
        head_depth=2,
        base_fingerprint=decoder.config.fingerprint(),
        base_model="tiny",
    )
    adapter = Adapter(config, decoder.config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2)
    return adapter


@pytest.fixture
def adapter(decoder: Decoder) -> Adapter:
    return make_adapter(decoder)


def make_config(**changes: object) -> ConvertConfig:
    values: dict[str, object] = {"block_size": M, "batch": 2, "length": 64, "anchors": 6}
    values |= {"steps": 1, "rank": 4, "tv_weight": 0.0, "survival": False}
    return ConvertConfig(**{**values, **changes})  # type: ignore[arg-type]


def make_corpus(count: int = 12, seed: int = 0) -> Corpus:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(15, 40, count)
    spans = [(int(rng.integers(3, 8)), int(n - rng.integers(0, 3))) for n in lengths]
    return Corpus(
        rng.integers(0, VOCAB, lengths.sum()).astype(np.int32),
        np.cumsum([0, *lengths]),
        np.array(spans),
        np.arange(count + 1),
        np.zeros(count, np.float32),
    )


def make_batch(seed: int = 0, batch: int = 2, anchors: int = 6) -> Batch:
    corpus = make_corpus(seed=seed)
    loader = Loader(corpus, batch=batch, length=64, anchors=anchors, block_size=M, seed=seed)
    return loader.batch(0)


def decode_time_hidden(
    decoder: Decoder, adapter: Adapter | None, tokens_S: torch.Tensor, b: int
) -> torch.Tensor:
    """Hidden states of the mask rows when token ``b`` is pending, by the inference path."""
    c = decoder.config
    shape = (c.num_layers, 5, c.num_kv_heads, 16, c.head_dim)
    k, v = torch.zeros(shape), torch.zeros(shape)
    table = torch.arange(1, 5, dtype=torch.int32)[None]
    if b > 0:
        positions = torch.arange(b)[None]
        visible = torch.ones(1, b, b, dtype=torch.bool).tril()
        prefill = PagedAttention(k, v, table, torch.zeros(1, dtype=torch.long), positions, visible)
        decoder(tokens_S[None, :b], positions, prefill)
    positions = torch.arange(b, b + 1 + M)[None]
    visible = torch.ones(1, M + 1, M + 1, dtype=torch.bool).tril()
    attention = PagedAttention(k, v, table, torch.tensor([b]), positions, visible)
    hidden = decoder(tokens_S[None, b : b + 1], positions, attention, num_masks=M, adapter=adapter)
    return hidden[0, 1:]


@torch.no_grad()
def test_mask_rows_are_those_of_decoding(decoder: Decoder, adapter: Adapter) -> None:
    batch = make_batch()
    objective = LosslessObjective(decoder, adapter, make_config())
    _, documents = objective._clean(batch)
    hidden_BAMH = objective._masks(batch, Blocks(batch, M), documents).unflatten(1, (-1, M))
    for row in range(2):
        for a, anchor in enumerate(batch.anchors_BA[row].tolist()):
            start = int(batch.documents_BT[row, anchor])
            tokens = batch.tokens_BT[row, start : anchor + 1]
            expected = decode_time_hidden(decoder, adapter, tokens, anchor - start)
            torch.testing.assert_close(hidden_BAMH[row, a], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_clean_rows_are_those_of_the_base_model(decoder: Decoder, adapter: Adapter) -> None:
    batch = make_batch()
    hidden_BTH, _ = LosslessObjective(decoder, adapter, make_config())._clean(batch)
    for row in range(2):
        starts = batch.documents_BT[row].unique().tolist()
        for start, end in zip(starts, [*starts[1:], 64], strict=True):
            positions = torch.arange(end - start)[None]
            if not torch.equal(batch.positions_BT[row, start:end], positions[0]):
                continue  # padding
            alone = decoder(
                batch.tokens_BT[row : row + 1, start:end], positions, CausalAttention(positions)
            )
            torch.testing.assert_close(hidden_BTH[row, start:end], alone[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_blocks_do_not_see_the_future(decoder: Decoder, adapter: Adapter) -> None:
    batch = make_batch()
    objective = LosslessObjective(decoder, adapter, make_config())
    anchor_B1 = batch.anchors_BA[:, 2:3]
    later_BT = torch.arange(64) > anchor_B1
    changed = Batch(
        torch.where(later_BT, (batch.tokens_BT + 7) % VOCAB, batch.tokens_BT),
        batch.positions_BT,
        batch.documents_BT,
        batch.answers_BT,
        batch.anchors_BA,
        batch.places_BA,
    )
    before, after = (
        objective._masks(b, Blocks(b, M), objective._clean(b)[1]).unflatten(1, (-1, M))
        for b in (batch, changed)
    )
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-6, rtol=0)
    assert (before[:, 3:] - after[:, 3:]).abs().max() > 1e-3


def test_teacher_and_head_follow_the_geometry(decoder: Decoder, adapter: Adapter) -> None:
    """The loss of one anchor, written out with the inference path and plain softmaxes."""
    batch = make_batch(batch=1, anchors=1)
    config = make_config(batch=1, anchors=1, marginal_weight=0.0, place_decay=0.9)
    outcome = LosslessObjective(decoder, adapter, config)(batch)
    anchor, places = int(batch.anchors_BA), int(batch.places_BA)
    start = int(batch.documents_BT[0, anchor])
    tokens, b = batch.tokens_BT[0, start:], anchor - start
    with torch.no_grad():
        h_MH = decode_time_hidden(decoder, adapter, tokens, b)
        told_MH = decoder.embed(tokens[b + 1 : b + 1 + M])
        assert adapter.head is not None
        assert adapter.head is not None
        states_MH = unroll(adapter.head, h_MH[None], told_MH[None])[0]
        positions = torch.arange(b + 1 + M)[None]
        clean = decoder(tokens[None, : b + 1 + M], positions, CausalAttention(positions))[0]
        expected = 0.0
        for j in range(1, places + 1):
            p = decoder.logits(clean[b + j]).log_softmax(-1)
            q = decoder.logits(h_MH[j - 1] + states_MH[j - 1]).log_softmax(-1)
            expected += 0.9 ** (j - 1) * float((p.exp() * (p - q)).sum())
    assert outcome.losses.item() == pytest.approx(expected, rel=1e-4)
    assert outcome.valid_BAM.sum() == places


@pytest.mark.parametrize("survival", [False, True])
def test_mean_loss_does_not_depend_on_the_split(
    decoder: Decoder, adapter: Adapter, survival: bool
) -> None:
    batch = make_batch(batch=4)
    objective = LosslessObjective(
        decoder, adapter, make_config(batch=4, survival=survival, tv_weight=0.5, place_decay=0.9)
    )
    losses, gradients = [], []
    for parts in (1, 2, 4):
        adapter.zero_grad()
        weights = objective.weights(batch)
        total = 0.0
        for part in batch.split(parts):
            loss = (objective(part).losses / weights).sum()
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]))  # type: ignore[union-attr]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()
    assert gradients[0].norm() > 0


def test_blocks_count_where_forwards_start() -> None:
    """Visit weights against a count over the blocks, token by token."""
    batch = make_batch(batch=2, anchors=9)
    overlap_BAM = torch.rand(2, 9, M, generator=torch.Generator().manual_seed(1))
    valid_BAM = torch.arange(M) < batch.places_BA[..., None]
    visits_BA = _visits(overlap_BAM, valid_BAM, batch)
    unproposed = 0
    for row in range(2):
        reached, rejected = torch.zeros(2, 64 + M + 2)
        for anchor, overlap_M, places in zip(
            batch.anchors_BA[row], overlap_BAM[row], batch.places_BA[row], strict=True
        ):
            chance = 1.0
            for j in range(int(places)):
                reached[anchor + j + 2] += chance
                rejected[anchor + j + 2] += chance * (1 - overlap_M[j])
                chance *= float(overlap_M[j])
        for i, anchor in enumerate(batch.anchors_BA[row]):
            at = int(anchor) + 1
            expected = float(rejected[at] / reached[at]) if reached[at] else 1.0
            unproposed += not reached[at]
            assert visits_BA[row, i] == pytest.approx(max(expected, 1 / (M + 1)), abs=1e-5)
    assert unproposed
