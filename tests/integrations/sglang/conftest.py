"""These tests need SGLang: `make test-sglang` installs it and runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_*.py"]
collect_ignore = ["stand_in"]

HERE = Path(__file__).parent
