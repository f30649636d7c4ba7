"""Files: a written one is either complete or absent, and the errors of the file system fit on one line."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from posterior_matching.errors import UserError


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


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors about impossible paths into a one-line UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = repr(str(path)) if len(str(path)) < 100 else repr(f"{str(path)[:100]}...")
        raise UserError(f"cannot read the run directory {shown} ({reason}): choose another --run_dir") from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns file system errors into a one-line UserError that names the run directory."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # Orbax wraps what its threads raise
            cause = cause.__cause__ or cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else _known_reason(error)
        if reason is None:
            raise
        full = reason in ("No space left on device", "Disk quota exceeded")
        remedy = "make space, then the same command resumes" if full else "choose another --run_dir"
        raise UserError(f"cannot write the run directory {path} ({reason}): {remedy}") from error


_REASONS = ("No space left on device", "Read-only file system", "Permission denied", "Disk quota exceeded", "null byte")


def _known_reason(error: Exception) -> str | None:
    """The file system error in a message from a library's C++ code; None if there is none."""
    for reason in _REASONS:
        if reason in str(error):
            return reason
    return None
