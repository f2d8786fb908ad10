"""Entry point of the `idlm` command: parses arguments, runs a command, reports errors."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import idlm
from idlm.cli import bench, chat, convert, generate, info, serve, synthesize
from idlm.errors import IdlmError

# Each has `add_parser(subparsers)`, which names its own `run(args)`, and imports torch only there.
COMMANDS = (generate, chat, serve, bench, info, synthesize, convert)

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed command stands in ``args.run``."""
    parser = argparse.ArgumentParser(
        prog="idlm",
        description="Introspective diffusion language models: several tokens per forward pass.",
    )
    parser.add_argument("--version", action="version", version=f"idlm {idlm.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 2 for bad input (one line on stderr), 130 after ctrl-c.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that is not UTF-8 is no reason to stop
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except IdlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away. Nothing may be written to stdout any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
