"""The model is what its checkpoint says; what contradicts it is refused, naming both values."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.config import from_config_dict, to_json
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.shape import check_weights, common_shape, shape_of
from agentcpm_jax.model.config import PUBLISHED, SHAPE, TINY
from agentcpm_jax.run.commandline import CHECKOUT, parse
from agentcpm_jax.types import UserError

NUMERICS = """
from agentcpm_jax.config import default_config, stage_dict
def get_config(variant=""):
    c = default_config()
    c.stages = ("sft",)
    c.stage.sft = stage_dict("sft", "model")
    return c
"""


def variant(directory: Path, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of the shipped agent whose config.json says something else."""
    shutil.copytree(SHIPPED["shipped:sft"], directory)
    file = directory / "config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop}
    file.write_text(json.dumps(kept | config))
    return directory


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `numerics.py`, which trains `model` and gives no shape."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numerics.py").write_text(NUMERICS)
    return tmp_path


def test_a_config_of_numerics_takes_the_shape_of_the_checkpoint(here: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    variant(here / "model", rope_theta=1e6, rope_parameters=rope, rms_norm_eps=1e-3)
    model = parse(["--config=numerics.py", "--config.model.remat=full"]).config.model
    assert (model.rope_theta, model.norm_eps, model.width) == (1e6, 1e-3, 128)
    assert (model.remat, model.dtype) == ("full", "float32")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("rope_theta=5e6", r"model/config.json says rope_theta 10000.0, .*rope_theta is 5000000.0"),
        ("num_kv_heads=4", r"says num_kv_heads 2, config.model.num_kv_heads is 4"),
        ("num_layers=2", r"says num_layers 3, config.model.num_layers is 2"),
        ("tied_embeddings=False", r"says tied_embeddings True, .* is False"),
        ("norm_eps=1e-3", r"says norm_eps 1e-06, .* is 0.001"),
        ("max_positions=9", r"says max_positions 1024, .* is 9"),
    ],
)
def test_a_contradiction_names_both_values(here: Path, flag: str, said: str) -> None:
    variant(here / "model")
    with pytest.raises(UserError, match=said):
        parse(["--config=numerics.py", f"--config.model.{flag}"])


def test_a_contradiction_is_answered_within_a_second_and_without_jax(here: Path) -> None:
    variant(here / "model")
    program = (
        "import sys, time\nfrom agentcpm_jax.run.commandline import parse\n"
        "from agentcpm_jax.types import UserError\n"
        "try: parse(sys.argv[1:])\nexcept UserError: print('jax' in sys.modules)\n"
        "print(time.process_time())"
    )
    argv = ["--config=numerics.py", "--config.model.width=64"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        env={"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    loaded, seconds = done.stdout.split()
    assert loaded == "False" and float(seconds) < 2, "on a machine that is half as fast"


def test_every_model_of_a_run_has_one_shape(here: Path) -> None:
    variant(here / "one"), variant(here / "deep", num_hidden_layers=4)
    assert common_shape({}, ["one", "one"]) == {k: getattr(shape_of(Path("one")), k) for k in SHAPE}
    with pytest.raises(UserError, match=r"deep/config.json says num_layers 4, one.* says 3"):
        common_shape({}, ["one", "deep"])
    longer = variant(here / "longer", max_position_embeddings=4096)
    assert common_shape({}, ["one", str(longer)])["max_positions"] == 1024


def test_random_parameters_need_a_shape_from_the_configuration(here: Path) -> None:
    flags = ["--config=numerics.py", "--config.stage.sft.init_from=random"]
    with pytest.raises(UserError, match=r"gives no vocab_size, width, .*begin at random"):
        parse(flags)
    given = [f"--config.model.{name}={getattr(TINY, name)}" for name in SHAPE]
    assert parse([*flags, *given]).config.model == TINY


def test_a_run_keeps_the_shape_that_it_began_with(here: Path) -> None:
    variant(here / "model")
    flags = ["--config=numerics.py", "--workdir=run"]
    cfg = parse(flags).config
    (here / "run" / "sft").mkdir(parents=True)
    (here / "run" / "config.json").write_text(json.dumps(to_json(cfg)))
    shutil.rmtree(here / "model")
    variant(here / "model", rms_norm_eps=1e-3)
    with pytest.raises(UserError, match=r"norm_eps 0.001, the run's own config.json says 1e-06"):
        parse(flags)
    (here / "run" / "sft" / "DONE").write_text("{}")  # then it is not read again
    shutil.rmtree(here / "model")
    assert parse(flags).config == cfg
    with pytest.raises(UserError, match=r"run's own config.json says width 128, .* is 64"):
        parse([*flags, "--config.model.width=64"])


def test_a_plan_needs_no_download_where_the_shape_is_published(here: Path) -> None:
    flags = ["--config=numerics.py", "--config.stage.sft.init_from=Qwen/Qwen3-4B"]
    assert parse([*flags, "--explain"]).config.model.rope_theta == PUBLISHED["Qwen3-4B"].rope_theta
    with pytest.raises(UserError, match="not a directory"):
        parse(flags)
    with pytest.raises(UserError, match=r"known without one are Qwen3-0.6B"):
        parse(["--config=numerics.py", "--explain"])


def test_a_missing_head_dim_is_that_of_the_weights(tmp_path: Path) -> None:
    model = variant(tmp_path / "model", drop=("head_dim",))
    assert shape_of(model).head_dim == 32, "transformers' default is 128"
    whole, _ = load_hf(SHIPPED["shipped:sft"])
    np.testing.assert_array_equal(load_hf(model)[0]["embed"], whole["embed"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"model.extra.weight": t["model.norm.weight"]}, "has tensor model.extra"),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "lacks tensor model"),
        (lambda t: t | {"model.norm.weight": np.ones(64, "f4")}, r"shape \(64,\), expected \(128"),
        (lambda t: t | {"model.norm.weight": np.ones(128, "i4")}, "stored as I32"),
    ],
)
def test_weights_of_another_model_are_refused_by_their_headers(
    tmp_path: Path, change: Any, said: str
) -> None:
    model = variant(tmp_path / "model")
    weights = change(load_file(model / "model.safetensors"))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said):
        check_weights(model, shape_of(model))


def test_code_may_give_no_model_either() -> None:
    stage = {"kind": "sft", "init_from": "shipped:sft"}
    cfg = from_config_dict({"stages": ["sft"], "stage": {"sft": stage}})
    assert cfg.model == shape_of(SHIPPED["shipped:sft"])
