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
    MAX_SIDE,
    PARTS,
    WHITE_16,
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
                    raise UserError(f"'{path}' names a file outside of itself, '{name}': make the archive anew")
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
            shown = f": it has {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "") if names else ""
            raise UserError(f"'{path}' holds no images{shown}")
        key = f"images-{hash_text((str(path.resolve()), candidates, dataclasses.astuple(options)))[:12]}"
        stored = cached(key, holders, lambda: _decode_all(str(path), candidates, read, options, known))
    notes = json.loads(str(stored["notes"]))
    others = sorted(set(names) - set(candidates))
    others += [name for name in notes["broken"] if not Path(name).suffix]
    broken = {name: why for name, why in notes["broken"].items() if name not in others}
    if broken:
        name, why = next(iter(broken.items()))
        which = f"'{name}' of '{path}'" if len(broken) == 1 else f"{len(broken)} files of '{path}'"
        text = f"cannot read {which} ({'' if len(broken) == 1 else f'{name}: '}{why})"
        if strict:
            raise UserError(f"{text}: remove or replace {'it' if len(broken) == 1 else 'them'}")
        logging.warning("%s: left out", text)
    if others:
        logging.warning("%d of the files of '%s' are no images (%s): left out", len(others), path, first_names(others))
    for note, found in notes["notes"].items():
        logging.warning("%d of the images of '%s' %s (%s)", len(found), path, note, first_names(found))
    if not known and 0 < notes["largest"] < WHITE_16 // 4:
        bound = 2 ** notes["largest"].bit_length() - 1
        raise UserError(
            f"the images of '{path}' have 16 bits but only values up to {notes['largest']}: set config.images.range to "
            f"(0, {bound}), if {bound} is white, or to (0, {WHITE_16})"
        )
    x, kept = stored["x"], [candidates[i] for i in stored["kept"]]
    channels = options.channels or (known.shape[2] if known else x.shape[3])
    if x.shape[3] > channels:
        found = f"{len(notes['colour'])} of the images of '{path}' are in colour ({first_names(notes['colour'])})"
        raise UserError(f"{found}, but the run was trained on grey ones: make them grey")
    parts, folders = _parts_and_folders(kept, str(path))
    label, labels = _labels(kept, folders, known.labels if known else (), str(path))
    x = x if x.shape[3] == channels else np.repeat(x, channels, axis=3)
    kind = ImageFormat(x.shape[1:], "uint8", (0.0, 255.0), labels)
    return Images(str(path), x, 255.0, tuple(kept), kind, fingerprint(path), label, parts, sizes=stored["sizes"])


def _decode_all(
    source: str,
    names: list[str],
    read: Callable[[str], bytes],
    options: ImageOptions,
    known: ImageFormat | None,
) -> dict[str, np.ndarray]:
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    sizes: list[tuple[int, int]] = []
    broken: dict[str, str] = {}
    notes: dict[str, list[str]] = collections.defaultdict(list)
    largest = 0
    threads = min(8, os.cpu_count() or 1)
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = pool.map(lambda name: _decode(name, read, options), names)
        try:
            for i, decoded in enumerate(tqdm(results, f"decoding {source}", len(names), delay=5, disable=None)):
                if decoded.pixels is None:
                    broken[names[i]] = decoded.problem
                    continue
                if pixels and decoded.pixels.shape[:2] != pixels[0].shape[:2]:
                    raise _mixed_sizes(source, names, read, known)
                pixels.append(decoded.pixels)
                kept.append(i)
                sizes.append(decoded.size)
                largest = max(largest, decoded.largest)
                for note in decoded.notes:
                    notes[note].append(names[i])
        finally:
            pool.shutdown(cancel_futures=True)
    if not pixels:
        name, why = next(iter(broken.items()))
        raise UserError(f"'{source}' holds no images: of {len(broken)} files none can be read ({name}: {why})")
    colour = [names[i] for i, image in zip(kept, pixels, strict=True) if image.shape[2] == 3]
    channels = 3 if colour else 1
    x = np.empty((len(pixels), *pixels[0].shape[:2], channels), np.uint8)
    for row, image in zip(x, pixels, strict=True):
        row[:] = image
    found = json.dumps({"broken": broken, "notes": notes, "colour": colour, "largest": largest})
    return {"x": x, "kept": np.array(kept), "sizes": np.array(sizes), "notes": np.array(found)}


