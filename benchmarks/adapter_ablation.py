"""Short trainings of several adapters on the same data, compared in one table.

    python benchmarks/adapter_ablation.py --data DIR --minutes 1 --output OUT \\
        --variant "all r=24: rank=24 alpha=48" \\
        --variant "o, down r=64: rank=64 alpha=128 projections=o,down"

or ``--variants FILE``, a YAML mapping of names to settings of `ConvertConfig`. All run in one
process with the same seed, so that compiled code is shared where shapes agree.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from idlm.cli.convert import add_settings, given_settings
from idlm.cli.synthesize import add_base_options, load_base
from idlm.errors import InvalidRequestError
from idlm.model.files import write_json
from idlm.training.config import ConvertConfig
from idlm.training.conversion import LosslessConversion
from idlm.training.data import Corpus
from idlm.training.trainer import Trainer

COLUMNS = ("variant", "M params", "MB", "steps", "M masks", "T=0 by place", "T=1 by place")


def main() -> None:
    """Train every variant, print the table, write ``ablation.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_base_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="shards of `idlm synthesize`")
    parser.add_argument("--output", type=Path, help="folder for ablation.json")
    parser.add_argument("--variants", type=Path, help="YAML file: name -> settings")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME: SETTING=VALUE ...'",
        help="one variant; may be repeated",
    )
    add_settings(parser)
    args = parser.parse_args()
    variants = read_variants(args)
    shared = given_settings(args)
    configs = {name: ConvertConfig.read(None, shared | own) for name, own in variants.items()}
    _, decoder, _ = load_base(args)
    train, heldout = Corpus.read(args.data, "train"), Corpus.read(args.data, "heldout")
    results = []
    for name, config in configs.items():
        print(f"== {name}", file=sys.stderr)
        conversion = LosslessConversion(decoder, config, "ablation")
        report = Trainer(conversion, train, heldout, config, None).run()
        if report is None:
            raise KeyboardInterrupt
        results.append(
            {
                "variant": name,
                "settings": variants[name],
                "parameters": report.parameters,
                "megabytes": 2 * report.parameters / 1e6,
                "steps": report.progress.step,
                "mask_rows": report.progress.mask_rows,
                "seconds": report.progress.seconds,
                "startup_seconds": report.progress.startup,
                **report.best.acceptance.to_dict(),
            }
        )
        if args.output is not None:
            # After every variant: a run that is cut short leaves what it has.
            write_json(args.output / "ablation.json", {**circumstances(), "results": results})
    print_table(results)


def read_variants(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Names and settings of the variants; values are read as YAML."""
    import yaml

    variants: dict[str, dict[str, Any]] = {}
    if args.variants is not None:
        variants |= yaml.safe_load(args.variants.read_text())
    for text in args.variant:
        name, _, settings = text.partition(":")
        pairs = [pair.partition("=") for pair in settings.split()]
        variants[name.strip()] = {key: yaml.safe_load(value) for key, _, value in pairs}
    for settings in variants.values():
        if isinstance(projections := settings.get("projections"), str):
            settings["projections"] = tuple(projections.split(","))
    if not variants:
        raise InvalidRequestError("No variants; give --variant or --variants.")
    return variants


def circumstances() -> dict[str, str]:
    """Hardware, versions and command."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "hardware": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(sys.argv),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Markdown, for docs/benchmarks.md."""
    strides = list(results[0]["tpf"])
    print(" | ".join(f"{key}: {value}" for key, value in circumstances().items()))
    print("| " + " | ".join((*COLUMNS, *(f"TPF {s}" for s in strides))) + " |")
    print("| --- |" + " ---: |" * (len(COLUMNS) + len(strides) - 1))
    for r in results:
        cells = [
            r["variant"],
            f"{r['parameters'] / 1e6:.2f}",
            f"{r['megabytes']:.1f}",
            str(r["steps"]),
            f"{r['mask_rows'] / 1e6:.1f}",
            " ".join(f"{a:.2f}" for a in r["greedy"]),
            " ".join(f"{a:.2f}" for a in r["sampled"]),
            *(f"{r['tpf'].get(s, float('nan')):.3f}" for s in strides),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
