"""Small files of a run, torn by a power cut: refused with the fix, or made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcpm_jax.config import EvalStage, config_from_json, to_json
from agentcpm_jax.hf.companions import tokenizer_digest
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.run.context import open_context
from agentcpm_jax.run.engines import _run_id
from agentcpm_jax.run.observe import machine
from agentcpm_jax.run.observe.dataset import announce_data, data_tables
from agentcpm_jax.run.observe.metrics import silent
from agentcpm_jax.run.observe.summary import model_results
from agentcpm_jax.run.stages import is_done
from agentcpm_jax.run.start.models import DIGEST, check_models
from agentcpm_jax.run.start.resume import CONFIG, check_config, claim
from agentcpm_jax.run.start.signals import StopSignal
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.store import manifest
from tests.run.observe.test_dataset import begun, data
from tests.run.recorded_run import CFG

TORN = [b"", b"{", b"[]", b"\xff\xfe\x00", b"\0" * 64]


def test_done(tmp_path: Path) -> None:
    assert not is_done(tmp_path)
    (tmp_path / "DONE").write_text('{"stage": "rl", "kind": "rl", "seconds": 1.0}\n')
    assert is_done(tmp_path)


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("DONE", is_done),
        ("data.json", data_tables),
        ("data.json", lambda place: announce_data(place, data("x"), lambda line: None)),
        ("a.json", lambda place: model_results(place, EvalStage(models=("a",)))),
        ("config.json", lambda place: check_config(CFG, place)),
        (DIGEST, lambda place: check_models(CFG, place, find_model("shipped:sft"))),
    ],
)
def test_a_torn_file_is_refused_with_its_fix(
    tmp_path: Path, torn: bytes, name: str, read: Callable
) -> None:
    path = tmp_path / name
    path.write_bytes(torn)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    said = str(error.value)
    assert "\n" not in said and "rm " in said
    assert said.startswith(f"{path} is damaged") or said.startswith(f"{path} is not")
    path.unlink()  # as it says
    read(tmp_path)


def test_a_lost_configuration_is_that_of_the_newest_checkpoint(tmp_path: Path) -> None:
    claim(CFG, tmp_path)
    other = config_from_json(json.loads(json.dumps(to_json(CFG) | {"seed": CFG.seed + 1})))
    (tmp_path / CONFIG).unlink()
    assert check_config(other, tmp_path) == []  # nothing was trained
    meta = tmp_path / "rl" / "checkpoints" / "2" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"config": to_json(CFG)}))
    assert check_config(CFG, tmp_path) == []
    with pytest.raises(UserError, match=r"another configuration \(seed differ\)"):
        check_config(other, tmp_path)


def test_a_torn_name_of_the_weights_is_another_name(tmp_path: Path) -> None:
    path = tmp_path / "run_id"
    first = _run_id(path)
    assert _run_id(path) == first
    path.write_bytes(b"\0\0")
    assert _run_id(path) not in (first, "") and _run_id(path) == _run_id(path)


def test_a_torn_tokenizer_is_copied_again(tmp_path: Path) -> None:
    made = tmp_path / "run" / "tokenizer"
    for torn in (b"", b"{"):
        with StopSignal() as stop:
            ctx = open_context(CFG, tmp_path / "run", silent, stop)
            ctx.log.close()
            ctx.claim()
        digest = tokenizer_digest(made)
        (made / "tokenizer.json").write_bytes(torn)
    shutil.rmtree(made)
    with StopSignal() as stop:
        open_context(CFG, tmp_path / "run", silent, stop).log.close()
    assert tokenizer_digest(made) == digest


def test_a_torn_record_of_machines_loses_no_later_one(tmp_path: Path) -> None:
    (tmp_path / machine.FILE).write_bytes(b'{"after": 0}\n{"after": 2, "ja\xff')
    machine.record(tmp_path, 2)
    assert machine.of_step(tmp_path, 3) == machine.describe()
    assert machine.of_step(tmp_path, 1) == {}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_manifest_of_weights_is_refused(tmp_path: Path, torn: bytes) -> None:
    place = tmp_path / "weights" / "v000003"
    place.mkdir(parents=True)
    (place / "STABLE").touch()
    (place / "manifest.json").write_bytes(torn)
    with pytest.raises(UserError, match=r"v000003 are damaged: manifest.json.*remove them"):
        manifest(tmp_path, 3)


def test_the_data_go_on_without_a_comparison(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "data.json").unlink()
    announce_data(tmp_path, data("z"), lambda line: None)
