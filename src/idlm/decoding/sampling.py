"""From logits to the distribution that a request asked for, and a sample from it.

`distribution` is the one function that serves drafting, verification and correction: what is
drafted from ``q`` is tested against ``p`` made in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from idlm.decoding.params import SamplingParams
from idlm.decoding.random import Stream, exponential
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cuda import head as cuda_head
from idlm.model.cuda.draw import Draw
from idlm.model.transfer import upload, upload_all

# Likeliest tokens among which top-p mostly ends, and how many times more are looked at if not.
FIRST_RANKS, MORE_RANKS = 256, 8


@dataclass
class Sampling:
    """Sampling parameters of ``B`` requests as tensors; what no request uses is None.

    Attributes:
        seed_B: int64.
        greedy_B: bool; greedy requests get a one-hot distribution.
        all_greedy, any_greedy: what is in ``greedy_B``, known without asking the device.
        temperature_B: fp32, 1 for greedy requests.
        top_k_B: int64, the vocabulary size where off; those that are on are up to ``max_top_k``.
        top_p_B, min_p_B: fp32.
        repetition_B, presence_B, frequency_B: fp32.
        prompt_BV: bool, tokens that stand in the prompt.
        counts_BV: fp32, occurrences in the output so far.
        bias_BV: fp32.
        allowed_BNV: bool, tokens that a grammar lets follow each of the model's own rows; set anew
            for every forward.
    """

    seed_B: torch.Tensor
    greedy_B: torch.Tensor
    all_greedy: bool
    any_greedy: bool
    temperature_B: torch.Tensor
    top_k_B: torch.Tensor | None = None
    max_top_k: int = 0
    top_p_B: torch.Tensor | None = None
    min_p_B: torch.Tensor | None = None
    repetition_B: torch.Tensor | None = None
    presence_B: torch.Tensor | None = None
    frequency_B: torch.Tensor | None = None
    prompt_BV: torch.Tensor | None = None
    counts_BV: torch.Tensor | None = None
    bias_BV: torch.Tensor | None = None
    allowed_BNV: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]] | torch.Tensor,
        outputs: Sequence[Sequence[int]] | torch.Tensor,
        vocab_size: int,
        device: torch.device,
    ) -> Sampling:
        """The batch of requests with these parameters, seeds, prompts and outputs so far.

        Prompts and outputs may be given as ``prompt_BV`` and ``counts_BV``, where these are known.
        """
        wants = kind_of(params)
        columns = cls.columns(params, seeds, wants, vocab_size)
        tensors: dict[str, Any] = dict(
            zip(columns, upload_all(list(columns.values()), device), strict=True)
        )
        sampling = cls(all_greedy="sampled" not in wants, any_greedy="greedy" in wants, **tensors)
        if sampling.top_k_B is not None:
            limits = (p.top_k for p in params if not p.greedy and 0 < p.top_k < vocab_size)
            sampling.max_top_k = max(limits, default=0)
        if "penalties" in wants:
            sampling.counts_BV = _counts(outputs, vocab_size, device)
            sampling.prompt_BV = _counts(prompts, vocab_size, device).bool()
        if "bias" in wants:
            entries = [
                (row * vocab_size + token, bias)
                for row, p in enumerate(params)
                for token, bias in (p.logit_bias or {}).items()
            ]
            places, biases = zip(*entries, strict=True)
            bias_X = torch.zeros(len(params) * vocab_size, device=device)
            bias_X[upload(places, device)] = upload(biases, device, torch.float32)
            sampling.bias_BV = bias_X.view(len(params), vocab_size)
        return sampling

    @classmethod
    def cat(cls, parts: Sequence[Sampling]) -> Sampling:
        """The requests of all ``parts``, which are of one kind, in order."""
        names = parts[0].tensors
        tensors: dict[str, Any] = {n: torch.cat([p.tensors[n] for p in parts]) for n in names}
        limit = max(p.max_top_k for p in parts)
        return replace(parts[0], max_top_k=limit, **tensors)

    @staticmethod
    def columns(
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        wants: frozenset[str],
        vocab_size: int,
    ) -> dict[str, npt.NDArray[Any]]:
        """By field, what is one number of each request with these parameters and seeds.

        They are part of a batch that ``wants`` this (`kind_of`), which they need not.
        """
        numbers = {
            "seed_B": np.array(seeds, np.int64),
            "greedy_B": np.array([p.greedy for p in params]),
            "temperature_B": _floats(1.0 if p.greedy else p.temperature for p in params),
        }
        if "top_k" in wants:
            limits = (p.top_k if p.top_k > 0 else vocab_size for p in params)
            numbers["top_k_B"] = np.array([min(limit, vocab_size) for limit in limits])
        if "top_p" in wants:
            numbers["top_p_B"] = _floats(p.top_p for p in params)
        if "min_p" in wants:
            numbers["min_p_B"] = _floats(p.min_p for p in params)
        if "penalties" in wants:
            numbers["repetition_B"] = _floats(p.repetition_penalty for p in params)
            numbers["presence_B"] = _floats(p.presence_penalty for p in params)
            numbers["frequency_B"] = _floats(p.frequency_penalty for p in params)
        return numbers

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that there are, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}

    @property
    def kind(self) -> frozenset[str]:
        """`kind_of` its requests: all that the course of the computation depends on."""
        asked = {
            "greedy": self.any_greedy,
            "sampled": not self.all_greedy,
            "top_k": self.top_k_B is not None,
            "top_p": self.top_p_B is not None,
            "min_p": self.min_p_B is not None,
            "penalties": self.counts_BV is not None,
            "bias": self.bias_BV is not None,
        }
        return frozenset(name for name, value in asked.items() if value)

    @property
    def plain(self) -> bool:
        """Whether all that anybody asks for is a temperature."""
        limits = (self.top_k_B, self.top_p_B, self.min_p_B)
        return not self.adjusts_logits and all(x is None for x in limits)

    @property
    def adjusts_logits(self) -> bool:
        """Whether a request has penalties, a bias or a grammar."""
        return any(x is not None for x in (self.counts_BV, self.bias_BV, self.allowed_BNV))

    def draw(self, position_B: torch.Tensor, stream: Stream) -> Draw | None:
        """How to draw, for kernels; None: everybody takes the likeliest."""
        if self.all_greedy:
            return None
        return Draw(self.seed_B, position_B, int(stream), self.temperature_B, self.greedy_B)

    def commit(self, tokens_BN: torch.Tensor, accepted_B: torch.Tensor) -> None:
        """Count the accepted of ``tokens_BN``, and the one after them, as output."""
        if self.counts_BV is not None:
            place_N = torch.arange(tokens_BN.shape[1], device=tokens_BN.device)
            self.counts_BV.scatter_add_(1, tokens_BN, (place_N <= accepted_B[:, None]).float())


def kind_of(params: Iterable[SamplingParams]) -> frozenset[str]:
    """What any of the requests wants (`SamplingParams.wants`)."""
    return frozenset().union(*{p.wants for p in params})


def _floats(numbers: Iterable[float]) -> npt.NDArray[np.float32]:
    return np.fromiter(numbers, np.float32)


def _counts(
    texts: Sequence[Sequence[int]] | torch.Tensor, vocab_size: int, device: torch.device
) -> torch.Tensor:
    """``[B, V]`` fp32: how often each token stands in each text; what is that already is left."""
    if isinstance(texts, torch.Tensor):
        return texts
    places = [row * vocab_size + token for row, ids in enumerate(texts) for token in ids]
    places_X = upload(places, device, torch.int64)
    counts_X = torch.zeros(len(texts) * vocab_size, device=device)
    counts_X.scatter_add_(0, places_X, torch.ones_like(places_X, dtype=torch.float32))
    return counts_X.view(len(texts), vocab_size)


def adjusted_logits(
    logits_BRX: torch.Tensor,
    sampling: Sampling,
    drafts_BRE: torch.Tensor,
    ids_BRX: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits after penalties, bias and grammar, fp32: all that can change their order.

    A grammar restricts the model's own rows (the whole vocabulary) only, not proposals.

    Args:
        logits_BRX: the model's logits, of the whole vocabulary or of the tokens ``ids_BRX``.
        drafts_BRE: tokens that stand before the row beyond the committed output, int64; -1: none.
    """
    logits_BRX = logits_BRX.float()
    if sampling.counts_BV is not None:
        logits_BRX = _penalised(logits_BRX, sampling, drafts_BRE, ids_BRX)
    if sampling.bias_BV is not None:
        logits_BRX = logits_BRX + _select(sampling.bias_BV, ids_BRX)
    if sampling.allowed_BNV is not None and ids_BRX is None:
        rows = logits_BRX.shape[1]  # one where nobody has drafts
        logits_BRX = logits_BRX.masked_fill(~sampling.allowed_BNV[:, :rows], -torch.inf)
    return logits_BRX


