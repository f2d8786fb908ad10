"""These tests need SGLang: `make test-sglang` installs it and runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent

if importlib.util.find_spec("sgl_kernel") is None:
    sys.path.append(str(HERE / "stand_in"))

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_*.py"]
collect_ignore = ["stand_in"]
