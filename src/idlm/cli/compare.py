"""`idlm generate --compare`: the base model alone (AR) and I-DLM on one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from idlm.cli.prompt import stream
from idlm.cli.render import (
    SourceColours,
    Terminal,
    figures,
    last_output,
    legend,
    print_stream,
    to_dict,
)
from idlm.errors import InvalidRequestError

if TYPE_CHECKING:
    from idlm import LLM, SamplingParams
    from idlm.llm import RequestOutput

WARM_UP_TOKENS = 16
NOTHING_TO_COMPARE = (
    "--compare needs an adapter and several tokens per forward, to compare with the base model "
    "alone; {remedy}."
)


def prepare(args: argparse.Namespace) -> None:
    """Settle the options so that both runs choose the same tokens: greedy, or coupled and a seed.

    Raises:
        InvalidRequestError: the options rule a comparison out.
    """
    if args.adapter == "none" or args.layout == "ar" or args.stride == 1:
        remedy = "leave out '--adapter none', '--layout ar' and '--stride 1'"
        raise InvalidRequestError(NOTHING_TO_COMPARE.format(remedy=remedy))
    if args.temperature:
        if args.verification == "rejection":
            raise InvalidRequestError(
                "With '--verification rejection' two runs draw different tokens by design; compare "
                "with '--verification coupled', or without --temperature (greedy)."
            )
        args.verification = "coupled"
        args.seed = 0 if args.seed is None else args.seed


def run(args: argparse.Namespace, llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Run both and print their texts, figures and whether the tokens are identical.

    Raises:
        InvalidRequestError: the model has no adapter.
    """
    if llm.layout.num_masks == 0:
        remedy = "give one with --adapter, or make one with `idlm convert`"
        raise InvalidRequestError(NOTHING_TO_COMPARE.format(remedy=remedy))
    ar_llm = llm.autoregressive()
    warm_up = replace(params, max_tokens=WARM_UP_TOKENS)
    for each in (ar_llm, llm):
        last_output(stream(each, prompt, warm_up, raw=args.raw))
    if args.json:
        ar = last_output(stream(ar_llm, prompt, params, raw=args.raw))
        idlm = last_output(stream(llm, prompt, params, raw=args.raw))
        print(json.dumps(_to_dict(ar, idlm)))
        return
    terminal = Terminal(sys.stdout)
    terminal.line("AR, one token per forward:", "bold")
    ar = print_stream(stream(ar_llm, prompt, params, raw=args.raw), terminal)
    terminal.line(figures(ar.stats), "dim")
    terminal.line()
    way = f"{llm.layout.name} layout, up to {llm.layout.stride} tokens per forward"
    if llm.auto:
        way = "layout and stride by cost and gain"
    terminal.line(f"I-DLM, {way}:", "bold")
    colours = SourceColours(llm.tokenizer) if args.show and terminal.coloured else None
    idlm = print_stream(stream(llm, prompt, params, raw=args.raw), terminal, colours)
    if colours is not None:
        terminal.line(legend(terminal))
    terminal.line(figures(idlm.stats), "dim")
    terminal.line()
    terminal.line(f"{_verdict(llm, ar, idlm)} I-DLM is {_speedup(ar, idlm):.2f}x as fast.", "bold")


def first_difference(ar: list[int], idlm: list[int]) -> int | None:
    """Index of the first token that differs or that only one of them has; None: identical."""
    if ar == idlm:
        return None
    pairs = zip(ar, idlm, strict=False)
    shorter = min(len(ar), len(idlm))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _verdict(llm: LLM, ar: RequestOutput, idlm: RequestOutput) -> str:
    index = first_difference(ar.token_ids, idlm.token_ids)
    if index is None:
        return f"Identical: all {len(ar.token_ids)} tokens."
    ends = [
        repr(llm.tokenizer.token_text(output.token_ids[index]))
        if index < len(output.token_ids)
        else "the end"
        for output in (ar, idlm)
    ]
    return f"The tokens differ from token {index + 1} on: AR has {ends[0]}, I-DLM has {ends[1]}."


def _speedup(ar: RequestOutput, idlm: RequestOutput) -> float:
    return idlm.stats.tokens_per_second / ar.stats.tokens_per_second


def _to_dict(ar: RequestOutput, idlm: RequestOutput) -> dict[str, object]:
    objects: dict[str, object] = {
        name: to_dict(output) | {"tokens_per_second": output.stats.tokens_per_second}
        for name, output in (("ar", ar), ("idlm", idlm))
    }
    return objects | {"identical": ar.token_ids == idlm.token_ids, "speedup": _speedup(ar, idlm)}
