"""Small random models: exact at any temperature, and every format of a converted model."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from idlm import LLM, SamplingParams
from idlm.decoding.sampling import Sampling, distribution
from idlm.model.adapter import CONFIG_FILE, HEAD_FILE, Adapter, AdapterConfig
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import load_config, load_decoder
from tests.integrations.sglang.server import server
from tests.support.tiny import TOKENIZER_SIZE, tiny_model

pytestmark = pytest.mark.sglang

CPU = torch.device("cpu")
SPEC = ("--speculative-algorithm", "IDLM")
PROMPTS = [[5, 9, 4, 7], [3, 8, 8, 10, 6, 4], [11, 3, 5], [7, 4, 9, 9, 5, 6, 3]]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.8, "seed": 2},
    {"temperature": 1.3, "top_k": 9, "min_p": 0.05, "seed": 3},
    {"temperature": 0.0},
    {"temperature": 0.9, "frequency_penalty": 0.8, "presence_penalty": 0.5, "seed": 4},
    {"temperature": 0.0, "frequency_penalty": 1.1},
    {"temperature": 1.0, "logit_bias": {7: 4.0, 9: -6.0}, "seed": 5},
    {"temperature": 0.8, "repetition_penalty": 1.0, "top_k": 3, "seed": 6},
]


def tiny(folder: Path, family: str, vocab_size: int = TOKENIZER_SIZE, **overrides: Any) -> Path:
    """A random model; on a CPU the host pads inner widths to multiples of 64."""
    return tiny_model(
        folder / "model", family, vocab_size=vocab_size, intermediate_size=64, **overrides
    )


@torch.no_grad()
def random_adapter(
    folder: Path, model: Path, head: tuple[int, int] = (16, 2), rank: int = 3
) -> Path:
    """An adapter of random weights, large enough to show where it acts."""
    base = load_config(model)
    adapter = Adapter(
        AdapterConfig(
            rank=rank,
            alpha=2.0 * rank,
            projections=("qkv", "o", "gate_up", "down"),
            block_size=3,
            head_width=head[0],
            head_depth=head[1],
            base_fingerprint=base.fingerprint(),
            base_model="random",
        ),
        base,
    )
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    adapter.save(folder)
    return folder


def coupled_texts(
    model: Path, adapter: Path | None, tmp_path: Path, *options: str, ranks: int = 1
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of SGLang and of the embedded engine, decoding plainly, for the same seeds."""
    adapter_options = () if adapter is None else ("--speculative-draft-model-path", str(adapter))
    asked = [PROMPTS[i % len(PROMPTS)] for i in range(3 * len(PARAMS))]
    each = [PARAMS[i % len(PARAMS)] for i in range(3 * len(PARAMS))]
    length = 24
    with server(
        model,
        tmp_path / "log",
        *SPEC,
        *adapter_options,
        *options,
        "--skip-tokenizer-init",
        ranks=ranks,
        IDLM_VERIFICATION="coupled",
    ) as s:
        ours = s.one_by_one(asked, [_as_host(p, length) for p in each], 5)
    llm = LLM(model, layout="ar", verification="coupled", dtype="float32", device="cpu")
    params = [SamplingParams(**p, max_tokens=length, ignore_eos=True) for p in each]
    return ours, [o.token_ids for o in llm.generate(asked, params)]


def _as_host(params: dict[str, Any], length: int) -> dict[str, Any]:
    given = {"max_new_tokens": length, "ignore_eos": True, **params}
    if "seed" in given:
        given["sampling_seed"] = given.pop("seed")
    if "logit_bias" in given:
        given["logit_bias"] = {str(t): b for t, b in given["logit_bias"].items()}
    return given


