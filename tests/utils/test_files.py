import errno
import os
import shutil
from pathlib import Path

import pytest

from pipeline.utils.files import atomic_write, publish_tree, remove_path, sha256_of, write_json, write_text
from pipeline.workspace import project_root

LARGE = b"x" * (1 << 20)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- atomic_write


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        temporary.write_bytes(b"whole")
    assert read(tmp_path) == {"deep/a.txt": b"whole"}


def test_a_failure_leaves_nothing_new_and_the_old_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    for target in (tmp_path / "a.txt", tmp_path / "b.txt"):
        with pytest.raises(OSError, match="no space"), atomic_write(target) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "no space")
    assert read(tmp_path) == {"a.txt": b"old"}


def test_text_and_json_have_lf_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é\nb\n")
    write_json(tmp_path / "a.json", {"k": [1]})
    assert (tmp_path / "a.txt").read_bytes() == "é\nb\n".encode()
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "k": [\n    1\n  ]\n}\n'


def test_borders_of_parts_count_in_a_digest() -> None:
    assert sha256_of(b"ab", b"c") != sha256_of(b"a", b"bc")


# ---------------------------------------------------------------- publish_tree


def test_publish_replaces_a_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"a": b"new", "deep/b": b"new too"})
    target = write(tmp_path / "out" / "target", {"a": b"old", "gone": b"old"})
    publish_tree(source, target)
    publish_tree(source, target)
    assert read(target) == read(source) == {"a": b"new", "deep/b": b"new too"}
    assert names(tmp_path / "out") == ["target"]


def test_publish_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, {"source": b"new", "out/target": b"old"})
    publish_tree(tmp_path / "source", tmp_path / "out" / "target")
    assert read(tmp_path) == {"source": b"new", "out/target": b"new"}


def test_a_publish_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", {"a": b"new", "b": b"new"})
    target = write(tmp_path / "out" / "target", {"a": b"old"})
    copyfile, done = shutil.copyfile, list[str]()

    def copy_once(source: str, target: str) -> None:
        if done:
            raise OSError(errno.ENOSPC, "no space")
        done.append(copyfile(source, target))

    monkeypatch.setattr(shutil, "copyfile", copy_once)
    with pytest.raises((OSError, shutil.Error), match="no space"):
        publish_tree(source, target)
    assert done
    assert read(tmp_path / "out") == {"target/a": b"old"}


def test_what_a_killed_publish_left_goes_with_the_next(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"a": b"new"})
    write(tmp_path / "out", {".target.0123abcd.part/a": b"half", ".targets.0123abcd.part": b"another's"})
    publish_tree(source, tmp_path / "out" / "target")
    assert names(tmp_path / "out") == [".targets.0123abcd.part", "target"]


def test_large_files_are_linked_and_small_ones_copied(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"large": LARGE, "small": b"x"})
    publish_tree(source, tmp_path / "folder")
    publish_tree(source / "large", tmp_path / "file")
    assert (tmp_path / "folder" / "large").samefile(source / "large")
    assert (tmp_path / "file").samefile(source / "large")
    assert not (tmp_path / "folder" / "small").samefile(source / "small")


def test_large_files_are_copied_where_links_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, "another file system")

    source = write(tmp_path / "source", {"large": LARGE})
    monkeypatch.setattr(os, "link", refuse)
    publish_tree(source, tmp_path / "target")
    assert read(tmp_path / "target") == {"large": LARGE}
    assert not (tmp_path / "target" / "large").samefile(source / "large")


def test_remove_takes_files_folders_links_and_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"file": b"", "folder/a": b"", "kept/a": b""})
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("file", "folder", "link", "nothing"):
        remove_path(tmp_path / name)
    assert read(tmp_path) == {"kept/a": b""}
    assert names(tmp_path) == ["kept"]


# ---------------------------------------------------------------- project_root


def test_project_root_is_the_workspace_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert project_root() == project_root(tmp_path) == tmp_path.resolve()
    assert project_root(tmp_path / ".dvc" / "tmp") == (tmp_path / ".dvc" / "tmp").resolve()


@pytest.mark.parametrize("copy", ["x", "standalone/tmpabc", "tmpabc/sub/folder"])
def test_project_root_of_a_temporary_experiment(tmp_path: Path, copy: str) -> None:
    assert project_root(tmp_path / ".dvc" / "tmp" / "exps" / copy) == tmp_path.resolve()
