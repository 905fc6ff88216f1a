"""A program for subprocesses: how much anonymous memory `load_hf` and `save_hf` take at most.

python memory_program.py DIR LAYERS     loads DIR/a, LAYERS at a time (0: all); saves it as DIR/b
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from agentcpm_jax import tree
from agentcpm_jax.hf import load
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.model.config import QWEN3_4B, ModelConfig
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.sharding import make_mesh, param_shardings

# The shape of 4B, an eighth as wide: like there, all layers of one matrix are larger than the
# embedding, the largest tensor of the files.
MODEL = dataclasses.replace(
    QWEN3_4B, vocab_size=65_536, width=320, num_layers=36, num_heads=8, head_dim=64, ffw=1216
)
MODEL = dataclasses.replace(MODEL, num_kv_heads=4)


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


def peak(work: Callable[[], Any]) -> tuple[int, Any]:
    """(the most anonymous memory while `work` ran, its result)."""
    done, highest = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return max(highest[0], anonymous()), result


def make(model: ModelConfig) -> Any:
    rng = np.random.default_rng(0)
    return tree.map_with_path(
        lambda _, s: rng.integers(0, 1 << 14, s.shape, np.uint16).view(ml_dtypes.bfloat16),
        param_specs(model),
    )


def main() -> None:
    directory, some = Path(sys.argv[1]), int(sys.argv[2])
    if some:  # as on other devices than the CPU
        load._layers_at_once = lambda spec, cfg: some
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    shardings = param_shardings(param_specs(MODEL), mesh)
    small = dataclasses.replace(MODEL, vocab_size=64, num_layers=8)
    save_hf(directory / "small", make(small), small)
    load_hf(directory / "small", shardings=shardings)  # what loading imports
    before = anonymous()
    top, (params, _) = peak(lambda: load_hf(directory / "a", shardings=shardings))
    found = {"load": top - before}
    before = anonymous()
    found["save"] = peak(lambda: save_hf(directory / "b", params, MODEL))[0] - before
    print(json.dumps(found))


if __name__ == "__main__":
    main()
