"""A program for subprocesses: SFT and RL gradients on meshes against one device.

python mesh_run.py '{"sft": [[8, 1, 1, 1]], "rl": []}'                      virtual devices
python mesh_run.py '{...}' 0 2 12345     process 0 of 2, coordinator on port 12345
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from agentcpm_jax import tree
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.pack import pack
from agentcpm_jax.data.rows import text_row
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.model.config import TINY, ModelConfig
from agentcpm_jax.model.params import abstract_params
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.train.losses.config import Correction, LossConfig
from agentcpm_jax.train.placement import place, step_shardings
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step, make_sft_step

MODEL = dataclasses.replace(
    TINY, vocab_size=24, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffw=24
)
MODEL = dataclasses.replace(MODEL, remat="full", logits_chunk=7)
LOSS = LossConfig(
    "reinforce_pp",
    objective="gspo",
    eps_low=3e-4,
    eps_high=4e-4,
    aggregation="seq-mean-token-mean",
    corrections=(Correction("geometric", 0.2, 5.0),),
)
# Keeps the gradient as its state and changes nothing.
RECORD = optax.chain(optax.trace(decay=0.0), optax.set_to_zero())


def batch() -> Batch:
    """8 rows of 16 tokens, most of them packed."""
    rng = np.random.default_rng(0)
    rows = []
    for n in (5, 11, 16, 7, 8, 4, 12, 3, 13, 9, 6, 16, 10, 2, 4):
        row = text_row(rng.integers(0, MODEL.vocab_size, n))
        rows.append(
            dataclasses.replace(
                row,
                weights=rng.random(n, np.float32),
                advantages=rng.standard_normal(n).astype(np.float32),
                logprobs=-3 * rng.random(n, np.float32),
                versions=np.zeros(n, np.int32),
            )
        )
    return pack(rows, row_length=16, num_rows=8).batch


def initial(model: ModelConfig) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def draw(path: str, p: Any) -> np.ndarray:
        values = np.ones(p.shape) if "norm" in path else 0.2 * rng.standard_normal(p.shape)
        return values.astype(np.float32)

    return tree.map_with_path(draw, abstract_params(model))


def gradient(kind: str, sizes: list[int] | None) -> tuple[float, np.ndarray]:
    """Loss and flat gradient; two steps on a mesh must compile once."""
    data, shardings = batch(), None
    if sizes is not None:
        mesh = make_mesh(MeshConfig(*sizes))
        shardings = step_shardings(mesh, MODEL, RECORD, 8)
        assert shardings is not None
        data = jax.device_put(data, shardings.batch)
    state = place(TrainState.create(initial(MODEL), RECORD), shardings)
    if sizes is not None:
        q = state.params["layers"]["attn"]["q"]
        share = q.size // q.addressable_shards[0].data.size
        assert share == sizes[1] * sizes[2] * sizes[3], "parameters are not split"
    if kind == "sft":
        step = make_sft_step(MODEL, RECORD, shardings=shardings)
        rest = (Frozen(),)
    else:
        step = make_rl_step(MODEL, LOSS, RECORD, shardings=shardings)
        rest = (np.int32(1), Frozen())
    state, metrics = step(state, data, *rest)
    if shardings is not None:
        state, metrics = step(state, data, *rest)
        assert step._cache_size() == 1, f"{step._cache_size()} compilations of one shape"
    grads = state.opt_state[0].trace
    if shardings is not None:
        grads = multihost_utils.process_allgather(grads, tiled=True)
    return float(metrics["train/loss"]), np.concatenate(
        [np.ravel(g) for g in jax.tree.leaves(grads)]
    )


def join() -> None:
    """Several processes become one job; before anything touches a device."""
    jax.config.update("jax_disable_most_optimizations", True)
    if len(sys.argv) > 2:
        process, processes, port = map(int, sys.argv[2:])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)


def main() -> None:
    for kind, meshes in json.loads(sys.argv[1]).items():
        with jax.default_device(jax.local_devices()[0]):
            loss, grad = gradient(kind, None)
        assert np.linalg.norm(grad) > 1e-2
        for sizes in meshes:
            other, theirs = gradient(kind, sizes)
            assert abs(other - loss) <= 1e-6 * abs(loss), (kind, sizes, other, loss)
            error = np.linalg.norm(theirs - grad) / np.linalg.norm(grad)
            assert error <= 1e-5, (kind, sizes, error)
    print("equal")


if __name__ == "__main__":
    join()
    main()