def test_a_seed_gives_the_text_of_plain_decoding_in_each_replica(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    adapter = random_adapter(tmp_path / "adapter", model)
    ours, plain = coupled_texts(model, adapter, tmp_path, "--dp-size", "2")
    assert ours == plain


def test_fully_converted_model_in_the_authors_format(tmp_path: Path) -> None:
    model = tiny(tmp_path, "sdar", mask_token_id=2)
    ours, plain = coupled_texts(model, None, tmp_path)
    assert ours == plain
    assert 2 not in itertools.chain(*ours)


def test_lora_of_the_authors_on_two_ranks(tmp_path: Path) -> None:
    model = tiny(tmp_path, "qwen3", mask_token_id=2)
    adapter = random_adapter(tmp_path / "adapter", model, (0, 0), rank=128)
    for ours_alone in (CONFIG_FILE, HEAD_FILE):
        (adapter / ours_alone).unlink()
    ours, plain = coupled_texts(model, adapter, tmp_path, "--speculative-num-steps", "2", ranks=2)
    assert ours == plain


def test_rejection_samples_the_models_distribution(tmp_path: Path) -> None:
    vocab, count = 8, 1200
    model = tiny(tmp_path, "llama", vocab)
    adapter = random_adapter(tmp_path / "adapter", model)
    prompt = [3, 4, 5]
    with server(
        model,
        tmp_path / "log",
        *SPEC,
        *("--speculative-draft-model-path", str(adapter), "--skip-tokenizer-init"),
    ) as s:
        cases: list[dict[str, Any]] = [
            {"temperature": 1.0},
            {"temperature": 1.2, "top_k": 6, "top_p": 0.9},
        ]
        for params in cases:
            host = {"max_new_tokens": 6, "ignore_eos": True, **params}
            replies = s.generate([prompt] * count, **host)
            seen = Counter(tuple(r["output_ids"][2:4]) for r in replies)
            exact = joint(model, prompt, SamplingParams(**params))
            accepted = sum(6 - 1 - r["meta_info"]["spec_verify_ct"] for r in replies)
            assert accepted > count / 4  # drafts that stood, so that the rule was put to the test
            observed, expected = [], []
            rest = [0.0, 0.0]
            for pair in itertools.product(range(vocab), repeat=2):
                e, o = float(exact[pair]) * count, seen[pair]
                if e >= 5:
                    observed.append(float(o))
                    expected.append(e)
                else:
                    rest = [rest[0] + o, rest[1] + e]
                assert e > 0 or o == 0
            if rest[1] > 0:
                observed.append(rest[0])
                expected.append(rest[1])
            assert chisquare(observed, expected).pvalue > 1e-4


@torch.no_grad()
def joint(model: Path, prompt: list[int], params: SamplingParams) -> torch.Tensor:
    """Probability ``[V, V]`` of the third and fourth token, summed over the first two."""
    decoder = load_decoder(model, device=CPU, dtype=torch.float32)
    V = decoder.config.vocab_size
    first_XF = torch.cartesian_prod(*[torch.arange(V)] * 3)
    tokens_XC = torch.cat((torch.tensor(prompt).expand(len(first_XF), -1), first_XF), dim=1)
    positions_XC = torch.arange(tokens_XC.shape[1]).expand(len(tokens_XC), -1)
    logits = decoder.logits(decoder(tokens_XC, positions_XC, CausalAttention(positions_XC)))[:, -4:]
    one = Sampling.of([params], [0], [[]], [[]], V, CPU)
    sampling = replace(
        one,
        **{
            name: tensor.expand(len(logits), *tensor.shape[1:])
            for name in ("seed_B", "greedy_B", "temperature_B", "top_k_B", "top_p_B", "min_p_B")
            if (tensor := getattr(one, name)) is not None
        },
    )
    p_XRV = distribution(logits, sampling, torch.full((len(logits), 4, 0), -1))
    chain_X3 = p_XRV[:, :3].gather(2, first_XF[..., None]).squeeze(2)
    joint_XV = chain_X3.prod(1)[:, None] * p_XRV[:, 3]
    joint_VV = joint_XV.double().view(V * V, V, V).sum(0)
    return joint_VV / joint_VV.sum()
