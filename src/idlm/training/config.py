"""Settings of a conversion: one dataclass, a YAML file and overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from idlm.errors import InvalidRequestError, ResourceError

# The command line builds its options from this module, so it imports nothing that needs torch.

# Settings that only one kind of conversion has.
ONLY = {
    "lossless": (
        *("rank", "alpha", "projections", "head_width", "head_depth", "head_lr", "tv_weight"),
        *("survival", "visits", "marginal_weight", "init_adapter"),
    ),
    "full": ("clean_weight", "mask_token"),
}
# Where a kind needs another value than the lossless one: the paper's (arXiv 2604.11035, section 3).
DEFAULTS: dict[str, dict[str, Any]] = {
    "lossless": {},
    "full": {"lr": 1e-5, "block_size": 3, "curriculum": 0.5},
}
# Blocks of so many masks come before the full size in the curriculum.
EARLY_BLOCKS = (1, 2, 3)


@dataclass(frozen=True)
class ConvertConfig:
    """Everything that decides how a model is converted.

    Attributes:
        kind: lossless: gated LoRA, mask embedding and sampler head over frozen weights; full: all
            weights, masks and clean rows.
        rank: rank of the LoRA.
        alpha: the LoRA's update is scaled by ``alpha / rank``.
        projections: fused projections that carry a LoRA (keys of `FUSED_MODULES`).
        head_width: inner width of the sampler head's blocks.
        head_depth: blocks of the sampler head.
        block_size: masks per block, ``m``: the longest stride served well is ``m + 1``.
        curriculum: share of the run that blocks of 1, 2 and 3 masks take, in equal parts, before
            those of ``block_size``; 0: none.
        init_adapter: folder of an adapter to train on, of the same shapes; None: a new one.
        batch: packed rows per optimiser step.
        length: tokens per packed row.
        anchors: mask blocks per packed row.
        accumulate: passes that a step's rows are split into (more need less memory).
        steps: optimiser steps; None: until ``minutes`` are over.
        minutes: training time, compilation left out; None: ``steps`` decides alone.
        lr: peak learning rate (cosine to zero) of all that has no other.
        head_lr: peak learning rate of the sampler head.
        warmup: share of the run in which the learning rate rises.
        weight_decay: AdamW's.
        clip: largest norm of the gradient (of the LoRA, the mask embedding and the head each).
        ema: decay of the weights' moving average, which is what is saved; 0: off.
        tv_weight: weight of the total-variation term beside the KL divergence.
        place_decay: weight of place ``j`` of a block is ``place_decay ** (j - 1)``.
        survival: weigh a place by the chance that the places before it are accepted.
        visits: weigh a block by the chance that a forward starts there when decoding, which is
            where the token before the block is hard to guess.
        marginal_weight: weight of the loss on the logits without the sampler head, which pick
            the candidates that the head rescores.
        clean_weight: weight of the clean rows' loss beside that of the masks; None: balanced, so
            that both count the same.
        mask_token: token whose embedding stands for a mask; None: a free one of the vocabulary.
        log_every: steps between log lines.
        eval_every: steps between evaluations on the held-out documents.
        eval_rows: packed rows in one evaluation.
        save_every: steps between checkpoints.
        seed: of data order, anchors and initial weights.
    """

    kind: str = "lossless"
    rank: int = 24
    alpha: float = 48.0
    projections: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
    head_width: int = 960
    head_depth: int = 2
    block_size: int = 7
    curriculum: float = 0.0
    init_adapter: str | None = None
    batch: int = 32
    length: int = 1024
    anchors: int = 256
    accumulate: int = 1
    steps: int | None = None
    minutes: float | None = None
    lr: float = 3e-3
    head_lr: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    tv_weight: float = 4.0
    place_decay: float = 1.0
    survival: bool = True
    visits: bool = False
    marginal_weight: float = 0.1
    clean_weight: float | None = None
    mask_token: str | None = None
    log_every: int = 20
    eval_every: int = 500
    eval_rows: int = 64
    save_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        from idlm.model.adapter import FUSED_MODULES

        _require(self.kind in DEFAULTS, "kind", self.kind, f"one of {', '.join(DEFAULTS)}")
        # YAML has lists only.
        object.__setattr__(self, "projections", tuple(self.projections))
        positive = (
            *(
                "rank",
                "alpha",
                "head_width",
                "head_depth",
                "batch",
                "length",
                "anchors",
                "accumulate",
            ),
            *(
                "clip",
                "log_every",
                "eval_every",
                "eval_rows",
                "save_every",
                "place_decay",
            ),
        )
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(1 <= self.block_size <= 15, "block_size", self.block_size, "from 1 to 15")
        for name in ("lr", "head_lr", "weight_decay", "tv_weight", "marginal_weight"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require((self.clean_weight or 0) >= 0, "clean_weight", self.clean_weight, "0 or more")
        for name in ("warmup", "ema", "curriculum"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        unknown = set(self.projections) - FUSED_MODULES.keys()
        _require(not unknown, "projections", self.projections, f"out of {list(FUSED_MODULES)}")
        _require(self.batch % self.accumulate == 0, "batch", self.batch, "a multiple of accumulate")
        if self.steps is None and self.minutes is None:
            raise InvalidRequestError(
                "The length of the training is not set; give --steps, --minutes or both."
            )
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0")

    @classmethod
    def read(cls, path: Path | None, overrides: Mapping[str, Any]) -> ConvertConfig:
        """The settings in a YAML file (None: the defaults) with ``overrides`` on top.

        Raises:
            InvalidRequestError: unknown name, or a value out of range.
        """
        values: dict[str, Any] = {}
        if path is not None:
            values = _read_yaml(path)
        values |= overrides
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise InvalidRequestError(
                f"Unknown setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}."
            )
        kind = values.get("kind", cls.kind)
        for other, names in ONLY.items():
            if other != kind and (alien := sorted(values.keys() & set(names))):
                raise InvalidRequestError(
                    f"Setting {alien[0]} belongs to the {other} kind, not to {kind!r}; leave it "
                    f"out, or set kind to {other}."
                )
        try:
            return cls(**(DEFAULTS.get(kind, {}) | values))
        except TypeError as error:
            raise InvalidRequestError(f"A setting has the wrong type: {error}.") from error

    @classmethod
    def describe(cls) -> dict[str, str]:
        """What each setting means, by name, from the docstring."""
        text = (cls.__doc__ or "").partition("Attributes:")[2]
        items = re.findall(r"^ {8}(\w+): (.+?)(?=^ {8}\w|\Z)", text, re.DOTALL | re.MULTILINE)
        return {name: " ".join(meaning.split()) for name, meaning in items}

    def masks_at(self, progress: float) -> int:
        """Masks per block when the share ``progress`` of the run is done."""
        early = [size for size in EARLY_BLOCKS if size < self.block_size]
        if progress >= self.curriculum or not early:
            return self.block_size
        return early[int(progress / self.curriculum * len(early))]

    def with_(self, **changes: Any) -> ConvertConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `read` accepts."""
        from idlm.model.files import replacing

        values = asdict(self) | {"projections": list(self.projections)}
        for kind, names in ONLY.items():
            if kind != self.kind:
                values = {name: v for name, v in values.items() if name not in names}
        with replacing(path) as temporary:
            temporary.write_text(_yaml().safe_dump(values, sort_keys=False))


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InvalidRequestError(f"Setting {name} is {value!r}; it must be {expected}.")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ResourceError(
            "Conversion needs PyYAML; install the extra: pip install 'idlm[train]'."
        ) from error
    return yaml


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidRequestError(f"Cannot read the settings in {path}: {error}.") from error
    if not isinstance(values, dict):
        raise InvalidRequestError(f"{path} must hold a mapping of settings, name: value.")
    return values
