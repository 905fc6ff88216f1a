"""Agents between an object store and hosts that share no disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from agentcpm_jax.engine.server import ServerConfig
from agentcpm_jax.pool.config import PoolConfig, agent_url
from agentcpm_jax.pool.servers import SGLangPool
from agentcpm_jax.weights.agent import open_agent
from agentcpm_jax.weights.mirror import Mirror
from agentcpm_jax.weights.store import VersionWriter
from tests.doubles.fault_server import FaultServer
from tests.doubles.object_store import ObjectStore, register
from tests.doubles.toy_pool import QUICK, check_toy, request, sample_all, toy_trainer, wait_for

ROOT = Path(__file__).parents[2]
#: The launcher, with the emulator's protocol and small reads.
LAUNCH = """
import sys
from tests.doubles.object_store import register
from agentcpm_jax.weights import mirror
register()
mirror.CHUNK = 4096
import pool_agent
sys.exit(pool_agent.main())
"""


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    register()
    running = ObjectStore()
    yield running
    running.close()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts the agent of a host (a loopback address with a directory of its own); its port."""
    running = []

    def start(host: str, source: str, port: int = 0, **options: str) -> int:
        server = open_agent(Mirror(source, tmp_path / host, pause=0.01), host, port, **options)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return server.server_address[1]

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def publish(root: str, version: int, weights: str) -> str:
    writer = VersionWriter(root, version)
    writer.write("toy.txt", [weights.encode()])
    writer.write("padding.bin", [os.urandom(50_000)])
    writer.commit({})
    return f"{root}/weights/v{version:06d}"


def test_each_host_copies_once_for_all_of_its_workers(
    servers, store, agents, tmp_path, monkeypatch
) -> None:
    """Two workers on one host, one on another, one that joins late on a third."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8,127.0.0.2,127.0.0.3,127.0.0.4")
    hosts = ["127.0.0.2", "127.0.0.2", "127.0.0.3"]
    port = agents("127.0.0.2", store.url)
    for host in ("127.0.0.3", "127.0.0.4"):
        agents(host, store.url, port)
    toys = [FaultServer(cfg=ServerConfig(host, 0), chunk=8) for host in hosts]
    urls = tuple(servers.start(toy) for toy in toys)
    loaded: list[tuple[str, str]] = []
    late = FaultServer(cfg=ServerConfig("127.0.0.4", 0), chunk=8)
    for toy in (*toys, late):
        load = toy.toy.load

        def noting(path: str, version: int, toy=toy, load=load) -> None:
            loaded.append((toy.cfg.host, path))
            load(path, version)

        toy.toy.load = noting
    file = tmp_path / "urls.txt"
    file.write_text("\n".join(urls))
    own = {"urls_file": str(file), "agent_port": port, "weights_dir": store.url}
    pool = SGLangPool(PoolConfig(**vars(QUICK) | own), "run.a1")
    root = f"{store.url}/run.a1"
    pool.start(toy_trainer("w0"), 0, publish(root, 0, "w0"))
    assert set(pool.update_weights(1, publish(root, 1, "w1")).values()) == {""}
    file.write_text("\n".join([*urls, servers.start(late)]))
    wait_for(lambda: list(pool.workers().values()).count("ready") == 4)
    done = sample_all(pool, [request(i) for i in range(16)])
    pool.close()
    for i, c in enumerate(done):
        check_toy(request(i), c, {1: "w1"})
    assert len(loaded) == 3 + 3 + 1
    assert all(Path(path).is_relative_to(tmp_path / host) for host, path in loaded)
    served = {key.split("/", 2)[2]: n for key, n in store.served.items() if key.endswith(".bin")}
    assert served == {  # by hosts, not by workers; the late one took the newest alone
        "weights/v000000/padding.bin": 2 * 50_000,
        "weights/v000001/padding.bin": 3 * 50_000,
    }


def test_a_host_without_its_agent_is_out_and_the_others_go_on(
    servers, store, agents, monkeypatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.2,127.0.0.3")
    port = agents("127.0.0.2", store.url)
    toys = [FaultServer(cfg=ServerConfig(host=h, port=0)) for h in ("127.0.0.2", "127.0.0.3")]
    urls = tuple(servers.start(toy) for toy in toys)
    cfg = PoolConfig(**vars(QUICK) | {"urls": urls, "agent_port": port, "weights_dir": store.url})
    pool = SGLangPool(cfg, "run")
    pool.start(toy_trainer("w0"), 0, publish(f"{store.url}/run", 0, "w0"))
    states = pool.workers()
    missing = pool.update_weights(7, f"{store.url}/run/weights/v000007")
    pool.close()
    assert states[urls[0]] == "ready"
    assert states[urls[1]].startswith(f"joining: unreachable: http://127.0.0.3:{port}")
    assert "no_weights" in missing[urls[0]] and "versions there: [0]" in missing[urls[0]]
    assert toys[0].toy.weights == "w0" and not toys[0].sessions.paused


def test_weights_are_copied_while_the_workers_generate(servers, store, agents, monkeypatch) -> None:
    """The copy stands at a gate until a whole completion was sampled under the old weights."""
    monkeypatch.setattr("agentcpm_jax.weights.mirror.CHUNK", 1024)
    port, toy = agents("127.0.0.1", store.url), FaultServer()
    urls = (servers.start(toy),)
    cfg = PoolConfig(**vars(QUICK) | {"urls": urls, "agent_port": port, "weights_dir": store.url})
    pool = SGLangPool(cfg, "run")
    pool.start(toy_trainer("w0"), 0, publish(f"{store.url}/run", 0, "w0"))
    store.gate.clear()
    path = publish(f"{store.url}/run", 1, "w1")
    update = threading.Thread(target=pool.update_weights, args=(1, path))
    update.start()
    store.waiting.wait()
    (during,) = sample_all(pool, [request()])
    store.gate.set()
    update.join()
    (after,) = sample_all(pool, [request()])
    pool.close()
    check_toy(request(), during, {0: "w0"})
    check_toy(request(), after, {1: "w1"})


# --- the process ------------------------------------------------------------------------------


def launch(store: ObjectStore, directory: Path, *flags: str, **environment: str):
    command = [sys.executable, "-c", LAUNCH, f"--source={store.url}", f"--directory={directory}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "launch")))
    process = subprocess.Popen(
        [*command, "--port=0", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def ask(url: str, version: int, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"name": "run", "version": version}
    return httpx.post(f"{url}/pull", json=body, headers=headers, trust_env=False)


def test_an_agent_that_is_killed_goes_on_where_it_was(store: ObjectStore, tmp_path: Path) -> None:
    """kill -9 in the middle of a file; the other host's agent is not concerned."""
    publish(f"{store.url}/run", 5, "w5")
    store.gate.clear()
    victim, url = launch(store, tmp_path / "a")
    other, other_url = launch(store, tmp_path / "b")
    assert ask(url, 5).json()["state"] == "pulling"
    store.waiting.wait()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    store.gate.set()
    wait_for(lambda: ask(other_url, 5).json()["state"] == "ready")
    again, url = launch(store, tmp_path / "a")
    wait_for(lambda: ask(url, 5).json()["state"] == "ready")
    found = httpx.get(f"{url}/versions", trust_env=False).json()
    for process in (other, again):
        process.terminate()
        assert process.wait() == 0 and process.stdout is not None
        process.stdout.close()
    assert victim.stdout is not None
    victim.stdout.close()
    assert found["versions"] == {"run": [5]} and found["source"] == store.url
    copies = [tmp_path / h / "run" / "weights" / "v000005" / "padding.bin" for h in "ab"]
    assert (
        copies[0].read_bytes() == copies[1].read_bytes() and len(copies[0].read_bytes()) == 50_000
    )
    assert store.served["bucket/run/weights/v000005/padding.bin"] <= 2 * 50_000 + 2 * 4096


