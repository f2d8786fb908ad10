"""What the inputs of captured graphs have in common, and the states that lie in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from idlm.decoding.cycle import State
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.slab import Field, Slab

NUMBER = ((), torch.int64)
FOR_EVERY_TOKEN = frozenset(("penalties", "bias"))  # what a request has a whole vocabulary for
NEUTRAL = {"temperature_B": 1.0, "top_k_B": 1}  # of nobody, where zeros would not do


@dataclass(frozen=True)
class Kind:
    """What is common to all inputs of a size.

    Attributes:
        wants: `Sampling.kind`.
        table_width: blocks of a request at most.
        places: drafts of a request at most.
        candidates: tokens among which each was chosen, where not all requests are greedy.
    """

    wants: frozenset[str]
    table_width: int
    places: int
    candidates: int
    vocab_size: int
    device: torch.device

    def of(self, wants: frozenset[str]) -> Kind:
        """The same for other sampling."""
        return replace(self, wants=wants)

    @property
    def greedy(self) -> bool:
        """Whether all requests are."""
        return "sampled" not in self.wants

    @property
    def table(self) -> dict[str, Field]:
        """The blocks of each request."""
        return {"table_BP": ((self.table_width,), torch.int32)}

    @property
    def state(self) -> dict[str, Field]:
        """What stands in a `State`, but for what drafts were drawn from."""
        numbers = dict.fromkeys(("pending_B", "length_B", "count_B"), NUMBER)
        return {**numbers, "tokens_BM": ((self.places,), torch.int64)}

    @property
    def drawn(self) -> dict[str, Field]:
        """What drafts were drawn from; those of greedy requests follow from their tokens."""
        if self.greedy:
            return {}
        shape = self.places, self.candidates
        return {"ids_BMK": (shape, torch.int64), "probs_BMK": (shape, torch.float32)}

    @property
    def columns(self) -> dict[str, Field]:
        """Those of `Sampling.columns`."""
        fields: dict[str, Field] = {"seed_B": NUMBER, "greedy_B": ((), torch.bool)}
        names = ["temperature_B"]
        if "top_k" in self.wants:
            fields["top_k_B"] = NUMBER
        names += [f"{limit}_B" for limit in ("top_p", "min_p") if limit in self.wants]
        if "penalties" in self.wants:
            names += ["repetition_B", "presence_B", "frequency_B"]
        return fields | dict.fromkeys(names, ((), torch.float32))

    @property
    def vocabulary(self) -> dict[str, Field]:
        """What `Sampling` has for every token."""
        V, found = (self.vocab_size,), dict[str, Field]()
        if "penalties" in self.wants:
            found = {"counts_BV": (V, torch.float32), "prompt_BV": (V, torch.bool)}
        return found | ({"bias_BV": (V, torch.float32)} if "bias" in self.wants else {})

    def sampling(self, slab: Slab) -> Sampling:
        """The parameters that lie in ``slab``."""
        tensors: dict[str, Any] = {name: slab[name] for name in (*self.columns, *self.vocabulary)}
        any_greedy = "greedy" in self.wants
        return Sampling(all_greedy=self.greedy, any_greedy=any_greedy, **tensors)


@dataclass(kw_only=True)
class SlabState(State):
    """A state that lies in a slab."""

    slab: Slab

    @classmethod
    def of(cls, slab: Slab, sampling: Sampling) -> SlabState:
        """What lies there; what penalties look at is in ``sampling``."""
        drafts = Drafts.certain(slab["tokens_BM"], slab["count_B"])
        own = cls(slab["pending_B"], slab["length_B"], drafts, slab=slab)
        own.counts_BV, own.prompt_BV = sampling.counts_BV, sampling.prompt_BV
        if "ids_BMK" in slab:
            drafts.ids_BMK, drafts.probs_BMK = slab["ids_BMK"], slab["probs_BMK"]
        return own

    def clone(self) -> SlabState:
        """The same in memory of its own."""
        slab, drafts = self.slab.clone(), self.drafts
        tokens_BM = slab["tokens_BM"]
        ids_BMK, probs_BMK = tokens_BM[..., None], drafts.probs_BMK  # which are all 1
        if "ids_BMK" in slab:
            ids_BMK, probs_BMK = slab["ids_BMK"], slab["probs_BMK"]
        return SlabState(
            slab["pending_B"],
            slab["length_B"],
            Drafts(tokens_BM, ids_BMK, probs_BMK, slab["count_B"]),
            None if self.counts_BV is None else self.counts_BV.clone(),
            None if self.prompt_BV is None else self.prompt_BV.clone(),
            slab=slab,
        )

    def take(self, state: State, B: int, real_B: torch.Tensor | None = None) -> None:
        """Write ``state`` over the first ``B``; lengths of rows that are not real become 0."""
        own, places = self.drafts, self.drafts.tokens_BM.shape[1]
        # Places that there are no drafts for stay as they are: nobody counts them.
        M = min(places, state.drafts.tokens_BM.shape[1])
        drafts = state.drafts.resized(M, own.ids_BMK.shape[2])
        self.pending_B[:B] = state.pending_B
        if real_B is None:
            self.length_B[:B] = state.length_B
        else:
            torch.mul(state.length_B, real_B[:B], out=self.length_B[:B])
        own.tokens_BM[:B, :M] = drafts.tokens_BM
        own.count_B[:B] = drafts.count_B
        if "ids_BMK" in self.slab:
            own.ids_BMK[:B, :M], own.probs_BMK[:B, :M] = drafts.ids_BMK, drafts.probs_BMK
