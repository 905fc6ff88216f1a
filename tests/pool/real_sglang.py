"""Real SGLang servers on the CPU, as processes; their environment is named by SGLANG_PYTHON."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

HERE = Path(__file__).parent
START_SECONDS = 900  # importing SGLang is nearly all of it, and the machine may be shared


def interpreter() -> str:
    """The Python that has SGLang. A missing one is a failure, not a skip."""
    python = os.environ.get("SGLANG_PYTHON", "")
    if not python or not Path(python).exists():
        raise RuntimeError(
            f"SGLANG_PYTHON={python!r} is no interpreter; `make test-sglang` makes one and sets it"
        )
    return python


@contextmanager
def sglang_servers(
    model: str, context: int, count: int, logs: Path, dtype: str = "float32"
) -> Iterator[list[str]]:
    """`count` servers of `model`, started together; their urls."""
    ports = [_free_port() for _ in range(count)]
    servers = []
    for port in ports:
        arguments = ["--model-path", model, "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--device", "cpu", "--dtype", dtype, "--grammar-backend", "none"]
        arguments += ["--attention-backend", "torch_native", "--disable-overlap-schedule"]
        arguments += ["--cuda-graph-backend-decode=disabled", "--skip-server-warmup"]
        arguments += ["--cuda-graph-backend-prefill=disabled", "--max-total-tokens", "8192"]
        # Without the last one an idle server takes a whole core by asking for work.
        arguments += ["--context-length", str(context), "--sleep-on-idle"]
        servers.append(_start([str(HERE / "sglang_cpu.py"), *arguments], logs, port))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url, server, port in zip(urls, servers, ports, strict=True):
            _await_health(url, server, logs / f"{port}.log")
        yield urls
    finally:
        for server in servers:
            _stop(server)


@contextmanager
def official_router(workers: list[str], logs: Path) -> Iterator[str]:
    """SGLang's own router in front of `workers`; its url."""
    port = _free_port()
    arguments = [str(HERE / "sglang_cpu.py"), "router", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--policy", "cache_aware", "--cache-threshold", "0.3"]
    arguments += ["--balance-abs-threshold", "4", "--balance-rel-threshold", "1.2"]
    arguments += ["--prometheus-port", str(_free_port()), "--worker-urls", *workers]
    server = _start(arguments, logs, port)
    url = f"http://127.0.0.1:{port}"
    try:
        _await_health(url, server, logs / f"{port}.log")
        yield url
    finally:
        _stop(server)


def kill(url: str) -> None:
    """End the server behind `url` as a crash would."""
    port = url.rsplit(":", 1)[1]
    _kill_group(_BY_PORT[port])


_BY_PORT: dict[str, subprocess.Popen[bytes]] = {}


def _start(arguments: list[str], logs: Path, port: int) -> subprocess.Popen[bytes]:
    # What conftest sets for JAX is not meant for SGLang's processes.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    with (logs / f"{port}.log").open("wb") as log:
        server = subprocess.Popen(
            [interpreter(), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    _BY_PORT[str(port)] = server
    return server


def _await_health(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/health", timeout=30, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url} did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.kill(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(20)
    _kill_group(server)


def _kill_group(server: subprocess.Popen[bytes]) -> None:
    """SGLang's children outlive a parent that was killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
