from __future__ import annotations

import dataclasses

import jax
import pytest

from agentcpm_jax import tree
from agentcpm_jax.mesh import AXES, MeshConfig
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.sharding import RULES, make_mesh, param_shardings
from agentcpm_jax.types import UserError


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        (
            MeshConfig(1, 3, 1, 2),
            "fsdp 3 .*tensor 2 .*multiply to 6, there are 8 devices; the nearest that fits: "
            "data=1, fsdp=4, context=1, tensor=2",
        ),
        (MeshConfig(1, -1, 1, 3), "tensor 3 .*multiply to 6, .* fsdp=4, context=1, tensor=2"),
        (MeshConfig(1, -1, 1, 16), "multiply to 16, .* fsdp=1, context=1, tensor=8"),
        (MeshConfig(3, -1, 1, 1), "data 3 .* data=2, fsdp=4, context=1, tensor=1"),
    ],
)
def test_impossible_meshes_are_refused_by_name(cfg, named):
    with pytest.raises(UserError, match=named):
        make_mesh(cfg, jax.devices()[:1] * 8)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"data": -1}, "mesh data and fsdp are -1, all that remain; only one may"),
        ({"data": 0}, "data 0 x fsdp -1 .* impossible"),
        ({"tensor": -2}, "tensor -2"),
        ({"slices": 0}, "slices 0"),
    ],
)
def test_sizes_are_checked_when_a_mesh_is_named(sizes, named):
    with pytest.raises(UserError, match=named):
        MeshConfig(**sizes)


def test_slices_share_the_data_axis() -> None:
    """Four devices of two hosts: rows of the mesh's first axis stay within a host."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        platform: str = "cpu"
        device_kind: str = "cpu"

    devices = [Device(i, i % 2) for i in range(4)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, slices=2), devices)
    hosts = [{d.process_index for d in row.ravel()} for row in mesh.devices]
    assert hosts == [{0}, {1}]
    with pytest.raises(UserError, match=r"slices=2 does not divide data=1; .* slices=1"):
        make_mesh(MeshConfig(data=1, fsdp=4, slices=2), devices)
    with pytest.raises(UserError, match=r"slices=4, but the 4 devices are not in 4 slices"):
        make_mesh(MeshConfig(data=4, fsdp=1, slices=4), devices)


def test_axes_that_do_not_divide_are_refused_except_key_value_heads():
    wide = jax.sharding.AbstractMesh((1, 1, 1, 4), AXES)
    shardings = tree.flatten(param_shardings(param_specs(TINY), wide))
    assert shardings["layers/attn/q"].spec[2] == "tensor"
    assert shardings["layers/attn/k"].spec[2] is None  # 2 heads over 4 devices: replicated
    with pytest.raises(
        UserError, match=r"fsdp 3 x context 1 of 3 devices does not divide width 128 .* fits is 2"
    ):
        param_shardings(param_specs(TINY), jax.sharding.AbstractMesh((1, 3, 1, 1), AXES))


def test_every_logical_axis_has_a_rule():
    used = {axis for spec in tree.flatten(param_specs(TINY)).values() for axis in spec.axes}
    assert used | {"batch", "time", "rank"} == set(RULES)
