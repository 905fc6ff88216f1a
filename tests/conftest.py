"""One CPU thread per process, fixed seeds, device-world annotations checked at run time."""

from __future__ import annotations

import ast
import json
import os
import random
import sys
from pathlib import Path

# Before jax, numpy or torch are imported: two xdist workers share two cores, and a fixed number of
# threads fixes the order of sums. Most of the time goes to compiling what runs once, so that little
# of it is optimised: a third of the time less, and 0.65 times as long in `make test`.
os.environ.update(
    JAX_PLATFORMS="cpu",
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    + " --xla_backend_optimization_level=0"
).strip()

import numpy as np
import pytest
from jaxtyping import install_import_hook

from tests.log.postgres_server import log_url, postgres  # noqa: F401  (fixtures)

TESTS = Path(__file__).parent
CHECKED = ["model", "merge", "train", "sharding", "tree", "plan.aot", "plan.flops", "plan.memory"]

_hook = install_import_hook([f"agentcpm_jax.{name}" for name in CHECKED], "beartype.beartype")

from agentcpm_jax.model.config import PUBLISHED, to_hf_config  # noqa: E402
from tests.doubles.toy_pool import servers  # noqa: E402, F401  (a fixture; imports what is checked)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds the config.json of the checkpoints that recipes name."""
    monkeypatch.chdir(tmp_path)
    for name, model in PUBLISHED.items():
        directory = Path("checkpoints", name)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(to_hf_config(model)))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    # For libraries that draw from the global generators; the package itself takes explicit keys and
    # seeds.
    random.seed(0)
    np.random.seed(0)


def _imports_torch(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) and any(
            a.name.split(".")[0] == "torch" for a in node.names
        ):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            return True
    return False


# PyTorch is the oracle of a few tests and pinned for Python 3.11 alone; on newer Pythons those
# files are named, not run.
_without_torch: list[str] = []
if sys.version_info >= (3, 12):
    try:
        import torch as _torch  # noqa: F401
    except ImportError:
        _without_torch = sorted(
            str(p.relative_to(TESTS)) for p in TESTS.rglob("test_*.py") if _imports_torch(p)
        )
collect_ignore = _without_torch


def pytest_report_header() -> list[str]:
    names = ", ".join(_without_torch)
    return [f"not collected, they need PyTorch: {names}"] if names else []
