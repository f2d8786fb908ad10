"""A real server on a free port, in a thread of the test's own process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from idlm import LLM
from idlm.server.app import Server, create_app
from idlm.server.limits import Limits

NAME = "test-model"


@dataclass(frozen=True)
class Live:
    """A running server and a client of it."""

    url: str
    http: httpx.Client
    server: Server

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        load = self.server.worker.load()
        return load.running == load.waiting == 0

    def chat(self, content: str = "The dog", **fields: object) -> httpx.Response:
        """A request to ``/v1/chat/completions``."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, prompt: object = "The dog", **fields: object) -> httpx.Response:
        """A request to ``/v1/completions``."""
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})


@contextmanager
def serving(llm: LLM, limits: Limits | None = None, api_key: str | None = None) -> Iterator[Live]:
    """Run a server while the block runs."""
    app = create_app(llm, NAME, limits, api_key)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield Live(url, client, app.state.server)
    app.state.server.worker.drain(0)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until ``condition`` holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
