"""Which files an upload takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dure.client.tree import files_of, inside
from dure.wire.errors import InvalidInput


def paths(source: Path, to: str = "", follow: bool = False) -> list[str]:
    return [file.path for file in files_of(source, to, follow_symlinks=follow)]


def test_a_directory_gives_its_content(tmp_path: Path) -> None:
    for name in ("b", "a/c", ".hidden/d", ".git/config", "a/.git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert paths(tmp_path) == [".hidden/d", "a/c", "b"]
    assert paths(tmp_path, "sub/") == ["sub/.hidden/d", "sub/a/c", "sub/b"]


def test_a_file_gives_itself(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    assert paths(tmp_path / "f") == ["f"]
    assert paths(tmp_path / "f", "other") == ["other"]
    assert paths(tmp_path / "f", "sub/") == ["sub/f"]
    with pytest.raises(InvalidInput, match="not a path inside"):
        paths(tmp_path / "f", "../other")


def test_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("x")
    (root / "real").write_text("x")
    (root / "inner").symlink_to("real")
    assert paths(root) == ["inner", "real"]
    (root / "out").symlink_to(outside)
    (root / "dangling").symlink_to("nowhere")
    with pytest.raises(InvalidInput) as caught:
        paths(root)
    assert len(caught.value.violations) == 2
    (root / "dangling").unlink()
    assert paths(root, follow=True) == ["inner", "out/secret", "real"]
    (root / "loop").symlink_to(root)
    with pytest.raises(InvalidInput, match="contains it"):
        paths(root)


def test_what_cannot_be_uploaded(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        paths(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="neither a file nor a directory"):
        paths(tmp_path)
    with pytest.raises(InvalidInput, match="neither a file nor a directory"):
        paths(tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    (tmp_path / "back\\slash").touch()
    with pytest.raises(InvalidInput, match="backslash"):
        paths(tmp_path)


@pytest.mark.parametrize("path", ["", "/a", "a/../b", "..", "a\\b", "a\0b"])
def test_paths_that_are_not_inside(path: str) -> None:
    with pytest.raises(InvalidInput):
        inside(path)
