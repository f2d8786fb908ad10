"""What clients, networks and steps do wrong: the right status, and nobody else notices."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from idlm import LLM, SamplingParams
from idlm.engine.engine import Engine
from idlm.engine.request import Request
from idlm.errors import ResourceError
from idlm.server.limits import Limits
from idlm.server.replies import CompletionReplies
from tests.server.live import Live, serving, until
from tests.support.tiny import tiny_model, tiny_tokenizer

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
SHORT: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "temperature": 0}


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of all events; ``[DONE]`` must come last, if at all."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if lines[-1] == "[DONE]":
        lines.pop()
    return [json.loads(line) for line in lines]


def raw_request(live: Live, body: bytes, *headers: str) -> socket.socket:
    """A connection on which a request to the chat endpoint was sent."""
    port = int(live.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        *headers,
    ]
    connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    return connection


def chat_body(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "The dog"}], **fields}).encode()


@pytest.fixture
def works(live: Live, tiny_llm: LLM) -> Iterator[None]:
    """After the test the server still gives the right text, and nothing runs."""
    yield
    until(live.idle)
    offline = tiny_llm.generate("The fox", SamplingParams(**SHORT))[0].text
    assert live.complete("The fox", **SHORT).json()["choices"][0]["text"] == offline


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1, 2]", 400),
        (b"null", 400),
        (b'{"messages": "hello"}', 400),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"\\ud800": 1}', 400),
        (b" " * 10_000_000, 413),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_bodies(live: Live, works: None, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = live.http.post(path, content=body, headers=headers)
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_other_content_types_are_refused(live: Live) -> None:
    """Else a page of any site could send requests to a server on its reader's machine."""
    response = live.http.post(
        "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 400 and "Content-Type" in response.json()["error"]["message"]


def test_a_large_body_without_a_length_is_refused_on_the_way(live: Live, works: None) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 10_000

    response = live.http.post(
        "/v1/completions", content=chunks(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("path", "fields", "status", "word"),
    [
        ("/v1/completions", {"prompt": "a", "n": 10**6}, 400, "n"),
        ("/v1/completions", {"prompt": ["a"] * 99, "n": 1}, 400, "99 prompts"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}, 400, "at most 512"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "other"),
        ("/v1/completions", {"prompt": ""}, 400, "empty"),
        ("/v1/completions", {"prompt": []}, 400, "empty"),
        ("/v1/completions", {"prompt": [[]]}, 400, "empty"),
        ("/v1/completions", {"prompt": [999]}, 400, "999"),
        ("/v1/completions", {"prompt": [5] * 512}, 400, "at most 511"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"999": 1}}, 400, "999"),
        ("/v1/completions", {"prompt": "a", "stride": 17}, 400, "stride"),
        ("/v1/completions", {"prompt": "a", "verification": "no"}, 400, "verification"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
        ("/v1/models", {}, 405, "POST"),
    ],
)
def test_bad_requests(
    live: Live, path: str, fields: dict[str, Any], status: int, word: str
) -> None:
    response = live.http.post(path, json=fields)
    assert response.status_code == status and word in response.json()["error"]["message"]


