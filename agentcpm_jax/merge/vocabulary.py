"""Models of different vocabularies: rows of embeddings are matched by token before merging.

    tokenizer_source: base            # or union, or a model
    tokenizer:
      source: union                   # base's ids, then what only others have
      tokens: {<|im_end|>: {source: org/chat, force: true}}
      pad_to_multiple_of: 64

A token that a model lacks takes the base's row, else that of the one model which has it, else the
mean of those that have it; a row nobody has is zero. Deviation from mergekit: padding rows stay
(Qwen3 has 151,936 rows for 151,669 tokens) unless `compat` trims them as mergekit does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.hf.companions import TOKENIZER_CONFIG, tokenizer_file
from agentcpm_jax.hf.files import TensorInfo, read_json, sha256_of
from agentcpm_jax.hf.names import embedding_names
from agentcpm_jax.merge.inputs import MergeInput
from agentcpm_jax.types import UserError

Rows = dict[str, np.ndarray]  # model -> for every output row, its row there or -1


@dataclass(frozen=True)
class TokenizerOptions:
    """Whose tokens the output has. `tokens` maps a token to its {source, force}."""

    source: str
    tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pad_to_multiple_of: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """The output's token -> id, and where every row comes from.

    Attributes:
      rows: number of rows of the output's embeddings.
      places: per model, the row of each output row, -1 where it lacks the token.
      given: output row -> (model, row) or None for zero: what `tokens` says.
      added: tokens that the donor of the tokenizer files lacks.
      donor: the model whose tokenizer files are copied.
    """

    ids: Mapping[str, int]
    rows: int
    places: Rows
    given: Mapping[int, tuple[str, int] | None]
    added: tuple[str, ...]
    donor: str
    notes: tuple[str, ...] = ()


def parse_tokenizer(
    options: Any, source: Any, model_name: Callable[[Any, str], str]
) -> TokenizerOptions | None:
    """Of the keys `tokenizer` and `tokenizer_source`; None when neither is there."""
    if options is None and source is None:
        return None
    if options is not None and source is not None:
        raise UserError("give tokenizer or tokenizer_source, not both")
    if options is None:
        options = {"source": source}
    if not isinstance(options, Mapping):
        raise UserError(f"tokenizer is {options!r}; write {{source: base, union or a model}}")
    for key in options:
        if key not in ("source", "tokens", "pad_to_multiple_of"):
            raise UserError(
                f"unknown key {key!r} in tokenizer; known: source, tokens, pad_to_multiple_of"
            )
    multiple = options.get("pad_to_multiple_of") or 0
    if type(multiple) is not int or multiple < 0:
        raise UserError(f"pad_to_multiple_of is {multiple!r}; write a positive whole number")
    tokens = options.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise UserError(f"tokens in tokenizer is {tokens!r}; write `token: {{source: ...}}`")
    for token, entry in tokens.items():
        if not isinstance(entry, Mapping) or not set(entry) <= {"source", "force"}:
            raise UserError(f"token {token!r} in tokenizer is {entry!r}; write {{source, force}}")
    name = model_name(options.get("source") or "union", "source in tokenizer")
    return TokenizerOptions(name.removeprefix("model:"), tokens, multiple)


def align(
    options: TokenizerOptions,
    base: str,
    models: Mapping[str, MergeInput],
    first: str,
    compat: bool,
) -> tuple[dict[str, MergeInput], Vocabulary]:
    """The models with their embeddings' rows in the output's order, and that order.

    `first` is the model a union starts from.

    Raises:
      UserError: no tokenizer.json, no base, a token or model that is not there.
    """
    known = {name: token_ids(m.companions) for name, m in models.items()}
    for name, ids in known.items():
        if not ids:
            where = models[name].companions / "tokenizer.json"
            raise UserError(f"{where} has no vocabulary, which `tokenizer` needs; add the file")
    donor = {"base": base, "union": first}.get(options.source, options.source)
    if options.source == "base" and not base:
        raise UserError("tokenizer source is base, but the recipe has no base_model; name one")
    if donor not in models:
        raise UserError(f"tokenizer source {donor} is not a model of this recipe; list it")
    ids = dict(known[donor])
    added = []
    if options.source == "union":
        free = max(ids.values()) + 1
        for other in known.values():
            for token in sorted(other, key=other.__getitem__):
                if token not in ids:
                    ids[token] = free
                    added.append(token)
                    free += 1
    used = max(ids.values()) + 1
    had = _row_count(models[donor])
    rows = used if compat else max(used, had)
    if options.pad_to_multiple_of:
        rows = -(-rows // options.pad_to_multiple_of) * options.pad_to_multiple_of
    places = {n: _places(ids, known[n], rows, _row_count(m)) for n, m in models.items()}
    given = {}
    for token, entry in options.tokens.items():
        if token not in ids:
            raise UserError(f"token {token!r} in tokenizer is not in the output's vocabulary")
        given[ids[token]] = _given(token, entry.get("source"), known, models)
        if entry.get("force"):
            for rows_of in places.values():
                rows_of[ids[token]] = -1
    notes = [f"embeddings have {rows} rows, those of {donor} {had}"] if rows != had else []
    vocabulary = Vocabulary(ids, rows, places, given, tuple(added), donor, tuple(notes))
    aligned: dict[str, MergeInput] = {
        name: Aligned(name, models, base, vocabulary) for name in models
    }
    return aligned, vocabulary


class Aligned:
    """A `MergeInput` whose per-token tensors have the output's rows."""

    def __init__(
        self, name: str, models: Mapping[str, MergeInput], base: str, vocabulary: Vocabulary
    ):
        self._name, self._models, self._base, self._vocabulary = name, models, base, vocabulary
        self._inner = inner = models[name]
        self._per_token = per_token(inner)
        place = vocabulary.places[name]
        self._unmoved = np.array_equal(place, np.arange(len(place)))
        self.directory, self.companions = inner.directory, inner.companions
        self.config, self.files = inner.config, inner.files
        self.release = inner.release
        self.tensors = {n: self._info(n, t) for n, t in inner.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype, rows in the output's order."""
        stored = self._inner.read(name)
        if name not in self._per_token:
            return stored
        place = self._vocabulary.places[self._name]
        if self._unmoved:
            return stored[: len(place)]
        out = stored[np.maximum(place, 0)]
        missing = np.flatnonzero(place < 0)
        out[missing] = self._fill(name, missing, stored.shape[1:])
        return out

    def copies(self, name: str) -> bool:
        """Whether rows are moved or made up."""
        return name in self._per_token and not self._unmoved

    def _fill(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What stands in for output rows this model lacks, in float32."""
        total, count = np.zeros((len(rows), *shape), np.float32), np.zeros(len(rows), np.int64)
        # the base alone where it has the token, so it comes first
        order = sorted(self._models, key=lambda m: m != self._base)
        for model in order:
            if name not in self._models[model].tensors:
                continue
            place = self._vocabulary.places[model][rows]
            has = place >= 0
            if model != self._base and self._base:
                has &= self._vocabulary.places[self._base][rows] < 0
            total[has] += self._models[model].read(name)[place[has]].astype(np.float32)
            count += has
        total /= np.maximum(count, 1).reshape(-1, *(1 for _ in shape))
        for row, source in self._vocabulary.given.items():
            at = np.flatnonzero(rows == row)
            if at.size:
                total[at] = 0 if source is None else self._models[source[0]].read(name)[source[1]]
        return total

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        if name not in self._per_token:
            return info
        return TensorInfo((self._vocabulary.rows, *info.shape[1:]), info.dtype)


def token_ids(directory: Path) -> dict[str, int]:
    """Token -> id from tokenizer.json; empty when there is none or it is of another kind."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}
    data = read_json(path)
    vocab = data.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [[token, score], ...]
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    return {**vocab, **{t["content"]: t["id"] for t in data.get("added_tokens", [])}}


def known_ids(directory: Path) -> dict[str, int]:
    """Token -> id, from whatever files say it: for comparing, not for writing."""
    ids = token_ids(directory)
    if not ids and (old := directory / "vocab.json").is_file():
        ids = read_json(old)
    if (added := directory / "added_tokens.json").is_file():
        ids = {**read_json(added), **ids}
    if (path := directory / TOKENIZER_CONFIG).is_file():
        decoder = read_json(path).get("added_tokens_decoder") or {}
        ids = {**{entry["content"]: int(i) for i, entry in decoder.items()}, **ids}
    return ids


def check_same_ids(models: Mapping[str, MergeInput], donor: str, compat: bool) -> list[str]:
    """Raises UserError if two tokenizers differ in an id, or the output's lacks a token.

    Under `compat` a lacking token is a note: the `donor` has the tokenizer that is copied.
    """
    union = "add `tokenizer: {source: union}`"
    known = {name: known_ids(model.companions) for name, model in models.items()}
    for name, own in known.items():
        last, rows = max(own, key=own.__getitem__, default=""), _row_count(models[name])
        if own and rows and own[last] >= rows:
            raise UserError(
                f"token {last!r} has id {own[last]} in {name}, whose embedding has {rows} rows; "
                "copy tokenizer and weights of one model"
            )
    _check_opaque(models)
    ids: dict[str, tuple[int, str]] = {}
    tokens: dict[int, tuple[str, str]] = {}
    for name, own in known.items():
        for token, i in own.items():
            other, where = ids.setdefault(token, (i, name))
            if other != i:
                raise UserError(
                    f"token {token!r} has id {other} in {where} but {i} in {name}; "
                    "merge models of one tokenizer, or add `tokenizer: {source: base}`"
                )
            taken, where = tokens.setdefault(i, (token, name))
            if taken != token:
                raise UserError(
                    f"id {i} is token {taken!r} in {where} but {token!r} in {name}; {union}"
                )
    lost = [(token, where) for token, (_, where) in ids.items() if token not in known[donor]]
    if not lost or not known[donor]:
        return []
    token, where = lost[0]
    text = f"{len(lost)} tokens are not in the tokenizer of {donor}, such as {token!r} of {where}"
    if not compat:
        raise UserError(f"{text}; {union}, or make {where} the base_model")
    return [f"{text}; lost"]


def _check_opaque(models: Mapping[str, MergeInput]) -> None:
    """Of vocabularies that only another library reads, the files must be the same."""
    found: dict[str, str] = {}
    for name, model in models.items():
        file = tokenizer_file(model.companions)
        if file is not None and file.suffix == ".model":
            found.setdefault(sha256_of(file), name)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise UserError(
            f"tokenizer.model of {one} and of {other} differ, and neither has a tokenizer.json to "
            "compare; save both tokenizers with tokenizer.json"
        )


def check_adapters(models: Mapping[str, MergeInput]) -> None:
    """Raises UserError if an adapter was trained with tokens that its model's tokenizer lacks."""
    for model in models.values():
        adapter = getattr(model, "adapter", None)
        if adapter is None or not (own := known_ids(model.companions)):
            continue
        for token, i in known_ids(adapter).items():
            if own.get(token) != i:
                raise UserError(
                    f"token {token!r} has id {i} in {adapter} but {own.get(token, 'none')} in "
                    f"{model.companions}; copy the tokenizer files of the adapter there"
                )


def per_token(model: MergeInput) -> set[str]:
    """Tensors with one row per token: embedding, head, and a bias of the head."""
    matrices = embedding_names(model.config, model.tensors)
    biases = {f"{name.removesuffix('.weight')}.bias" for name in matrices}
    return {*matrices, *(biases & model.tensors.keys())}


def _row_count(model: MergeInput) -> int:
    return max((model.tensors[name].shape[0] for name in per_token(model)), default=0)


def _places(ids: Mapping[str, int], own: Mapping[str, int], rows: int, has: int) -> np.ndarray:
    place = np.full(rows, -1, np.int64)
    used = max(ids.values()) + 1
    own_used = max(own.values()) + 1
    padding = np.arange(used, rows)  # rows without a token stay where they are
    place[used:] = np.where((padding >= own_used) & (padding < has), padding, -1)
    for token, i in ids.items():
        j = own.get(token, -1)
        place[i] = j if j < has else -1
    return place


def _given(
    token: str,
    source: Any,
    known: Mapping[str, Mapping[str, int]],
    models: Mapping[str, MergeInput],
) -> tuple[str, int] | None:
    """(model, row) a token's embedding is taken from; None: zero."""
    if isinstance(source, Mapping) and source.get("kind") == "zero":
        return None
    model, wanted = source, token
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        model, wanted = source.get("model"), source.get("token", source.get("token_id"))
    if not isinstance(model, str) or model not in models:
        raise UserError(f"source of token {token!r} is {source!r}, not a model of this recipe")
    row = wanted if isinstance(wanted, int) else known[model].get(str(wanted), -1)
    if not 0 <= row < _row_count(models[model]):
        raise UserError(f"model {model} has no token {wanted!r}, the source of {token!r}")
    return model, row
