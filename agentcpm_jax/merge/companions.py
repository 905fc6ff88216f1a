"""What travels beside merged weights: config.json, tokenizer files, chat template."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentcpm_jax.merge.recipe import MergeRecipe
from agentcpm_jax.merge.resolve import TensorJob
from agentcpm_jax.merge.shards import Checkpoint, read_json
from agentcpm_jax.merge.vocabulary import Vocabulary, token_ids
from agentcpm_jax.types import UserError

FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
#: Spell the vocabulary out a second time; wrong once tokens are added.
OLD_VOCABULARIES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_companions(
    directory: Path,
    recipe: MergeRecipe,
    models: Mapping[str, Checkpoint],
    jobs: Sequence[TensorJob],
    vocabulary: Vocabulary | None,
    template: str | None,
) -> None:
    """Writes all but weights and card into `directory`."""
    donor = models[donor_of(recipe)]
    tokenizer = models[vocabulary.donor] if vocabulary else donor
    for name in FILES:
        source = (tokenizer if name != "generation_config.json" else donor).companions / name
        if source.is_file() and not (vocabulary and vocabulary.added and name in OLD_VOCABULARIES):
            shutil.copyfile(source, directory / name)
    if vocabulary and vocabulary.added:
        _write_json(directory / "tokenizer.json", _extended(tokenizer, models, vocabulary))
    if template is not None:
        _set_template(directory, template)
    config = merged_config(recipe, models, jobs, vocabulary)
    _write_json(directory / "config.json", config)
    generation = directory / "generation_config.json"
    if vocabulary and generation.is_file():
        _write_json(generation, _with_moved_ids(read_json(generation), donor, vocabulary))


def donor_of(recipe: MergeRecipe) -> str:
    """Whose configuration the output gets: the base's, else the first model's."""
    return recipe.base_model or recipe.models[0]


def merged_config(
    recipe: MergeRecipe,
    models: Mapping[str, Checkpoint],
    jobs: Sequence[TensorJob],
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    """The donor's config.json with the depth, vocabulary and dtype of the output."""
    donor = models[donor_of(recipe)]
    config = dict(donor.config)
    dtypes = {job.info.dtype for job in jobs}
    if len(dtypes) == 1:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = next(iter(dtypes))
        if "torch_dtype" in config and "dtype" in config:
            config["dtype"] = config["torch_dtype"]
    if recipe.slices[0].sources[0].layers is not None:
        config["num_hidden_layers"] = 1 + max(j.layer for j in jobs if j.layer is not None)
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] = _layer_types(recipe, models)
        if config.get("max_window_layers") == donor.config.get("num_hidden_layers"):
            config["max_window_layers"] = config["num_hidden_layers"]
    if vocabulary:
        config["vocab_size"] = vocabulary.rows
        config = _with_moved_ids(config, donor, vocabulary)
    return config


def chat_template(recipe: MergeRecipe, models: Mapping[str, Checkpoint]) -> str | None:
    """The template to write; None: keep what the tokenizer files have.

    Raises UserError for the name of a template that is not here.
    """
    wanted = recipe.chat_template
    if not wanted:
        return None
    if wanted == "auto":
        found = [t for m in models.values() if (t := _template_of(m.companions)) is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted == "chatml":
        return CHATML
    if "{{" in wanted or "{%" in wanted:
        return wanted
    raise UserError(
        f"chat_template {wanted!r} is not here; write auto, chatml or the template's Jinja text"
    )


def _layer_types(recipe: MergeRecipe, models: Mapping[str, Checkpoint]) -> list[str]:
    types = []
    for part in recipe.slices:
        first, last = part.sources[0].layers or (0, 0)
        own = models[part.sources[0].model].config.get("layer_types") or []
        types += own[first:last] or ["full_attention"] * (last - first)
    return types


def _template_of(directory: Path) -> str | None:
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    if (path := directory / "tokenizer_config.json").is_file():
        template = read_json(path).get("chat_template")
        return template if isinstance(template, str) else None
    return None


def _set_template(directory: Path, template: str) -> None:
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    if path.is_file() and "chat_template" in (config := read_json(path)):
        del config["chat_template"]
        _write_json(path, config)


def _extended(
    donor: Checkpoint, models: Mapping[str, Checkpoint], vocabulary: Vocabulary
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
    config: dict[str, Any], donor: Checkpoint, vocabulary: Vocabulary
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
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
