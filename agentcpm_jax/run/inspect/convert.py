"""Orbax checkpoints to Hugging Face directories and back; no process holds the model twice."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcpm_jax.chat.format import IM_END
from agentcpm_jax.hf.card import LINEAGE, copied
from agentcpm_jax.hf.companions import (
    TOKENIZERS,
    copy_companions,
    generation,
    tokenizer_file,
)
from agentcpm_jax.hf.files import Checkpoint, check_finite, json_text, read_json
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import CONFIG, GENERATION, PEFT_CONFIG, TOKEN_IDS
from agentcpm_jax.hf.place import (
    check_free,
    check_replaceable,
    output_place,
    whole_or_not_at_all,
)
from agentcpm_jax.hf.shape import whole_model
from agentcpm_jax.hf.tokenizer import check_ids, load_tokenizer
from agentcpm_jax.run.start.models import generation_of
from agentcpm_jax.types import UserError

if TYPE_CHECKING:
    from agentcpm_jax.config import ExperimentConfig, Stage

# JAX and orbax are imported where they work, so that a wrong place is refused without them.
TOKENIZER = "tokenizer"


def convert(
    source: Path, out: Path, *, step: int | None = None, tokenizer: str = "", dtype: str = ""
) -> str:
    """Converts `source`, which is one of the two, into the other; returns a line for the user.

    Args:
      source: a model (a directory with config.json, or a name as in `hf.locate`); or a stage's
        `checkpoints`, or one step of them.
      out: what is written; adapters become a directory for PEFT.
      step: of the checkpoints, the newest by default.
      tokenizer: a directory whose tokenizer is copied; default: that of the model or the run.
      dtype: 'float32' or 'bfloat16'; default: as it is stored.

    Raises:
      UserError: `source` is neither of the two, or `out` is already taken.
    """
    name, source = str(source), find_model(source).absolute()
    if (source / CONFIG).is_file() and "model_type" in read_json(source / CONFIG):
        out = output_place(out, [source])
        check_free(out)
        whole_model(source)
        if tokenizer:
            used = find_model(tokenizer)
            check_ids(load_tokenizer(used), used, source)
        with _named(out):
            return _to_orbax(source, name, out, tokenizer, dtype)
    if source.name.isdecimal() and (source / "meta").is_dir():
        source, step = source.parent, int(source.name)
    steps = sorted(int(path.name) for path in source.iterdir() if path.name.isdecimal())
    if not steps:
        raise _neither(source)
    if step is not None and step not in steps:
        raise UserError(f"{source} has no step {step}; it has {', '.join(map(str, steps))}")
    out = output_place(out, [source])
    check_replaceable(out)
    with _named(out):
        return _to_hf(source, out, step, tokenizer, dtype)


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """What a disk answers becomes a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"output {out} cannot be written: {e}; free space or choose another disk"
        ) from e


def _neither(source: Path) -> UserError:
    return UserError(
        f"{source} is neither a Hugging Face directory (config.json) nor a directory of "
        "checkpoints (<workdir>/<stage>/checkpoints); name one of the two"
    )


def _to_hf(source: Path, out: Path, step: int | None, tokenizer: str, dtype: str) -> str:
    import jax

    from agentcpm_jax.checkpoint import Checkpointer
    from agentcpm_jax.config import config_from_json
    from agentcpm_jax.hf.save import save_hf, save_peft
    from agentcpm_jax.train.placement import trained_shapes

    checkpoints = Checkpointer(source)
    if not (steps := checkpoints.steps()):
        raise _neither(source)
    step = steps[-1] if step is None else step
    restored = checkpoints.restore(step)
    assert restored is not None
    cfg = config_from_json(restored.config)
    stage = next((s for s in cfg.stages if s.name == source.parent.name), None)
    abstract = trained_shapes(cfg.model)
    if cfg.model.lora_rank == 0 and (shardings := _shardings(cfg.model)) is not None:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
    made_from = _made_from(source, cfg, stage, step)
    if cfg.model.lora_rank:
        if dtype not in ("", "float32"):
            raise UserError(f"adapters are written as float32, not {dtype}; leave --dtype out")
        check_free(out)
        params = checkpoints.restore_part(step, {"params": abstract})["params"]
        described = partial(_described, source, cfg, stage, made_from, "")
        save_peft(out, params, cfg.model, _base(made_from) if stage else "", described)
        return f"{out}: adapters of step {step} for PEFT ({PEFT_CONFIG})"
    found = find_model(tokenizer) if tokenizer else _tokenizer_of(source, cfg)
    _check_tokenizer(found, cfg.model.vocab_size)
    ids, settings = _generation(source, stage, made_from, found)
    described = partial(_described, source, cfg, stage, made_from, settings)
    params = checkpoints.restore_part(step, {"params": abstract})["params"]
    save_hf(
        out,
        params,
        cfg.model,
        dtype=dtype,
        tokenizer_from=found,
        describe=described,
        token_ids=ids,
    )
    stored = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    return f"{out}: step {step} of {source}{_rounding(stored, dtype)}"


