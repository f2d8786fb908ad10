"""The README of a result of conversion: what it is, how it was made, what it reaches."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import torch

import idlm
from idlm.model.adapter import RESULTS_FILE
from idlm.model.files import replacing, write_json
from idlm.training.config import ConvertConfig
from idlm.training.trainer import Report, Trainer

CARD_FILE = "README.md"


def write_card(folder: Path, trainer: Trainer, report: Report, command: str) -> None:
    """Write the card into ``folder``, and beside it its figures as JSON."""
    write_json(folder / RESULTS_FILE, report.best.acceptance.to_dict())
    with replacing(folder / CARD_FILE) as temporary:
        temporary.write_text(_card(folder, trainer, report, command))


def _card(folder: Path, trainer: Trainer, report: Report, command: str) -> str:
    c, progress, acceptance = trainer.config, report.progress, report.best.acceptance
    corpus, conversion = trainer.loader.corpus, trainer.conversion
    sizes = {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    lines = [
        f"# {conversion.title} {conversion.base_model}",
        "",
        conversion.summary,
        "",
        f"Made on {date.today().isoformat()} with idlm {idlm.__version__}, torch "
        f"{torch.__version__}, on {_hardware(trainer.device)}, by",
        "",
        f"    {command}",
        "",
        "| | |",
        "| --- | --- |",
        f"| data | {len(corpus)} documents, {len(corpus.tokens) / 1e6:.2f}M tokens |",
        f"| steps | {progress.step} of {c.batch} rows x {c.length} tokens, "
        f"{c.batch * c.anchors} blocks of {c.block_size} masks each; the weights are those of "
        f"step {report.best.step} |",
        f"| training time | {progress.seconds / 60:.1f} min, and {progress.startup:.0f} s for "
        f"the first step; {trainer.parallel.world} processes |",
        *_settings(c),
        f"| trained parameters | {report.parameters / 1e6:.2f}M |",
        *(f"| {name} | {size / 1e6:.1f} MB |" for name, size in sizes.items()),
        "",
        "On held-out documents, drafts accepted by place in the block:",
        "",
        "| place | " + " | ".join(str(j + 1) for j in range(c.block_size)) + " |",
        "| --- |" + " --- |" * c.block_size,
        "| T=0 | " + " | ".join(f"{a:.3f}" for a in acceptance.greedy) + " |",
        "| T=1 | " + " | ".join(f"{a:.3f}" for a in acceptance.sampled) + " |",
        "",
        "Tokens per forward that this implies for the quadratic layout: "
        + ", ".join(f"{name}: {value:.2f}" for name, value in acceptance.tpf.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _settings(c: ConvertConfig) -> list[str]:
    """The settings that only the kind of conversion has."""
    if c.kind == "full":
        balance = "balanced" if c.clean_weight is None else f"x {c.clean_weight}"
        return [
            f"| objective | cross-entropy of masks, and of clean rows {balance}, place decay "
            f"{c.place_decay}, shorter blocks for {100 * c.curriculum:.0f}% of the run |"
        ]
    return [
        f"| objective | KL to the base model, total variation x {c.tv_weight}, place decay "
        f"{c.place_decay}, survival weights {'on' if c.survival else 'off'}, visit weights "
        f"{'on' if c.visits else 'off'}, head-free loss x "
        f"{c.marginal_weight} |",
        f"| LoRA | rank {c.rank}, alpha {c.alpha}, on {', '.join(c.projections)} |",
        f"| sampler head | {c.head_depth} x width {c.head_width} |",
    ]


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
