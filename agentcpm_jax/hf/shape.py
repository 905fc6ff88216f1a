"""The shape of a model as its checkpoint says it, and whether what is configured agrees.

`config.json` is asked; where it leaves `head_dim` out, the weights are. No JAX: a contradiction is
answered before anything is started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agentcpm_jax import tree
from agentcpm_jax.hf.files import Checkpoint, read_json
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import CONFIG, check_shape, file_shapes
from agentcpm_jax.model.config import DTYPES, PUBLISHED, SHAPE, ModelConfig, from_hf_config
from agentcpm_jax.model.specs import param_specs
from agentcpm_jax.types import UserError

READABLE = (*DTYPES, "float16")
#: Written by some exporters although they hold nothing of their own.
REDUNDANT = ("rotary_emb.inv_freq",)
#: Two models that differ in nothing else compute the same.
RECORDED_ONLY = ("max_positions",)
HEAD_NORM = "model.layers.0.self_attn.q_norm.weight"


def shape_of(directory: Path) -> ModelConfig:
    """The model of a directory. Raises `UserError` when it is not one that can be computed."""
    config = read_json(directory / CONFIG)
    if config.get("head_dim") is not None:
        return _read(directory, config)
    with Checkpoint(directory) as stored:
        return stored_shape(stored)


def stored_shape(stored: Checkpoint) -> ModelConfig:
    """The same of a directory that is open."""
    config = dict(stored.config)
    if config.get("head_dim") is None and HEAD_NORM in stored.tensors:
        config["head_dim"] = stored.tensors[HEAD_NORM].shape[0]
    return _read(stored.directory, config)


def whole_model(name: str | Path) -> tuple[Path, ModelConfig]:
    """Directory and shape of a model, as `locate` finds it, whose files are those of that shape."""
    directory = find_model(name)
    with Checkpoint(directory) as stored:
        shape = stored_shape(stored)
        check_stored(stored, shape)
    return directory, shape


def check_weights(directory: Path, cfg: ModelConfig) -> None:
    """`check_stored` of a directory: the headers of its files are read, no weights."""
    with Checkpoint(directory) as stored:
        check_stored(stored, cfg)


def check_stored(stored: Checkpoint, cfg: ModelConfig) -> None:
    """Raises `UserError` for a directory of another model: by config.json, or for a tensor that is
    missing, too many, of another shape or dtype."""
    found = stored_shape(stored)
    for name in SHAPE:
        ours, theirs = getattr(cfg, name), getattr(found, name)
        if name not in RECORDED_ONLY and ours != theirs:
            raise UserError(
                f"{stored.directory / CONFIG} says {name} {theirs!r}, the config says {ours!r}; "
                "make them agree"
            )
    expected = file_shapes(tree.flatten(param_specs(cfg)))
    for key, shape in expected.items():
        if key not in stored.tensors:
            raise UserError(f"{stored.directory} lacks tensor {key} of shape {shape}")
        info, where = stored.tensors[key], f"{stored.places[key]}: tensor {key}"
        check_shape(where, info.shape, shape, f"{CONFIG} and weights are of different models")
        if info.dtype not in READABLE:
            fix = f"convert it to {' or '.join(DTYPES)}"
            raise UserError(f"{where} is stored as {info.dtype}, which is not supported; {fix}")
    for key in sorted(stored.tensors.keys() - expected.keys()):
        copy_of_embedding = key == "lm_head.weight" and cfg.tied_embeddings
        if not copy_of_embedding and not key.endswith(REDUNDANT):
            raise UserError(
                f"{stored.places[key]} has tensor {key}, which the model of {CONFIG} does not "
                f"have; correct {CONFIG}"
            )


def common_shape(
    given: Mapping[str, Any],
    names: Iterable[str],
    recorded: Mapping[str, Any] | None = None,
    *,
    planned: bool = False,
) -> dict[str, Any]:
    """{field of `SHAPE`: value} that all of these models have.

    Args:
      given: values that the configuration gives.
      names: of models, see `locate`.
      recorded: the shape that the run already has, which wins.
      planned: a model that is not here may be one of `PUBLISHED`.

    Raises:
      UserError: two of them contradict each other (both values are named), a model is not here, or
        nothing says the shape.
    """
    found = dict(recorded or {})
    said = dict.fromkeys(found, "the run's own config.json")
    for model in dict.fromkeys(names):
        shape, where = _looked_up(model, planned)
        for field in SHAPE:
            old = found.setdefault(field, getattr(shape, field))
            said.setdefault(field, where)
            if old != getattr(shape, field) and field not in RECORDED_ONLY:
                raise UserError(
                    f"{where} says {field} {getattr(shape, field)!r}, {said[field]} says {old!r}: "
                    "they are of different models; name models of one shape"
                )
    for field, value in given.items():
        if found.setdefault(field, value) != value:
            raise UserError(
                f"{said[field]} says {field} {found[field]!r}, config.model.{field} is {value!r}; "
                f"leave config.model.{field} out (None): the checkpoint gives it"
            )
    missing = [field for field in SHAPE if field not in found]
    if missing:
        raise UserError(
            f"config.model gives no {', '.join(missing)}: parameters begin at random and no "
            "checkpoint says them; give them, or name a checkpoint in init_from"
        )
    return found


def shape_text(model: ModelConfig) -> str:
    """One line for people."""
    tied = "tied" if model.tied_embeddings else "untied"
    return (
        f"{model.num_layers} layers of width {model.width}, {model.num_heads} heads of "
        f"{model.head_dim} over {model.num_kv_heads}, {model.vocab_size:,} ids ({tied}), "
        f"rope theta {model.rope_theta:g}"
    )


def where_said(names: Iterable[str]) -> str:
    """What tells the shape, for people."""
    name = next(iter(names), None)
    return _looked_up(name, planned=True)[1] if name else "config.model"


def _looked_up(name: str, planned: bool) -> tuple[ModelConfig, str]:
    """(shape, what says it)."""
    try:
        directory = find_model(name)
    except UserError as error:
        if not planned:
            raise
        key = name.partition("@")[0].rpartition("/")[2]
        if key not in PUBLISHED:
            known = ", ".join(PUBLISHED)
            raise UserError(f"{error}; the shapes known without one are {known}") from None
        return PUBLISHED[key], f"{key} as published ({name} is not here)"
    return shape_of(directory), str(directory / CONFIG)


def _read(directory: Path, config: Mapping[str, Any]) -> ModelConfig:
    try:
        return from_hf_config(config)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