def greedy_choice(
    logits_BRX: torch.Tensor,
    sampling: Sampling,
    drafts_BRE: torch.Tensor,
    ids_BRX: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index ``[B, R]`` of the largest adjusted logit, the first of equals; arguments as above."""
    if sampling.adjusts_logits:
        logits_BRX = adjusted_logits(logits_BRX, sampling, drafts_BRE, ids_BRX)
    if cpu_kernels.usable(logits_BRX):
        return cpu_kernels.argmax(logits_BRX)
    if cuda_head.usable(logits_BRX.device):
        return cuda_head.argmax(logits_BRX)
    return logits_BRX.argmax(dim=-1)


def distribution(
    logits_BRX: torch.Tensor,
    sampling: Sampling,
    drafts_BRE: torch.Tensor,
    ids_BRX: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities ``[B, R, X]``, fp32: penalties, bias, temperature, top-k, top-p, min-p.

    Arguments as in `adjusted_logits`. Tokens that tie with the last one kept are kept too, so
    that the result does not depend on the order of equal logits. A greedy request's distribution
    is one-hot at the argmax.
    """
    logits_BRX = adjusted_logits(logits_BRX, sampling, drafts_BRE, ids_BRX)
    probs_BRX = torch.softmax(logits_BRX / sampling.temperature_B[:, None, None], dim=-1)
    probs_BRX = _truncated(probs_BRX, sampling)
    if sampling.any_greedy:
        one_hot_BRX = torch.zeros_like(probs_BRX).scatter_(
            2, logits_BRX.argmax(dim=-1, keepdim=True), 1.0
        )
        probs_BRX = torch.where(sampling.greedy_B[:, None, None], one_hot_BRX, probs_BRX)
    return probs_BRX


def sample(
    probs_BRX: torch.Tensor,
    seed_B: torch.Tensor,
    position_BR: torch.Tensor,
    stream: Stream,
    ids_BRX: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index ``[B, R]`` of a sample from each row of ``probs`` (which need not sum to 1).

    Args:
        seed_B, position_BR: int64; a sample is a function of these, the stream and ``probs``.
        ids_BRX: the tokens of ``probs``, int64; None: the whole vocabulary.
    """
    if cuda_head.usable(probs_BRX.device):
        return cuda_head.sample(probs_BRX, seed_B, position_BR, int(stream), ids_BRX)
    if ids_BRX is None:
        ids_BRX = torch.arange(probs_BRX.shape[-1], device=probs_BRX.device)
    noise = exponential(seed_B[:, None, None], position_BR[..., None], stream, ids_BRX)
    return (probs_BRX / noise).argmax(dim=-1)


def _select(values_BV: torch.Tensor, ids_BRX: torch.Tensor | None) -> torch.Tensor:
    """``[B, R, X]``: the values at ``ids``, or ``[B, 1, V]`` for the whole vocabulary."""
    if ids_BRX is None:
        return values_BV[:, None]
    return values_BV[:, None].expand(-1, ids_BRX.shape[1], -1).gather(2, ids_BRX)


def _penalised(
    logits_BRX: torch.Tensor,
    sampling: Sampling,
    drafts_BRE: torch.Tensor,
    ids_BRX: torch.Tensor | None,
) -> torch.Tensor:
    assert sampling.counts_BV is not None and sampling.prompt_BV is not None
    assert sampling.repetition_B is not None and sampling.presence_B is not None
    assert sampling.frequency_B is not None
    if ids_BRX is None:
        counts_BRX = sampling.counts_BV[:, None].repeat(1, logits_BRX.shape[1], 1)
        real_BRE = drafts_BRE >= 0
        counts_BRX.scatter_add_(2, drafts_BRE.clamp(min=0), real_BRE.float())
    else:
        drafted_BRX = (drafts_BRE[:, :, None, :] == ids_BRX[..., None]).sum(-1)
        counts_BRX = _select(sampling.counts_BV, ids_BRX) + drafted_BRX
    present_BRX = counts_BRX > 0
    seen_BRX = present_BRX | _select(sampling.prompt_BV, ids_BRX)
    repetition_B11 = sampling.repetition_B[:, None, None]
    scaled_BRX = torch.where(
        logits_BRX > 0, logits_BRX / repetition_B11, logits_BRX * repetition_B11
    )
    logits_BRX = torch.where(seen_BRX, scaled_BRX, logits_BRX)
    logits_BRX = logits_BRX - sampling.frequency_B[:, None, None] * counts_BRX
    return logits_BRX - sampling.presence_B[:, None, None] * present_BRX


def _truncated(probs_BRX: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Keep what reaches the highest of the thresholds of top-k, top-p and min-p; renormalise."""
    thresholds = []
    if sampling.min_p_B is not None:
        thresholds.append(sampling.min_p_B[:, None, None] * probs_BRX.amax(-1, keepdim=True))
    if sampling.top_k_B is not None or sampling.top_p_B is not None:
        thresholds.append(_rank_threshold(probs_BRX, sampling))
    if not thresholds:
        return probs_BRX
    for threshold_BR1 in thresholds:
        probs_BRX = torch.where(probs_BRX >= threshold_BR1, probs_BRX, 0.0)
    return probs_BRX / probs_BRX.sum(-1, keepdim=True)


def _rank_threshold(probs_BRX: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The smallest probability that top-k and top-p (within the top k) keep, ``[B, R, 1]``."""
    if cuda_head.usable(probs_BRX.device):
        return cuda_head.rank_threshold(probs_BRX, sampling.top_k_B, sampling.top_p_B)
    X = probs_BRX.shape[-1]
    # To sort a vocabulary takes the CPU about as long as a forward, and few tokens are kept.
    few = probs_BRX.device.type == "cpu"
    width = min(max(FIRST_RANKS, sampling.max_top_k), X) if few else X
    while True:
        threshold_BR1, enough = _threshold_within(probs_BRX, sampling, width)
        if width == X or enough.all():
            return threshold_BR1
        width = min(MORE_RANKS * width, X)


def _threshold_within(
    probs_BRX: torch.Tensor, sampling: Sampling, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_rank_threshold` if no more than ``width`` are kept, and whether it is so, ``[B, R, 1]``."""
    X = probs_BRX.shape[-1]
    sorted_BRW = probs_BRX.topk(width, dim=-1).values
    last_BR1 = torch.full_like(sorted_BRW[..., :1], X - 1, dtype=torch.int64)
    total_BR1 = probs_BRX.sum(-1, keepdim=True)
    if sampling.top_k_B is not None:
        last_BR1 = torch.minimum(last_BR1, sampling.top_k_B[:, None, None] - 1)
        rank_W = torch.arange(width, device=probs_BRX.device)
        sorted_BRW = torch.where(rank_W <= last_BR1, sorted_BRW, 0.0)
        total_BR1 = torch.where(last_BR1 < X - 1, sorted_BRW.sum(-1, keepdim=True), total_BR1)
    everything_BR1 = last_BR1 == X - 1
    enough_BR1 = ~everything_BR1
    if sampling.top_p_B is not None:
        top_p_B11 = sampling.top_p_B[:, None, None]
        share_BRW = sorted_BRW / total_BR1
        sum_BRW = share_BRW.cumsum(-1)
        kept_BR1 = (sum_BRW - share_BRW < top_p_B11).sum(-1, keepdim=True)
        enough_BR1 = enough_BR1 | (sum_BRW[..., -1:] >= top_p_B11)
        on_BR1 = (top_p_B11 < 1).expand_as(last_BR1)
        everything_BR1 = everything_BR1 & ~on_BR1
        last_BR1 = torch.where(on_BR1, torch.minimum(last_BR1, kept_BR1 - 1), last_BR1)
    threshold_BR1 = sorted_BRW.gather(2, last_BR1.clamp(0, width - 1))
    return torch.where(everything_BR1, 0.0, threshold_BR1), enough_BR1 | everything_BR1
