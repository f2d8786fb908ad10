"""Requests in, tensors of a forward out: what `idlm.decoding.cycle` needs of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from idlm.decoding import cycle
from idlm.decoding.cycle import Method, Outcome, State
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.grammar import Grammars
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Request


class Runner:
    """Runs forwards of one method over one cache; knows nothing of whose turn it is."""

    def __init__(
        self, method: Method, cache: KVCache, grammars: Grammars, device: torch.device
    ) -> None:
        self.method, self.device = method, device
        self._cache, self._grammars = cache, grammars

    def decode(
        self, requests: Sequence[Request], table_BP: torch.Tensor, state: State, sampling: Sampling
    ) -> Outcome:
        """One cycle; what belongs to ``requests`` is made by `table` and `sampling`."""
        self._restrict(sampling, requests, state.drafts)
        return cycle.decode(
            self.method, self._cache.k_LNKTD, self._cache.v_LNKTD, table_BP, state, sampling
        )

    def prefill(self, request: Request, end: int) -> Outcome:
        """Run what is not cached of the prompt, which has ``end`` tokens."""
        sampling = self.sampling([request])
        self._restrict(sampling, [request], Drafts.none(1, self.device))
        return cycle.prefill(self.method, *self._inputs(request, end), sampling)

    def cache(self, request: Request, end: int) -> None:
        """Cache the tokens before ``end`` that are not cached yet."""
        cycle.cache(self.method, *self._inputs(request, end))

    def table(self, requests: Sequence[Request]) -> torch.Tensor:
        """``table_BP``: the blocks of ``requests``, int32."""
        return self._cache.table([request.lease for request in requests])

    def sampling(self, requests: Sequence[Request]) -> Sampling:
        """The sampling parameters of ``requests`` and what their penalties count, now."""
        return Sampling.of(
            [r.params for r in requests],
            [r.seed for r in requests],
            [r.prompt_token_ids for r in requests],
            [r.token_ids for r in requests],
            self.method.decoder.config.vocab_size,
            self.device,
        )

    def select(self, state: State, rows: Sequence[int]) -> State:
        """The requests at ``rows`` of ``state``."""
        return state.select(torch.tensor(rows, dtype=torch.int64, device=self.device))

    def _inputs(
        self, request: Request, end: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self._cache.k_LNKTD,
            self._cache.v_LNKTD,
            self.table([request]),
            torch.tensor([request.tokens(request.cached, end)], device=self.device),
            torch.tensor([request.cached], device=self.device),
        )

    def _restrict(self, sampling: Sampling, requests: Sequence[Request], drafts: Drafts) -> None:
        """Let grammars say what may follow each of the model's own rows of this forward."""
        if not any(r.params.constrained for r in requests):
            return
        tokens, counts = drafts.tokens_BM.tolist(), drafts.count_B.tolist()
        sampling.allowed_BNV = self._grammars.allowed(
            [r.grammar for r in requests],
            [t[:count] for t, count in zip(tokens, counts, strict=True)],
            rows=drafts.tokens_BM.shape[1] + 1,
        ).to(self.device)
