"""The training run: steps, schedule, evaluation, checkpoints, log and the finished adapter."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from idlm.errors import CheckpointError, IdlmError, InvalidRequestError, ResourceError
from idlm.model.adapter import Adapter, AdapterConfig
from idlm.model.decoder import Decoder
from idlm.model.files import replacing
from idlm.training.acceptance import Acceptance, Evaluation
from idlm.training.config import ConvertConfig
from idlm.training.data import Batch, Corpus, Loader
from idlm.training.lossless import LosslessObjective
from idlm.training.objective import Objective
from idlm.training.optimizer import MasterAdamW
from idlm.training.parallel import ALONE, Parallel

CHECKPOINT_FILE = "checkpoint.safetensors"
CONFIG_FILE = "train_config.yaml"
LOG_FILE = "train_log.jsonl"
# A checkpoint continues a run only if these settings are unchanged: all but the pace of reports.
FREE_SETTINGS = ("log_every", "eval_every", "eval_rows", "save_every", "accumulate")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        seconds: time spent in them, the first (which compiles) and evaluations left out.
        startup: seconds of the first step of this process.
        mask_rows: mask rows trained on.
    """

    step: int = 0
    seconds: float = 0.0
    startup: float = 0.0
    mask_rows: int = 0

    def fraction(self, config: ConvertConfig) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        by_steps = self.step / config.steps if config.steps else 0.0
        by_time = self.seconds / 60 / config.minutes if config.minutes else 0.0
        return max(by_steps, by_time)


@dataclass(frozen=True)
class Report:
    """What a run reached."""

    progress: Progress
    acceptance: Acceptance
    parameters: int
    finished: bool


