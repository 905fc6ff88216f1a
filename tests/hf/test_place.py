"""Where outputs may be written: what is refused is refused before any work, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from agentcpm_jax.hf import place
from agentcpm_jax.hf.card import model_card, origins
from agentcpm_jax.hf.files import Checkpoint
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.place import check_free, check_replaceable, output_place
from agentcpm_jax.hf.save import save_hf, save_peft
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.lora import init_adapters
from agentcpm_jax.model.params import init
from agentcpm_jax.types import UserError

CFG = ModelConfig(
    vocab_size=24, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffw=24
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_hf(tmp_path / "model", init(jax.random.key(0), CFG), CFG)
    return tmp_path / "model"


def test_links_are_followed_and_places_nothing_can_be_renamed_to_are_refused(
    tmp_path, model, monkeypatch
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    assert output_place(tmp_path / "link") == tmp_path / "real"
    assert output_place(tmp_path / "dangling") == tmp_path / "later"
    monkeypatch.chdir(tmp_path / "real")
    for here in (Path(), Path("."), tmp_path / "link", tmp_path / "real"):
        with pytest.raises(UserError, match="is the working directory"):
            output_place(here)
    with pytest.raises(UserError, match="is a mount point"):
        output_place(Path("/proc"))
    with pytest.raises(UserError, match=r"lies inside .*, which is read"):
        output_place(model / "merged", [tmp_path / "other", model])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="is no place"):
        output_place(tmp_path / "loop")


def test_a_place_below_what_is_no_folder_or_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(UserError, match="file cannot be written to; choose another place"):
            output_place(out)
    monkeypatch.setattr(place.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written to"):
        output_place(tmp_path / "new" / "out")


def test_adapters_replace_adapters_and_nothing_else(tmp_path):
    cfg = ModelConfig(**{**CFG.__dict__, "lora_rank": 2, "lora_alpha": 4.0})
    adapters = init_adapters(jax.random.key(0), cfg)
    out = tmp_path / "adapter"
    save_peft(out, adapters, cfg, "base")
    save_peft(out, adapters, cfg, "again")
    assert "again" in (out / "adapter_config.json").read_text()
    for foreign in ("notes.txt", "config.json"):
        (out / foreign).write_text("irreplaceable")
        with pytest.raises(UserError, match=f"already exists and holds {foreign}"):
            save_peft(out, adapters, cfg, "base")
        (out / foreign).unlink()
    adapters["attn"]["q"]["a"] = adapters["attn"]["q"]["a"].at[0, 0].set(np.nan)
    with pytest.raises(UserError, match="not finite"):
        save_peft(out, adapters, cfg, "base")
    assert "again" in (out / "adapter_config.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_mounted_from_the_same_disk_is_a_mount_point(tmp_path, monkeypatch):
    lines = f"36 35 98:0 /a {str(tmp_path).replace(' ', chr(92) + '040')}/m rw - ext4 /dev/x rw\n"
    (tmp_path / "mountinfo").write_text(lines)
    monkeypatch.setattr(place, "MOUNTS", tmp_path / "mountinfo")
    with pytest.raises(UserError, match="is a mount point; give a directory below it"):
        output_place(tmp_path / "m")
    assert output_place(tmp_path / "m" / "out") == tmp_path / "m" / "out"


def test_only_nothing_is_free(tmp_path):
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    check_free(tmp_path / "absent")
    (tmp_path / "gone").symlink_to(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    for taken in ("gone", "file"):
        with pytest.raises(UserError, match="already exists"):
            check_free(tmp_path / taken)


@pytest.mark.parametrize(
    "foreign",
    ["notes.txt", ".git", "src/code.py", "model-1.safetensors", "adapter_model.safetensors"],
)
def test_a_model_directory_is_replaced_only_when_it_holds_nothing_else(model, foreign):
    check_replaceable(model)
    (model / foreign).parent.mkdir(exist_ok=True)
    (model / foreign).write_text("irreplaceable")
    before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already exists and holds"):
        save_hf(model, init(jax.random.key(1), CFG), CFG)
    assert {p: p.read_bytes() for p in model.rglob("*") if p.is_file()} == before


def test_a_config_alone_or_of_something_else_is_no_model(model):
    shutil.copytree(model, model.parent / "run")
    (model.parent / "run" / "config.json").write_text('{"stages": []}')
    (model / "model.safetensors").unlink()
    for directory in (model, model.parent / "run"):
        with pytest.raises(UserError, match=r"is no model's|already exists"):
            check_replaceable(directory)


def test_a_model_that_cannot_be_replaced_stays(model, monkeypatch):
    old = (model / "model.safetensors").read_bytes()
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="busy"):
        save_hf(model, init(jax.random.key(1), CFG), CFG)
    assert (model / "model.safetensors").read_bytes() == old
    assert [p.name for p in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, value):
    params = init(jax.random.key(0), CFG)
    params["final_norm"] = np.asarray(params["final_norm"]).copy()
    params["final_norm"][3] = value
    with pytest.raises(UserError, match=r"tensor model.norm.weight has 1 values that are not fin"):
        save_hf(tmp_path / "out", params, CFG)
    assert not list(tmp_path.iterdir())


def test_an_index_beside_one_file_is_not_believed(model):
    index = model / "model.safetensors.index.json"
    for stale in (
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        "not json",
        '{"weight_map": {}}',
    ):
        index.write_text(stale)
        load_hf(model)
    (model / "model-00001-of-00002.safetensors").write_bytes(b"older")
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"two sets of weights.*remove one of them"):
        load_hf(model)
    (model / "model.safetensors").unlink()
    index.write_text('{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match="which is no file beside it"):
        load_hf(model)
    index.write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors, which .* not name"):
        load_hf(model)
    index.unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is there, but no model"):
        load_hf(model)


def test_a_head_beside_a_tied_flag_is_compared(tmp_path):
    untied = ModelConfig(**{**CFG.__dict__, "tied_embeddings": False})
    params = init(jax.random.key(0), untied)
    save_hf(tmp_path / "m", params, untied)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    text = json.dumps({**config, "tie_word_embeddings": True})
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(tmp_path / "m")
    params["lm_head"] = np.asarray(params["embed"]).T.copy()
    shutil.rmtree(tmp_path / "m")
    save_hf(tmp_path / "m", params, untied)
    (tmp_path / "m" / "config.json").write_text(text)
    with Checkpoint(tmp_path / "m") as copied:
        assert "lm_head.weight" not in copied.tensors
    assert load_hf(tmp_path / "m")[1].tied_embeddings


def test_the_card_names_what_a_model_was_made_from():
    card = model_card("merge", "T", ["text"], ["org/a", 'odd: "name"', "org/a"])
    assert card.startswith('---\nlibrary_name: transformers\nbase_model:\n- "org/a"\n- ')
    assert "base_model" not in model_card("merge", "T", [])
    made = {"source": "stage:sft", "parents": [{"source": "org/base", "weights": {}}]}
    assert origins([made, {"source": "random"}]) == ["org/base"]


def test_refusals_need_no_jax(model):
    code = (
        "import sys\n"
        f"sys.argv = ['convert.py', {str(model)!r}, {str(model)!r}]\n"
        "sys.path.insert(0, 'launch')\n"
        "import convert\n"
        "assert convert.main(sys.argv[1:]) == 2 and 'jax' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
