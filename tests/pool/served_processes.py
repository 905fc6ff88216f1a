"""Our own servers as processes, each with the shipped agent."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from agentcpm_jax.files import SHIPPED
from configs.tiny import CONTEXT

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def our_servers(count: int) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """(process, url) of `launch/serve.py` with the shipped agent."""
    command = [sys.executable, "launch/serve.py", str(SHIPPED["shipped:sft"]), "--port=0"]
    command += ["--slots=8", f"--context={CONTEXT}", "--chunk=16"]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        found = []
        for process in running:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving"), process.wait()
            found.append((process, line.split()[-1]))
        yield found
    finally:
        for process in running:
            process.terminate()
        for process in running:
            with process:
                process.wait(60)
