"""`idlm` as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys


def start_idlm(*arguments: str) -> subprocess.Popen[bytes]:
    """The command with pipes; it heeds an interrupt even if the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "idlm.cli.main", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