class _Decoded(NamedTuple):
    """A decoded image, or why there is none."""

    pixels: np.ndarray | None  # [H, W, 1 or 3] uint8
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)  # before cropping and resizing
    largest: int = 0  # of the values of 16 bits
    problem: str = ""


def _decode(name: str, read: Callable[[str], bytes], options: ImageOptions) -> _Decoded:
    try:
        with Image.open(io.BytesIO(read(name)), formats=formats()) as image:
            notes = ["are animated or have several pages, of which the first is taken"] if _has_frames(image) else []
            if any(";16" in str(tile) for tile in getattr(image, "tile", ())) or image.mode.startswith("I;16"):
                notes.append("have 16 bits, reduced to 8")
            upright = ImageOps.exif_transpose(image)
            solid = opaque(upright)
            if solid is not upright:
                notes.append("are transparent, shown on white")
            eight_bits, largest = _in_eight_bits(solid, name, options)
            fitted = fit(eight_bits, options, name)
    except UserError:
        raise
    except FileNotFoundError:
        return _Decoded(None, problem="there is no such file")
    except Exception as error:  # whatever Pillow and zipfile raise for damaged files
        return _Decoded(None, problem=reason(error))
    if fitted.width * fitted.height > MAX_SIDE**2:
        raise UserError(
            f"the image '{name}' has {fitted.height}x{fitted.width} pixels, more than {MAX_SIDE}x{MAX_SIDE}: set "
            "config.images.size, which resizes the images"
        )
    pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, -1)
    if (pixels == pixels[:, :, :1]).all():  # no colour
        pixels = pixels[:, :, :1]
    return _Decoded(pixels, tuple(notes), (upright.height, upright.width), largest)


def _has_frames(image: Image.Image) -> bool:
    # The further pictures of an MPO, which many cameras write as .jpg, are no pages.
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def opaque(image: Image.Image) -> Image.Image:
    """Returns the image itself if nothing of it is transparent."""
    if not image.has_transparency_data:
        return image
    with_alpha = image.convert("RGBA")
    if with_alpha.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha)


def _in_eight_bits(image: Image.Image, name: str, options: ImageOptions) -> tuple[Image.Image, int]:
    """Returns the image in mode L or RGB, and its largest value if it has 16 bits and no range is set."""
    deep, largest = image.mode in ("I", "F") or image.mode.startswith("I;16"), 0
    if not deep:
        image = image.convert("L" if options.channels == 1 or image.mode in ("1", "L") else "RGB")
    if deep or options.range is not None:
        values = np.asarray(image).astype(np.float64)
        black, white = options.range or (0, WHITE_16)
        if not np.isfinite(values).all():
            raise ValueError("some values are not numbers")
        if options.range is None and image.mode in ("I", "F"):
            raise UserError(
                f"the image '{name}' has 32 bits and values from {values.min():g} to {values.max():g}: set "
                "config.images.range to (black, white)"
            )
        if values.min() < black or values.max() > white:
            found = f"{values.min():g} to {values.max():g}"
            raise OptionError("config.images.range", f"is {options.range}, but '{name}' has values from {found}")
        largest = 0 if options.range else int(values.max())
        image = Image.fromarray(np.rint((values - black) / (white - black) * 255).astype(np.uint8))
    return image, largest


def _mixed_sizes(source: str, names: list[str], read: Callable[[str], bytes], known: ImageFormat | None) -> UserError:
    sizes: collections.Counter[str] = collections.Counter()
    for name in names:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(read(name)), formats=formats()) as image:
            upright = image.size[::-1] if image.getexif().get(0x0112, 1) < 5 else image.size
            sizes[size_text(upright)] += 1
    counts = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3)) + (
        ", ..." if len(sizes) > 3 else ""
    )
    remedy = (
        f"resize them to {size_text(known.shape[:2])}" if known else "set config.images.size=64 to resize them to 64x64"
    )
    return UserError(f"the images of '{source}' differ in size ({counts} pixels): {remedy}")


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
            raise UserError(f"'{name}' lies beside the folders {', '.join(sorted(found))} of '{source}': move it")
    part_of = np.array([PARTS[name] for name in outermost])
    parts: dict[str, np.ndarray] = {
        part: np.flatnonzero(part_of == part) for part in ("train", "val", "test") if part in found
    }
    return parts, [inside[1:] for inside in folders]


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
