"""A manifest: sizes and checksums of all files of a directory, written last, checked on reading.

Against damage, not against forgery: a flipped bit, a file that is cut short, missing or too many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import xxhash

from agentcpm_jax.files import sync_tree, write_atomically

MANIFEST = "manifest.json"
#: Ten times as fast as sha256, which would cost more CPU than all the rest of a publication.
CHECKSUM = "xxh3_128"
checksum = xxhash.xxh3_128
SCHEMA = 1


def seal(directory: Path) -> None:
    """Write the manifest of what lies in `directory`, once all of that is on disk."""
    sync_tree(directory)
    found = {}
    for name, path in _files(directory):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, checksum).hexdigest()
            found[name] = {"bytes": file.tell(), CHECKSUM: digest}
    content = {"schema": SCHEMA, "files": found}
    write_atomically(directory / MANIFEST, json.dumps(content, indent=1))


def damage(directory: Path, below: str = "") -> str:
    """What is wrong with the files of `directory`, or with those `below` a folder; else empty."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        expected = {name: (f["bytes"], f[CHECKSUM]) for name, f in content["files"].items()}
        if content["schema"] != SCHEMA:
            return f"{MANIFEST} has schema {content['schema']}, this version reads {SCHEMA}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    found = dict(_files(directory))
    for name in sorted(n for n in expected.keys() | found.keys() if n.startswith(below)):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        if said := differs(found[name], *expected[name]):
            return f"{name} {said}"
    return ""


def differs(path: Path, size: int, digest: str) -> str:
    """How a file is not what a manifest says of it; empty when it is."""
    try:
        if (found := path.stat().st_size) != size:
            return f"has {found} bytes, {size} were written"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, checksum).hexdigest() == digest
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if same else "has another checksum than what was written"


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """(name within `directory`, path) of everything that is no folder, but for the manifest."""
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if name != MANIFEST and (path.is_symlink() or not path.is_dir()):
            yield name, path
