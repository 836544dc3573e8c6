"""Atomic writes: a file or folder is either complete or not there. Also hard links and digests."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import CarvanaError

_MIN_LINKED_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``: renamed to ``target`` after the block, deleted if the block fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text with LF line ends, atomically."""
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def read_versioned(path: Path) -> str:
    """Return the UTF-8 text of a file that is kept in Git; a byte order mark is removed.

    Raises CarvanaError if the file has an unresolved merge conflict, and OSError or UnicodeDecodeError as
    ``Path.read_text`` does.
    """
    text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            raise CarvanaError(
                f"{path}, line {number}: unresolved merge conflict. Edit the file, or take one side with "
                f"'git checkout --ours {path}' or '--theirs', then 'git add {path}'."
            )
    return text


def sha256_of_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content, as ``sha256sum`` prints it."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_of(*parts: bytes) -> str:
    """Return the hex SHA-256 of the parts, each preceded by its length: ``ab, c`` and ``a, bc`` differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def publish_tree(source: Path, target: Path) -> None:
    """Replace ``target`` by a copy of the folder or file ``source``, and delete what a killed call left behind.

    Files are linked or copied as by ``link_or_copy``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.????????.part"):
        remove_path(stale)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        if source.is_dir():
            shutil.copytree(source, temporary, copy_function=link_or_copy)
        else:
            link_or_copy(source, temporary)
        _replace(temporary, target)
    finally:
        remove_path(temporary)


def remove_path(path: Path) -> None:
    """Remove a file, a symbolic link or a folder; do nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(temporary: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # A folder that is not empty cannot be replaced in one call, so it is moved away first.
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.replace(target)


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Hard-link a file of 1 MiB or more if the file system can, to save space; else copy it.

    Small files are copied because people edit them in place. Returns ``target``, as ``shutil.copytree`` expects.
    """
    if os.stat(source).st_size >= _MIN_LINKED_BYTES:  # noqa: PTH116 - copytree passes strings
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(source), target)  # realpath: link the file, not a symbolic link to it
            return str(target)
    shutil.copyfile(source, target)
    return str(target)