def _to_orbax(source: Path, name: str, out: Path, tokenizer: str, dtype: str) -> str:
    from agentcpm_jax.hf.shape import shape_of

    config = read_json(source / CONFIG)
    from_where = find_model(tokenizer) if tokenizer else source
    shape = shape_of(source)
    _check_tokenizer(from_where, shape.vocab_size)
    with Checkpoint(source) as files:
        check_finite(files)
        stored = {info.dtype for info in files.tensors.values()}

    from agentcpm_jax.checkpoint import Checkpointer
    from agentcpm_jax.config import ExperimentConfig, to_json
    from agentcpm_jax.hf.load import load_hf

    params, model = load_hf(source, param_dtype=dtype or None, shardings=_shardings(shape))
    experiment = to_json(ExperimentConfig(name=source.name, model=model))
    with whole_or_not_at_all(out, check_free) as fresh:
        checkpoints = Checkpointer(fresh)
        checkpoints.save(0, state={"params": params}, config=experiment)
        checkpoints.close()
        beside = fresh / TOKENIZER
        beside.mkdir()
        copy_companions(from_where, beside)
        _keep_token_ids(source, config, beside / GENERATION)
        if (source / LINEAGE).is_file():
            shutil.copyfile(source / LINEAGE, beside / LINEAGE)
        else:
            (beside / LINEAGE).write_text(json_text(copied(name)), encoding="utf-8")
    return f"{out}: step 0, parameters of {source}{_rounding(stored, model.param_dtype)}"


def _check_tokenizer(directory: Path | None, rows: int) -> None:
    """Raises UserError for a token whose id has no row in the model."""
    file = tokenizer_file(directory) if directory else None
    if file is None or file.name != TOKENIZERS[0]:  # others need transformers
        return
    ids = load_tokenizer(file.parent).get_vocab(with_added_tokens=True)
    token = max(ids, key=ids.__getitem__, default="")
    if ids and ids[token] >= rows:
        raise UserError(
            f"token {token!r} has id {ids[token]} in {file}, but the model has {rows} rows; name "
            "the model's own tokenizer"
        )


def _keep_token_ids(source: Path, config: Mapping[str, Any], path: Path) -> None:
    """What begins and ends a text, which a model may say in config.json alone."""
    given = source / GENERATION
    stored = read_json(given) if given.is_file() else {}
    lacking = {k: config[k] for k in TOKEN_IDS if k not in stored and config.get(k) is not None}
    if stored or lacking:
        path.write_text(json_text({**stored, **lacking}), encoding="utf-8")


def _rounding(stored: set[str], dtype: str) -> str:
    """Says it when numbers were rounded on their way."""
    sizes = {"float16": 10, "bfloat16": 7, "float32": 23}  # bits of the fraction
    lost = sorted(name for name in stored if dtype and sizes.get(name, 52) > sizes[dtype])
    return f"; rounded from {', '.join(lost)} to {dtype}" if lost else ""


def _shardings(model: Any) -> Any:
    """Shardings over all devices of this machine; None for one device."""
    import jax

    from agentcpm_jax.mesh import MeshConfig
    from agentcpm_jax.model.params import param_specs
    from agentcpm_jax.sharding import make_mesh, param_shardings

    if jax.device_count() == 1:
        return None
    mesh = make_mesh(MeshConfig(fsdp=-1))
    return param_shardings(param_specs(model), mesh)


def _tokenizer_of(source: Path, cfg: ExperimentConfig) -> Path | None:
    """Beside a converted checkpoint, of the run's configuration, or made by the run."""
    named = []
    with contextlib.suppress(UserError):  # it may have been removed since the run
        named = [find_model(cfg.tokenizer)] if cfg.tokenizer else []
    places = [source / TOKENIZER, *named, source.parent.parent / TOKENIZER]
    return next((p for p in places if tokenizer_file(p) is not None), None)


def _made_from(
    source: Path, cfg: ExperimentConfig, stage: Stage | None, step: int
) -> dict[str, Path | None]:
    """{name: directory} of the models that a checkpoint came from, for card and lineage."""
    if stage is None:  # converted: what it was lies beside it
        beside = source / TOKENIZER
        return {f"{source}/{step}": beside if (beside / LINEAGE).is_file() else None}
    from agentcpm_jax.config import sources_of

    found: dict[str, Path | None] = {}
    for name in sources_of(cfg, stage):
        path = source.parents[1] / name[6:] / "hf" if name.startswith("stage:") else None
        with contextlib.suppress(UserError):  # it may have been removed since the run
            path = path or (find_model(name) if name != "random" else None)
        found[name] = path if path and path.is_dir() else None
    return found


def _base(made_from: Mapping[str, Path | None]) -> str:
    """What PEFT finds the base of adapters by."""
    name, path = next(iter(made_from.items()))
    return str(path) if path and name.startswith("stage:") else name


def _generation(
    source: Path, stage: Stage | None, made_from: Mapping[str, Path | None], tokenizer: Path | None
) -> tuple[dict[str, Any], str]:
    """As a run writes it: what the model began with stops it still, and so does the end of a turn
    that SFT and RL train."""
    if stage is None or tokenizer is None:
        beside = [source / TOKENIZER] if stage is None else []
        return generation([*beside, *([tokenizer] if tokenizer else [])], None)
    began = next(iter(made_from.values()), None)
    return generation_of(stage, began, tokenizer, load_tokenizer(tokenizer).token_to_id(IM_END))


def _described(
    source: Path,
    cfg: ExperimentConfig,
    stage: Stage | None,
    made_from: Mapping[str, Path | None],
    settings: str,
    weights: Mapping[str, str],
) -> dict[str, str]:
    """{file: text} of what goes beside the weights."""
    from agentcpm_jax.run.observe.card import describe

    files = describe(cfg, stage, made_from, source.parent / "metrics.jsonl", weights)
    return files | ({GENERATION: settings} if settings else {})
