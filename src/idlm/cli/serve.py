"""`idlm serve`: the OpenAI-compatible server and its page."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import signal
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from idlm.cli import options
from idlm.errors import InvalidRequestError, ResourceError

if TYPE_CHECKING:
    import uvicorn

    from idlm.server.limits import Limits
    from idlm.server.worker import Worker

logger = logging.getLogger(__name__)

KEY_VARIABLE = "IDLM_API_KEY"
LAST_WORDS = 5  # seconds for streams to say that they end


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model with OpenAI's API and a page to try it. Needs the extra "
        "'server'. Logs are lines of JSON on stderr. With --stride auto, --verification is coupled "
        "if it is not given.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    group.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"the API wants this key (default: {KEY_VARIABLE} of the environment, else none)",
    )
    group.add_argument("--name", help="the model's name in the API (default: made from --model)")
    group.add_argument(
        "--max-batch", type=int, default=32, metavar="N", help="texts at once (default: 32)"
    )
    group.add_argument(
        "--kv-cache-tokens",
        type=int,
        metavar="N",
        help="tokens whose keys and values are kept (default: the context of all texts at once, "
        "or what fits into a share of the free memory)",
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="texts that may wait; beyond, a request gets status 429 (default: 256)",
    )
    group.add_argument(
        "--max-body", type=int, default=2048, metavar="KIB", help="of a request (default: 2048)"
    )
    group.add_argument("--max-prompt", type=int, metavar="N", help="tokens (default: the context)")
    group.add_argument("--max-output", type=int, metavar="N", help="tokens (default: the context)")
    group.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="of a request (default: 600)"
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30,
        metavar="S",
        help="how long running requests may take to finish when the server is told to stop "
        "(default: 30)",
    )
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command until a signal ends it.

    Raises:
        IdlmError: bad options, a model that cannot be loaded, or a port that is taken.
    """
    try:
        import uvicorn

        from idlm.server.app import create_app
        from idlm.server.logs import JsonFormatter

        limits = _limits(args)
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"`idlm serve` needs {error.name}: pip install 'idlm[server]'."
        ) from error
    listener = _listen(args.host, args.port)
    llm = options.load_llm(args, max_batch=args.max_batch, kv_cache_tokens=args.kv_cache_tokens)
    name = args.name or model_name(args.model)
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    app = create_app(llm, name, limits, key, own_thread=False)
    # What is there now stays. To look through it all takes the garbage collector a tenth of a
    # second, in which nobody gets a token.
    gc.collect()
    gc.freeze()

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(args.shutdown_timeout) + LAST_WORDS,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {name} at http://{shown}:{port}", file=sys.stderr, flush=True)
    if llm.auto and llm.verification == "rejection":
        logger.warning(
            "With --stride auto and --verification rejection a seed does not give the same text "
            "again; with --verification coupled it does."
        )
    _run_until_signal(uvicorn.Server(config), listener, app.state.server.worker, args)


def _run_until_signal(
    server: uvicorn.Server, listener: socket.socket, worker: Worker, args: argparse.Namespace
) -> None:
    """HTTP in a thread, the engine here: OpenMP then has one set of threads, not two."""

    def serve() -> None:
        try:
            server.run([listener])
        finally:
            worker.end()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if server.should_exit:
            server.force_exit = True
        else:
            worker.drain(args.shutdown_timeout)
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    thread = threading.Thread(target=serve, name="http")
    thread.start()
    worker.run()
    thread.join()


def model_name(model: str | None) -> str:
    """A name for the API: the last part of a path, without what a URL or a shell minds."""
    from idlm.llm import DEFAULT_ADAPTER

    if model is None:
        return DEFAULT_ADAPTER
    last = re.sub(r"\.gguf$", "", model.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last) or "model"


def _limits(args: argparse.Namespace) -> Limits:
    from idlm.server.limits import Limits

    for name in ("max_batch", "kv_cache_tokens", "max_body", "max_prompt", "max_output", "timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InvalidRequestError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
    for name in ("max_waiting", "shutdown_timeout"):
        if not getattr(args, name) >= 0:
            raise InvalidRequestError(f"--{name.replace('_', '-')} must be at least 0.")
    return Limits(
        max_body_bytes=args.max_body * 1024,
        max_prompt_tokens=args.max_prompt,
        max_output_tokens=args.max_output,
        max_waiting=args.max_waiting,
        timeout_seconds=args.timeout,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before a model is loaded for nothing.

    Raises:
        InvalidRequestError: the address cannot be listened at.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise InvalidRequestError(f"--port must be between 0 and 65535, not {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise InvalidRequestError(
            f"Cannot listen at {host}:{port} ({error}); choose another --host or --port."
        ) from error
    return listener