class Trainer:
    """Trains one adapter for a frozen decoder.

    Args:
        decoder: the base model on its device, in the dtype to compute in.
        train, heldout: documents of the base model.
        out: folder for checkpoints and log; None: keep nothing (ablations).
        base_model: name of the base model, for the adapter's card.
        parallel: this process among those that train together. All hold the whole adapter, each
            trains on its share of every batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        train: Corpus,
        heldout: Corpus,
        config: ConvertConfig,
        out: Path | None,
        base_model: str,
        parallel: Parallel = ALONE,
    ) -> None:
        if config.batch % (parallel.world * config.accumulate):
            raise InvalidRequestError(
                f"A batch of {config.batch} rows cannot be shared by {parallel.world} processes "
                f"with --accumulate {config.accumulate}; set --batch to a multiple of "
                f"{parallel.world * config.accumulate}."
            )
        self.config, self.out, self.parallel = config, out, parallel
        self.device, dtype = decoder.embed.weight.device, decoder.embed.weight.dtype
        shape: dict[str, Any] = {
            "length": config.length,
            "anchors": config.anchors,
            "block_size": config.block_size,
            "seed": config.seed,
        }
        self.loader = Loader(train, batch=config.batch, parallel=parallel, **shape)
        rows = config.batch // config.accumulate // parallel.world
        self.evaluation = Evaluation(heldout, rows=config.eval_rows, batch=rows, **shape)
        self.adapter_config = AdapterConfig(
            rank=config.rank,
            alpha=config.alpha,
            projections=config.projections,
            block_size=config.block_size,
            head_width=config.head_width,
            head_depth=config.head_depth,
            base_fingerprint=decoder.config.fingerprint(),
            base_model=base_model,
        )
        torch.manual_seed(config.seed)
        adapter = Adapter(self.adapter_config, decoder.config)
        # A mask enters the residual stream at the scale of a token: much smaller, and its
        # gradient (through the first norm) would be as much too large.
        scale = decoder.embed.weight.float().square().mean().sqrt()
        torch.nn.init.normal_(adapter.mask_embedding, std=scale.item())
        self.parameters = sum(p.numel() for p in adapter.parameters())
        self.decoder = decoder
        self.adapter = adapter.to(device=self.device, dtype=dtype)
        self.objective: Objective = LosslessObjective(decoder, self.adapter, config)
        self.factors = torch.ones(len(self.objective.terms), device=self.device)
        self.optimizer = MasterAdamW(self.adapter, config, parallel)
        self.progress = Progress()
        self._stop = False

    def run(self) -> Report:
        """Train to the end, or until SIGTERM or SIGINT, and leave a checkpoint.

        Raises:
            IdlmError: the loss is no longer a number.
            ResourceError: the device is out of memory.
        """
        if self.out is not None and self.parallel.main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.config.save(self.out / CONFIG_FILE)
        self._say(
            f"training {self.parameters / 1e6:.2f}M parameters on {len(self.loader.corpus)} "
            f"documents ({len(self.loader.corpus.tokens) / 1e6:.2f}M tokens, "
            f"{100 * self.loader.padding:.1f}% padding), {self.loader.batches_per_epoch} steps "
            "per epoch"
        )
        try:
            with self._stop_on_signals():
                self._loop()
            acceptance = self.evaluate()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"The device is out of memory ({str(error).split('.')[0]}); raise --accumulate "
                "or lower --batch, --anchors or --length."
            ) from error
        return Report(self.progress, acceptance, self.parameters, not self._stop)

    def resume(self) -> bool:
        """Continue from the checkpoint in ``out``, if there is one.

        Raises:
            CheckpointError: it is damaged or belongs to a run with other settings.
        """
        path = None if self.out is None else self.out / CHECKPOINT_FILE
        if path is None or not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it to begin again."
            ) from error
        for name, value in self._identity().items():
            if state["config"].get(name) != value:
                raise CheckpointError(
                    f"{path} belongs to a run with {name} = {state['config'].get(name)}, not "
                    f"{value}; give that value, or another output folder."
                )
        self.optimizer.load(tensors)
        self.progress = Progress(**state["progress"])
        return True

    def evaluate(self) -> Acceptance:
        """Acceptance of the current weights on the held-out documents."""
        acceptance = self.evaluation.measure(self.objective, self.device)
        self._log({"step": self.progress.step, "acceptance": acceptance.to_dict()})
        self._say(f"step {self.progress.step}  {acceptance.line()}")
        return acceptance

    def finished_adapter(self) -> Adapter:
        """The trained weights (their average, if one is kept) in bf16, on the CPU."""
        adapter = Adapter(self.adapter_config, self.decoder.config)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                parameter.copy_(self.optimizer.averages[name])
        return adapter.to(torch.bfloat16)

    def save_checkpoint(self) -> None:
        """Write the state of the run to ``out``, atomically."""
        if self.out is None or not self.parallel.main:
            return
        state = {"config": self._identity(), "progress": asdict(self.progress)}
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.optimizer.state().items()}
        with replacing(self.out / CHECKPOINT_FILE) as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(state)})

    def train_step(self) -> torch.Tensor:
        """One optimiser step.

        Returns:
            On the device: mean loss, gradient norm, the mean of every term, then summed acceptance
            at T=0 and at T=1 and the number of valid places, by place: ``[2 + terms + 3 * M]``
            fp32.
        """
        c, terms = self.config, len(self.objective.terms)
        batch = self.loader.batch(self.progress.step).to(self.device)
        weights = self.parallel.sum(self.objective.weights(batch)).clamp(min=1e-9)
        totals = torch.zeros(terms + 3 * c.block_size, device=self.device)
        for part in batch.split(c.accumulate):
            totals += self._backward(part, weights)
        means = self.parallel.sum(totals)[:terms]
        loss = means @ self.factors
        self.factors = self.objective.factors(means)
        norm = self.optimizer.step(self.progress.fraction(c), self.progress.step)
        self.progress.step += 1
        self.progress.mask_rows += c.batch * c.anchors * self.objective.block_size
        return torch.cat((torch.stack((loss, norm)), totals))

    def _backward(self, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        outcome = self.objective(batch)
        losses = outcome.losses / weights
        (losses @ self.factors).backward()
        self.optimizer.collect()
        valid_BAM = outcome.valid_BAM
        sums_M = [
            F.pad((x * valid_BAM).sum((0, 1)), (0, self.config.block_size - valid_BAM.shape[-1]))
            for x in (outcome.agree_BAM, outcome.overlap_BAM, torch.ones_like(outcome.agree_BAM))
        ]
        return torch.cat((losses.detach(), *sums_M)).float()

    def _loop(self) -> None:
        c = self.config
        pending: list[torch.Tensor] = []
        since = time.monotonic()
        first = True
        while self._goes_on():
            pending.append(self.train_step())
            step = self.progress.step
            if first:
                self._synchronize()
                self.progress.startup = time.monotonic() - since
                since, first = time.monotonic(), False
            pause = {
                "log": step % c.log_every == 0,
                "evaluate": step % c.eval_every == 0,
                "save": step % c.save_every == 0,
            }
            if any(pause.values()):
                self._report(pending, since)
                pending = []
                if pause["save"]:
                    self.save_checkpoint()
                if pause["evaluate"]:
                    self.evaluate()
                since = time.monotonic()
            elif c.minutes is not None:
                # The schedule follows the clock between the reports too.
                now = time.monotonic()
                self.progress.seconds += now - since
                since = now
        if pending:
            self._report(pending, since)
        self.save_checkpoint()

    def _goes_on(self) -> bool:
        """Whether there is another step; the main process's clock and signals decide for all."""
        seconds, stop = self.parallel.of_main([self.progress.seconds, self._stop])
        self.progress.seconds, self._stop = seconds, bool(stop)
        return self.progress.fraction(self.config) < 1.0 and not self._stop

    def _report(self, pending: list[torch.Tensor], since: float) -> None:
        """Fetch and log what the last steps returned; the one place that waits for the device."""
        before = self.progress.seconds
        values = torch.stack(pending).double().cpu()
        self.progress.seconds = before + time.monotonic() - since
        loss, norm = values[:, 0].mean().item(), values[-1, 1].item()
        if not math.isfinite(values[:, :2].sum().item()):
            raise IdlmError(
                f"The loss is not a number within {len(pending)} steps before step "
                f"{self.progress.step}; lower --lr and --head-lr, or set a longer --warmup."
            )
        terms = len(self.objective.terms)
        means = values[:, 2 : 2 + terms].mean(0).tolist()
        agree_M, overlap_M, valid_M = values[:, 2 + terms :].sum(0).view(3, -1)
        greedy, sampled = agree_M.sum() / valid_M.sum(), overlap_M.sum() / valid_M.sum()
        done = self.progress.fraction(self.config)
        rate = self.progress.mask_rows / max(self.progress.seconds, 1e-9)
        self._log(
            {
                "step": self.progress.step,
                "progress": round(done, 4),
                "seconds": round(self.progress.seconds, 2),
                "loss": loss,
                "terms": dict(zip(self.objective.terms, means, strict=True)),
                "gradient_norm": norm,
                "agree": (agree_M / valid_M.clamp(min=1)).tolist(),
                "overlap": (overlap_M / valid_M.clamp(min=1)).tolist(),
            }
        )
        self._say(
            f"step {self.progress.step}  {100 * done:.1f}%  loss {loss:.4f}  "
            f"argmax {greedy:.3f}  overlap {sampled:.3f}  norm {norm:.2f}  "
            f"{rate / 1e3:.1f}k masks/s"
        )

    def _identity(self) -> dict[str, Any]:
        config = json.loads(json.dumps(asdict(self.config)))
        identity = {k: v for k, v in config.items() if k not in FREE_SETTINGS}
        return identity | {"base_fingerprint": self.adapter_config.base_fingerprint}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _log(self, record: dict[str, Any]) -> None:
        if self.out is not None and self.parallel.main:
            with (self.out / LOG_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _say(self, line: str) -> None:
        if self.parallel.main:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            self._stop = True

        previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
