"""AdamW on fp32 parameters: schedule, clipping, moving average, and its state by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from idlm.model.adapter import Adapter
from idlm.training.config import ConvertConfig
from idlm.training.parallel import Parallel


class Group(NamedTuple):
    """Parameters (fp32) that share a peak learning rate and are clipped together."""

    parameters: Mapping[str, torch.Tensor]
    peak: float


class Optimizer:
    """AdamW whose parameters may be sharded over the processes (`DTensor`).

    Attributes:
        masters: the trained parameters by name.
        averages: their moving average; the masters themselves if none is kept.
    """

    def __init__(self, groups: list[Group], config: ConvertConfig) -> None:
        self.config = config
        self.masters = {name: p for group in groups for name, p in group.parameters.items()}
        self.averages = (
            {name: m.detach().clone() for name, m in self.masters.items()}
            if config.ema
            else self.masters
        )
        self._adamw = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "peak": g.peak} for g in groups],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=next(iter(self.masters.values())).is_cuda,
        )
        # Now, not at the first step: a checkpoint is read into these.
        for master in self.masters.values():
            device = master.device if self._adamw.defaults["fused"] else "cpu"
            self._adamw.state[master] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def collect(self) -> None:
        """Take in the gradients of one backward pass, which adds them up where they are."""

    @torch.no_grad()
    def step(self, progress: float, number: int) -> torch.Tensor:
        """One update at the learning rate of ``progress`` (0 to 1); returns the gradient norm."""
        norms = []
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * schedule(progress, self.config.warmup)
            # A sampler head's gradient is a hundred times the LoRA's: a common clip would be its
            # own.
            norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.clip)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        if self.config.ema:
            # A young average follows faster, so that it forgets the initial weights.
            decay = min(self.config.ema, (1 + number) / (10 + number))
            torch._foreach_lerp_(_parts(self.averages), _parts(self.masters), 1.0 - decay)
        self.publish()
        return torch.stack(norms).norm()

    def publish(self) -> None:
        """Give the model the masters' values; here they are the model's own parameters."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model computes with the averages meanwhile."""
        if not self.config.ema:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a resumed run needs, by name: to be saved, or to be read into."""
        tensors = {f"master.{name}": m.detach() for name, m in self.masters.items()}
        if self.config.ema:
            tensors |= {f"average.{name}": a for name, a in self.averages.items()}
        for name, master in self.masters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self._adamw.state[master][key]
        return tensors

    def restored(self, steps: int) -> None:
        """To be called when `state` was read into: ``steps`` were done by then."""
        for master in self.masters.values():
            self._adamw.state[master]["step"].fill_(steps)
        self.publish()

    @torch.no_grad()
    def _swap(self) -> None:
        for master, average in zip(_parts(self.masters), _parts(self.averages), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.publish()


class MasterAdamW(Optimizer):
    """Masters of an adapter that computes in a lower precision, whole in every process."""

    def __init__(self, adapter: Adapter, config: ConvertConfig, parallel: Parallel) -> None:
        self._parallel = parallel
        self._live = dict(adapter.named_parameters())
        masters = {name: p.detach().float().clone() for name, p in self._live.items()}
        parts: dict[str, dict[str, torch.Tensor]] = {"lora": {}, "mask_embedding": {}, "head": {}}
        for name, master in masters.items():
            parts[name.partition(".")[0]][name] = master
        peaks = {"lora": config.lr, "mask_embedding": config.lr, "head": config.head_lr}
        super().__init__([Group(parts[part], peak) for part, peak in peaks.items()], config)

    def collect(self) -> None:
        """Add the gradients of the live parameters to the masters' and clear them."""
        for name, live in self._live.items():
            master = self.masters[name]
            gradient = torch.zeros_like(master) if live.grad is None else live.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            live.grad = None

    @torch.no_grad()
    def step(self, progress: float, number: int) -> torch.Tensor:
        """As `Optimizer.step`; the gradients of all processes are added first."""
        self._parallel.sum_all([m.grad for m in self.masters.values() if m.grad is not None])
        return super().step(progress, number)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the live parameters."""
        torch._foreach_copy_(list(self._live.values()), [self.masters[name] for name in self._live])


def schedule(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` and result in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


def _parts(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds of each tensor."""
    values = (t.detach() for t in tensors.values())
    return [t.to_local() if isinstance(t, DTensor) else t for t in values]
