"""schemathesis: bodies made from the OpenAPI schema, right and wrong ones, on the default model.

`make fuzz` sends 2,000 and more; they are the same ones each time.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from idlm import LLM
from idlm.server.limits import Limits
from tests.server.live import Live, serving, until

EXAMPLES = int(os.environ.get("IDLM_SCHEMA_EXAMPLES", "25"))  # for each of two endpoints
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def live_default(default_llm: LLM) -> Iterator[Live]:
    limits = Limits(max_prompt_tokens=64, max_output_tokens=2, max_choices=2)
    with serving(default_llm, limits) as live:
        yield live


def test_no_server_error_and_no_undocumented_status(
    live_default: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "idlm")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{live_default.url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--continue-on-failure", "--request-timeout", "60"),
        *("--generation-deterministic", "--no-color"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    until(live_default.idle)
    answers = [r.fields for r in caplog.records if r.name == "idlm.server.requests"]  # type: ignore[attr-defined]
    by_status = Counter((a["path"], a["status"]) for a in answers)
    print(result.stdout, *(f"{n:6} {path} {s}" for (path, s), n in by_status.items()), sep="\n")
    assert result.returncode == 0, result.stdout + result.stderr
    generated = re.search(r"(\d+) generated", result.stdout)
    assert generated is not None and int(generated[1]) >= 2 * EXAMPLES
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert by_status[path, 200] and by_status[path, 400]
    # A failure of the server amid a stream of status 200, and what it says of any other.
    assert not [answer for answer in answers if answer.get("error")]
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
