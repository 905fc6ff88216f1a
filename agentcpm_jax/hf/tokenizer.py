"""The tokenizer and chat template of a Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.hf.companions import (
    TEMPLATE,
    TOKENIZERS,
    chat_template,
    id_list,
    token_ids,
    tokenizer_digest,
    tokenizer_file,
)
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import CONFIG, GENERATION
from agentcpm_jax.hf.shape import whole_model
from agentcpm_jax.types import UserError


def load_chat(directory: str | os.PathLike[str], **template_kwargs: Any) -> ChatFormat:
    """How conversations become ids; `template_kwargs` go to every render.

    Args:
      directory: a Hugging Face directory, or the name of a model; see `locate`.

    Raises:
      UserError: tokenizer or template is missing or damaged.
    """
    path = find_model(directory)
    return chat_of(load_tokenizer(path), path, **template_kwargs)


def chat_of(tokenizer: Tokenizer, path: Path, **template_kwargs: Any) -> ChatFormat:
    """The same of a tokenizer that is loaded from `path`; what ends a text there ends a turn."""
    template = chat_template(path)
    if template is None:
        raise UserError(f"no chat template in {path}; add {TEMPLATE}")
    chat = ChatFormat.from_parts(tokenizer, template, **template_kwargs)
    ends = (token_ids(path, name).get("eos_token_id") for name in (CONFIG, GENERATION))
    declared = (i for entry in ends for i in id_list(entry))
    chat.stop_ids = tuple(dict.fromkeys((*chat.stop_ids, *declared)))
    return chat


def served_chat(name: str) -> tuple[Path, ChatFormat]:
    """Directory and chat of a model that can be served: it is whole, and its tokenizer fits it.

    Raises `UserError` without JAX having been imported.
    """
    path, shape = whole_model(name)
    tokenizer = load_tokenizer(path)
    chat = chat_of(tokenizer, path)
    check_size(chat, shape.vocab_size, str(path))
    check_ids(tokenizer, path, path)
    return path, chat


def check_size(chat: ChatFormat, rows: int, called: str) -> None:
    """Raises `UserError` when a tokenizer has more ids than a model has rows."""
    if chat.vocab_size > rows:
        raise UserError(
            f"the tokenizer {called} has {chat.vocab_size} ids, the model {rows} (vocab_size); use "
            "the model's own tokenizer"
        )


def check_ids(used: Tokenizer, tokenizer: Path, model: Path, called: str = "") -> None:
    """Check that a tokenizer, loaded from `tokenizer`, gives ids as a model means them.

    Every token that the model's own tokenizer has too must have the same id there, and no id
    another token; new ids are free. The ids that the model's configuration names (end of text ...)
    must be tokens; added ones, unless its own tokenizer shows that they are meant.

    Raises:
      UserError: names the token and both ids, or the id that is no such token.
    """
    own, called = tokenizer_file(model), called or str(tokenizer)
    readable = own is not None and own.name == TOKENIZERS[0]  # others need transformers
    if readable and tokenizer_digest(model) != tokenizer_digest(tokenizer):
        ids = used.get_vocab(with_added_tokens=True)
        theirs = load_tokenizer(model).get_vocab(with_added_tokens=True)
        wrong = [token for token, i in theirs.items() if ids.get(token, i) != i]
        if wrong:
            token = max(wrong, key=lambda token: token.startswith("<|"))
            said = f"token {token!r} has id {ids[token]} in {called} and {theirs[token]} in {model}"
            raise _other(said, len(wrong))
        new = {i: token for token, i in ids.items() if token not in theirs}
        renamed = [t for t, i in theirs.items() if t not in ids and i in new]
        if renamed:
            old = renamed[0]
            said = f"id {theirs[old]} is {new[theirs[old]]!r} in {called} and {old!r} in {model}"
            raise _other(said, len(renamed))
    known = used.get_vocab(with_added_tokens=True).values() if own else ()
    known = {*known, *used.get_added_tokens_decoder()}
    for name in (CONFIG, GENERATION):
        for key, value in token_ids(model, name).items():
            for i in id_list(value):
                if i not in known:
                    kind = "" if own else "added "
                    raise UserError(
                        f"{model / name} says {key} {i}, which is no {kind}token of {called}; "
                        "use the model's own tokenizer, or correct the id"
                    )


def _other(said: str, count: int) -> UserError:
    return UserError(
        f"{said}: the tokenizer is not the model's ({count} ids differ); set config.tokenizer to "
        "the model's directory"
    )


def load_tokenizer(directory: Path) -> Tokenizer:
    """From tokenizer.json; an older kind of tokenizer is converted, which needs transformers."""
    file = tokenizer_file(directory)
    if file is None:
        raise UserError(f"no tokenizer.json in {directory}; name a Hugging Face directory")
    if file.name != "tokenizer.json":
        return _converted(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{file} is not a tokenizer: {error}; fetch it again") from None


def _converted(file: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            f"{file.parent} has {file.name} and no tokenizer.json: converting it needs "
            "transformers; pip install 'agentcpm_jax[hf]'"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(file.parent, local_files_only=True).backend_tokenizer
    except Exception as error:  # each kind of tokenizer has its own
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{file} cannot be converted: {said}; save the tokenizer with tokenizer.json"
        ) from None
