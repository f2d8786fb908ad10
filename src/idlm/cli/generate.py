"""`idlm generate`: continue or answer one prompt."""

from __future__ import annotations

import argparse
import json
import sys

from idlm.cli import compare, options
from idlm.cli.prompt import read_prompt, stream
from idlm.cli.render import (
    SourceColours,
    Terminal,
    figures,
    last_output,
    legend,
    print_stream,
    to_dict,
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate",
        help="generate text for one prompt",
        description="Stream the text for one prompt, then one line of figures.",
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the prompt; '-' reads it from stdin, less a last newline"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as plain text (default: it is a user's message, where the model "
        "has a chat template)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--compare",
        action="store_true",
        help="run the base model alone (AR) and I-DLM on the prompt and compare tokens and speed. "
        "Both first generate a few tokens that are not counted, so that one-time costs are not in "
        "the figures. Needs --verification coupled (then the default) if --temperature is above 0",
    )
    output.add_argument(
        "--show",
        action="store_true",
        help="colour the tokens by how they came about (on a terminal, unless NO_COLOR is set)",
    )
    output.add_argument("--json", action="store_true", help="print nothing but one JSON object")
    options.add_model_options(parser)
    options.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        IdlmError: bad input, or a model that cannot be loaded.
    """
    prompt = read_prompt(args.prompt)
    if args.compare:
        compare.prepare(args)
    params = options.sampling_params(args)
    llm = options.load_llm(args)
    if args.compare:
        compare.run(args, llm, prompt, params)
        return
    deltas = stream(llm, prompt, params, raw=args.raw)
    if args.json:
        print(json.dumps(to_dict(last_output(deltas))))
        return
    terminal = Terminal(sys.stdout)
    colours = SourceColours(llm.tokenizer) if args.show and terminal.coloured else None
    output = print_stream(deltas, terminal, colours)
    if colours is not None:
        terminal.line(legend(terminal))
    terminal.line(figures(output.stats), "dim")
