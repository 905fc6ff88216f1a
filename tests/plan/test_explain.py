"""What a run will take, from shapes alone: a 4B recipe on a pod, each figure with its source."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.plan.explain import naming_what_is_too_large
from agentcpm_jax.run.commandline import explained, parse
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.types import UserError

RL = "rl_qwen3_4b.py"


def explanation(config: str, *flags: str) -> str:
    said: list[str] = []
    asked = [] if any(flag.startswith("--explain") for flag in flags) else ["--explain"]
    command = parse([f"--config=configs/{config}", *asked, *flags])
    assert explained(command, said.append)
    return said[0]


def figure(text: str, name: str) -> float:
    found = re.search(rf"^  {name}: ([\d,.]+)", text, re.M)
    assert found, name
    return float(found[1].replace(",", ""))


def test_every_figure_has_a_source_and_the_known_ones_are_right() -> None:
    text = explanation(RL)
    assert "rl_qwen3_4b on v5p-64: 32 chips of 95.74 GiB, mesh fsdp 4, context 8" in text
    assert "parameters: 4,022,468,096 [exact]" in text
    assert "tokens a step: 524,288 (4 x 131,072) [exact]" in text
    assert "a checkpoint: 44.95 GiB [exact]" in text  # 12 bytes a parameter
    assert "a published version: 7.49 GiB [exact] in bfloat16" in text
    lines = [line for line in text.splitlines() if re.search(r"^  [^:]+: \S*\d", line)]
    assert len(lines) >= 12
    assert all(re.search(r"\[(exact|estimate|AOT|measured)\]", line) for line in lines)
    seconds = figure(text, "step time")
    assert figure(text, "rollouts to keep up") == pytest.approx(524_288 / seconds, rel=1e-2)
    assert figure(text, "chip hours for 1,000 steps") == pytest.approx(
        1000 * seconds * 32 / 3600, rel=1e-2
    )
    # At a third of the tokens sampled, as the log's bench measured.
    assert figure(text, "log") == pytest.approx(2.99 * 524_288 * 1000 / 2**30, rel=1e-2)


@pytest.mark.parametrize(
    ("config", "slice_name"),
    [
        ("sft_qwen3_4b.py", "v5p-32"),
        (RL, "v5p-64"),
        ("sft_qwen3_0_6b.py", "v5e-1"),
        ("lora_qwen3_4b.py", "v5e-1"),
        ("quickstart.py", "v5e-1"),
        ("tiny.py", "v5e-1"),
    ],
)
def test_every_recipe_fits_the_slice_it_names(config: str, slice_name: str) -> None:
    text = explanation(config)
    assert f" on {slice_name}: " in text.splitlines()[0]
    assert "does not fit" not in text


def test_a_t4_computes_in_float32_and_says_why_in_a_line_each() -> None:
    text = explanation("sft_qwen3_0_6b.py:t4", "--slice=t4-1")
    assert "14.75 GiB" in text.splitlines()[0] and "does not fit" not in text
    (dtype,) = (line for line in text.splitlines() if "model.dtype" in line)
    assert "float32 instead of bfloat16, which a GPU of compute capability 7.5" in dtype
    (attention,) = (line for line in text.splitlines() if "model.attention" in line)
    assert "blockwise, since cuDNN's kernel computes in bfloat16" in attention
    assert "model.dtype" not in explanation("sft_qwen3_0_6b.py", "--slice=h200-1")


def test_adapters_are_what_is_trained_and_saved() -> None:
    text = explanation("lora_qwen3_4b.py")
    trained = figure(text, r"trained \(adapters\)")
    assert trained == 33_030_144
    assert figure(text, "a checkpoint") == pytest.approx(12 * trained / 2**30, abs=0.01)
    assert figure(text, "a published version") == pytest.approx(7.49)


def test_cost_comes_from_the_price_file(tmp_path: Path) -> None:
    assert "give --prices=FILE" in explanation(RL)
    prices = tmp_path / "prices.json"
    prices.write_text('{"v5p": [2, 4]}')
    text = explanation(RL, f"--prices={prices}")
    found = re.search(r"chip hours .*: ([\d,.]+) .*cost ([\d,.]+) to ([\d,.]+)", text)
    assert found
    hours, low, high = (float(x.replace(",", "")) for x in found.groups())
    assert low == pytest.approx(2 * hours, abs=0.1) and high == pytest.approx(4 * hours, abs=0.1)
    prices.write_text("{}")
    with pytest.raises(UserError, match="no pair of prices for v5p"):
        explanation(RL, f"--prices={prices}")


def test_the_arrays_are_listed_with_their_places() -> None:
    text = explanation(RL, "--explain=arrays")
    row = next(line for line in text.splitlines() if "state/params/layers/mlp/gate" in line)
    assert row.split()[1:] == ["36x2560x9728", "float32", "-,fsdp+context,tensor", "106.88"]
    assert any(line.startswith("total ") for line in text.splitlines())


def test_several_slices_share_the_data_axis() -> None:
    flags = ("--config.mesh.slices=2", "--config.mesh.data=2", "--config.stage.rl.shape.rows=8")
    text = explanation(RL, "--slice=v5p-64", *flags, "--config.stage.rl.shape.micro_rows=8")
    assert "on 2 x v5p-64: 64 chips" in text.splitlines()[0]
    assert "mesh data 2, fsdp 4, context 8" in text.splitlines()[0]


@pytest.mark.usefixtures("published")
def test_impossible_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown slice 'v5p-63'; use one of .*v5p-64"):
        explanation(RL, "--slice=v5p-63")
    with pytest.raises(UserError, match=r"32 x context 8 .* nearest that fits"):
        rows = ("--config.stage.rl.shape.rows=32", "--config.stage.rl.shape.micro_rows=32")
        explanation(RL, "--slice=v5p-64", "--config.mesh.fsdp=32", *rows)
    with pytest.raises(UserError, match=r"no slice is known .* it needs .* split more"):
        more = ("--config.stage.rl.shape.rows=64", "--config.stage.rl.shape.micro_rows=64")
        explanation(RL, "--config.mesh.fsdp=-1", "--config.model.remat=none", *more)
    assert not explained(parse([f"--config=configs/{RL}"]), print)


def test_an_exhausted_device_is_explained_and_other_errors_pass() -> None:
    command = parse(["--config=configs/tiny.py"])
    (stage,), mesh = command.config.stages, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    with (
        pytest.raises(UserError, match=r"allocating 9 bytes \(estimate .* GiB, the biggest: "),
        naming_what_is_too_large(command.config, stage, mesh),
    ):
        raise exhausted
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        naming_what_is_too_large(command.config, stage, mesh),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")
