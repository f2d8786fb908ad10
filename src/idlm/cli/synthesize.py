"""`idlm synthesize`: on-policy training text, written by the base model itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from idlm.errors import InvalidRequestError

if TYPE_CHECKING:
    from idlm.model.decoder import Decoder
    from idlm.model.tokenizer import Tokenizer
    from idlm.training.synthesis import SynthesisConfig

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "synthesize",
        help="let a model write its own training data",
        description="Let a model write user turns and answers, the training data of `idlm "
        "convert`. A folder that has shards already is continued.",
    )
    add_base_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the shards"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    add_synthesis_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from idlm.training.parallel import torchrun
    from idlm.training.synthesis import synthesize

    config = synthesis_config(args)
    _, decoder, tokenizer = load_base(args)
    with torchrun(decoder.embed.weight.device) as parallel:
        synthesize(decoder, tokenizer, args.output, config, parallel)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_base` reads."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder, .gguf file or hub id (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="type to compute in (default: bfloat16 on CUDA, float32 elsewhere)",
    )


def add_synthesis_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `synthesis_config` reads, but for the seed."""
    group = parser.add_argument_group("synthesis")
    group.add_argument(
        "--tokens",
        type=count,
        default=20_000_000,
        metavar="N",
        help="tokens in the folder at the end, such as 500k or 20M (the default)",
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="user turns to answer: .txt with one per line, or .jsonl with 'prompt' or 'messages' "
        "(default: the model writes the user turns too)",
    )
    group.add_argument(
        "--slots",
        type=int,
        default=1024,
        metavar="N",
        help="conversations at once (default: 1024)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        default=640,
        metavar="N",
        help="longest document in tokens (default: 640)",
    )
    group.add_argument(
        "--max-user",
        type=int,
        default=160,
        metavar="N",
        help="longest user turn; longer ones are dropped (default: 160)",
    )
    group.add_argument(
        "--max-answer",
        type=int,
        default=400,
        metavar="N",
        help="longest answer; longer ones are cut (default: 400)",
    )


def synthesis_config(args: argparse.Namespace) -> SynthesisConfig:
    """The settings of the synthesis.

    Raises:
        InvalidRequestError: a value out of range, or a file of prompts that cannot be read.
    """
    from idlm.training.prompts import read_prompts
    from idlm.training.sampler import Limits
    from idlm.training.synthesis import SynthesisConfig

    limits = Limits(length=args.max_length, user=args.max_user, answer=args.max_answer)
    prompts = read_prompts(args.prompts) if args.prompts else ()
    return SynthesisConfig(args.tokens, args.seed, args.slots, limits, prompts)


def load_base(args: argparse.Namespace) -> tuple[Path, Decoder, Tokenizer]:
    """Folder, decoder and tokenizer of the base model.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        InvalidRequestError: the device does not exist.
    """
    import torch

    from idlm.model.checkpoint import load_decoder, resolve
    from idlm.model.tokenizer import Tokenizer
    from idlm.training.parallel import local_rank

    name = args.device
    if name == "auto":
        name = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError(
            f"Device {name!r} cannot be used ({str(error).splitlines()[0]}); choose another "
            "--device."
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, args.dtype)
    folder = resolve(args.model)
    return folder, load_decoder(folder, device=device, dtype=dtype), Tokenizer.load(folder)


def count(text: str) -> int:
    """A number with an optional suffix: 500k, 20M, 1.5B."""
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if factor != 1 else text) * factor)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 500k or 20M") from error
