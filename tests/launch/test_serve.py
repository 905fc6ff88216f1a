"""What `serve.py` and `convert.py` refuse, they refuse before JAX is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import served_chat
from agentcpm_jax.types import UserError
from tests.launch.test_train import mistaken

Config = dict[str, Any]


def copied(tmp_path: Path, name: str, change: Callable[[Config], Config] = lambda c: c) -> Path:
    """The shipped agent, with a changed config.json."""
    model = Path(shutil.copytree(SHIPPED["shipped:sft"], tmp_path / name))
    file = model / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return model


def test_a_model_is_served_with_its_own_stop_ids(tmp_path: Path) -> None:
    model = copied(tmp_path, "model", lambda c: c | {"eos_token_id": [520, 518]})
    path, chat = served_chat(str(model))
    assert path == model and chat.stop_ids == (518, 516, 520)


def test_a_tokenizer_with_more_ids_than_rows_is_not_served(tmp_path: Path) -> None:
    model = copied(tmp_path, "model")
    more = Tokenizer.from_file(str(model / "tokenizer.json"))
    more.add_tokens(["<a>", "<b>", "<c>"])
    more.save(str(model / "tokenizer.json"))
    with pytest.raises(UserError, match=r"model has 545 ids, the model 544 \(vocab_size\); use"):
        served_chat(str(model))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("serve", "llama"), "model_type 'llama'"),
        (("serve", "deep"), "lacks tensor model.layers.3"),
        (("serve", "org/none"), "models--org--none"),
        (("serve", "mute"), "no tokenizer.json in mute"),
        (("convert", "llama", "out"), "model_type 'llama'"),
        (("convert", "deep", "out"), "lacks tensor model.layers.3"),
        (("convert", "--parity=llama"), "model_type 'llama'"),
        (("convert", "model", "out", "--tokenizer=other"), "'<|renamed|>' in other and '<|fim_p"),
    ],
)
def test_another_model_is_refused_without_jax(
    argv: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    copied(tmp_path, "llama", lambda c: c | {"model_type": "llama"})
    copied(tmp_path, "deep", lambda c: c | {"num_hidden_layers": 4})
    (copied(tmp_path, "mute") / "tokenizer.json").unlink()
    copied(tmp_path, "model")
    file = copied(tmp_path, "other") / "tokenizer.json"
    file.write_text(file.read_text().replace("<|fim_pad|>", "<|renamed|>"))
    done = mistaken(*argv, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not {"jax", "torch", "orbax"} & set(done.stdout.split())
    assert not (tmp_path / "out").exists()
