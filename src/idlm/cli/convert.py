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
from idlm.training.config import DEFAULTS, ConvertConfig

if TYPE_CHECKING:
    from idlm.model.decoder import Decoder
    from idlm.model.tokenizer import Tokenizer
    from idlm.training.conversion import Conversion
    from idlm.training.data import Corpus
    from idlm.training.parallel import Parallel

DATA_FOLDER = "data"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a model into an I-DLM",
        description="Lossless kind: train an adapter (gated LoRA, mask embedding and sampler "
        "head) on text that the model itself wrote; the model's weights do not change. Full kind: "
        "train all weights, which gives a new model. A run that was stopped is continued by the "
        "same command; torchrun starts it on several GPUs.",
    )
    add_base_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the result"
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
        InvalidRequestError: settings or data that cannot be used.
        KeyboardInterrupt: it was stopped; the same command continues.
    """
    from idlm.training.full import mask_token
    from idlm.training.parallel import torchrun
    from idlm.training.synthesis import synthesize

    config = ConvertConfig.read(args.config, given_settings(args))
    args.seed = config.seed
    synthesis = synthesis_config(args)
    folder, decoder, tokenizer = load_base(args)
    args.name = args.name or args.model or folder.name
    if config.kind == "full":
        mask_token(decoder.config, tokenizer, config.mask_token)  # an error now, not after hours
    with torchrun(decoder.embed.weight.device) as parallel:
        if args.data is None:
            args.data = args.output / DATA_FOLDER
            synthesize(decoder, tokenizer, args.data, synthesis, parallel)
        parallel.wait()  # all have written their data
        data = read_data(args.data, config, decoder.config.vocab_size, tokenizer, parallel)
        conversion = start(args.name, config, folder, decoder, tokenizer, parallel)
        del decoder  # the full kind has another one
        train(args, config, conversion, data, parallel)


def read_data(
    path: Path, config: ConvertConfig, vocab_size: int, tokenizer: Tokenizer, parallel: Parallel
) -> tuple[Corpus, Corpus]:
    """Documents to train on and held-out ones; a report says what became of the data.

    Raises:
        InvalidRequestError: the data cannot be used.
    """
    from rich.console import Console

    from idlm.training.corpus_reader import read_corpus
    from idlm.training.progress import report_counts

    documents, heldout, counts = read_corpus(
        path, tokenizer, length=config.length, vocab_size=vocab_size
    )
    if parallel.main:
        print(f"data from {path}", file=sys.stderr)
        report_counts(counts, Console(stderr=True))
    return documents, heldout


def start(
    name: str,
    config: ConvertConfig,
    folder: Path,
    decoder: Decoder,
    tokenizer: Tokenizer,
    parallel: Parallel,
) -> Conversion:
    """The conversion of ``decoder``, which was read from ``folder`` in the dtype to compute in."""
    from idlm.model.checkpoint import load_decoder
    from idlm.training.conversion import FullConversion, LosslessConversion
    from idlm.training.full import mask_token

    if config.kind == "lossless":
        return LosslessConversion(decoder, config, name, parallel)
    import torch

    weight = decoder.embed.weight
    return FullConversion(
        # The masters begin with all the digits that the file has.
        load_decoder(folder, device=weight.device, dtype=torch.float32),
        config,
        name,
        parallel,
        dtype=weight.dtype,
        mask_token_id=mask_token(decoder.config, tokenizer, config.mask_token),
        source=folder,
    )


def train(
    args: argparse.Namespace,
    config: ConvertConfig,
    conversion: Conversion,
    data: tuple[Corpus, Corpus],
    parallel: Parallel,
) -> None:
    """Train on ``data`` and write the result.

    Raises:
        KeyboardInterrupt: it was stopped; the same command continues.
    """
    from idlm.training.card import write_card
    from idlm.training.trainer import Trainer

    trainer = Trainer(conversion, *data, config, args.output, parallel)
    if trainer.resume() and parallel.main:
        print(f"continuing at step {trainer.progress.step}", file=sys.stderr)
    report = trainer.run()
    if report is None:
        print("stopped; the same command continues", file=sys.stderr)
        raise KeyboardInterrupt
    if parallel.main:
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
            help=f"{meanings[field.name]} (default: {_default(field)})",
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


def _default(field: dataclasses.Field[Any]) -> str:
    others = [f"; {k}: {_show(d[field.name])}" for k, d in DEFAULTS.items() if field.name in d]
    return _show(field.default) + "".join(others)


def _show(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
