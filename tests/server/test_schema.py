"""schemathesis: bodies made from the OpenAPI schema, right and wrong ones, on the default model.

For 2,000 cases: IDLM_SCHEMA_EXAMPLES=1000 pytest tests/server/test_schema.py -s
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def test_no_server_error_and_no_undocumented_status(live_default: Live, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{live_default.url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--continue-on-failure", "--request-timeout", "60"),
        *("--generation-deterministic", "--no-color"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    generated = re.search(r"(\d+) generated", result.stdout)
    assert generated is not None and int(generated[1]) >= 2 * EXAMPLES
    until(live_default.idle)
    texts = live_default.http.get("/metrics").text
    assert 'idlm_texts_total{finish_reason="length"}' in texts  # some of them were right
    assert 'idlm_texts_total{finish_reason="error"}' not in texts
