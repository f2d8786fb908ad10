"""How the requests of a batch want their tokens chosen, kept from forward to forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from idlm.decoding.params import SamplingParams
from idlm.decoding.sampling import Sampling
from idlm.integrations.sglang.requests import sampling_params, seed_of


def greedy_sampling(batch: int, device: torch.device) -> Sampling:
    """Of ``batch`` requests that take the likeliest token and want nothing else."""
    return Sampling(
        seed_B=torch.zeros(batch, dtype=torch.int64, device=device),
        greedy_B=torch.ones(batch, dtype=torch.bool, device=device),
        all_greedy=True,
        any_greedy=True,
        temperature_B=torch.ones(batch, device=device),
    )


class BatchSampling:
    """`Sampling` of the batch that runs; built anew when its requests change.

    Penalties count the output alone, as the host's do. The host learns of committed tokens a
    forward late under overlap scheduling, so they are counted here, on the device.
    """

    def __init__(self, vocab_size: int, server_seed: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._server_seed = server_seed
        self._requests: list[Any] = []
        self._sampling: Sampling | None = None
        self._counts_V: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Any, tuple[SamplingParams, int]] = WeakKeyDictionary()
        self._greedy: dict[int, Sampling] = {}

    def running(self, requests: Sequence[Any]) -> Sampling:
        """Of requests that have gone through `starting`."""
        if self._sampling is None or self._requests != list(requests):
            sampling = self._of(requests, [[] for _ in requests])
            if sampling.counts_BV is not None:
                known = [self._counts_V.get(r) for r in requests]
                for row, counts_V in enumerate(known):
                    if counts_V is not None:
                        sampling.counts_BV[row] = counts_V
                self._watch(requests, sampling)
            self._requests, self._sampling = list(requests), sampling
        return self._sampling

    def starting(self, requests: Sequence[Any]) -> Sampling:
        """Of requests whose prompt has just been read; retracted ones have output already."""
        sampling = self._of(requests, [r.output_ids for r in requests])
        self._watch(requests, sampling)
        self._sampling = None
        return sampling

    def _of(self, requests: Sequence[Any], outputs: Sequence[Sequence[int]]) -> Sampling:
        params, seeds = zip(*map(self._wanted, requests), strict=True)
        if all(p.greedy and not p.penalised and not p.logit_bias for p in params):
            # Batches change every few steps: what nobody asks for is not built anew each time.
            if len(requests) not in self._greedy:
                self._greedy[len(requests)] = greedy_sampling(len(requests), self.device)
            return self._greedy[len(requests)]
        prompts: list[list[int]] = [[]] * len(params)
        return Sampling.of(params, seeds, prompts, outputs, self.vocab_size, self.device)

    def _wanted(self, request: Any) -> tuple[SamplingParams, int]:
        """The request's parameters in our terms, and its seed."""
        if request not in self._known:
            params = sampling_params(request.sampling_params)
            self._known[request] = params, seed_of(params, request.rid, self._server_seed)
        return self._known[request]

    def _watch(self, requests: Sequence[Any], sampling: Sampling) -> None:
        """Keep the rows in which this sampling counts the output of its requests."""
        if sampling.counts_BV is not None:
            for request, counts_V in zip(requests, sampling.counts_BV, strict=True):
                self._counts_V[request] = counts_V
