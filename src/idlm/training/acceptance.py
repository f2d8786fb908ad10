"""How many drafts are accepted, measured on held-out documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from idlm.training.data import Corpus, Loader
from idlm.training.objective import Objective

# Strides whose tokens per forward are reported.
STRIDES = (4, 8)


@dataclass(frozen=True)
class Acceptance:
    """Acceptance by place in the block, and tokens per forward.

    Attributes:
        greedy: share of places where draft and model have the same argmax, on documents sampled
            at temperature 0.
        sampled: mean ``sum_x min(p, q)``, on documents sampled at temperature 1.
        tpf: tokens per forward of the quadratic layout, by ``"T=0 N=4"`` etc. (`walk`).
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
            self._loaders.append(Loader(part, batch=batch, spread=False, **loader))

    @torch.no_grad()
    def measure(self, objective: Objective, device: torch.device) -> Acceptance:
        """Run the batches through the objective."""
        by_place: list[tuple[float, ...]] = []
        tpf: dict[str, float] = {}
        for temperature, loader in enumerate(self._loaders):
            accepted, valid, anchors = [], [], []
            for step in range(self._steps):
                batch = loader.batch(step)
                outcome = objective(batch.to(device))
                chosen = outcome.overlap_BAM if temperature else outcome.agree_BAM
                accepted.append(chosen.double().cpu())
                valid.append(outcome.valid_BAM.cpu())
                anchors.append(batch.anchors_BA)
            accepted_RAM, valid_RAM = torch.cat(accepted), torch.cat(valid)
            mean_M = (accepted_RAM * valid_RAM).sum((0, 1)) / valid_RAM.sum((0, 1)).clamp(min=1)
            by_place.append(tuple(mean_M.tolist()))
            accepted_RAM *= valid_RAM
            used_RA = valid_RAM[..., 0]
            for stride in STRIDES:
                if stride <= accepted_RAM.shape[-1] + 1:
                    name = f"T={temperature} N={stride}"
                    tpf[name] = walk(accepted_RAM[..., : stride - 1], torch.cat(anchors), used_RA)
        return Acceptance(by_place[0], by_place[1], tpf)


def walk(accepted_RAM: torch.Tensor, anchors_RA: torch.Tensor, used_RA: torch.Tensor) -> float:
    """Tokens per forward of decoding along the anchors, each one token after the one before.

    A forward that starts at an anchor and has ``k`` leading drafts accepted (the token after them
    is the model's own) is followed by one that starts ``k + 1`` anchors on. The mean chain over
    all anchors would be too high: forwards start where drafts fail more often than elsewhere.

    Args:
        accepted_RAM: chance that a draft is accepted, 0 where it has no target; fp64.
        anchors_RA: indices in the row, ascending; a gap begins another text.
        used_RA: anchors that count, bool.
    """
    R, A, M = accepted_RAM.shape
    reached_RAN = torch.cat(
        (torch.ones(R, A, 1, dtype=accepted_RAM.dtype), accepted_RAM.cumprod(-1)), dim=-1
    )
    ends_RAN = reached_RAN - torch.cat((reached_RAN[..., 1:], torch.zeros(R, A, 1)), dim=-1)
    starts_RA = torch.ones(R, A, dtype=torch.bool)
    starts_RA[:, 1:] = anchors_RA[:, 1:] != anchors_RA[:, :-1] + 1
    visits_RA = starts_RA.to(accepted_RAM.dtype)
    # The text that an anchor belongs to, so that no chain runs on into the next one.
    text_RA = starts_RA.cumsum(1)
    for a in range(A):
        steps = min(M + 1, A - 1 - a)
        same_RN = text_RA[:, a + 1 : a + 1 + steps] == text_RA[:, a : a + 1]
        visits_RA[:, a + 1 : a + 1 + steps] += (
            visits_RA[:, a : a + 1] * ends_RAN[:, a, :steps] * same_RN
        )
    return float(used_RA.sum() / (visits_RA * used_RA).sum())
