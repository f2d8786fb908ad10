"""schemathesis: bodies made from the OpenAPI schema, right and wrong ones, on the default model.

`make fuzz` sends 2,000 and more; they are the same ones each time.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from idlm import LLM
from idlm.server.limits import Limits
from tests.server.live import Live, serving, until

# Cases for each operation, besides those at the bounds of every field (coverage).
FULL = "IDLM_FUZZ" in os.environ
PHASES, EXAMPLES, LEAST = (
    ("examples,coverage,fuzzing", 700, 2000) if FULL else ("examples,fuzzing", 25, 50)
)
TEXTS = ("/v1/chat/completions", "/v1/completions")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def live_default(default_llm: LLM) -> Iterator[Live]:
    limits = Limits(max_prompt_tokens=512, max_output_tokens=2)
    with serving(default_llm, limits) as live:
        yield live


def test_no_server_error_and_no_undocumented_status(
    live_default: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "idlm")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{live_default.url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", PHASES),
        *("--max-examples", str(EXAMPLES), "--continue-on-failure", "--request-timeout", "60"),
        *("--seed", "1", "--no-color"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    until(live_default.idle)
    answers = [r.fields for r in caplog.records if r.name == "idlm.server.requests"]  # type: ignore[attr-defined]
    by_status = Counter((a["path"], a["status"]) for a in answers)
    print(result.stdout, *(f"{n:6} {path} {s}" for (path, s), n in by_status.items()), sep="\n")
    assert result.returncode == 0, result.stdout + result.stderr
    assert sum(n for (path, _), n in by_status.items() if path in TEXTS) >= LEAST
    assert all(by_status[path, 200] for path in TEXTS)  # some of them are right
    # A failure of the server amid a stream of status 200, and what it says of any other.
    assert not [answer for answer in answers if answer.get("error")]
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
