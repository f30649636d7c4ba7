"""Atomic writes: a file is either complete or absent. Write every file of the project with these functions."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`, and moves it there once the block has succeeded.

    If the block raises, `path` stays as it was and the temporary file is removed. The temporary name is unique, so
    processes writing the same file do not disturb each other, and keeps the suffix, which some writers depend on.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{''.join(path.suffixes[-2:])}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder next to `path`, and moves it there once the block has succeeded.

    `path` must not exist, or be an empty folder.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def move(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Moves a complete file to its place, for what takes several tries to write; otherwise use `replacing`."""
    os.replace(temporary, path)
