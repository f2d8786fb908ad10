"""`idlm convert`: train the adapter that turns a base model into an I-DLM."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from idlm.cli.synthesize import (
    add_base_options,
    add_synthesis_options,
    load_base,
    synthesis_config,
)
from idlm.training.config import ConvertConfig

if TYPE_CHECKING:
    from idlm.model.decoder import Decoder
    from idlm.model.tokenizer import Tokenizer
    from idlm.training.parallel import Parallel

DATA_FOLDER = "data"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "convert",
        help="train an adapter for a model",
        description="Train gated LoRA, mask embedding and sampler head on text that the model "
        "itself wrote. The base model's weights do not change. A run that was stopped is "
        "continued by the same command.",
    )
    add_base_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the adapter"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="shards of `idlm synthesize`, or a file or folder of .jsonl, .parquet, .arrow (with "
        "'messages' or 'text') or .txt (default: synthesise into "
        f"OUT/{DATA_FOLDER} first)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML")
    parser.add_argument("--name", help="name of the base model for the card (default: MODEL)")
    add_settings(parser)
    add_synthesis_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        KeyboardInterrupt: it was stopped; the same command continues.
    """
    from idlm.training.parallel import torchrun
    from idlm.training.synthesis import synthesize

    config = ConvertConfig.read(args.config, given_settings(args))
    args.seed = config.seed
    synthesis = synthesis_config(args)
    folder, decoder, tokenizer = load_base(args)
    args.name = args.name or args.model or folder.name
    with torchrun(decoder.embed.weight.device) as parallel:
        if args.data is None:
            args.data = args.output / DATA_FOLDER
            synthesize(decoder, tokenizer, args.data, synthesis, parallel)
        train(args, config, decoder, tokenizer, parallel)


def train(
    args: argparse.Namespace,
    config: ConvertConfig,
    decoder: Decoder,
    tokenizer: Tokenizer,
    parallel: Parallel,
) -> None:
    """Train on ``args.data`` and write the adapter.

    Raises:
        KeyboardInterrupt: it was stopped; the same command continues.
    """
    from rich.console import Console

    from idlm.training.card import write_card
    from idlm.training.corpus_reader import read_corpus
    from idlm.training.progress import report_counts
    from idlm.training.trainer import Trainer

    parallel.wait()  # all have written their data
    documents, heldout, counts = read_corpus(
        args.data, tokenizer, length=config.length, vocab_size=decoder.config.vocab_size
    )
    if parallel.main:
        print(f"data from {args.data}", file=sys.stderr)
        report_counts(counts, Console(stderr=True))
    trainer = Trainer(decoder, documents, heldout, config, args.output, args.name, parallel)
    if trainer.resume() and parallel.main:
        print(f"continuing at step {trainer.progress.step}", file=sys.stderr)
    report = trainer.run()
    if not report.finished:
        print("stopped; the same command continues", file=sys.stderr)
        raise KeyboardInterrupt
    if parallel.main:
        trainer.finished_adapter().save(args.output)
        write_card(args.output, trainer, report, shlex.join(["idlm", *sys.argv[1:]]))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of `ConvertConfig`; none is set unless given."""
    group = parser.add_argument_group("training")
    meanings = ConvertConfig.describe()
    types = get_type_hints(ConvertConfig)
    for field in dataclasses.fields(ConvertConfig):
        kind = types[field.name]
        options: dict[str, Any] = {"type": _parser(kind), "metavar": "X"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=None,
            help=f"{meanings[field.name]} (default: {_show(field.default)})",
            **options,
        )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    names = [field.name for field in dataclasses.fields(ConvertConfig)]
    return {n: getattr(args, n) for n in names if getattr(args, n) is not None}


def _parser(kind: Any) -> Callable[[str], Any]:
    if get_origin(kind) is tuple:
        return lambda text: tuple(text.split(","))
    members = [member for member in get_args(kind) if member is not type(None)]
    return members[0] if members else kind


def _show(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
