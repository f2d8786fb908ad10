"""Options that several commands share: which model, and how its tokens are chosen."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idlm import LLM, SamplingParams


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_llm` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="model folder, .gguf file or hub id (default: SmolLM2-135M-Instruct)"
    )
    group.add_argument(
        "--adapter",
        help="adapter folder, or 'none' for the base model alone (default: the one that comes with "
        "the default model)",
    )
    group.add_argument(
        "--stride",
        type=stride,
        default="auto",
        metavar="N",
        help="most tokens per forward, or 'auto' (the default): it follows what a forward costs "
        "here and what it brings",
    )
    group.add_argument(
        "--layout",
        choices=("auto", "ar", "linear", "quadratic"),
        default="auto",
        help="rows of a forward: a mask block after the last draft (linear) or after every draft "
        "(quadratic); auto (the default): chosen with the stride, or quadratic if that is given",
    )
    group.add_argument(
        "--verification",
        choices=("auto", "rejection", "coupled"),
        default="auto",
        help="how drafts are tested, both exact: rejection accepts more; coupled gives token for "
        "token what the base model alone gives for the same seed; auto (the default): coupled with "
        "'--stride auto', else rejection",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    group.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="type of the weights in memory (default: auto)",
    )


def stride(text: str) -> int | str:
    """A whole number, or ``auto``."""
    return text if text == "auto" else int(text)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `sampling_params` reads."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="stop after N (default: 256)",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 (default): greedy")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default): off")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 (default): off")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 (default): off")
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated"
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that the options ask for.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    from idlm import SamplingParams

    return SamplingParams(
        temperature=args.temperature or 0.0,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        max_tokens=args.max_tokens,
    )


def load_llm(args: argparse.Namespace, **given: Any) -> LLM:
    """The model that the options ask for; ``given`` are further arguments of `LLM`.

    Raises:
        IdlmError: it cannot be loaded, or an option is out of range.
    """
    from idlm import LLM

    return LLM(
        args.model,
        args.adapter,
        stride=args.stride,
        layout=args.layout,
        verification=args.verification,
        device=args.device,
        dtype=args.dtype,
        **given,
    )
