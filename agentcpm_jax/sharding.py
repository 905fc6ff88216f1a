"""Where arrays live: a mesh of four axes and one table from logical axes to mesh axes.

data replicates parameters; fsdp splits parameters and batch; tensor splits heads, ffw and
vocabulary; context splits time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from agentcpm_jax import tree
from agentcpm_jax.types import UserError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis (ParamSpec.axes, or batch and time of the data) -> mesh axis or axes.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "context",
    "layers": None,
    "vocab": "tensor",
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffw": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1: all that remain."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with Auto axes over `devices` (default: all of this job).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {wanted} is impossible; sizes are at least 1, and one may be -1")
    if free and fixed <= len(devices):
        sizes[free[0]] = len(devices) // fixed
    product = math.prod(abs(size) for size in sizes.values())
    if product != len(devices):
        raise UserError(
            f"mesh {wanted} needs {'a divisor' if free else 'a product'} equal to the device "
            f"count: the axes multiply to {product}, there are {len(devices)} devices; "
            "change the mesh"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def param_shardings(specs: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """A NamedSharding for every parameter that `specs` (from `model.params.param_specs`) describe.

    Of a description only `shape` and `axes` are read. Key/value heads that the tensor axis does
    not divide are replicated.

    Raises:
      UserError: a mesh axis does not divide the parameter axis it splits.
    """

    def sharding(path: str, spec: Any) -> NamedSharding:
        return NamedSharding(mesh, _partition(path, spec, mesh))

    return tree.map_with_path(sharding, specs)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """For arrays [B, T, ...]: rows over data and fsdp, time over context."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["time"]))


def _partition(path: str, spec: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    parts = []
    for logical, size in zip(spec.axes, spec.shape, strict=True):
        axis = RULES[logical]
        devices = math.prod(mesh.shape[a] for a in _names(axis))
        if size % devices and logical == "kv_heads":
            axis = None
        elif size % devices:
            raise UserError(
                f"mesh axis {axis} of {devices} devices does not divide {logical} {size} of "
                f"parameter {path}; choose a divisor of {size}"
            )
        parts.append(axis)
    return PartitionSpec(*parts)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis
