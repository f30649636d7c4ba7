"""Downloads, and a disk cache of decoded arrays, as decoding records in Python takes seconds to minutes."""

import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from absl import logging

from posterior_matching.atomic import replacing
from posterior_matching.errors import UserError

_DECODING = 2  # increment when decoding or preprocessing changes


def folder() -> Path:
    """Returns `$POSTERIOR_MATCHING_CACHE`, `$XDG_CACHE_HOME/posterior_matching` or `~/.cache/posterior_matching`.

    Raises:
        UserError: None of these is set, and the user has no home directory.
    """
    if chosen := os.environ.get("POSTERIOR_MATCHING_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posterior_matching"
    except RuntimeError as error:
        raise UserError("no home directory for cached data: set POSTERIOR_MATCHING_CACHE to a folder") from error


def cached(key: str, sources: Iterable[Path], compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns `compute()`, or what it returned before for the same key and unchanged source files.

    Unreadable entries are recomputed, and entries that cannot be written are skipped with a warning. The files can be
    deleted at any time.

    Args:
        key: Everything that the result depends on besides the sources, such as dataset, version and split.
        sources: Files that the result is computed from. A new name, size or modification time makes a new entry.
        compute: Computes the arrays.
    """
    state = [(source.name, source.stat().st_size, source.stat().st_mtime_ns) for source in sorted(sources)]
    fingerprint = hashlib.sha256(repr((_DECODING, key, state)).encode()).hexdigest()[:16]
    path = folder() / f"{re.sub(r'[^a-z0-9.]+', '-', key)}-{fingerprint}.npz"
    try:
        with path.open("rb") as saved, np.load(saved, allow_pickle=False) as archive:
            if damaged := archive.zip.testzip():  # compares checksums, which reading an array may not
                raise zipfile.BadZipFile(damaged)
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError):
        arrays = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        logging.warning("not caching decoded data: %s", error)
    return arrays


def file_fingerprint(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, path: Path) -> None:
    """Downloads a file, from Google Drive by gdown, unless it exists; it appears once it is complete.

    Raises:
        ConnectionError: It cannot be downloaded or written. The message is a few words.
    """
    import gdown
    import pooch

    def from_drive(url: str, output: str, _: object) -> None:
        gdown.download(url, output=output)

    pooch.get_logger().setLevel("WARNING")  # it would print how to pin the checksum
    try:
        drive = from_drive if "://drive.google.com/" in url else None
        pooch.retrieve(url, None, path.name, path.parent, downloader=drive, progressbar=sys.stderr.isatty())
    except Exception as error:  # of requests, gdown or the file system: they have no common base
        raise ConnectionError(getattr(error, "strerror", None) or type(error).__name__) from error
