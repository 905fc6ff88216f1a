"""What travels beside merged weights: config.json, tokenizer files, chat template, card."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentcpm_jax.hf.card import file_table, model_card
from agentcpm_jax.hf.companions import (
    chat_template,
    copy_companions,
    id_list,
    set_chat_template,
)
from agentcpm_jax.hf.files import json_digest, json_text, read_json
from agentcpm_jax.hf.names import CONFIG, GENERATION, TOKEN_IDS, text_config
from agentcpm_jax.merge.inputs import MergeInput
from agentcpm_jax.merge.recipe import COMPAT, MergeRecipe
from agentcpm_jax.merge.resolve import TensorJob
from agentcpm_jax.merge.vocabulary import Vocabulary, token_ids
from agentcpm_jax.types import UserError

#: Spell the vocabulary out a second time; wrong once tokens are added.
OLD_VOCABULARIES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_companions(
    directory: Path,
    recipe: MergeRecipe,
    models: Mapping[str, MergeInput],
    jobs: Sequence[TensorJob],
    vocabulary: Vocabulary | None,
    template: str | None,
) -> None:
    """Writes all but weights and card into `directory`."""
    donor = models[donor_of(recipe)]
    tokenizer = models[vocabulary.donor] if vocabulary else donor
    extended = vocabulary is not None and bool(vocabulary.added)
    old = OLD_VOCABULARIES if extended else ()
    copy_companions(tokenizer.companions, directory, (*old, GENERATION))
    if vocabulary and extended:
        _write_json(directory / "tokenizer.json", _extended(tokenizer, models, vocabulary))
    if template is not None:
        set_chat_template(directory, template)
    config = merged_config(recipe, models, jobs, vocabulary)
    path = donor.companions / GENERATION
    united = united_stops(recipe, models, vocabulary)
    stops = {"eos_token_id": united} if united else {}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] |= stops
    _write_json(directory / CONFIG, config | stops)
    if vocabulary or united:
        settings = read_json(path) if path.is_file() else {}
        if vocabulary:
            settings = _with_moved_ids(settings, donor, vocabulary)
        if settings or united:
            _write_json(directory / GENERATION, settings | stops)
    elif path.is_file():
        shutil.copyfile(path, directory / GENERATION)


def card(
    recipe: MergeRecipe,
    seed: int,
    hashes: Mapping[str, Mapping[str, str]],
    notes: Sequence[str],
) -> str:
    """README.md: the recipe to repeat the merge, and what exactly went in.

    `hashes` identify the content of every input's files, by model and file.
    """
    how = f"as {COMPAT} calculates" if recipe.compat else "in float32, rounded once"
    body = [
        f"Method `{recipe.merge_method}`, {how}, seed {seed}.",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        f"SHA-256 of the recipe: `{json_digest(dict(recipe.raw))}`",
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
        *file_table(("input", "file", "content"), hashes.items()),
    ]
    return model_card("merge", "Merged model", body, map(_hub_name, recipe.models))


def stop_notes(
    recipe: MergeRecipe, models: Mapping[str, MergeInput], vocabulary: Vocabulary | None
) -> list[str]:
    """Says that the models stop at different tokens."""
    united = united_stops(recipe, models, vocabulary)
    return [f"the models stop at different ids; the output stops at all: {united}"] * bool(united)


def united_stops(
    recipe: MergeRecipe, models: Mapping[str, MergeInput], vocabulary: Vocabulary | None
) -> list[int]:
    """Ids that end a text of any of the models, the donor's first; empty: the donor has them all.

    A stop token that the output's vocabulary lacks cannot be drawn, and is left out.
    """
    first = donor_of(recipe)
    found: dict[str, list[int]] = {}
    for name in dict.fromkeys([first, *models]):
        model = models[name]
        path = model.companions / GENERATION
        settings = read_json(path) if path.is_file() else {}
        ids = id_list(settings.get("eos_token_id"))
        ids = ids or id_list(text_config(model.config).get("eos_token_id"))
        if vocabulary:
            words = {i: token for token, i in token_ids(model.companions).items()}
            ids = [vocabulary.ids[words[i]] for i in ids if words.get(i) in vocabulary.ids]
        found[name] = ids
    united = list(dict.fromkeys(i for ids in found.values() for i in ids))
    return united if {*united} != {*found[first]} else []


def _hub_name(model: str) -> str:
    """Of a model without its revision and adapter, if they are there: what the Hub links to."""
    return model if Path(model).is_dir() else re.split(r"[@+]", model, maxsplit=1)[0]


def donor_of(recipe: MergeRecipe) -> str:
    """Whose configuration the output gets: the base's, else the first model's."""
    return recipe.base_model or recipe.models[0]


def merged_config(
    recipe: MergeRecipe,
    models: Mapping[str, MergeInput],
    jobs: Sequence[TensorJob],
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    """The donor's config.json with the depth, vocabulary and dtype of the output, not quantised."""
    donor = models[donor_of(recipe)]
    config = {k: v for k, v in donor.config.items() if k != "quantization_config"}
    nested = isinstance(config.get("text_config"), dict)
    text = dict(config["text_config"]) if nested else config
    dtypes = {job.info.dtype for job in jobs}
    if len(dtypes) == 1:
        (dtype,) = dtypes
        for part in (config, text):
            for key in {"dtype", "torch_dtype"} & part.keys() or {"dtype"}:
                part[key] = dtype
    if recipe.slices[0].sources[0].layers is not None:
        text["num_hidden_layers"] = 1 + max(j.layer for j in jobs if j.layer is not None)
        if isinstance(text.get("layer_types"), list):
            text["layer_types"] = _layer_types(recipe, models)
        if text.get("max_window_layers") == text_config(donor.config).get("num_hidden_layers"):
            text["max_window_layers"] = text["num_hidden_layers"]
    if vocabulary:
        for part in (config, text):
            if part is text or "vocab_size" in part:
                part["vocab_size"] = vocabulary.rows
            _with_moved_ids(part, donor, vocabulary)
    return {**config, "text_config": text} if nested else config