def test_the_agent_imports_no_arrays(store: ObjectStore, tmp_path: Path) -> None:
    publish(f"{store.url}/run", 1, "w1")
    block = "import sys\nfor name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'torch', "
    block += "'transformers', 'sqlalchemy', 'ml_collections'):\n    sys.modules[name] = None\n"
    command = [sys.executable, "-c", block + LAUNCH, f"--source={store.url}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "launch")))
    process = subprocess.Popen(
        [*command, f"--directory={tmp_path}", "--port=0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "SGLANG_ADMIN_API_KEY": "secret"},
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    assert ask(url, 1).status_code == ask(url, 1, "wrong").status_code == 401
    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    wait_for(lambda: ask(url, 1, "secret").json()["state"] == "ready")
    process.terminate()
    assert process.wait() == 0
    process.stdout.close()


def test_what_is_asked_wrongly_is_answered(store: ObjectStore, agents) -> None:
    url = f"http://127.0.0.1:{agents('127.0.0.1', store.url)}"
    evil = b'{"name": "../x", "version": 1}'
    deep, yes = b"[" * 3000, b'{"name": "run", "version": true}'
    for body in (b"no json", b"[]", b'{"name": 3, "version": 1}', evil, deep, yes):
        answer = httpx.post(f"{url}/pull", content=body, trust_env=False)
        assert (answer.status_code, "error" in answer.json()) == (400, True)
    too_long = httpx.post(f"{url}/pull", content=b"x" * 5000, trust_env=False)
    assert too_long.status_code == 400
    assert httpx.get(f"{url}/etc/passwd", trust_env=False).status_code == 404
    page = {"Origin": "http://evil.example"}
    for path, method in (("/pull", "POST"), ("/versions", "GET")):
        answer = httpx.request(method, f"{url}{path}", headers=page, content=b"", trust_env=False)
        assert answer.status_code == 403


def test_mistakes_are_one_line(tmp_path: Path, capsys) -> None:
    sys.path.insert(0, str(ROOT / "launch"))
    import pool_agent

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = [f"--source={tmp_path}", f"--directory={tmp_path}"]
        assert pool_agent.main([*flags, f"--port={taken.getsockname()[1]}"]) == 2
    assert pool_agent.main(["--source=nowhere://b", f"--directory={tmp_path}"]) == 2
    assert pool_agent.main([*flags, "--port=0", f"--certificate={tmp_path}/none.pem"]) == 2
    assert pool_agent.main([*flags, "--port=0", "--host=0.0.0.0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "set SGLANG_ADMIN_API_KEY" in lines[-1]
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)


def test_tls_and_addresses(store: ObjectStore, agents, tmp_path: Path) -> None:
    pem = tmp_path / "both.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    name = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    command = [*make.split(), *name.split(), "-keyout", f"{pem}.key", "-out", str(pem)]
    subprocess.run(command, check=True, capture_output=True)
    with pem.open("a") as both:
        both.write(Path(f"{pem}.key").read_text())
    port = agents("127.0.0.1", store.url, certificate=str(pem))
    with socket.create_connection(("127.0.0.1", port)):  # says nothing and holds nobody up
        answer = httpx.get(f"https://127.0.0.1:{port}/health", verify=_trust(pem), trust_env=False)
    assert json.loads(answer.content) == {"status": "ok"}
    assert agent_url("https://worker-1:30000", 9) == "https://worker-1:9"
    assert agent_url("http://[::1]:30000", 9) == "http://[::1]:9"


def _trust(pem: Path):
    import ssl

    return ssl.create_default_context(cafile=str(pem))
