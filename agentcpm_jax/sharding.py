"""Where arrays live: a mesh of four axes and one table from logical axes to mesh axes.

data replicates parameters; fsdp splits parameters and batch; context splits parameters and time;
tensor splits heads, ffw and vocabulary. A job of several slices splits its data axis over them, so
that only gradients cross the slow network between slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from agentcpm_jax import tree
from agentcpm_jax.mesh import AXES, MeshConfig, mesh_shape, nearest_divisor
from agentcpm_jax.types import UserError

#: The axes that split tokens: rows and time.
TOKEN_AXES = ("data", "fsdp", "context")
#: The token axes that also split parameters.
WIDTH_AXES = ("fsdp", "context")

# Logical axis (ParamSpec.axes, or an axis of an activation) -> mesh axis or axes.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "context",
    "layers": None,
    "vocab": "tensor",
    "width": WIDTH_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffw": "tensor",
    "rank": None,
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with Auto axes over `devices` (default: all of this job).

    Raises:
      UserError: the axes do not multiply to the number of devices, or `slices` divides neither the
        data axis nor the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(cfg, len(devices))
    if cfg.slices > 1:
        grid = _over_slices(cfg, shape, devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if devices and devices[0].platform == "tpu":
        # A 2-D slice has fewer physical axes than the mesh has axes; splitting them is allowed.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def splits_tokens(mesh: Mesh | None) -> bool:
    """Whether an axis that splits tokens has several devices: XLA compiles no `shard_map` that is
    manual over axes of size 1 alone, and there is nothing to write out then."""
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in TOKEN_AXES)


def param_shardings(specs: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """A NamedSharding for every parameter that `specs` (from `model.params.param_specs`) describe.

    Only `shape` and `axes` of a spec are read. Key/value heads that the tensor axis does not
    divide are replicated.

    Raises:
      UserError: a mesh axis does not divide the parameter axis it splits.
    """

    def sharding(path: str, spec: Any) -> NamedSharding:
        return NamedSharding(mesh, _partition(path, spec, mesh))

    return tree.map_with_path(sharding, specs)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """For arrays [B, T, ...]: rows over data and fsdp, time over context."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["time"]))


def constrain(x: jax.Array, mesh: Mesh | None, *logical: str | None) -> jax.Array:
    """`x` sharded by the rules of its logical axes (None: not split); unchanged without a mesh.

    An axis that its mesh axes do not divide is not split.
    """
    if mesh is None or mesh.size == 1:
        return x
    parts = [
        None if name is None or size % axis_size(mesh, RULES[name]) else RULES[name]
        for name, size in zip(logical, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))


def axis_size(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along one mesh axis or the product of several; 1 for None."""
    return math.prod(mesh.shape[axis] for axis in _names(axes))


def _over_slices(cfg: MeshConfig, shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
    data, *rest = shape
    if cfg.slices < 1 or data % cfg.slices:
        raise UserError(
            f"mesh slices={cfg.slices} does not divide data={data}; the data axis runs over the "
            f"slices: use slices={nearest_divisor(data, max(cfg.slices, 1))} or a multiple for data"
        )
    by_slice = len({getattr(d, "slice_index", None) for d in devices}) == cfg.slices
    by_process = len({d.process_index for d in devices}) == cfg.slices
    if not by_slice and not by_process:
        raise UserError(
            f"mesh slices={cfg.slices}, but the {len(devices)} devices are not in {cfg.slices} "
            "slices; set slices to the number that the job was given"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // cfg.slices, *rest),
        (cfg.slices, 1, 1, 1),
        devices,
        process_is_granule=not by_slice,
        allow_split_physical_axes=devices[0].platform == "tpu",
    )


def _partition(path: str, spec: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    parts = []
    for logical, size in zip(spec.axes, spec.shape, strict=True):
        axis = RULES[logical]
        devices = axis_size(mesh, axis)
        if size % devices and logical == "kv_heads":
            axis = None
        elif size % devices:
            names = " x ".join(f"{name} {mesh.shape[name]}" for name in _names(axis))
            raise UserError(
                f"mesh axis {names} of {devices} devices does not divide {logical} {size} of "
                f"parameter {path}; the nearest that fits is {nearest_divisor(size, devices)}"
            )
        parts.append(axis)
    return PartitionSpec(*parts)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis
