"""Loss and tokens per forward of a run, drawn from its log."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from idlm.model.files import replacing


def plot_run(log: Path, png: Path) -> None:
    """Draw the records in ``log`` (JSON lines) into ``png``."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [r for r in records if "loss" in r]
    measured = [r for r in records if "acceptance" in r]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for term in dict.fromkeys(name for r in losses for name in r["terms"]):
        left.plot([r["step"] for r in losses], [r["terms"][term] for r in losses], label=term)
    left.set(xlabel="step", ylabel="loss", title="training")
    for name in dict.fromkeys(name for r in measured for name in r["acceptance"]["tpf"]):
        tpf = [r["acceptance"]["tpf"][name] for r in measured]
        right.plot([r["step"] for r in measured], tpf, marker="o", label=name)
    right.set(xlabel="step", ylabel="tokens per forward", title="held-out documents")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
