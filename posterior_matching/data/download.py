"""Downloads that can be interrupted, and checksums of files that were downloaded or brought by hand."""

import contextlib
from pathlib import Path

import filelock
import requests
from absl import logging

from posterior_matching import atomic
from posterior_matching.data.cache import file_fingerprint
from posterior_matching.errors import UserError
from posterior_matching.progress import progress_bar

_BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def fetch(url: str, path: Path) -> None:
    """Downloads a file, from where an earlier download stopped; one process at a time.

    What has arrived is kept in `<path>.part`, and the version it belongs to (the server's ETag or time of modification)
    in `<path>.part.version`. If the server has another version by then, or cannot send the rest alone, the download
    starts again. A broken connection is resumed at once, as long as every try gets further than the one before.

    Args:
        url: What to download.
        path: Where to; nothing happens if it exists.

    Raises:
        OSError: The server cannot be reached or refuses (`requests.RequestException`), or the file cannot be written.
        UserError: It was interrupted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, lock = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.lock")
    with filelock.FileLock(lock):
        try:
            while not path.exists():
                arrived = _size(part)
                try:
                    _continue(url, part)
                except _BROKEN:
                    if _size(part) <= arrived:
                        raise
                    continue
                except KeyboardInterrupt:
                    raise UserError(f"interrupted: the same command resumes the download of {path.name}") from None
                atomic.move(part, path)
                _version(part).unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _continue(url: str, part: Path) -> None:
    """Downloads what is missing from a part; raises a `requests.RequestException` if that is not all that came."""
    arrived = _size(part) if _version(part).exists() else 0
    headers = {"Accept-Encoding": "identity"}  # not unpacked on the way, so that bytes can be counted
    if arrived:
        headers |= {"Range": f"bytes={arrived}-", "If-Range": _version(part).read_text()}
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if arrived and response.status_code == 416:  # there is no rest
            _version(part).unlink()
            return _continue(url, part)
        response.raise_for_status()
        if response.status_code != 206:
            arrived = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {arrived}-"):
            raise requests.RequestException(f"the server sent the wrong part of {url}")
        missing = response.headers.get("Content-Length")
        total = arrived + int(missing) if missing else None
        with part.open("ab" if arrived else "wb") as file:
            _remember_version(part, response.headers.get("ETag") or response.headers.get("Last-Modified"))
            with progress_bar(total=total, initial=arrived, desc=part.stem, unit="B", unit_scale=True) as bar:
                for chunk in response.iter_content(1 << 16):
                    bar.update(file.write(chunk))
    if total is not None and _size(part) != total:
        raise requests.ConnectionError(f"{_size(part)} of {total} bytes arrived")


def _remember_version(part: Path, version: str | None) -> None:
    if version is None:
        _version(part).unlink(missing_ok=True)
    else:
        atomic.write_text(_version(part), version)


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def compare_checksum(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Raises:
        UserError: It is not the one that `record_checksum` recorded.
    """
    found, record = file_fingerprint(path), _record(path)
    if record.exists() and record.read_text(encoding="utf-8").split()[:1] != [found]:
        raise UserError(
            f"'{path}' is not the file that was used before (its SHA-256 is {found}, not that in '{record.name}'): "
            f"put the old file back, or delete '{record.name}' if the new one is right"
        )
    return found


def record_checksum(path: Path, checksum: str) -> None:
    """Writes the checksum of a file to `<path>.sha256`, in the format of `sha256sum`, if it can be written."""
    try:
        atomic.write_text(_record(path), f"{checksum}  {path.name}\n")
    except OSError as error:
        logging.warning("cannot record the checksum of '%s': %s", path, error)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
