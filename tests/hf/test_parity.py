"""`launch/convert.py --parity`: is a directory the same model here and in transformers?"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import pytest

pytest.importorskip("torch", reason="the reference implementation needs torch")

from agentcpm_jax.hf import parity
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init
from agentcpm_jax.run.commandline import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "launch"))
import convert as launch_convert


@pytest.fixture
def model(tmp_path: Path) -> Path:
    cfg = dataclasses.replace(TINY, num_layers=2, param_dtype="bfloat16")
    save_hf(tmp_path / "model", init(jax.random.key(0), cfg), cfg)
    return tmp_path / "model"


def test_the_same_model_is_told_from_another(model: Path, tmp_path, capsys, monkeypatch) -> None:
    assert launch_convert.main([f"--parity={model}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{model}: largest difference") and said.endswith(": the same model\n")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0
    (other / "config.json").write_text(json.dumps(config))
    reference = parity._reference
    monkeypatch.setattr(parity, "_reference", lambda path, ids: reference(other, ids))
    assert launch_convert.main([f"--parity={model}"]) == 1
    assert "NOT the same model" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_a_reference_the_fix_is_named(model: Path, capsys, monkeypatch, missing) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert launch_convert.main([f"--parity={model}"]) == 2
    said = capsys.readouterr().err
    assert f"error: {missing} is missing" in said and "'agentcpm_jax[hf]' torch" in said


def test_a_conversion_needs_both_ends(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch_convert.main(["model"])
    assert "or --parity=DIR" in capsys.readouterr().err
