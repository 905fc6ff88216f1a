"""The number of devices along each axis of the mesh: only the arithmetic, without jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentcpm_jax.types import UserError

AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1: all that remain.

    `slices` TPU slices (or hosts that only a data-centre network joins) share the data axis, which
    it must divide.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if any(size < 1 and size != -1 for size in sizes.values()) or self.slices < 1:
            said = " x ".join(f"{name} {size}" for name, size in vars(self).items())
            raise UserError(f"mesh {said} is impossible; sizes are at least 1, or -1: what remains")
        if list(sizes.values()).count(-1) > 1:
            free = " and ".join(axis for axis, size in sizes.items() if size == -1)
            raise UserError(f"mesh {free} are -1, all that remain; only one may be")


def mesh_shape(cfg: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes along `AXES` for `devices` devices; raises `UserError` when they do not fit."""
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and fixed <= devices:
        sizes[free[0]] = devices // fixed
    product = math.prod(abs(size) for size in sizes.values())
    if product != devices:
        raise UserError(
            f"mesh {_wanted(cfg)} needs {'a divisor' if free else 'a product'} equal to the device "
            f"count: the axes multiply to {product}, there are {devices} devices; "
            f"the nearest that fits: {_nearest_mesh(sizes, free, devices)}"
        )
    return tuple(sizes.values())


def check_divides(cfg: MeshConfig, axes: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Raise `UserError` for one of the named sizes that the mesh axes together do not divide.

    An axis of -1 devices counts as one: how many remain is known only where the devices are.
    """
    devices = {axis: max(getattr(cfg, axis), 1) for axis in axes}
    count = math.prod(devices.values())
    for name, size in sizes.items():
        if size % count:
            said = " x ".join(f"mesh.{axis} {n}" for axis, n in devices.items())
            raise UserError(
                f"{said} does not divide {name} {size}; the nearest that fits is "
                f"{nearest_divisor(size, count)}"
            )


def _wanted(cfg: MeshConfig) -> str:
    return " x ".join(f"{axis} {getattr(cfg, axis)}" for axis in AXES)


def _nearest_mesh(sizes: Mapping[str, int], free: Sequence[str], devices: int) -> str:
    """A mesh over `devices` with sizes close to `sizes`, fitted from the last axis to the first."""
    fitted, left = dict(sizes), devices
    for axis in reversed(AXES):
        if axis in free or (not free and axis == AXES[1]):
            continue
        fitted[axis] = nearest_divisor(left, sizes[axis])
        left //= fitted[axis]
    fitted[free[0] if free else AXES[1]] = left
    return ", ".join(f"{axis}={size}" for axis, size in fitted.items())


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`; the smaller of two."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
