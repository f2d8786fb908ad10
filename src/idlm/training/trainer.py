"""The training run: steps, schedule, evaluation, checkpoints and the best result."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from idlm.errors import CheckpointError, IdlmError, InvalidRequestError, ResourceError
from idlm.model.files import write_safetensors
from idlm.training import run_state
from idlm.training.acceptance import Acceptance, Evaluation
from idlm.training.config import ConvertConfig
from idlm.training.conversion import Conversion
from idlm.training.data import Batch, Corpus, Loader
from idlm.training.log import RunLog
from idlm.training.parallel import ALONE, Parallel

CONFIG_FILE = "train_config.yaml"
NAN_FILE = "nan_batch.safetensors"
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
class Best:
    """The best weights so far: those of the result on disk.

    Attributes:
        step: optimiser steps done by then.
        acceptance: on the held-out documents.
    """

    step: int
    acceptance: Acceptance

    @property
    def score(self) -> float:
        """Mean tokens per forward over temperatures and strides.

        For blocks too short for those strides the mean acceptance.
        """
        a = self.acceptance
        return fmean(a.tpf.values() if a.tpf else (*a.greedy, *a.sampled))


@dataclass(frozen=True)
class Report:
    """What a finished run reached."""

    progress: Progress
    best: Best
    parameters: int


class Trainer:
    """Runs a conversion.

    Args:
        conversion: the model in training.
        train, heldout: documents.
        out: folder for the result, checkpoints and log; None: keep nothing (ablations).
        parallel: this process among those that train together; each trains on its share of
            every batch.
    """

    def __init__(
        self,
        conversion: Conversion,
        train: Corpus,
        heldout: Corpus,
        config: ConvertConfig,
        out: Path | None,
        parallel: Parallel = ALONE,
    ) -> None:
        if config.batch % (parallel.world * config.accumulate):
            raise InvalidRequestError(
                f"A batch of {config.batch} rows cannot be shared by {parallel.world} processes "
                f"with --accumulate {config.accumulate}; set --batch to a multiple of "
                f"{parallel.world * config.accumulate}."
            )
        self.config, self.out, self.parallel = config, out, parallel
        self.conversion, self.device = conversion, conversion.device
        self.objective, self.optimizer = conversion.objective, conversion.optimizer
        shape: dict[str, Any] = {
            "length": config.length,
            "anchors": config.anchors,
            "block_size": config.block_size,
            "seed": config.seed,
        }
        self.loader = Loader(train, batch=config.batch, parallel=parallel, **shape)
        rows = config.batch // config.accumulate // parallel.world
        self.evaluation = Evaluation(heldout, rows=config.eval_rows, batch=rows, **shape)
        self.factors = torch.ones(len(self.objective.terms), device=self.device)
        self.progress = Progress()
        self.best: Best | None = None
        self.log = RunLog(out, parallel.main)
        self._evaluated: int | None = None
        self._stop = False

    def run(self) -> Report | None:
        """Train to the end and leave a checkpoint; the result in ``out`` is the best one.

        Returns:
            None if SIGTERM or SIGINT stopped the run: it can be continued from its checkpoint.
        Raises:
            IdlmError: the loss is no longer a number.
            ResourceError: the device is out of memory.
        """
        if self.out is not None and self.parallel.main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.config.save(self.out / CONFIG_FILE)
        corpus = self.loader.corpus
        self.log.say(
            f"training {self.conversion.parameters / 1e6:.2f}M parameters on {len(corpus)} "
            f"documents ({len(corpus.tokens) / 1e6:.2f}M tokens, "
            f"{100 * self.loader.padding:.1f}% padding), {self.loader.batches_per_epoch} steps "
            "per epoch"
        )
        try:
            with self._stop_on_signals(), self.log.bar():
                self._loop()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"The device is out of memory ({str(error).split('.')[0]}); raise --accumulate "
                "or lower --batch, --anchors or --length."
            ) from error
        finally:
            self.log.close()
        if self._stop or self.best is None:
            return None
        return Report(self.progress, self.best, self.conversion.parameters)

    def resume(self) -> bool:
        """Continue from the checkpoint in ``out``, if there is one.

        Raises:
            CheckpointError: it is damaged or belongs to a run with other settings.
        """
        folder = None if self.out is None else run_state.newest(self.out)
        if folder is None:
            return False
        facts = run_state.read_facts(folder)
        for name, value in self._identity().items():
            if facts["config"].get(name) != value:
                raise CheckpointError(
                    f"{folder} belongs to a run with {name} = {facts['config'].get(name)}, not "
                    f"{value}; give that value, or another output folder."
                )
        run_state.read_tensors(folder, self._tensors())
        self.progress = Progress(**facts["progress"])
        self.optimizer.restored(self.progress.step)
        if facts["best"] is not None:
            a = facts["best"]["acceptance"]
            acceptance = Acceptance(tuple(a["greedy"]), tuple(a["sampled"]), a["tpf"])
            self.best = Best(facts["best"]["step"], acceptance)
        return True

    def evaluate(self) -> Acceptance:
        """Acceptance of the current weights (their average) on the held-out documents.

        If they are the best so far, they become the result in ``out``.
        """
        self.objective.block_size = self.config.block_size
        with self.optimizer.averaged():
            acceptance = self.evaluation.measure(self.objective, self.device)
        self.log.record(self.progress.step, {"acceptance": acceptance.to_dict()})
        self.log.say(f"step {self.progress.step}  {acceptance.line()}")
        self._evaluated = self.progress.step
        now = Best(self.progress.step, acceptance)
        # Processes may differ in the last digit, and all have to decide alike.
        (better,) = self.parallel.of_main([self.best is None or now.score > self.best.score])
        if better:
            self.best = now
            if self.out is not None:
                self.conversion.save(self.out)
        return acceptance

    def save_checkpoint(self) -> None:
        """Write the state of the run to ``out``, atomically."""
        if self.out is None:
            return
        facts = {
            "config": self._identity(),
            "progress": asdict(self.progress),
            "best": None if self.best is None else asdict(self.best),
        }
        run_state.save(self.out, self.progress.step, self._tensors(), facts, self.parallel)

    def train_step(self) -> torch.Tensor:
        """One optimiser step.

        Returns:
            On the device: mean loss, gradient norm, the mean of every term, then summed acceptance
            at T=0 and at T=1 and the number of valid places, by place: ``[2 + terms + 3 * M]``
            fp32.
        """
        c, terms = self.config, len(self.objective.terms)
        self.objective.block_size = c.masks_at(self.progress.fraction(c))
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
                if pause["evaluate"]:
                    self.evaluate()
                if pause["save"]:
                    self.save_checkpoint()
                since = time.monotonic()
            elif c.minutes is not None:
                # The schedule follows the clock between the reports too.
                now = time.monotonic()
                self.progress.seconds += now - since
                since = now
        if pending:
            self._report(pending, since)
        self.save_checkpoint()
        if not self._stop and self._evaluated != self.progress.step:
            self.evaluate()
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
            self._fail_at_nan(values)
        terms = len(self.objective.terms)
        means = values[:, 2 : 2 + terms].mean(0).tolist()
        agree_M, overlap_M, valid_M = values[:, 2 + terms :].sum(0).view(3, -1)
        greedy, sampled = agree_M.sum() / valid_M.sum(), overlap_M.sum() / valid_M.sum()
        done = self.progress.fraction(self.config)
        self.log.advance(done)
        rate = self.progress.mask_rows / max(self.progress.seconds, 1e-9)
        self.log.record(
            self.progress.step,
            {
                "progress": round(done, 4),
                "seconds": round(self.progress.seconds, 2),
                "loss": loss,
                "terms": dict(zip(self.objective.terms, means, strict=True)),
                "gradient_norm": norm,
                "agree": (agree_M / valid_M.clamp(min=1)).tolist(),
                "overlap": (overlap_M / valid_M.clamp(min=1)).tolist(),
            },
        )
        self.log.say(
            f"step {self.progress.step}  {100 * done:.1f}%  loss {loss:.4f}  "
            f"argmax {greedy:.3f}  overlap {sampled:.3f}  norm {norm:.2f}  "
            f"{rate / 1e3:.1f}k masks/s"
        )

    def _fail_at_nan(self, values: torch.Tensor) -> None:
        """Write out the batch of the first of the last steps (their losses and norms) to fail."""
        failed = ~values[:, :2].sum(1).isfinite()
        step = self.progress.step - len(values) + int(failed.nonzero()[0])
        where = ""
        if self.out is not None:
            path = self.out / (
                NAN_FILE if self.parallel.main else f"{self.parallel.rank}-{NAN_FILE}"
            )
            write_safetensors(path, vars(self.loader.batch(step)))
            where = f" (its batch is in {path})"
        raise IdlmError(
            f"The loss is not a number in step {step}{where}; lower --lr and --head-lr, or set a "
            "longer --warmup."
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"factors": self.factors, **self.optimizer.state()}

    def _identity(self) -> dict[str, Any]:
        config = json.loads(json.dumps(asdict(self.config)))
        identity = {k: v for k, v in config.items() if k not in FREE_SETTINGS}
        return identity | {"base_fingerprint": self.conversion.base_fingerprint}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
