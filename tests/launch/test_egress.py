"""Nothing that the project starts talks to the outside, unless it is configured to.

Each program runs where there is no network but loopback, without `HF_HUB_OFFLINE`, and every
attempt is noted (`tests/doubles/unplugged.py`).
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.weights.store import VersionWriter
from tests.doubles.unplugged import ROOT, running, unplugged

pytestmark = pytest.mark.runs


def call_out(folder: Path) -> bool:
    """What must be noted: a name, an address, and a datagram."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo("huggingface.co", 443)
    with socket.socket() as stream, contextlib.suppress(OSError):
        stream.settimeout(0.1)
        stream.connect(("192.0.2.1", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as datagram, contextlib.suppress(OSError):
        datagram.sendto(b"x", ("192.0.2.1", 53))
    subprocess.run([sys.executable, "-c", "import socket; socket.gethostbyaddr('127.0.0.1')"])
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()):
        return True


def train_and_explain(folder: Path) -> list[str]:
    """Every stage of the quickstart, its report, and the page about a group that was trained."""
    run = ["--config=" + str(ROOT / "configs/quickstart.py:smoke"), f"--workdir={folder / 'run'}"]
    for command in (
        ["train.py", *run],
        ["inspect_run.py", "why", str(folder / "run"), "1"],
        ["train.py", *run],  # skips every stage and writes the report once more
    ):
        script = [sys.executable, str(ROOT / "launch" / command[0])]
        subprocess.run([*script, *command[1:]], cwd=folder, check=True)
    return sorted(path.name for path in (folder / "run").glob("*.html"))


def serve_and_ask(folder: Path) -> list[Any]:
    model = str(SHIPPED["shipped:sft"])
    sampled = {"max_new_tokens": 4, "temperature": 0.0}
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    with (
        running("serve.py", model, "--port=0", "--context=64", "--slots=2") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=300.0) as client,
    ):
        return [
            client.get("/health").status_code,
            client.post("/generate", json={"text": "hi", "sampling_params": sampled}).status_code,
            client.post("/v1/chat/completions", json=chat).status_code,
        ]


def copy_weights(folder: Path) -> str:
    writer = VersionWriter(str(folder / "published" / "run"), 1)
    writer.write("weights.bin", [b"x" * 1000])
    writer.commit({})
    flags = [f"--source={folder / 'published'}", f"--directory={folder / 'here'}", "--port=0"]
    body = {"name": "run", "version": 1}
    with (
        running("pool_agent.py", *flags) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        while (found := client.post("/pull", json=body).json())["state"] == "pulling":
            pass
        return found["state"]


def test_attempts_are_noted(tmp_path: Path) -> None:
    notes, reached_itself = unplugged(call_out, tmp_path)
    assert reached_itself
    events = [note.split()[0] for note in notes]
    assert events[:4] == [
        *("socket.getaddrinfo", "socket.connect", "socket.sendto", "socket.gethostbyaddr")
    ]
    lost = " ".join(notes[4:])  # where the child may leave the network; a name is many packets
    assert not lost or re.fullmatch(r"\d+ packets had no route", lost)


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (serve_and_ask, [200, 200, 200]),
        (copy_weights, "ready"),
        (train_and_explain, ["report.html", "why-1.html"]),
    ],
)
def test_nothing_talks_to_the_outside(program: Any, answer: Any, tmp_path: Path) -> None:
    assert unplugged(program, tmp_path) == ([], answer)
