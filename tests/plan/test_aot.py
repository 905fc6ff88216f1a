"""Steps for devices that are not here: what fails is one line; the compiling is `make test-aot`."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from agentcpm_jax.plan.aot import compile_ahead, topology_devices
from agentcpm_jax.plan.flops import GIB
from agentcpm_jax.plan.memory import MemoryEstimate
from agentcpm_jax.plan.slices import TOPOLOGIES, device_count
from agentcpm_jax.types import UserError

#: What libtpu 0.0.42 says.
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(56.00G) exceeds available HBM (15.75G)."
)


class Refused:
    """A step whose compiler says something else than yes."""

    def __init__(self, words: str):
        self.words = words

    def lower(self, *arguments: Any) -> Refused:
        return self

    def compile(self) -> Any:
        raise jax.errors.JaxRuntimeError(self.words)


def test_a_step_that_does_not_fit_names_the_need_the_estimate_and_three_remedies() -> None:
    guess = MemoryEstimate(*(float(GIB * size) for size in (2, 3, 1, 0, 4, 29)))
    with pytest.raises(UserError) as caught:
        compile_ahead(Refused(TOO_LARGE), estimate=guess)
    said = str(caught.value)
    assert "\n" not in said
    assert "it needs 56.00G of 15.75G per device" in said
    assert "(estimate 35.00 GiB, the biggest: logits and the output matrix 29.00 GiB, " in said
    for remedy in ("mesh.fsdp", "model.remat='full'", "shape.micro_rows"):
        assert remedy in said
    older = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 655.65G exceeds 15.75G"
    with pytest.raises(UserError, match=r"needs 655.65G of 15.75G per device; split"):
        compile_ahead(Refused(older))
    with pytest.raises(UserError, match=r"RESOURCE_EXHAUSTED: allocating 3 bytes; split"):
        compile_ahead(Refused("RESOURCE_EXHAUSTED: allocating 3 bytes"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_ahead(Refused("INTERNAL: a bug of the compiler"))


def test_slices_are_known_by_the_names_they_are_rented_under() -> None:
    known = {name: device_count(name) for name in TOPOLOGIES}
    assert all(int(n.split("-")[1]) == c for n, c in known.items() if not n.startswith("v5p"))
    assert all(int(n.split("-")[1]) == 2 * c for n, c in known.items() if n.startswith("v5p"))
    assert device_count("t4-1") == 1 and device_count("h200-8") == 8
    for name in ("v5p-63", "t4", "h200-0"):
        with pytest.raises(UserError, match=f"unknown slice '{name}'; use one of .*v5p-64, .*t4-1"):
            device_count(name)
    with pytest.raises(UserError, match="'t4-1' cannot be compiled for from here"):
        topology_devices("t4-1")


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch: Any) -> None:
    def absent(**kwargs: Any) -> Any:
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    monkeypatch.setattr("os.environ", {})
    with pytest.raises(UserError, match=r"needs libtpu, .*; pip install 'agentcpm_jax\[tpu\]'"):
        topology_devices("v5p-64")
