"""AdamW on fp32 master copies of an adapter that computes in a lower precision."""

from __future__ import annotations

import math

import torch

from idlm.model.adapter import Adapter
from idlm.training.config import ConvertConfig
from idlm.training.parallel import Parallel


class MasterAdamW:
    """Holds the masters, their average and AdamW's state; writes back after each step."""

    def __init__(self, adapter: Adapter, config: ConvertConfig, parallel: Parallel) -> None:
        self.config, self._parallel = config, parallel
        self._live = dict(adapter.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self._live.items()}
        self.averages = (
            {name: m.clone() for name, m in self.masters.items()} if config.ema else self.masters
        )
        head = [m for name, m in self.masters.items() if name.startswith("head.")]
        mask = [self.masters["mask_embedding"]]
        lora = [m for name, m in self.masters.items() if name.startswith("lora.")]
        self._adamw = torch.optim.AdamW(
            [
                {"params": lora, "peak": config.lr},
                {"params": mask, "peak": config.lr},
                {"params": head, "peak": config.head_lr},
            ],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=next(iter(self.masters.values())).is_cuda,
        )

    def collect(self) -> None:
        """Add the gradients of the live parameters to the masters' and clear them."""
        for name, live in self._live.items():
            master = self.masters[name]
            gradient = torch.zeros_like(master) if live.grad is None else live.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            live.grad = None

    @torch.no_grad()
    def step(self, progress: float, number: int) -> torch.Tensor:
        """One update at the learning rate of ``progress`` (0 to 1); returns the gradient norm.

        The gradients of all processes are added first.
        """
        masters = list(self.masters.values())
        self._parallel.sum_all([m.grad for m in masters if m.grad is not None])
        norms = []
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * schedule(progress, self.config.warmup)
            # The head's gradient is a hundred times the LoRA's: a common clip would be its own.
            norms.append(torch.nn.utils.clip_grad_norm_(group["params"], self.config.clip))
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        torch._foreach_copy_(list(self._live.values()), masters)
        if self.config.ema:
            # A young average follows faster, so that it forgets the initial weights.
            decay = min(self.config.ema, (1 + number) / (10 + number))
            torch._foreach_lerp_(list(self.averages.values()), masters, 1.0 - decay)
        return torch.stack(norms).norm()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs, as named tensors."""
        tensors = {f"master.{name}": m for name, m in self.masters.items()}
        if self.config.ema:
            tensors |= {f"average.{name}": a for name, a in self.averages.items()}
        for name, master in self.masters.items():
            for key, value in self._adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            self._live[name].copy_(master)
            if self.config.ema:
                self.averages[name].copy_(tensors[f"average.{name}"])
            self._adamw.state[master] = {
                "step": tensors[f"step.{name}"].clone(),
                "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
            }
            if self._adamw.defaults["fused"]:
                state = self._adamw.state[master]
                state["step"] = state["step"].to(master.device)


def schedule(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` and result in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))
