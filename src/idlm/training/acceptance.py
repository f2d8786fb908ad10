"""How many drafts are accepted, measured on held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from idlm.training.data import Corpus, Loader
from idlm.training.objective import Objective

# Strides whose tokens per forward are reported.
STRIDES = (4, 8)


@dataclass(frozen=True)
class Acceptance:
    """Acceptance by place in the block, and tokens per forward implied by it.

    Attributes:
        greedy: share of places where draft and model have the same argmax, on documents sampled
            at temperature 0.
        sampled: mean ``sum_x min(p, q)``, on documents sampled at temperature 1.
        tpf: tokens per forward when every forward has a fresh block (the quadratic layout):
            one more than the expected number of leading accepted places, by ``"T=0 N=4"`` etc.
    """

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]
    tpf: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        places = " ".join(f"{a:.3f}" for a in self.greedy)
        sampled = " ".join(f"{a:.3f}" for a in self.sampled)
        tpf = "  ".join(f"{name} {value:.3f}" for name, value in self.tpf.items())
        return f"accepted by place: T=0 {places} | T=1 {sampled} | TPF {tpf}"


class Evaluation:
    """Fixed batches of held-out documents, greedy ones and ones sampled at temperature 1."""

    def __init__(self, corpus: Corpus, *, rows: int, batch: int, **loader: Any) -> None:
        self._steps = -(-rows // batch)
        self._loaders = []
        for temperature in (0.0, 1.0):
            keep = corpus.temperatures == temperature
            part = corpus.select(keep) if keep.any() else corpus
            self._loaders.append(Loader(part, batch=batch, **loader))

    @torch.no_grad()
    def measure(self, objective: Objective, device: torch.device) -> Acceptance:
        """Run the batches through the objective."""
        by_place: list[tuple[float, ...]] = []
        tpf: dict[str, float] = {}
        for temperature, loader in enumerate(self._loaders):
            accepted, valid = [], []
            for step in range(self._steps):
                outcome = objective(loader.batch(step).to(device))
                chosen = outcome.overlap_BAM if temperature else outcome.agree_BAM
                accepted.append(chosen.flatten(0, 1).double().cpu())
                valid.append(outcome.valid_BAM.flatten(0, 1).cpu())
            accepted_NM, valid_NM = torch.cat(accepted), torch.cat(valid)
            mean_M = (accepted_NM * valid_NM).sum(0) / valid_NM.sum(0).clamp(min=1)
            by_place.append(tuple(mean_M.tolist()))
            whole_NM = accepted_NM[valid_NM[:, -1]]
            tpf |= _tpf(whole_NM, f"T={temperature}", STRIDES)
        return Acceptance(by_place[0], by_place[1], tpf)


def _tpf(accepted_NM: torch.Tensor, name: str, strides: Sequence[int]) -> dict[str, float]:
    """One more than the mean length of the accepted chain, for the strides that fit."""
    chains_NM = accepted_NM.cumprod(-1)
    return {
        f"{name} N={n}": 1.0 + float(chains_NM[:, : n - 1].sum(-1).mean())
        for n in strides
        if n <= accepted_NM.shape[1] + 1 and len(accepted_NM)
    }
