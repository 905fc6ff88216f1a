from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.merge.recipe import parse_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError

EMBED = "model.embed_tokens.weight"


def write_model(
    directory: Path, words: list[str], added: list[str], rows: int, first: float
) -> None:
    """One matrix whose row i holds `first + i`; ids are places in words + added."""
    directory.mkdir()
    rows_of = (first + np.arange(rows, dtype=np.float32))[:, None] * np.ones((1, 4), np.float32)
    tensors = {EMBED: rows_of, "model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)}
    save_file(tensors, directory / "model.safetensors")
    eos = len(words) + len(added) - 1
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "vocab_size": rows,
        "eos_token_id": eos,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokens = [{"content": t, "id": len(words) + i, "special": True} for i, t in enumerate(added)]
    data = {
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}},
        "added_tokens": tokens,
    }
    (directory / "tokenizer.json").write_text(json.dumps(data))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": first}))
    (directory / "chat_template.jinja").write_text(f"{{{{ {first} }}}}")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base: a b <e> and 2 padding rows; x: b c <e> <f>, other ids; y: a d <e>."""
    write_model(tmp_path / "base", ["a", "b"], ["<e>"], 5, 100.0)
    write_model(tmp_path / "x", ["b", "c"], ["<e>", "<f>"], 4, 200.0)
    write_model(tmp_path / "y", ["a", "d"], ["<e>"], 3, 300.0)
    return tmp_path


def merge(models: Path, out: str, compat: str = "", **keys) -> tuple[list[float], dict]:
    """The first column of the merged embedding, and the output's config."""
    data = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("base", "x", "y")],
        **keys,
    }
    merge_checkpoints(parse_recipe(data, compat), models / out, [models])
    rows = load_file(models / out / "model.safetensors")[EMBED]
    assert all(np.array_equal(rows[:, 0], rows[:, i]) for i in range(4))
    return rows[:, 0].tolist(), json.loads((models / out / "config.json").read_text())


def mean(*values: float) -> float:
    return float(np.float32(np.mean(values)))


def test_rows_follow_their_tokens_to_the_bases_ids(models):
    rows, config = merge(models, "out", tokenizer_source="base")
    # x lacks `a` and y lacks `b`: they take the base's rows; padding is the base's alone
    want = [mean(100, 100, 300), mean(101, 200, 101), mean(102, 202, 302), 103.0, 104.0]
    assert rows == pytest.approx(want)
    assert (config["vocab_size"], config["eos_token_id"]) == (5, 2)
    tokenizer = (models / "out" / "tokenizer.json").read_bytes()
    assert tokenizer == (models / "base" / "tokenizer.json").read_bytes()


def test_compat_trims_padding_rows(models):
    rows, config = merge(models, "out", "mergekit-0.1.5", tokenizer_source="base")
    assert len(rows) == config["vocab_size"] == 3


def test_a_union_appends_what_only_others_have(models):
    rows, config = merge(models, "out", tokenizer={"source": "union", "pad_to_multiple_of": 4})
    # c and <f> of x, d of y, then padding to a multiple of 4
    assert rows[3:6] == pytest.approx([201.0, 203.0, 301.0]) and rows[6:] == [0.0, 0.0]
    assert config["vocab_size"] == 8
    data = json.loads((models / "out" / "tokenizer.json").read_text())
    assert data["model"]["vocab"] == {"a": 0, "b": 1, "c": 3, "d": 5}
    assert [(t["content"], t["id"]) for t in data["added_tokens"]] == [("<e>", 2), ("<f>", 4)]


def test_special_ids_move_with_another_models_tokenizer(models):
    rows, config = merge(models, "out", tokenizer={"source": "y"})
    assert rows[1] == pytest.approx(301.0) and len(rows) == 3  # d, which y alone has
    assert config["eos_token_id"] == 2
    _, config = merge(models, "x_ids", tokenizer_source="x")
    # <e> of x, not the base's last token; and <f>, which ends the texts of x
    assert config["eos_token_id"] == [2, 3]


def test_a_tokens_source_stands_in_or_is_forced(models):
    tokens = {
        "a": {"source": "y"},  # for x alone, which lacks it
        "b": {"source": {"kind": "zero"}, "force": True},
        "<e>": {"source": {"kind": "model_token", "model": "x", "token": "<f>"}, "force": True},
    }
    rows, _ = merge(models, "out", tokenizer={"source": "base", "tokens": tokens})
    assert rows[:3] == pytest.approx([mean(100, 300, 300), 0.0, 203.0])


def test_a_template_by_majority_by_name_or_as_text(models):
    (models / "y" / "chat_template.jinja").write_text("{{ 200.0 }}")
    for wanted, text in [("auto", "{{ 200.0 }}"), ("{{ mine }}", "{{ mine }}")]:
        merge(models, f"out {wanted}", tokenizer_source="base", chat_template=wanted)
        assert (models / f"out {wanted}" / "chat_template.jinja").read_text() == text
        config = json.loads((models / f"out {wanted}" / "tokenizer_config.json").read_text())
        assert "chat_template" not in config
    merge(models, "chatml", tokenizer_source="base", chat_template="chatml")
    assert "<|im_start|>" in (models / "chatml" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "token 'b' has id 1 in base but 0 in x"),
        ({"tokenizer_source": "z"}, "tokenizer source z is not a model of this recipe"),
        ({"tokenizer": {"tokens": {"q": {}}}}, "token 'q' in tokenizer is not in the output's"),
        (
            {"tokenizer": {"tokens": {"a": {"source": "x"}}}},
            "model x has no token 'a', the source of 'a'",
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "mean"}}}}},
            "source of token 'a' is {'kind': 'mean'}",
        ),
        (
            {"tokenizer_source": "base", "chat_template": "llama3"},
            "chat_template 'llama3' is not here; write auto, chatml",
        ),
    ],
)
def test_what_does_not_fit_is_named(models, keys, message):
    with pytest.raises(UserError) as error:
        merge(models, "out", **keys)
    assert message in str(error.value)
    assert not (models / "out").exists()


def test_rows_of_another_count_are_an_error_without_the_tokenizer_key(models):
    for name in ("x", "y"):
        (models / name / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"align vocabularies with `tokenizer: \{source: base\}`"):
        merge(models, "out")
    with pytest.raises(UserError, match=r"x/tokenizer\.json has no vocabulary"):
        merge(models, "out", tokenizer_source="base")
