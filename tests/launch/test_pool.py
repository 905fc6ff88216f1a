"""The pool's scripts: manifests against the schemas of Kubernetes and Compose, the shell scripts by
ShellCheck and by running them with stand-ins for what only a cluster has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from agentcpm_jax.pool.config import ADMIN_KEY_ENV, PoolConfig

POOL = Path(__file__).parents[2] / "launch" / "pool"
SCRIPTS = ("workers.sh", "pool.sbatch")
#: Stands in for the interpreter: says how it was called and waits, or ends where a test wants it.
STUB = """#!/usr/bin/env bash
python3 - "$@" >>"$CALLS" <<'EOF'
import json, os, sys
config = sys.argv[sys.argv.index('--config') + 1] if '--config' in sys.argv else None
print(json.dumps([sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES'),
                  open(config).read() if config else '']), flush=True)
EOF
[[ "$*" == *"${FAIL:-nothing}"* ]] && exit 3
exec sleep 600
"""


def manifests() -> list[dict]:
    return list(yaml.safe_load_all((POOL / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("kind", ["Service", "StatefulSet"])
def test_kubernetes_takes_the_manifests(kind: str) -> None:
    (manifest,) = [m for m in manifests() if m["kind"] == kind]
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    spoiled = json.loads(json.dumps(manifest).replace('"selector"', '"selektor"'))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoiled, kubernetes_validate.latest_version(), strict=True)


def test_the_parts_of_the_pod_fit_each_other() -> None:
    service, stateful = manifests()
    spec = stateful["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert env["WORKERS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == stateful["spec"]["template"]["metadata"]["labels"]
    assert {v["name"] for v in spec["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    assert env["DIRECTORY"] in [v["mountPath"] for v in container["volumeMounts"]]
    keys = {e["name"] for e in container["env"] if "valueFrom" in e}
    assert keys == {PoolConfig().api_key_env, ADMIN_KEY_ENV}
    assert env.keys() - keys <= variables("workers.sh")


@pytest.mark.parametrize(("old", "new", "valid"), [("", "", True), ("ipc:", "ipcc:", False)])
def test_compose_takes_the_file(tmp_path: Path, old: str, new: str, valid: bool) -> None:
    """The specification's own schema; a key that it does not know is refused."""
    file = tmp_path / "compose.yaml"
    file.write_text((POOL / "compose.yaml").read_text().replace(old, new))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema=vendor.compose-spec"]
    done = subprocess.run([*command, file], capture_output=True, text=True)
    assert (done.returncode == 0) is valid, done.stdout
    assert valid or "ipcc" in done.stdout


def test_compose_names_what_the_script_reads() -> None:
    compose = yaml.safe_load((POOL / "compose.yaml").read_text())
    assert compose.keys() == {"name", "services", "volumes"}
    (service,) = compose["services"].values()
    assert service["environment"].keys() <= variables("workers.sh")
    assert (POOL / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    named = {v.split(":")[0] for v in service["volumes"] if not v.startswith(("$", "/"))}
    assert named == compose["volumes"].keys()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    dockerfile = (POOL / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (\S+)", dockerfile, re.M):
        assert (POOL.parent.parent / source).exists()


def variables(script: str) -> set[str]:
    return set(re.findall(r"\$\{?([A-Z][A-Z_]+)", (POOL / script).read_text()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", POOL / script], check=True)
    # SC2329 takes the function that a trap calls for an unused one.
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--exclude=SC2329", POOL / script], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_sbatch_options_are_slurms() -> None:
    options = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", (POOL / "pool.sbatch").read_text(), re.M)
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    assert dict(options).keys() == known | {"signal", "output"}
    assert (POOL / "pool.sbatch").read_text().count("#SBATCH") == len(options)


@pytest.fixture
def stage(tmp_path: Path):
    """(environment, calls): commands of a cluster that write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def stub(name: str, text: str) -> Path:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
        return folder / name

    python = stub("python-with-sglang", STUB)
    stub("nvidia-smi", "#!/bin/sh\nprintf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'")
    stub("scontrol", "#!/bin/sh\nprintf 'node1\\nnode2\\n'")
    stub("srun", '#!/bin/sh\necho "$@" >>"$CALLS"')
    calls = tmp_path / "calls"
    calls.touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG")}
    environment = clean | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "CALLS": str(calls),
        "MODEL": "some/model",
    }
    return environment, calls


def read(calls: Path) -> list:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_one_server_per_gpu_and_one_agent_per_host(stage) -> None:
    environment, calls = stage
    environment |= {"SOURCE": "gs://bucket/weights", "GPUS_EACH": "2", "WORKERS": "2"}
    environment |= {"SGLANG_FLAGS": "--log-level warning"}
    environment |= {"SGLANG_API_KEY": "a-secret", "SGLANG_ADMIN_API_KEY": "b-secret"}
    script = subprocess.Popen(["bash", POOL / "workers.sh"], env=environment)
    while len(read(calls)) < 3:
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    assert script.wait() == 143
    found = sorted(read(calls), key=lambda call: call[0][-1])
    servers = [call for call in found if "sglang.launch_server" in call[0]]
    (agent,) = [call[0] for call in found if call not in servers]
    assert agent[0].endswith("launch/pool_agent.py") and Path(agent[0]).is_file()
    assert "--source=gs://bucket/weights" in agent and "--port=30900" in agent
    assert sorted(gpus for _, gpus, _ in servers) == ["0,1", "2,3"]
    ports = sorted(call[0][call[0].index("--port") + 1] for call in servers)
    assert ports == ["30000", "30001"]
    for arguments, _, keys in servers:
        assert yaml.safe_load(keys) == {"api-key": "a-secret", "admin-api-key": "b-secret"}
        assert "secret" not in " ".join(arguments)
        assert arguments[-2:] == ["--log-level", "warning"]


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "node7", ""])
def test_workers_that_others_reach_need_a_key(stage, host: str) -> None:
    environment, calls = stage
    environment |= {"HOST": host, "SGLANG_API_KEY": "", "SGLANG_ADMIN_API_KEY": ""}
    done = subprocess.run(["bash", POOL / "workers.sh"], env=environment, capture_output=True)
    assert done.returncode == 2 and read(calls) == []
    assert b"is open to other machines: export SGLANG_ADMIN_API_KEY" in done.stderr


def test_a_server_that_dies_ends_its_host(stage) -> None:
    environment, calls = stage
    environment |= {"FAIL": "--port 30002", "HOST": "127.0.0.1"}
    done = subprocess.run(["bash", POOL / "workers.sh"], env=environment, capture_output=True)
    assert done.returncode == 1 and b"ended; ending the others" in done.stderr
    assert len(read(calls)) <= 4  # as many as nvidia-smi counts


def test_slurm_writes_the_urls_and_starts_every_host(stage, tmp_path: Path) -> None:
    environment, calls = stage
    environment |= {"SLURM_SUBMIT_DIR": str(POOL.parent.parent), "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4", "GPUS_EACH": "2"}
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    environment["CHECKOUT"] = str(POOL.parent.parent)
    subprocess.run(["bash", POOL / "pool.sbatch"], env=environment, check=True, timeout=60)
    urls = (tmp_path / "pool-urls-7.txt").read_text().split()
    assert urls == [f"http://node{n}:{p}" for n in (1, 2) for p in (30000, 30001)]
    assert str(POOL / "workers.sh") in calls.read_text()
