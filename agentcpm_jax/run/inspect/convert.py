"""Orbax checkpoints to Hugging Face directories and back; no process holds the model twice."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcpm_jax.disk import refusals
from agentcpm_jax.hf.card import LINEAGE
from agentcpm_jax.hf.companions import copy_companions, tokenizer_file
from agentcpm_jax.hf.files import Checkpoint, json_text, read_json
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import CONFIG, GENERATION, PEFT_CONFIG, TOKEN_IDS
from agentcpm_jax.hf.place import check_free, check_replaceable, output_place
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
    with refusals(out, "then convert again"):
        return _converted(find_model(source).absolute(), out, step, tokenizer, dtype)


def _converted(source: Path, out: Path, step: int | None, tokenizer: str, dtype: str) -> str:
    if (source / CONFIG).is_file() and not (source / "checkpoints").is_dir():
        out = output_place(out, [source])
        check_free(out)
        return _to_orbax(source, out, tokenizer, dtype)
    if source.name.isdecimal() and (source / "meta").is_dir():
        source, step = source.parent, int(source.name)
    if not any(path.name.isdecimal() for path in source.iterdir()):
        raise _neither(source)
    out = output_place(out, [source])
    check_replaceable(out)
    return _to_hf(source, out, step, tokenizer, dtype)


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
    described = partial(_described, source, cfg, stage, step)
    if cfg.model.lora_rank:
        check_free(out)
        params = checkpoints.restore_part(step, {"params": abstract})["params"]
        save_peft(out, params, cfg.model, stage.init_from if stage else "", described)
        return f"{out}: adapters of step {step} for PEFT ({PEFT_CONFIG})"
    found = find_model(tokenizer) if tokenizer else _tokenizer_of(source, cfg)
    params = checkpoints.restore_part(step, {"params": abstract})["params"]
    save_hf(out, params, cfg.model, dtype=dtype, tokenizer_from=found, describe=described)
    stored = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    return f"{out}: step {step} of {source}{_rounding(stored, dtype)}"


def _to_orbax(source: Path, out: Path, tokenizer: str, dtype: str) -> str:
    from agentcpm_jax.checkpoint import Checkpointer
    from agentcpm_jax.config import ExperimentConfig, to_json
    from agentcpm_jax.hf.load import load_hf
    from agentcpm_jax.hf.shape import shape_of

    config = read_json(source / CONFIG)
    from_where = find_model(tokenizer) if tokenizer else source
    shardings = _shardings(shape_of(source))
    params, model = load_hf(source, param_dtype=dtype or None, shardings=shardings)
    checkpoints = Checkpointer(out)
    experiment = to_json(ExperimentConfig(name=source.name, model=model))
    checkpoints.save(0, state={"params": params}, config=experiment)
    checkpoints.close()
    (out / TOKENIZER).mkdir(exist_ok=True)
    copy_companions(from_where, out / TOKENIZER)
    _keep_token_ids(source, config, out / TOKENIZER / GENERATION)
    if (from_where / LINEAGE).is_file():
        shutil.copyfile(from_where / LINEAGE, out / TOKENIZER / LINEAGE)
    with Checkpoint(source) as files:
        stored = {info.dtype for info in files.tensors.values()}
    return f"{out}: step 0, parameters of {source}{_rounding(stored, model.param_dtype)}"


def _keep_token_ids(source: Path, config: Mapping[str, Any], path: Path) -> None:
    """What begins and ends a text, which a model may say in config.json alone."""
    given = source / GENERATION
    stored = read_json(given) if given.is_file() else {}
    lacking = {k: config[k] for k in TOKEN_IDS if k not in stored and config.get(k) is not None}
    if lacking:
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


def _described(
    source: Path, cfg: ExperimentConfig, stage: Stage | None, step: int, weights: Any
) -> dict[str, str]:
    from agentcpm_jax.run.observe.card import describe

    made_from: dict[str, Path | None] = {f"{source}/{step}": None}
    if (source / TOKENIZER / LINEAGE).is_file():
        made_from = {f"{source}/{step}": source / TOKENIZER}
    files = describe(cfg, stage, made_from, source.parent / "metrics.jsonl", weights)
    if (generation := source / TOKENIZER / GENERATION).is_file():
        files[GENERATION] = generation.read_text(encoding="utf-8")
    return files
