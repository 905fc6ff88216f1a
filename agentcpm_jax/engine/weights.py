"""The engine's own copy of the weights and its cache: in the layout and on the devices it uses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.decode import KVCache, init_cache, unstack
from agentcpm_jax.model.lora import merge
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.sharding import make_mesh, param_shardings
from agentcpm_jax.types import UserError


def make_mesh_of(tensor: int) -> Mesh | None:
    """A mesh of the first `tensor` devices of this process; None for one device.

    Raises `UserError` when there are fewer.
    """
    devices = jax.local_devices()
    if tensor < 1 or tensor > len(devices):
        raise UserError(
            f"engine.tensor is {tensor}; this process has {len(devices)} devices: choose 1 to "
            f"{len(devices)}"
        )
    if tensor == 1:
        return None
    return make_mesh(MeshConfig(fsdp=1, tensor=tensor), devices[:tensor])


def own_copy(params: dict, cfg: ModelConfig, mesh: Mesh | None) -> dict:
    """A finished copy that shares no buffer with `params`, with the adapters merged."""
    if "adapters" in params:
        params = merge(
            {k: v for k, v in params.items() if k != "adapters"}, params["adapters"], cfg
        )
    if mesh is not None:
        params = jax.device_put(params, param_shardings(param_specs(cfg), mesh))
    rest = jax.tree.map(jnp.copy, {k: v for k, v in params.items() if k != "layers"})
    layers = params["layers"]
    layers = _apart(layers) if _layers_apart() else jax.tree.map(jnp.copy, layers)
    return jax.block_until_ready({**rest, "layers": layers})


@jax.jit
def _apart(layers: dict) -> tuple:
    return unstack({"layers": layers})["layers"]


def _layers_apart() -> bool:
    """Whether to unstack the layers.

    On CPUs a scan copies each layer's weights out of the stack in every step; accelerators read
    them in place, and a scan compiles faster.
    """
    return jax.default_backend() == "cpu"


def make_cache(cfg: ModelConfig, rows: int, capacity: int, mesh: Mesh | None) -> KVCache:
    """An empty cache, split over key/value heads where the mesh divides them."""
    cache = init_cache(cfg, rows, capacity)
    if _layers_apart():
        cache = dataclasses.replace(cache, k=tuple(cache.k), v=tuple(cache.v))
    if mesh is None:
        return cache
    axis = "tensor" if cfg.num_kv_heads % mesh.shape["tensor"] == 0 else None

    def put(x: jax.Array) -> jax.Array:
        parts = (None,) * (x.ndim - 3) + (axis,) if x.ndim > 3 else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*parts)))

    return jax.tree.map(put, cache)
