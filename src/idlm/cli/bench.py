"""`idlm bench`: load on a server with OpenAI's API, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idlm.errors import InvalidRequestError, ResourceError

if TYPE_CHECKING:
    from idlm.server.load import Pattern, Spread, Summary

KEY_VARIABLE = "OPENAI_API_KEY"
COLUMNS = (
    "load",
    "finished",
    "errors",
    "tokens/s",
    "TTFT p50",
    "p95",
    "TPOT p50",
    "p95",
    "total p50",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a server under load",
        description="Send chat requests to any server with OpenAI's API and measure tokens per "
        "second, time to the first token (TTFT) and per further token (TPOT). Needs the extra "
        "'server'.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help=f"default: {KEY_VARIABLE}, if set")
    load = parser.add_argument_group("load").add_mutually_exclusive_group()
    load.add_argument(
        "--clients",
        metavar="N,N",
        default="1,8",
        help="closed loop: numbers of clients, one run each (default: 1,8)",
    )
    load.add_argument("--rate", metavar="R,R", help="open loop: requests per second, one run each")
    length = parser.add_argument_group("length of a run, whichever comes first")
    length.add_argument("--requests", type=int, metavar="N", help="default: 32")
    length.add_argument("--seconds", type=float, metavar="S", help="default: no limit")
    request = parser.add_argument_group("request")
    request.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line (default: eight questions)"
    )
    request.add_argument("--max-tokens", type=int, default=64, metavar="N", help="default: 64")
    request.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    request.add_argument("--seed", type=int, default=0, help="default: 0")
    request.add_argument(
        "--body", metavar="JSON", help="further fields of the body, such as '{\"stride\": 1}'"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw them here, as PNG or SVG; needs 'eval'"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        IdlmError: bad options, or a server that is not there or fails.
    """
    try:
        from idlm.server.load import PROMPTS, Target, measure

        if args.plot is not None:
            import matplotlib  # noqa: F401  before an hour of load, not after
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"`idlm bench` needs {error.name}: pip install 'idlm[server,eval]'."
        ) from error
    target = Target(
        url=args.url,
        model=args.model,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE),
        prompts=PROMPTS if args.prompts is None else _prompts(args.prompts),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        extra=_body(args.body),
    )
    summaries = asyncio.run(measure(target, _patterns(args)))
    print(table(summaries))
    if args.json is not None:
        from idlm.model.files import write_json

        runs = [summary.to_dict() for summary in summaries]
        write_json(args.json, {"url": args.url, "max_tokens": args.max_tokens, "runs": runs})
    if args.plot is not None:
        plot(summaries, args.plot)


def table(summaries: list[Summary]) -> str:
    """The figures in columns; times in milliseconds."""
    rows = [COLUMNS]
    for s in summaries:
        rows.append(
            (
                s.load,
                f"{s.finished}/{s.requests}",
                ", ".join(f"{count} x {kind}" for kind, count in s.errors.items()) or "none",
                f"{s.tokens_per_second:.1f}",
                _ms(s.ttft, "p50"),
                _ms(s.ttft, "p95"),
                _ms(s.tpot, "p50"),
                _ms(s.tpot, "p95"),
                _ms(s.latency, "p50"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "times in ms"])


def plot(summaries: list[Summary], path: Path) -> None:
    """Draw tokens per second and the two times over the load."""
    from matplotlib.figure import Figure

    from idlm.model.files import replacing

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    loads = [s.load for s in summaries]
    axes[0].plot(loads, [s.tokens_per_second for s in summaries], marker="o")
    axes[0].set(title="Tokens per second", ylim=(0, None))
    for axis, name, title in (
        (axes[1], "ttft", "Time to first token, ms"),
        (axes[2], "tpot", "Time per further token, ms"),
    ):
        for percentile in ("p50", "p95"):
            spreads = [getattr(s, name) for s in summaries]
            values = [float("nan") if s is None else 1000 * getattr(s, percentile) for s in spreads]
            axis.plot(loads, values, marker="o", label=percentile)
        axis.set(title=title, ylim=(0, None))
        axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def _ms(spread: Spread | None, name: str) -> str:
    return "-" if spread is None else f"{1000 * getattr(spread, name):.0f}"


def _patterns(args: argparse.Namespace) -> list[Pattern]:
    from idlm.server.load import Pattern

    requests = 32 if args.requests is None and args.seconds is None else args.requests
    for name, value in (("requests", requests), ("seconds", args.seconds)):
        if value is not None and not value > 0:
            raise InvalidRequestError(f"--{name} must be above 0, not {value}.")
    limits: dict[str, Any] = {"requests": requests, "seconds": args.seconds}
    if args.rate is not None:
        return [Pattern(rate=rate, **limits) for rate in _numbers("rate", args.rate, float)]
    return [Pattern(clients=n, **limits) for n in _numbers("clients", args.clients, int)]


def _numbers(name: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(0 < number < 1e6 for number in numbers):
        raise InvalidRequestError(
            f"--{name} takes numbers above 0 with commas between them, not {text!r}."
        )
    return numbers


def _prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"Cannot read {path} ({error}); give a file of lines.") from error
    if not prompts:
        raise InvalidRequestError(f"{path} has no prompt; write one on each line.")
    return prompts


def _body(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidRequestError(
            f"--body is not JSON ({error}); quote it for the shell."
        ) from error
    if not isinstance(body, dict):
        raise InvalidRequestError("--body must be a JSON object, such as '{\"stride\": 1}'.")
    return body