def test_keys(tiny_llm: LLM) -> None:
    with serving(tiny_llm, api_key="secret") as live:
        assert live.complete(**SHORT).status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            response = httpx.post(f"{live.url}/v1/completions", json={}, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(live: Live, works: None, stream: bool) -> None:
    body = chat_body(n=3, stream=stream, **LONG)
    connection = raw_request(live, body, f"Content-Length: {len(body)}")
    until(lambda: live.server.worker.load().running == 3)
    connection.close()
    until(live.idle, 5)
    aborted = [line for line in live.http.get("/metrics").text.splitlines() if "abort" in line]
    assert any(line.startswith("idlm_texts_total") for line in aborted)


def test_a_killed_client(live: Live, works: None) -> None:
    code = (
        "import httpx, sys\n"
        f"with httpx.stream('POST', '{live.url}/v1/completions', timeout=60, json="
        f"{ {'prompt': 'The dog', 'stream': True, **LONG}!r}) as response:\n"
        "    for line in response.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline()
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    client.stdout.close()
    until(live.idle, 5)


def test_a_slow_reader_holds_nobody_up(live: Live, works: None, tiny_llm: LLM) -> None:
    body = chat_body(stream=True, return_details=True, logprobs=True, top_logprobs=20, **LONG)
    connection = raw_request(live, body, f"Content-Length: {len(body)}")
    try:
        offline = tiny_llm.generate("The dog", SamplingParams(**SHORT))[0].text
        for _ in range(3):
            assert live.complete(**SHORT).json()["choices"][0]["text"] == offline
        until(live.idle)  # its text is ready, whether or not it reads
    finally:
        connection.close()


def test_a_reader_that_never_reads_is_let_go(tiny_llm: LLM) -> None:
    with serving(tiny_llm, Limits(timeout_seconds=2)) as live:
        body = chat_body(stream=True, logprobs=True, top_logprobs=20, n=8, **LONG)
        connection = raw_request(live, body, f"Content-Length: {len(body)}")
        until(live.idle)
        until(lambda: 'path="/v1/chat' in live.http.get("/metrics").text)
        connection.close()


def test_a_full_queue(tiny_llm: LLM) -> None:
    with serving(tiny_llm, Limits(max_waiting=2)) as live, ThreadPoolExecutor(6) as pool:
        running = [pool.submit(live.complete, **LONG, seed=i) for i in range(6)]
        until(lambda: live.server.worker.load().waiting == 2)
        refused = live.complete(**SHORT)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        assert all(future.result().status_code == 200 for future in running)
        assert live.complete(**SHORT).status_code == 200


def test_timeouts(tiny_llm: LLM) -> None:
    with serving(tiny_llm, Limits(timeout_seconds=0.2)) as live:
        whole = live.complete(n=8, **LONG)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        stream = live.complete(n=8, stream=True, **LONG)
        assert stream.status_code == 200
        assert events(stream.text)[-1]["error"]["code"] == "timeout"
        until(live.idle, 5)


class Fault:
    """Makes every step fail that has a request with ``token`` first in its prompt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, token: int, error: Exception) -> None:
        self.after = 4  # tokens
        self.armed = True
        step, add = Engine.step, Engine.add
        requests: dict[int, list[Request]] = {}

        def adding(engine: Engine, prompt: list[int], params: SamplingParams) -> Request:
            request = add(engine, prompt, params)
            requests.setdefault(id(engine), []).append(request)
            return request

        def stepping(engine: Engine) -> bool:
            for request in requests.get(id(engine), []):
                bad = request.prompt_token_ids[0] == token and not request.finished
                if self.armed and bad and len(request.token_ids) >= self.after:
                    raise error
            return step(engine)

        monkeypatch.setattr(Engine, "add", adding)
        monkeypatch.setattr(Engine, "step", stepping)


BAD = 42


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("boom"), 500, "internal_error"),
        (ResourceError("No memory for that."), 503, "out_of_resources"),
    ],
)
def test_a_failing_step_fails_only_its_request(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str
) -> None:
    params: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "temperature": 0.8}
    prompts = ["The dog", "The sun", "A hen"]
    offline = [
        tiny_llm.generate(p, SamplingParams(seed=i, **params))[0].text
        for i, p in enumerate(prompts)
    ]
    Fault(monkeypatch, BAD, error)
    with serving(tiny_llm) as live, ThreadPoolExecutor(4) as pool:
        good = [
            pool.submit(live.complete, p, seed=i, stream=True, **params)
            for i, p in enumerate(prompts)
        ]
        until(lambda: live.server.worker.load().running == 3)
        bad = live.complete([BAD, 5], **params)
        assert bad.status_code == status and bad.json()["error"]["code"] == code
        assert "boom" not in bad.text
        texts = ["".join(e["choices"][0]["text"] for e in events(f.result().text)) for f in good]
        assert texts == offline
        assert live.server.worker.step_failures >= 2  # together, then alone
        streamed = live.complete([BAD, 5], stream=True, **params)
        assert events(streamed.text)[-1]["error"]["code"] == code
        assert live.complete("The dog", seed=0, **params).json()["choices"][0]["text"] == offline[0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_written(
    live: Live,
    works: None,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(CompletionReplies, "part", failing)
        response = live.complete(stream=stream, **LONG)
    error = events(response.text)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 500) and error["code"] == "internal_error"
    assert any("boom" in str(record.exc_info) for record in caplog.records)  # as it says


def test_a_fault_that_passes_is_not_noticed(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """All start again, without a gap or a repetition in what was streamed."""
    params: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.8}
    fault = Fault(monkeypatch, BAD, RuntimeError("boom"))
    fault.armed = False
    offline = tiny_llm.generate([[BAD, 5], [9, 5]], SamplingParams(seed=1, **params))
    fault.armed = True
    with serving(tiny_llm) as live:

        def disarm() -> None:
            until(lambda: live.server.worker.step_failures > 0)
            fault.armed = False

        waiting = threading.Thread(target=disarm)
        waiting.start()
        response = live.complete([[BAD, 5], [9, 5]], seed=1, stream=True, **params)
        waiting.join()
        texts = ["", ""]
        for event in events(response.text):
            if "error" in event:  # it may have failed alone too, before it was disarmed
                assert live.server.worker.step_failures > 1
                return
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == [output.text for output in offline]


def test_grammars_that_lead_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model has no token for the first byte of a character; that is the client's trouble."""
    folder = tiny_tokenizer(tiny_model(tmp_path, mask_token_id=7), without=b"\xf1")
    llm = LLM(folder, stride=4, dtype="float32")
    params: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "temperature": 0.8, "seed": 1}
    offline = llm.generate("The dog", SamplingParams(**params))[0].text
    schema = {"name": "a", "schema": {"enum": ["a\U00040000", "b\U00040000"]}}
    late = {"response_format": {"type": "json_schema", "json_schema": schema}}
    with serving(llm) as live, ThreadPoolExecutor(1) as pool:
        other = pool.submit(live.complete, "The dog", **params)
        until(lambda: live.server.worker.load().running == 1)
        at_once = live.complete(guided_regex="a*\U00040000", stream=True)
        assert at_once.status_code == 400 and "no text" in at_once.json()["error"]["message"]
        whole = live.complete(**late)
        assert whole.status_code == 400 and "cannot go on" in whole.json()["error"]["message"]
        stream = live.complete(**late, stream=True)
        assert stream.status_code == 200 and "[DONE]" not in stream.text
        assert events(stream.text)[-1]["error"] == whole.json()["error"]
        assert other.result().json()["choices"][0]["text"] == offline
        assert live.server.worker.step_failures == 0
    assert not [record for record in caplog.records if record.exc_info]


def test_shutdown_finishes_what_it_can_and_ends_the_rest(tiny_llm: LLM) -> None:
    for seconds, finished in ((30.0, True), (0.0, False)):
        with serving(tiny_llm) as live, ThreadPoolExecutor(2) as pool:
            stream = pool.submit(live.complete, stream=True, max_tokens=100, ignore_eos=True)
            until(lambda live=live: live.server.worker.load().kv_tokens > 10)  # type: ignore[misc]
            live.server.worker.drain(seconds)
            refused = live.complete(**SHORT)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert live.http.get("/health").status_code == 503
            text = stream.result().text
            last = events(text)[-1]
            if finished:
                assert text.endswith("data: [DONE]\n\n")
                assert last["choices"][0]["finish_reason"] == "length"
            else:
                assert last["error"]["code"] == "shutting_down"


def test_sigterm_ends_the_command_with_its_streams(default_model_dir: object) -> None:
    command = [
        *(sys.executable, "-m", "idlm.cli.main", "serve", "--port", "0"),
        *("--stride", "auto", "--verification", "rejection", "--shutdown-timeout", "0"),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        first = server.stderr.readline()
        assert first.startswith("Serving smollm2-135m-instruct at http://127.0.0.1:"), first
        url = first.split()[-1]
        until(lambda: _up(url))
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json={"prompt": "Once", "stream": True, "max_tokens": 2000, "ignore_eos": True},
            timeout=60,
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            started = time.monotonic()
            server.terminate()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        log = [json.loads(line) for line in server.stderr.read().splitlines()]
        assert server.wait(30) == 0 and time.monotonic() - started < 30
        [entry] = [line for line in log if line.get("path") == "/v1/completions"]
        assert entry["error"] == "shutting_down" and entry["completion_tokens"] > 0
        assert "Once" not in json.dumps(log)
        assert "--verification coupled" in log[0]["message"]  # seeds do not repeat a text
    finally:
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()


def _up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
