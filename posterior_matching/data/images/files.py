"""Reads users' image files from folders and archives: decoding, splits and labels."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import threading
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps
from tqdm import tqdm

from posterior_matching.data.cache import cached, file_fingerprint
from posterior_matching.data.images.options import (
    PARTS,
    ImageFormat,
    ImageOptions,
    Images,
    first_names,
    fit,
    hash_text,
    reason,
    size_text,
)
from posterior_matching.errors import OptionError, UserError

_METADATA = ("__MACOSX", "Thumbs.db", "desktop.ini")
# Pillow opens EPS and WMF with other programs, and cannot decode the rest.
_NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that are read."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - set(_NOT_READ)))


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of image files, in lower case."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def fingerprint(source: str | Path) -> str:
    """Returns the SHA-256 of a file, or of all files of a folder with their names."""
    path = Path(source)
    if path.is_file():
        return file_fingerprint(path)
    files = {name: file for name, file in _visible_files(path).items() if file.exists()}

    def compute() -> dict[str, np.ndarray]:
        return {"digest": np.array(hash_text([(name, file_fingerprint(file)) for name, file in files.items()]))}

    key = f"fingerprint-{hash_text((str(path.resolve()), list(files)))[:12]}"
    return str(cached(key, files.values(), compute)["digest"])


def state(path: Path) -> Any:
    """Returns what changes when a file or a folder does."""
    files = _visible_files(path) if path.is_dir() else {path.name: path}
    stats = {name: file.stat() if file.exists() else None for name, file in files.items()}
    return {name: stat and (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _visible_files(folder: Path) -> dict[str, Path]:
    """Returns the files in a folder and its subfolders, by name relative to it; links are followed."""

    def refuse(error: OSError) -> None:
        raise error

    files, seen = {}, set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        for name in names:
            path = Path(root, name)
            files[path.relative_to(folder).as_posix()] = path
    return {name: files[name] for name in sorted(files) if _is_visible(name)}


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part in _METADATA for part in name.split("/"))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes], list[Path]]]:
    """Yields the names of the visible files of a source, a function that reads one, and the files that hold them."""
    if path.is_dir():
        if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
            raise UserError(f"'{path}' is a run directory, not a folder of images")
        files = _visible_files(path)
        yield list(files), lambda name: files[name].read_bytes(), [file for file in files.values() if file.exists()]
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [member.filename for member in archive.infolist() if not member.is_dir()]
            named = {member.replace("\\", "/"): member for member in members}
            for name in named:
                if re.match("/|[A-Za-z]:", name) or ".." in name.split("/"):
                    raise UserError(f"'{path}' names a file outside of itself, '{name}': make a new archive")
            lock = threading.Lock()  # since Python 3.12, concurrent reads of one archive fail: "Overlapped entries"

            def read(name: str) -> bytes:
                with lock:
                    return archive.read(named[name])

            yield sorted(filter(_is_visible, named)), read, [path]
    else:
        yield [path.name], lambda _: path.read_bytes(), [path]


def read_files(path: Path, options: ImageOptions, known: ImageFormat | None, strict: bool) -> Images:
    """Reads the images of a folder, an archive or a single file; `strict`: unreadable files are an error."""
    with opened(path) as (names, read, holders):
        candidates = [name for name in names if Path(name).suffix.lower() in suffixes() or not Path(name).suffix]
        if not candidates:
            raise UserError(f"'{path}' holds no images" + (f": it has {first_names(names)}" if names else ""))
        key = f"decoded-{hash_text((str(path.resolve()), candidates, dataclasses.astuple(options)))[:12]}"
        remedy = f"resize them to {size_text(known.shape[:2])}" if known else "set config.images.size=64 to resize them"
        stored = cached(key, holders, lambda: _decode_all(str(path), candidates, read, options, remedy))
    broken, notes = json.loads(str(stored["broken"])), json.loads(str(stored["notes"]))
    others = [name for name in names if name not in candidates or (name in broken and not Path(name).suffix)]
    if unread := [f"{name}: {why}" for name, why in broken.items() if name not in others]:
        text = f"cannot read {len(unread)} of the files of '{path}' ({first_names(unread)})"
        if strict:
            raise UserError(f"{text}: remove or replace {'it' if len(unread) == 1 else 'them'}")
        logging.warning("%s: left out", text)
    if others:
        logging.warning("%d of the files of '%s' are no images (%s): left out", len(others), path, first_names(others))
    for note, found in notes.items():
        logging.warning("%d of the images of '%s' %s (%s)", len(found), path, note, first_names(found))
    x, kept = stored["x"], [candidates[i] for i in stored["kept"]]
    channels = options.channels or (known.shape[2] if known else x.shape[3])
    if x.shape[3] > channels:
        colour = [name for name, image in zip(kept, x, strict=True) if (image != image[:, :, :1]).any()]
        found = f"{len(colour)} of the images of '{path}' are in colour ({first_names(colour)})"
        raise UserError(f"{found}, but the run was trained on grey ones: make them grey")
    parts, folders = _parts_and_folders(kept, str(path))
    label, labels = _labels(kept, folders, known.labels if known else (), str(path))
    x = x if x.shape[3] == channels else np.repeat(x, channels, axis=3)
    kind = ImageFormat(x.shape[1:], "uint8", (0.0, 255.0), labels)
    return Images(str(path), x, 255.0, tuple(kept), kind, fingerprint(path), stored["sizes"], label, parts)


def _decode_all(
    source: str, names: list[str], read: Callable[[str], bytes], options: ImageOptions, remedy: str
) -> dict[str, np.ndarray]:
    images: dict[int, _Decoded] = {}
    broken: dict[str, str] = {}
    notes: dict[str, list[str]] = collections.defaultdict(list)
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = pool.map(lambda name: _decode(name, read, options), names)
        try:
            for i, decoded in enumerate(tqdm(results, f"decoding {source}", len(names), delay=5, disable=None)):
                if isinstance(decoded, str):
                    broken[names[i]] = decoded
                    continue
                images[i] = decoded
                first, image = next(iter(images.items()))
                if image.pixels.shape[:2] != decoded.pixels.shape[:2]:
                    pair = [f"'{names[j]}' is {size_text(images[j].pixels.shape[:2])}" for j in (first, i)]
                    raise UserError(f"the images of '{source}' differ in size ({', '.join(pair)} pixels): {remedy}")
                for note in decoded.notes:
                    notes[note].append(names[i])
        finally:
            pool.shutdown(cancel_futures=True)
    if not images:
        name, why = next(iter(broken.items()))
        raise UserError(f"'{source}' holds no images: of {len(broken)} files none can be read ({name}: {why})")
    channels = max(image.pixels.shape[2] for image in images.values())
    x = np.empty((len(images), *next(iter(images.values())).pixels.shape[:2], channels), np.uint8)
    for row, image in zip(x, images.values(), strict=True):
        row[:] = image.pixels
    sizes = np.array([image.size for image in images.values()])
    texts = {"broken": np.array(json.dumps(broken)), "notes": np.array(json.dumps(notes))}
    return {"x": x, "kept": np.array(list(images)), "sizes": sizes, **texts}


class _Decoded(NamedTuple):
    pixels: np.ndarray  # [H, W, 1 or 3] uint8
    size: tuple[int, int]  # before cropping and resizing
    notes: list[str]


def _decode(name: str, read: Callable[[str], bytes], options: ImageOptions) -> _Decoded | str:
    """Returns an image, or why it cannot be read."""
    notes = []
    try:
        with Image.open(io.BytesIO(read(name)), formats=formats()) as image:
            # The further pictures of an MPO, which many cameras write as .jpg, are no pages.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                notes.append("are animated or have several pages, of which the first is taken")
            upright = ImageOps.exif_transpose(image)
            solid = _opaque(upright)
            if solid is not upright:
                notes.append("are transparent, shown on white")
            fitted = fit(_in_eight_bits(solid, name, options), options, name)
    except UserError:
        raise
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:  # whatever Pillow and zipfile raise for damaged files
        return reason(error)
    pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, -1)
    grey = (pixels == pixels[:, :, :1]).all()
    return _Decoded(pixels[:, :, :1] if grey else pixels, (upright.height, upright.width), notes)


def _opaque(image: Image.Image) -> Image.Image:
    """Returns the image itself if nothing of it is transparent."""
    if not image.has_transparency_data:
        return image
    with_alpha = image.convert("RGBA")
    if with_alpha.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha)


def _in_eight_bits(image: Image.Image, name: str, options: ImageOptions) -> Image.Image:
    """Returns the image in mode L or RGB."""
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if not deep:
        image = image.convert("L" if options.channels == 1 or image.mode in ("1", "L") else "RGB")
    if not deep and options.range is None:
        return image
    values = np.asarray(image).astype(np.float64)
    found = f"'{name}' has values from {values.min():g} to {values.max():g}"
    if options.range is None:
        raise UserError(f"{found}, more than 8 bits: set config.images.range to (black, white), such as (0, 65535)")
    black, white = options.range
    if not (values.min() >= black and values.max() <= white):
        raise OptionError("config.images.range", f"is {options.range}, but {found}")
    return Image.fromarray(np.rint((values - black) / (white - black) * 255).astype(np.uint8))


# Splits and labels ---------------------------------------------------------------------------------------------------


def _parts_and_folders(names: list[str], source: str) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Returns the indices of each part, and the folders that each image lies in, without those of the parts.

    Folders named train, val and test are the parts. Otherwise a hash of an image's name decides, so that images added
    later leave the others where they are: 80% train, 10% val, 10% test.
    """
    folders = [name.split("/")[:-1] for name in names]
    while all(folders) and len({inside[0] for inside in folders}) == 1:
        folders = [inside[1:] for inside in folders]
    outermost = [inside[0].lower() if inside else "" for inside in folders]
    found = {PARTS[name] for name in outermost if name in PARTS}
    if "train" not in found or len(found) == 1:
        part_of = np.array([_part_by_name(name) for name in names])
        return {part: np.flatnonzero(part_of == part) for part in ("train", "val", "test")}, folders
    for name, folder in zip(names, outermost, strict=True):
        if folder not in PARTS:
            raise UserError(f"'{name}' lies next to the folders {', '.join(sorted(found))} of '{source}': move it")
    part_of = np.array([PARTS[name] for name in outermost])
    order = [part for part in ("train", "val", "test") if part in found]
    return {part: np.flatnonzero(part_of == part) for part in order}, [inside[1:] for inside in folders]


def _part_by_name(name: str) -> str:
    digest = hashlib.sha256(unicodedata.normalize("NFC", name).encode(errors="surrogateescape")).digest()
    return {0: "test", 1: "val"}.get(int.from_bytes(digest[:8]) % 10, "train")


def _labels(
    names: list[str], folders: list[list[str]], known: tuple[str, ...], source: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns the index of each image's label, and the labels' names: its folder, if all images lie in several."""
    if known:
        of_image = [next((folder for folder in name.split("/")[:-1] if folder in known), None) for name in names]
    else:
        of_image = [inside[0] if inside else None for inside in folders]
    labels = known or tuple(sorted({label for label in of_image if label is not None}))
    if None in of_image or len(labels) < 2:
        if any(of_image) and len(labels) > 1:
            lacking = of_image.count(None)
            logging.warning("%d of the images of '%s' have no label: labels are ignored", lacking, source)
        return None, known
    index = {label: i for i, label in enumerate(labels)}
    return np.array([index[str(label)] for label in of_image], np.int32), labels
