"""Checkpoints: parameters, optimiser, loader state and configuration, whole or not at all.

Orbax writes every step into a temporary directory and renames it when all of it is on disk, so a
killed process leaves the previous step untouched. Before the rename a manifest with the checksums
of all files goes in, and a step is restored only if every byte of it is as it was written. Nothing
here falls back to an older step by itself: a damaged checkpoint is reported, with the command that
continues without it. A step may carry a snapshot of the experience log, which then survives the
loss of the log's disk.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from grain.checkpoint import CheckpointRestore, CheckpointSave

from agentcpm_jax.disk import refusals
from agentcpm_jax.files import sync_directory
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.manifest import MANIFEST, damage, seal
from agentcpm_jax.types import UserError

#: Version of the content of `meta`; increased when older readers would misread it.
SCHEMA = 1

#: The file of an experience log's snapshot within the item `log` of a step.
SNAPSHOT = "experience.db"


@dataclass(frozen=True)
class Restored:
    """What one checkpoint holds. `state` is None when no abstract state was given."""

    step: int
    state: Any
    config: dict[str, Any]
    extra: dict[str, Any]
    loader_state: Any


class Checkpointer:
    """Saves and restores the steps of one directory; the newest `keep` stay.

    Args:
      directory: where `<step>/` directories go; made by the first save.
      keep: how many finished steps are kept, at least 1.
      async_: True writes in the background; `save` returns when the arrays have left the device
        (they may be donated).
    """

    def __init__(self, directory: str | Path, keep: int = 3, async_: bool = True) -> None:
        if keep < 1:
            raise UserError(f"cannot keep {keep} checkpoints; keep at least 1")
        self.directory = Path(directory).absolute()
        self._keep, self._async = keep, async_
        self._manager: ocp.CheckpointManager | None = None

    def save(
        self,
        step: int,
        *,
        state: Any,
        loader: Any = None,
        loader_state: Any = None,
        config: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        log: ExperienceLog | None = None,
    ) -> bool:
        """Starts writing `step`; False when it is on disk already (recomputing gives the same).

        Args:
          step: how many steps are complete, >= 0.
          state: pytree of arrays, e.g. a TrainState.
          loader: a grain iterator; its state is taken before this returns, one file per process.
          loader_state: instead of `loader`, any JSON value that does not depend on the number of
            processes.
          config, extra: JSON mappings, copied before this returns.
          log: process 0 stores its position and, of an SQLite log, a snapshot. If process 0 gives
            an SQLite log, every process must.

        Raises:
          UserError: this step, or the one before, cannot be written: its disk is full, say.
          ValueError: both `loader` and `loader_state`; TypeError: something is not JSON.
        """
        if loader is not None and loader_state is not None:
            raise ValueError("give the loader or its state, not both")
        if step in self.steps():
            return False
        meta = {
            "schema": SCHEMA,
            "config": dict(config),
            "extra": dict(extra or {}),
            "loader_state": loader_state,
            "log": None if log is None else log.position(),
            "sealed": True,  # a manifest belongs to it; older releases wrote none
        }
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave(json.loads(json.dumps(meta))),
        }
        if loader is not None:
            items["loader"] = CheckpointSave(loader)
        if log is not None and not log.shared:
            items["log"] = _LogSave(log)  # an item of every process, written by the first
        with self._writing():
            return self._writer().save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self,
        step: int | None = None,
        abstract_state: Any = None,
        loader: Any = None,
        log: ExperienceLog | None = None,
    ) -> Restored | None:
        """Reads `step`, the latest when None; None when there is no checkpoint at all.

        Args:
          step: a finished step.
          abstract_state: pytree of arrays or `jax.ShapeDtypeStruct` (with shardings, else the first
            local device) that the stored state must match leaf for leaf; None reads configuration
            and extras only.
          loader: set to the saved position, from `loader` or `loader_state` of `save`.
          log: must be at least as far as it was when the step was saved.

        Raises:
          UserError: the step is missing, damaged, of another schema, or does not match
            `abstract_state`, or `log` is an older one.
        """
        self.wait()
        if step is None and (step := self.latest_step()) is None:
            return None
        path = self.directory / str(step)
        if step not in self.steps():
            raise UserError(f"no checkpoint {path}; finished steps there: {self.steps() or 'none'}")
        self._check_files(path, "" if abstract_state is not None else "meta/")
        meta = self._read_meta(path)
        if log is not None:
            _check_position(path, log, meta.get("log") or {})
        state = None if abstract_state is None else self._read_state(path, abstract_state)
        if loader is not None:
            self._restore_loader(path, loader, meta["loader_state"])
        return Restored(step, state, meta["config"], meta["extra"], meta["loader_state"])

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        """Reads only the leaves of `abstract_part`, a subtree such as {"params": ...}.

        Raises `UserError` as `restore` does.
        """
        self.wait()
        path = self.directory / str(step)
        if step not in self.steps():
            raise UserError(f"no checkpoint {path}; finished steps there: {self.steps() or 'none'}")
        self._check_files(path)
        return self._read_state(path, abstract_part, partial=True)

    def latest_step(self) -> int | None:
        """The newest finished step on disk; a save still under way does not count."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """All finished steps on disk, ascending; remains of killed saves do not count."""
        if not self.directory.is_dir():
            return []
        names = (p.name for p in self.directory.iterdir() if p.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def wait(self) -> None:
        """Waits until the save under way, if any, is on disk; raises its error, as of `save`."""
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the save under way, as `wait` does, and releases the background threads."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                self._manager.close()
                self._manager = None
                self._remove_leftovers()  # of a save that failed, whose last threads ended now

    def _writer(self) -> ocp.CheckpointManager:
        # Made by the first save, so that a process that only reads creates nothing and removes
        # nothing.
        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            _say_errors_once()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=self._async,
                # Else a directory that cannot be made is waited for, not reported.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                temporary_path_class=_SealedPath,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Of what cannot be written, removes the part that was: it holds room that is lacking."""
        try:
            with refusals(self.directory):
                yield
        except UserError:
            self._remove_leftovers()
            raise

    def _remove_leftovers(self) -> None:
        if jax.process_index() == 0:
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _read_meta(self, path: Path) -> dict[str, Any]:
        try:
            meta = json.loads((path / "meta" / "metadata").read_text())
            schema = meta["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, "meta/metadata cannot be read") from error
        if schema != SCHEMA:
            raise UserError(
                f"checkpoint {path} has schema {schema}, this version reads {SCHEMA}; "
                "use the agentcpm_jax version that wrote it"
            )
        return meta

    def _read_state(self, path: Path, abstract_state: Any, partial: bool = False) -> Any:
        target = jax.tree.map(_abstract, abstract_state)
        try:
            handler = ocp.StandardCheckpointHandler()
            found: Any = handler.metadata(path / "state")  # pyright: ignore[reportArgumentType]
            stored, wanted = _leaves(found.tree), _leaves(target)
            if partial:
                stored = {name: leaf for name, leaf in stored.items() if name in wanted}
            _check_match(path, stored, wanted)
            if partial:
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(target, restore_args, partial_restore=True)
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                    return reader.restore(path / "state", args=args)
            with ocp.Checkpointer(handler) as reader:
                return reader.restore(path / "state", args=ocp.args.StandardRestore(target))
        except UserError:
            raise
        except Exception as error:  # its type depends on the storage layer that noticed the damage
            said = f"its state cannot be read ({type(error).__name__})"
            raise self._damaged(path, said) from error

    def _restore_loader(self, path: Path, loader: Any, loader_state: Any) -> None:
        if loader_state is not None:
            loader.set_state(loader_state)
            return
        if not (path / "loader").is_dir():
            raise UserError(f"checkpoint {path} holds no loader state; restore it without a loader")
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                reader.restore(path, args=ocp.args.Composite(loader=CheckpointRestore(loader)))
        except (OSError, ValueError) as error:
            raise self._damaged(path, "its loader state cannot be read") from error

    def _check_files(self, path: Path, below: str = "") -> None:
        """Raises `UserError` unless the files of a step are as they were written."""
        if said := _damage(path, below):
            raise self._damaged(path, said)

    def _damaged(self, path: Path, said: str) -> UserError:
        older = [s for s in self.steps() if s < int(path.name)]
        while older and _damage(self.directory / str(older[-1])):
            older.pop()
        outcome = f"go on from step {older[-1]}" if older else "start again"
        worse = [s for s in self.steps() if older[-1:] < [s] and s <= int(path.name)]
        fix = " ".join(str(self.directory / str(s)) for s in worse)
        return UserError(
            f"checkpoint {path} is damaged: {said}; delete it (rm -r {fix}) to {outcome}"
        )


def newest_snapshot(directories: Iterable[Path]) -> Path | None:
    """The experience log in the newest checkpoint of the first directory that has one.

    Raises `UserError` when it is not as it was written.
    """
    for directory in directories:
        checkpoints = Checkpointer(directory)
        for step in reversed(checkpoints.steps()):
            path = directory / str(step) / "log" / SNAPSHOT
            if path.is_file():
                checkpoints._check_files(directory / str(step), "log/")
                return path
    return None


def _say_errors_once() -> None:
    """Keeps the tracebacks of orbax's threads off the screen: what they say is raised as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_echo)
    if getattr(sys.unraisablehook, "func", None) is not _but_late_ones:
        sys.unraisablehook = partial(_but_late_ones, sys.unraisablehook)


def _is_no_echo(record: logging.LogRecord) -> bool:
    orbax = f"{os.sep}orbax{os.sep}"
    return not (record.exc_info and orbax in record.pathname + record.getMessage())


def _but_late_ones(show: Callable[[Any], None], unraisable: Any) -> None:
    """Of several writes that fail, tensorstore tells all but the first to a loop that has ended."""
    if str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)


_AtomicPath = ocp.path.atomicity.AtomicRenameTemporaryPath


class _SealedPath(_AtomicPath):
    """The directory in which a step grows; complete, it gets a manifest, and then its name."""

    async def finalize(self) -> None:
        if not self.get_final().name.isdecimal():  # an item of a step
            await super().finalize()
            return
        name = f"{self.get().name}-complete"  # another temporary one, in which orbax is done
        complete, final = self.get().with_name(name), self.get_final()
        times = self._checkpoint_metadata_store
        await _AtomicPath(self.get(), complete, checkpoint_metadata_store=times).finalize()
        await asyncio.to_thread(seal, Path(complete))
        os.rename(complete, final)
        sync_directory(Path(final).parent)


class _LogHandler(ocp.CheckpointHandler):
    """Writes the snapshot into the step's temporary directory: it appears with the step."""

    def save(self, directory: Any, args: _LogSave) -> None:
        if jax.process_index() == 0:
            args.log.snapshot(Path(directory) / SNAPSHOT)

    def restore(self, directory: Any, args: Any = None) -> Path:
        return Path(directory) / SNAPSHOT


@ocp.args.register_with_handler(_LogHandler, for_save=True, for_restore=True)
@dataclass
class _LogSave(ocp.args.CheckpointArgs):
    log: ExperienceLog


def _check_position(path: Path, log: ExperienceLog, saved: Mapping[str, int]) -> None:
    now = log.position()
    behind = [f"{now[name]} {name}, then {n}" for name, n in saved.items() if now[name] < n]
    if behind:
        fix = "restore the database from a newer backup"
        if not log.shared:
            fix = f"move it away, and the snapshot in {path} takes its place"
        raise UserError(
            f"experience log {log.where} is older than checkpoint {path} ({'; '.join(behind)}); "
            f"{fix}"
        )


def _abstract(leaf: Any) -> Any:
    if not hasattr(leaf, "shape"):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _check_match(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    fix = "resume with the configuration that wrote it, or give another workdir"
    for name in sorted(expected.keys() | found.keys()):
        stored, wanted = (_describe(tree.get(name)) for tree in (found, expected))
        if stored != wanted:
            raise UserError(
                f"checkpoint {path} does not match: leaf {name} is {stored}, "
                f"expected {wanted}; {fix}"
            )


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # stored as its bits
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _damage(path: Path, below: str = "") -> str:
    """What is wrong with the files of a step; of one without a manifest, whether one is cut short.

    Every process of a job reads all of them: none may go on with what another one refuses.
    """
    if (path / MANIFEST).exists():
        return damage(path, below)
    try:
        sealed = json.loads((path / "meta" / "metadata").read_bytes()).get("sealed")
    except (OSError, ValueError, AttributeError):
        return "meta/metadata cannot be read"
    return f"{MANIFEST} is missing" if sealed else _cut_short(path / "state")


def _cut_short(directory: Path) -> str:
    """The file or leaf of a stored state that is cut short, or nothing. Reads indices, no array."""
    for file in (
        directory / "_METADATA",
        directory / "_sharding",
        *(directory / "array_metadatas").glob("*"),
    ):
        if not _is_json(file):
            return f"{file.relative_to(directory.parent)} cannot be read"
    try:
        store = tensorstore.KvStore.open(f"file://{directory}/").result()
        for name, data, end in _stored_values(store):
            path = directory / data
            if not path.is_file() or path.stat().st_size < end:
                return f"leaf {name} is cut short"
    except (OSError, ValueError):
        return "the index of its arrays cannot be read"
    return ""


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _stored_values(store: tensorstore.KvStore) -> Iterator[tuple[str, str, int]]:
    """(leaf name, data file, offset of its end there) of every chunk of an OCDBT database."""
    root = tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]
    nodes = [(b"", root["location"])] if "location" in root else []
    while nodes:
        prefix, location = nodes.pop()
        for entry in tensorstore.ocdbt.dump(store, location).result()["entries"]:
            if "location" in entry:
                nodes.append((prefix + entry["subtree_common_prefix"], entry["location"]))
            elif "indirect_value" in entry:
                # "value:<directory>:<file>:<offset>:<length>", the directory empty for a single
                # database
                file, offset, length = entry["indirect_value"].rsplit(":", 2)
                name = (prefix + entry["key"]).decode().rsplit("/", 1)[0]
                yield name, "".join(file.split(":")[1:]), int(offset) + int(length)
