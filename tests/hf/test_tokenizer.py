"""A directory's tokenizer and chat template, in the forms in which they are published."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from agentcpm_jax.chat.format import template_text
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.companions import generation, tokenizer_digest
from agentcpm_jax.hf.tokenizer import check_ids, load_chat, load_tokenizer
from agentcpm_jax.types import UserError
from tests.chat.qwen_style import qwen_style_tokenizer

QUESTION = {"role": "user", "content": "q"}
TEXT = "system\n The capital of 瓦杜兹 é 12 <|im_end|>\n<tool_call>x"


def test_load_reads_a_hugging_face_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_chat(tmp_path)
    qwen_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no chat template"):
        load_chat(tmp_path)
    template = template_text("qwen3-hybrid")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    form = load_chat(tmp_path, enable_thinking=False)
    assert form.render([QUESTION]).endswith("<think>\n\n</think>\n\n")
    (tmp_path / "chat_template.jinja").write_text(template_text("qwen3-thinking-2507"))
    assert load_chat(tmp_path).in_thought  # the file wins, as in transformers
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_chat(tmp_path)


@pytest.mark.parametrize("kept_in", ["tokenizer_config.json", "chat_template.json"])
def test_of_several_templates_the_default_is_taken(tmp_path: Path, kept_in: str) -> None:
    qwen_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    listed = [{"name": "rag", "template": "r"}, {"name": "default", "template": "{{ 1 + 1 }}"}]
    (tmp_path / kept_in).write_text(json.dumps({"chat_template": listed}))
    assert load_chat(tmp_path).render([QUESTION]) == "2"


def write_bpe(directory: Path) -> None:
    """The Qwen-style tokenizer as vocab.json and merges.txt."""
    qwen_style_tokenizer().model.save(str(directory))
    write_config(directory, "Qwen2Tokenizer", qwen_style_tokenizer())


def write_config(directory: Path, kind: str, tokenizer: Tokenizer) -> None:
    flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    added = {
        str(i): {"content": token.content, "special": token.special, **flags}
        for i, token in tokenizer.get_added_tokens_decoder().items()
    }
    config = {"tokenizer_class": kind, "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_vocabulary_and_merges_become_the_same_tokenizer(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    found = load_tokenizer(tmp_path)
    assert found.encode(TEXT).ids == qwen_style_tokenizer().encode(TEXT).ids
    assert found.decode(found.encode(TEXT).ids, skip_special_tokens=False) == TEXT


def test_a_sentencepiece_model_is_converted(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The capital of Liechtenstein is Vaduz."] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    write_config(tmp_path, "LlamaTokenizer", Tokenizer.from_str(BARE))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "the capital is Vaduz"
    ours = load_tokenizer(tmp_path).encode(text, add_special_tokens=False)
    assert ours.tokens == theirs.encode(text, out_type=str)


#: A tokenizer without added tokens.
BARE = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})


def test_what_a_conversion_lacks_is_named(tmp_path: Path, monkeypatch) -> None:
    write_bpe(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(UserError, match=r"vocab\.json and no.*'agentcpm_jax\[hf\]'"):
            load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("no merge")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match=r"vocab\.json cannot be converted"):
        load_tokenizer(tmp_path)


def directory_of(tmp_path: Path, name: str, **config: Any) -> Path:
    """The shipped agent under another name, with ids of tokens in its config.json."""
    path = Path(shutil.copytree(SHIPPED["shipped:sft"], tmp_path / name))
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def test_tokens_that_the_model_knows_under_another_id_are_named(tmp_path: Path) -> None:
    model = directory_of(tmp_path, "model", eos_token_id=[516, 518])
    other = directory_of(tmp_path, "other")
    check_ids(load_tokenizer(other), other, model)
    raw = json.loads((other / "tokenizer.json").read_text())
    ids = {token["content"]: token for token in raw["added_tokens"]}
    start, end = ids["<|im_start|>"], ids["<|im_end|>"]
    start["id"], end["id"] = end["id"], start["id"]
    raw["added_tokens"].sort(key=lambda token: token["id"])
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"token '<\|im_\w+\|>' has id 51\d in .*other and 51\d in"):
        check_ids(load_tokenizer(other), other, model)


def test_new_ids_are_free_and_old_ones_keep_their_token(tmp_path: Path) -> None:
    model, other = directory_of(tmp_path, "model"), directory_of(tmp_path, "other")
    used = load_tokenizer(other)
    used.add_tokens(["<more>"])
    used.save(str(other / "tokenizer.json"))
    check_ids(used, other, model)
    text = (other / "tokenizer.json").read_text().replace("<|fim_pad|>", "<|renamed|>")
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"is '<\|renamed\|>' in .* and '<\|fim_pad\|>' in"):
        check_ids(load_tokenizer(other), other, model)


def test_ids_that_the_model_names_are_tokens(tmp_path: Path) -> None:
    model, other = directory_of(tmp_path, "model", eos_token_id=3), SHIPPED["shipped:sft"]
    check_ids(load_tokenizer(model), model, model)  # a word, but its own tokenizer says so
    assert load_chat(model).stop_ids == (518, 516, 3)
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"eos_token_id 3, which is no added token of the world's"):
        check_ids(load_tokenizer(other), other, model, "the world's")
    more = directory_of(tmp_path, "more", eos_token_id=543)
    with pytest.raises(UserError, match=r"eos_token_id 543, which is no token of .*more"):
        check_ids(load_tokenizer(more), more, more)


def test_a_digest_stands_for_vocabulary_and_template(tmp_path: Path) -> None:
    one, other = directory_of(tmp_path, "one", eos_token_id=516), directory_of(tmp_path, "other")
    assert tokenizer_digest(one) == tokenizer_digest(other)
    with (other / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert tokenizer_digest(one) != tokenizer_digest(other)


@pytest.mark.parametrize(
    ("config", "settings", "stop", "ids", "written"),
    [
        ({"eos_token_id": 3}, None, None, {"eos_token_id": 3}, {"eos_token_id": 3}),
        ({}, {"eos_token_id": 516, "top_k": 4}, 518, [516, 518], {"top_k": 4}),
        ({"eos_token_id": 518}, None, 518, 518, {}),
        ({"bos_token_id": 1}, None, 518, 518, {"bos_token_id": 1}),
        ({}, None, None, {}, None),
    ],
)
def test_what_ends_a_text_is_kept_and_the_end_of_a_turn_added(
    tmp_path: Path, config: Any, settings: Any, stop: Any, ids: Any, written: Any
) -> None:
    model = directory_of(tmp_path, "model", **config)
    if settings is not None:
        (model / "generation_config.json").write_text(json.dumps(settings))
    found, text = generation([model, SHIPPED["shipped:base"]], stop)
    expected = ids if isinstance(ids, dict) else config | {"eos_token_id": ids}
    assert found == expected
    assert (json.loads(text) if text else None) == (None if written is None else expected | written)
