"""The full kind: objective, mask token, and a whole conversion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from idlm import LLM, SamplingParams
from idlm.errors import InvalidRequestError
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import load_config, load_decoder
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training.attention import joint_see
from idlm.training.config import ConvertConfig
from idlm.training.conversion import FullConversion
from idlm.training.cross_entropy import cross_entropy
from idlm.training.data import Corpus
from idlm.training.full import FullObjective, mask_token
from idlm.training.objective import Blocks
from idlm.training.parallel import torchrun
from idlm.training.trainer import Trainer
from tests.support.random_model import random_config, random_decoder
from tests.support.tiny import tiny_model
from tests.training.test_objective import M, decode_time_hidden, make_batch, make_config
from tests.training.test_trainer import losses

MASK = 7
CONFIG = ConvertConfig.read(
    None,
    {
        **{"kind": "full", "block_size": 3, "batch": 4, "length": 192, "anchors": 16},
        **{"steps": 30, "lr": 3e-3, "log_every": 5, "eval_rows": 4},
    },
)


@pytest.fixture
def masked() -> Decoder:
    """A decoder with a mask token, in memory."""
    return random_decoder(random_config(mask_token_id=MASK, tie_word_embeddings=True))


def make_full(model: Path, data: Path, out: Path | None, config: ConvertConfig) -> Trainer:
    conversion = FullConversion(
        load_decoder(model, device="cpu", dtype=torch.float32),
        config,
        "tiny",
        dtype=torch.float32,
        mask_token_id=0,
        source=model,
    )
    return Trainer(
        conversion, Corpus.read(data, "train"), Corpus.read(data, "heldout"), config, out
    )


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_cross_entropy(chunk_rows: int) -> None:
    torch.manual_seed(0)
    hidden_NH = torch.randn(10, 8, requires_grad=True)
    weight_VH = torch.randn(21, 8, requires_grad=True)
    targets_N, weights_N = torch.randint(21, (10,)), torch.rand(10) * (torch.arange(10) != 4)
    actual = cross_entropy(hidden_NH, weight_VH, targets_N, weights_N, chunk_rows)
    logits_NV = hidden_NH @ weight_VH.T
    expected = (F.cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
    torch.testing.assert_close(actual.loss, expected)
    gradients = (
        torch.autograd.grad(3 * loss, (hidden_NH, weight_VH)) for loss in (actual.loss, expected)
    )
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    chance_NV = logits_NV.softmax(-1)
    torch.testing.assert_close(actual.chance_N, chance_NV.gather(1, targets_N[:, None]).squeeze(1))
    assert torch.equal(actual.agree_N, (chance_NV.argmax(-1) == targets_N).float())


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), block_size=st.integers(1, M))
def test_who_sees_whom(seed: int, block_size: int) -> None:
    """The mask function of the joint pass against its definition, row by row."""
    batch = make_batch(seed=seed, batch=1, anchors=4)
    starts_BA, T = Blocks(batch, block_size).starts_BA, 64
    rows = T + 4 * block_size
    sees = joint_see(batch.documents_BT, batch.anchors_BA, starts_BA, block_size)
    index = torch.arange(rows)
    actual_RS = sees(index[:1, None], index[:1, None], index[:, None], index[None, :])
    documents, anchors = batch.documents_BT[0].tolist(), batch.anchors_BA[0].tolist()
    for row in range(rows):
        if row < T:
            expected = {key for key in range(row + 1) if documents[key] == documents[row]}
        else:
            block = (row - T) // block_size
            anchor = anchors[block]
            expected = {k for k in range(anchor + 1) if documents[k] == documents[anchor]}
            expected |= set(range(T + block * block_size, row + 1))
        assert set(actual_RS[row].nonzero().flatten().tolist()) == expected


def test_losses_are_those_of_decoding(masked: Decoder) -> None:
    """Both losses of one anchor, written out with the inference path and plain softmaxes."""
    batch = make_batch(batch=1, anchors=1)
    objective = FullObjective(
        masked, make_config(batch=1, anchors=1, place_decay=0.9), torch.float32
    )
    outcome = objective(batch)
    anchor, places = int(batch.anchors_BA), int(batch.places_BA)
    start = int(batch.documents_BT[0, anchor])
    tokens, b = batch.tokens_BT[0, start:], anchor - start
    with torch.no_grad():
        log_q_MV = masked.logits(decode_time_hidden(masked, None, tokens, b)).log_softmax(-1)
        mask = sum(-(0.9**j) * float(log_q_MV[j, tokens[b + j + 2]]) for j in range(places))
        clean, count = 0.0, 0
        starts = sorted(set(batch.documents_BT[0].tolist()))
        for first, last in zip(starts, [*starts[1:], 64], strict=True):
            text_T = batch.tokens_BT[:, first:last]
            positions = torch.arange(last - first)[None]
            hidden = masked(text_T, positions, CausalAttention(positions))[0]
            log_p_TV = masked.logits(hidden).log_softmax(-1)
            for t in range(1, last - first):
                if batch.answers_BT[0, first + t]:
                    clean -= float(log_p_TV[t - 1, text_T[0, t]])
                    count += 1
    assert outcome.losses.tolist() == pytest.approx([mask, clean], rel=1e-4)
    weights = [sum(0.9**j for j in range(places)), float(batch.answers_BT.sum())]
    assert objective.weights(batch).tolist() == pytest.approx(weights)
    assert count == batch.answers_BT.sum() > 0  # the first token of every answer is among them


def test_acceptance_is_measured_against_the_clean_rows(masked: Decoder) -> None:
    batch = make_batch(batch=1, anchors=1)
    objective = FullObjective(masked, make_config(batch=1, anchors=1), torch.float32)
    with torch.no_grad():
        outcome = objective(batch)
        anchor, start = int(batch.anchors_BA), int(batch.documents_BT[0, int(batch.anchors_BA)])
        tokens, b = batch.tokens_BT[0, start:], anchor - start
        positions = torch.arange(b + 1 + M)[None]
        clean = masked(tokens[None, : b + 1 + M], positions, CausalAttention(positions))[0]
        p_MV = masked.logits(clean[b + 1 :]).softmax(-1)
        q_MV = masked.logits(decode_time_hidden(masked, None, tokens, b)).softmax(-1)
    places = int(batch.places_BA)
    expected_M = torch.minimum(p_MV, q_MV).sum(-1)
    torch.testing.assert_close(
        outcome.overlap_BAM[0, 0, :places], expected_M[:places], rtol=1e-4, atol=1e-5
    )


def test_mean_losses_do_not_depend_on_the_split(masked: Decoder) -> None:
    batch = make_batch(batch=4)
    objective = FullObjective(masked, make_config(batch=4), torch.float32)
    results, gradients = [], []
    for parts in (1, 2, 4):
        masked.zero_grad()
        weights, total = objective.weights(batch), torch.zeros(2)
        for part in batch.split(parts):
            losses = objective(part).losses / weights
            (losses @ torch.tensor([1.0, 0.7])).backward()
            total += losses.detach()
        results.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in masked.parameters()]))  # type: ignore[union-attr]
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=0)
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()
    # Masks reach the embedding of their token.
    assert masked.embed.weight.grad is not None and masked.embed.weight.grad[MASK].norm() > 0


def test_balance(masked: Decoder) -> None:
    means = torch.tensor([6.0, 2.0])
    auto = FullObjective(masked, make_config(kind="full"), torch.float32)
    assert auto.factors(means).tolist() == [1.0, 3.0]
    fixed = FullObjective(masked, make_config(kind="full", clean_weight=0.5), torch.float32)
    assert fixed.factors(means).tolist() == [1.0, 0.5]


def test_full_conversion_decodes(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    with torchrun(torch.device("cpu")):
        trainer = make_full(model_dir, data_dir, tmp_path, CONFIG)
        before = trainer.evaluate()
        report = trainer.run()
    assert report is not None and report.best.step > 0
    assert report.best.acceptance.tpf["T=1 N=4"] > before.tpf["T=1 N=4"]
    terms = [json.loads(line).get("terms") for line in _log(tmp_path)]
    first, *_, last = [t for t in terms if t]
    assert last["mask"] < first["mask"] and last["clean"] < first["clean"]
    assert len(losses(tmp_path)) == 6

    assert load_config(tmp_path).mask_token_id == 0
    model = LLM(tmp_path, device="cpu", dtype="float32", stride=4)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (diffusion,) = model.generate("The quick brown", params)
    (plain,) = model.autoregressive().generate("The quick brown", params)
    assert diffusion.token_ids == plain.token_ids
    assert diffusion.stats.tokens_per_forward > 1.0
    ids = torch.tensor([diffusion.prompt_token_ids])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        decoder = load_decoder(tmp_path, device="cpu", dtype=torch.float32)
        positions = torch.arange(ids.shape[1])[None]
        logits = decoder.logits(decoder(ids, positions, CausalAttention(positions)))
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=1e-3)


def _log(out: Path) -> list[str]:
    return (out / "train_log.jsonl").read_text().splitlines()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_run_equals_an_unbroken_one(
    model_dir: Path, data_dir: Path, tmp_path: Path, ema: float
) -> None:
    config = CONFIG.with_(steps=8, log_every=1, ema=ema)
    with torchrun(torch.device("cpu")):
        whole = make_full(model_dir, data_dir, tmp_path / "whole", config)
        whole.run()
        first = make_full(model_dir, data_dir, tmp_path / "parts", config)
        for _ in range(4):
            first.train_step()
        first.save_checkpoint()
        second = make_full(model_dir, data_dir, tmp_path / "parts", config)
        assert second.resume() and second.progress.step == 4
        second.run()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole")[4:], rel=1e-6)
    for folder in ("whole", "parts"):
        assert (tmp_path / folder / "model.safetensors").exists()
    for name, value in whole.optimizer.state().items():
        assert torch.equal(value.full_tensor(), second.optimizer.state()[name].full_tensor())  # type: ignore[attr-defined]


def test_mask_token(model_dir: Path, tmp_path: Path) -> None:
    tokenizer, config = Tokenizer.load(model_dir), load_config(model_dir)
    with pytest.raises(InvalidRequestError, match=r"--kind lossless.*--mask-token"):
        mask_token(config, tokenizer, None)
    with pytest.raises(InvalidRequestError, match="no token '<nothing>'"):
        mask_token(config, tokenizer, "<nothing>")
    assert mask_token(config, tokenizer, "<|endoftext|>") == 0
    assert mask_token(replace(config, mask_token_id=5), tokenizer, None) == 5
    larger = tiny_model(tmp_path, vocab_size=328)
    assert mask_token(load_config(larger), Tokenizer.load(larger), None) == 320
