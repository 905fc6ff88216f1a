"""Parameters on their way to the engines, and back from disk: Hugging Face directories.

One format for every reader: SGLang, our server and `load_version` take the same files (`store` has
the layout and the rules of publication, `hf.save` the conversion).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.disk import REMEDIES, disk_errno
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.save import directory_contents
from agentcpm_jax.model import lora
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.store import (
    VersionWriter,
    check_file,
    is_collected,
    manifest,
    open_root,
    versions,
)


def publish_version(
    root: str | Path,
    version: int,
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: str = "",
    tokenizer_from: str | Path | None = None,
    describe: Callable[[], Mapping[str, str]] = dict,
) -> bool:
    """Writes one version of the weights; False when it exists or was collected already.

    Args:
      root: a directory or an fsspec URL; only one process publishes there.
      version: completed RL batches of the stage, 0 to 999,999.
      params: the tree of `model.params.init`, on any mesh of this process; adapters beside it are
        added to it.
      dtype: 'float32' or 'bfloat16'; empty: as the parameters are, bit for bit.
      tokenizer_from: a directory whose tokenizer, chat template and generation config go along.
      describe: {file: text} of what else goes along, such as a model card.

    Raises:
      UserError: the place cannot be used. ValueError: `params` are not the parameters of `cfg`.
    """
    stable = versions(root)
    if version in stable or is_collected(version, stable):
        return False
    if "adapters" in params:  # engines know nothing of them
        base = {name: leaf for name, leaf in params.items() if name != "adapters"}
        params = lora.merge(base, params["adapters"], cfg)
    contents = directory_contents(params, cfg, dtype, tokenizer_from)
    saved = dtype or str(np.dtype(params["embed"].dtype))
    writer = VersionWriter(root, version)
    try:
        for name, pieces in contents:
            writer.write(name, pieces)
        for name, text in describe().items():
            writer.write(name, [text.encode()])
        writer.commit({"model": dataclasses.asdict(cfg), "dtype": saved})
    except BaseException as error:
        with suppress(OSError):  # a disk that fails
            writer.discard()
        number = disk_errno(error, root)
        if number is None and not isinstance(error, OSError):
            raise
        fix = REMEDIES.get(number or 0, "see that its store is there")
        fix += " or name another pool.weights_dir, then the same command resumes"
        raise UserError(f"weights cannot be written to {root}: {error}; {fix}") from None
    return True


def load_version(root: str | Path, version: int) -> dict[str, Any]:
    """The parameters of a stable version, bit for bit, as arrays on the default device.

    Raises:
      UserError: the version is not there, or not on a disk of this machine, or a file's size or
        checksum is not the manifest's.
    """
    place = open_root(root)
    if not place.local:
        raise UserError(f"weights at {root} cannot be read in place; copy them to a local disk")
    directory = Path(place.version(version))
    for name, expected in manifest(root, version)["files"].items():
        check_file(directory / name, expected)
    return load_hf(directory)[0]