def template_for(recipe: MergeRecipe, models: Mapping[str, MergeInput]) -> str | None:
    """The template to write; None: keep what the tokenizer files have.

    Raises UserError for the name of a template that is not here.
    """
    wanted = recipe.chat_template
    if not wanted:
        return None
    if wanted == "auto":
        found = [t for m in models.values() if (t := chat_template(m.companions)) is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted == "chatml":
        return CHATML
    if "{{" in wanted or "{%" in wanted:
        return wanted
    raise UserError(
        f"chat_template {wanted!r} is not here; write auto, chatml or the template's Jinja text"
    )


def _layer_types(recipe: MergeRecipe, models: Mapping[str, MergeInput]) -> list[str]:
    types = []
    for part in recipe.slices:
        first, last = part.sources[0].layers or (0, 0)
        own = text_config(models[part.sources[0].model].config).get("layer_types") or []
        types += own[first:last] or ["full_attention"] * (last - first)
    return types


def _extended(
    donor: MergeInput, models: Mapping[str, MergeInput], vocabulary: Vocabulary
) -> dict[str, Any]:
    """The donor's tokenizer.json with the tokens it lacks.

    Added tokens stay added tokens. Words of another model's vocabulary join the vocabulary without
    the rules that merge them: they can be read, and the donor's text is cut up as before.
    """
    data = read_json(donor.companions / "tokenizer.json")
    words = data["model"]["vocab"]
    flags: dict[str, Any] = {}
    for model in models.values():
        for token in read_json(model.companions / "tokenizer.json").get("added_tokens", []):
            flags.setdefault(token["content"], token)
    added, new = [], {}
    for token in vocabulary.added:
        if token in flags:
            added.append({**flags[token], "id": vocabulary.ids[token]})
        else:
            new[token] = vocabulary.ids[token]
    if new and not isinstance(words, dict):
        raise UserError(
            f"{donor.companions / 'tokenizer.json'} has a vocabulary of another kind than a table; "
            "a union is not possible: use `tokenizer: {source: base}`"
        )
    return {
        **data,
        "model": {**data["model"], "vocab": {**words, **new}} if new else data["model"],
        "added_tokens": [*data.get("added_tokens", []), *added],
    }


def _with_moved_ids(
    config: dict[str, Any], donor: MergeInput, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Special ids follow their tokens into the output's vocabulary."""
    words = {i: token for token, i in token_ids(donor.companions).items()}

    def moved(i: Any) -> Any:
        return vocabulary.ids.get(words.get(i, ""), i)

    for key in TOKEN_IDS:
        value = config.get(key)
        if isinstance(value, list):
            config[key] = [moved(i) for i in value]
        elif value is not None:
            config[key] = moved(value)
    return config


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")
