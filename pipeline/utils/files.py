"""Atomic file writes, digests, and moving of results."""

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

_LINK_FROM_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that becomes ``target`` if the block ends without an error."""
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
    """Write UTF-8 text with LF line ends; the file appears whole or not at all."""
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON; the file appears whole or not at all."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def read_versioned(path: Path) -> str:
    """Return the UTF-8 text of a file that is kept in git, with or without a byte order mark.

    Raises OSError and UnicodeDecodeError, and CarvanaError for the marks of a merge conflict.
    """
    text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            raise CarvanaError(
                f"{path}, line {number}: unresolved merge conflict. Edit the file, or take one side with "
                f"'git checkout --ours {path}' or '--theirs', then 'git add {path}'."
            )
    return text


def sha256_of(*parts: bytes) -> str:
    """Return the hex SHA-256 of the parts, each preceded by its length so that borders count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def publish_tree(source: Path, target: Path) -> None:
    """Put a copy of the folder or file ``source`` at ``target``, replacing what is there.

    Large files are hard-linked if the file system can, to save space; small ones are copied, since people edit
    them in place.
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
        _replace_dir(temporary, target)
    finally:
        remove_path(temporary)


def remove_path(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace_dir(temporary: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # A folder can't be replaced in one call, so the old one is renamed first.
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)
    else:
        temporary.replace(target)


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Hard-link a large file if the file system can, else copy it; returns ``target``, for shutil."""
    if os.stat(source).st_size >= _LINK_FROM_BYTES:  # noqa: PTH116 - copytree hands over strings
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(source), target)  # the file itself, not a symlink that leads there
            return str(target)
    shutil.copyfile(source, target)
    return str(target)
