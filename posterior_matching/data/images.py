"""Reads users' images: files of any format that Pillow reads, or arrays.

| source | images |
|---|---|
| a folder, or a `.zip` | the image files in it and in its subfolders, by name |
| an image file | one |
| `.npy` | `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` |
| `.npz` | one such array, or one per part: `train`, `val`, `test`, also as in `x_train`; 1-D arrays are labels |
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps
from pydantic import Field, PlainValidator

from posterior_matching.config import call
from posterior_matching.data.cache import cached
from posterior_matching.errors import OptionError, UserError
from posterior_matching.progress import progress_bar

_MAX_SIDE = 1024
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_METADATA = ("__MACOSX", "Thumbs.db", "desktop.ini")
# Pillow opens EPS and WMF with other programs, and cannot decode the rest.
_NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
_WHITE_16 = 65535

Offset = Annotated[int, Field(ge=0, le=100_000)]
Side = Annotated[int, Field(ge=1, le=100_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """The keys of `config.images`: what to make of the user's own images. Every key has a default.

    Attributes:
        size: Resize to `size` x `size` pixels: the shorter side to `size`, of the longer one the middle; None: as they
            are, which must be of one size.
        crop: `(top, left, height, width)` of the part to use, in pixels, before resizing; None: all.
        channels: 1 (grey) or 3 (colour); None: 3 if any image has colour.
        range: The stored values that mean black and white; None: found.
        channels_first: Whether arrays are `[N, C, H, W]`; None: found.
    """

    size: Annotated[int, Field(ge=1, le=_MAX_SIDE)] | None = None
    crop: tuple[Offset, Offset, Side, Side] | None = None
    channels: Literal[1, 3] | None = None
    range: tuple[Finite, Finite] | None = None
    channels_first: bool | None = None

    def __post_init__(self) -> None:
        if self.range is not None and self.range[0] >= self.range[1]:
            raise OptionError("range", f"must be (black, white) with black below white, not {self.range}")


ImageOption = Annotated[ImageOptions, PlainValidator(functools.partial(call, ImageOptions))]


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """What a run keeps of its images, for the images of later.

    Attributes:
        shape: `(H, W, C)`.
        dtype: The type in which they were stored, `uint8` for files; None: unknown.
        range: The values of this type that mean black and white; None: unknown.
        labels: The names of the labels.
    """

    shape: tuple[int, int, int]
    dtype: str | None = None
    range: tuple[float, float] | None = None
    labels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values from which `from_json` restores it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "ImageFormat":
        """Restores what `to_json` returned."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in saved.items()}
        return cls(**values)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images in memory.

    Attributes:
        source: Where they are from, for messages.
        x: `[N, H, W, C]`: uint8 in 0..`max_value`, or float32 in [0, 1].
        max_value: The value that means white.
        names: Their names: of files, relative to the source and with `/` between folders; of arrays, their numbers.
        format: What a run keeps of them.
        fingerprint: SHA-256 of the files.
        label: [N] int32 indices of `format.labels`, or None.
        parts: Indices of `train`, `val` and `test`; None for arrays without parts.
        holes: [N, H, W, 1] bool, where a value of an array is NaN; None: nowhere.
        axes: The axes of a `.npy` array: "NHW", "NHWC" or "NCHW"; empty otherwise.
        sizes: [N, 2], the heights and widths before cropping and resizing.
        original: The array as `[N, H, W, C]` in its own type and range, if it was neither cropped nor resized.
    """

    source: str
    x: np.ndarray
    max_value: float
    names: tuple[str, ...]
    format: ImageFormat
    fingerprint: str
    label: np.ndarray | None = None
    parts: dict[str, np.ndarray] | None = None
    holes: np.ndarray | None = None
    axes: str = ""
    sizes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int32))
    original: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)


def is_images(source: Any) -> bool:
    """Whether `source` is the name of a folder, an archive other than of tables, an image, or an array of images."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    kind = path.suffix.lower()
    if kind in (".npy", ".npz"):
        return any(ndim >= 3 for ndim in _dimensions(path))
    return path.is_dir() or kind == ".zip" or kind in _suffixes()


def read_images(
    source: str | Path,
    options: ImageOptions = ImageOptions(),
    known: ImageFormat | None = None,
    *,
    for_imputation: bool = False,
) -> Images:
    """Reads all images of a source.

    Decoded files are cached. Of transparent images the background is white, of animated ones the first frame counts,
    16 bits are reduced to 8, and files that cannot be read are left out: a warning counts each.

    Args:
        source: See the top of this module.
        options: What to make of them.
        known: The format of the run that they are for.
        for_imputation: NaN in arrays are holes, and files that cannot be read are an error.

    Raises:
        UserError: There are none, they differ in size, or they do not match the options or the run; or they changed
            while they were read.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"no file or folder '{source}'")
    try:
        before = _state(path)
        if path.suffix.lower() in (".npy", ".npz"):
            images = _read_array(path, options, known, for_imputation)
        else:
            images = _read_files(path, options, known, for_imputation)
        unchanged = _state(path) == before
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read '{source}': {_reason(error)}") from error
    if not unchanged:
        raise UserError(f"'{source}' changed while it was read: try again when it is complete")
    if known and images.x.shape[1:] != known.shape:
        raise UserError(
            f"the images of '{source}' are {_size(images.x.shape[1:])}, but the run was trained on "
            f"{_size(known.shape)}: {'use other images' if options.size or options.crop else 'resize them'}"
        )
    return images


def fingerprint(source: str | Path) -> str:
    """Returns the SHA-256 of a file, or of all files of a folder with their names."""
    path = Path(source)
    if path.is_file():
        return _digest(path)
    files = {name: file for name, file in _visible_files(path).items() if file.exists()}

    def compute() -> dict[str, np.ndarray]:
        return {"digest": np.array(_hash([(name, _digest(file)) for name, file in files.items()]))}

    key = f"fingerprint-{_hash((str(path.resolve()), list(files)))[:12]}"
    return str(cached(key, files.values(), compute)["digest"])


def _hash(value: Any) -> str:
    return hashlib.sha256(ascii(value).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r" ?<_io\.BytesIO object at \w+>", "", text)
    return (text.splitlines() or [type(error).__name__])[0]


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}" + (f" with {shape[2]} channel{'s'[: shape[2] - 1]}" if len(shape) == 3 else "")


# Files ---------------------------------------------------------------------------------------------------------------


class _Decoded(NamedTuple):
    """A decoded image, or why there is none."""

    pixels: np.ndarray | None  # [H, W, 1 or 3] uint8
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)  # before cropping and resizing
    largest: int = 0  # of the values of 16 bits
    problem: str = ""


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(sorted(set(Image.OPEN) - set(_NOT_READ)))


@functools.cache
def _suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part in _METADATA for part in name.split("/"))


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


def _state(path: Path) -> Any:
    """Returns what changes when a file or a folder does."""
    files = _visible_files(path) if path.is_dir() else {path.name: path}
    stats = {name: file.stat() if file.exists() else None for name, file in files.items()}
    return {name: stat and (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes], list[Path]]]:
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
            yield sorted(filter(_is_visible, named)), lambda name: archive.read(named[name]), [path]
    else:
        yield [path.name], lambda _: path.read_bytes(), [path]


def _read_files(path: Path, options: ImageOptions, known: ImageFormat | None, strict: bool) -> Images:
    with _opened(path) as (names, read, holders):
        candidates = [name for name in names if Path(name).suffix.lower() in _suffixes() or not Path(name).suffix]
        if not candidates:
            shown = f": it has {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "") if names else ""
            raise UserError(f"'{path}' holds no images{shown}")
        key = f"images-{_hash((str(path.resolve()), candidates, dataclasses.astuple(options)))[:12]}"
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
        logging.warning("%d of the files of '%s' are no images (%s): left out", len(others), path, _first(others))
    for note, found in notes["notes"].items():
        logging.warning("%d of the images of '%s' %s (%s)", len(found), path, note, _first(found))
    x, kept = stored["x"], [candidates[i] for i in stored["kept"]]
    channels = options.channels or (known.shape[2] if known else x.shape[3])
    if x.shape[3] > channels:
        colour = notes["colour"]
        raise UserError(
            f"{len(colour)} of the {len(kept)} images of '{path}' are in colour ({_first(colour)}), but the run was "
            "trained on grey ones: make them grey"
        )
    parts, folders = _parts_and_folders(kept, str(path))
    label, labels = _labels(kept, folders, known.labels if known else (), str(path))
    x = np.repeat(x, channels // x.shape[3], axis=3)
    kind = ImageFormat(x.shape[1:], "uint8", (0.0, 255.0), labels)
    return Images(str(path), x, 255.0, tuple(kept), kind, fingerprint(path), label, parts, sizes=stored["sizes"])


def _first(names: Collection[str]) -> str:
    return ", ".join(list(names)[:2]) + (", ..." if len(names) > 2 else "")


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
            for i, decoded in enumerate(progress_bar(results, total=len(names), desc=f"decoding {source}", delay=5)):
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
    if 0 < largest < _WHITE_16 // 4:
        bound = 2 ** largest.bit_length() - 1
        raise UserError(
            f"the images of '{source}' have 16 bits but only values up to {largest}: set config.images.range to "
            f"(0, {bound}), if {bound} is white, or to (0, {_WHITE_16})"
        )
    colour = [names[i] for i, image in zip(kept, pixels, strict=True) if image.shape[2] == 3]
    channels = 3 if colour else 1
    x = np.empty((len(pixels), *pixels[0].shape[:2], channels), np.uint8)
    for row, image in zip(x, pixels, strict=True):
        row[:] = image
    found = json.dumps({"broken": broken, "notes": notes, "colour": colour})
    return {"x": x, "kept": np.array(kept), "sizes": np.array(sizes), "notes": np.array(found)}


def _decode(name: str, read: Callable[[str], bytes], options: ImageOptions) -> _Decoded:
    try:
        with Image.open(io.BytesIO(read(name)), formats=_formats()) as image:
            notes = ["are animated or have several pages, of which the first is taken"] if _has_frames(image) else []
            if any(";16" in str(tile) for tile in getattr(image, "tile", ())) or image.mode.startswith("I;16"):
                notes.append("have 16 bits, reduced to 8")
            upright = ImageOps.exif_transpose(image)
            opaque = _opaque(upright)
            if opaque is not upright:
                notes.append("are transparent, shown on white")
            eight_bits, largest = _in_eight_bits(opaque, name, options)
            fitted = _fit(eight_bits, options, name)
    except UserError:
        raise
    except FileNotFoundError:
        return _Decoded(None, problem="there is no such file")
    except Exception as error:  # whatever Pillow and zipfile raise for damaged files
        return _Decoded(None, problem=_reason(error))
    if fitted.width * fitted.height > _MAX_SIDE**2:
        raise UserError(
            f"the image '{name}' has {fitted.height}x{fitted.width} pixels, more than {_MAX_SIDE}x{_MAX_SIDE}: set "
            "config.images.size, which resizes the images"
        )
    pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, -1)
    if (pixels == pixels[:, :, :1]).all():  # no colour
        pixels = pixels[:, :, :1]
    return _Decoded(pixels, tuple(notes), (upright.height, upright.width), largest)


def _has_frames(image: Image.Image) -> bool:
    # The further pictures of an MPO, which many cameras write as .jpg, are no pages.
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def _opaque(image: Image.Image) -> Image.Image:
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
        black, white = options.range or (0, _WHITE_16)
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


def _fit(image: Image.Image, options: ImageOptions, name: str) -> Image.Image:
    """Crops and resizes an image as `options` say."""
    if options.crop is not None:
        top, left, height, width = options.crop
        if top + height > image.height or left + width > image.width:
            found = f"does not lie inside '{name}', which has {image.height}x{image.width} pixels"
            raise OptionError("config.images.crop", f"is {options.crop}, which {found}")
        image = image.crop((left, top, left + width, top + height))
    if options.size is not None and image.size != (options.size, options.size):
        image = ImageOps.fit(image, (options.size, options.size), Image.Resampling.BICUBIC)
    return image


def _mixed_sizes(source: str, names: list[str], read: Callable[[str], bytes], known: ImageFormat | None) -> UserError:
    sizes: collections.Counter[str] = collections.Counter()
    for name in names:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(read(name)), formats=_formats()) as image:
            upright = image.size[::-1] if image.getexif().get(0x0112, 1) < 5 else image.size
            sizes[_size(upright)] += 1
    counts = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3)) + (
        ", ..." if len(sizes) > 3 else ""
    )
    remedy = (
        f"resize them to {_size(known.shape[:2])}" if known else "set config.images.size=64 to resize them to 64x64"
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
    found = {_PARTS[name] for name in outermost if name in _PARTS}
    if "train" in found and len(found) > 1:
        for name, folder in zip(names, outermost, strict=True):
            if folder not in _PARTS:
                raise UserError(f"'{name}' lies beside the folders {', '.join(sorted(found))} of '{source}': move it")
        part_of = [_PARTS[name] for name in outermost]
        folders = [inside[1:] for inside in folders]
    else:
        part_of = [_part_by_name(name) for name in names]
    parts = {part: np.flatnonzero(np.array(part_of) == part) for part in ("train", "val", "test")}
    return {part: rows for part, rows in parts.items() if len(rows) or not found}, folders


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


# Arrays --------------------------------------------------------------------------------------------------------------


def _dimensions(path: Path) -> list[int]:
    """Returns the number of dimensions of each array of a file, without reading them; empty if it is no such file."""
    found = []
    with (
        contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError),
        path.open("rb") as file,
    ):
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist():
                    with archive.open(member) as array:
                        found.append(_header_dimensions(array))
        else:
            file.seek(0)
            found.append(_header_dimensions(file))
    return found


def _header_dimensions(file: Any) -> int:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return len(read(file)[0])


def _read_array(path: Path, options: ImageOptions, known: ImageFormat | None, with_holes: bool) -> Images:
    source, kind = str(path), path.suffix.lower()
    if zipfile.is_zipfile(path) != (kind == ".npz"):  # np.load looks at the content, not at the name
        raise UserError(f"cannot read '{path}': it is a {'.npy' if kind == '.npz' else '.npz'} file, rename it")
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        groups: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"": (loaded, None)}
    else:
        with loaded:
            groups = _grouped({name: loaded[name] for name in loaded.files}, source)
    first = next(iter(groups.values()))[0]
    for array, _ in groups.values():
        if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            kinds = " and ".join(f"{list(a.shape)} of {a.dtype}" for a in (first, array))
            raise UserError(f"the arrays of '{path}' differ in shape or type: {kinds}")
    axes = _axes(first.shape, options, source)
    raw = np.concatenate([array for array, _ in groups.values()]) if len(groups) > 1 else first
    if not len(raw) or raw.dtype.kind not in "biuf":
        raise UserError(f"'{path}' holds no images: its array has shape {list(raw.shape)} and type {raw.dtype}")
    raw = np.moveaxis(raw, 1, -1) if axes == "NCHW" else raw if axes == "NHWC" else raw[..., None]
    holes = _checked_holes(raw, source, with_holes)
    black, white = _range(raw, options, known, source)
    unit = ((raw.astype(np.float32) - black) / (white - black)).astype(np.float32)
    unit = np.where(holes, np.float32(0), unit) if holes is not None else unit
    unit = _with_channels(np.clip(_fit_array(unit, options, source), 0, 1), options, known)
    holes = holes if holes is None else _fit_array(holes.astype(np.float32), options, source) != 0
    if raw.dtype.kind in "biu" and black == 0 and white <= 255 and white % 1 == 0:
        x, max_value = np.rint(unit * np.float32(white)).astype(np.uint8), float(white)
    else:
        x, max_value = unit, 1.0
    names = [f"{i:0{len(str(len(raw) - 1))}d}" for i in range(len(raw))]
    label, labels = _array_labels([label for _, label in groups.values()], known.labels if known else (), source)
    ends = np.cumsum([len(array) for array, _ in groups.values()])
    parts = {name: np.arange(end - len(groups[name][0]), end) for name, end in zip(groups, ends, strict=True)}
    return Images(
        source,
        x,
        max_value,
        tuple(names),
        ImageFormat(x.shape[1:], str(raw.dtype), (float(black), float(white)), labels),
        _digest(path),
        label,
        parts if len(parts) > 1 else None,
        holes,
        axes if kind == ".npy" else "",
        np.tile(raw.shape[1:3], (len(raw), 1)),
        raw if raw.shape == x.shape else None,
    )


def _grouped(arrays: dict[str, np.ndarray], source: str) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Returns the images and labels of each part; the part is "" if there are none."""
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        part = next((_PARTS[word] for word in re.split("[^a-z]+", name.lower()) if word in _PARTS), "")
        group = images if array.ndim >= 3 else labels
        if part in group or not array.ndim:
            break
        group[part] = array
    else:
        fit_together = all(part in images and len(images[part]) == len(labels[part]) for part in labels)
        if fit_together and ("train" in images or len(images) == 1):
            order = [part for part in ("", "train", "val", "test") if part in images]
            if "" not in images or len(images) == 1:
                return {part: (images[part], labels.get(part)) for part in order}
    raise UserError(
        f"'{source}' must hold one array of images, or one for each of train, val and test, and one label for each "
        f"image or none: it has {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}"
    )


def _axes(shape: tuple[int, ...], options: ImageOptions, source: str) -> str:
    """Returns what the axes of an array are: "NHW", "NHWC" or "NCHW"."""
    shown = f"the array of '{source}' has shape {list(shape)}"
    if len(shape) == 3:
        if shape[2] in (1, 3):
            raise UserError(f"{shown}, one image: save array[None], with an axis for several")
        return "NHW"
    if len(shape) != 4:
        raise UserError(f"{shown}, but images are [N, H, W], [N, H, W, C] or [N, C, H, W]")
    first, last = (shape[axis] in (1, 3) for axis in (1, 3))
    if first and last and options.channels_first is None:
        raise UserError(f"{shown}, with channels first or last: set config.images.channels_first to True or False")
    channels_first = first if options.channels_first is None else options.channels_first
    if not (first if channels_first else last):
        raise UserError(f"{shown}, but images have 1 or 3 channels, in the second or the last axis")
    return "NCHW" if channels_first else "NHWC"


def _checked_holes(raw: np.ndarray, source: str, allowed: bool) -> np.ndarray | None:
    """Returns the pixels of `[N, H, W, C]` that are NaN, `[N, H, W, 1]`, or None if there are none."""
    if raw.dtype.kind != "f" or np.isfinite(raw).all():
        return None
    infinite = np.isinf(raw).any((1, 2, 3)).sum()
    holes = np.isnan(raw).any(-1, keepdims=True)
    if infinite or not allowed or holes.all():
        count, what = (infinite, "infinite values") if infinite else (holes.any((1, 2, 3)).sum(), "NaN")
        raise UserError(f"{count} of the {len(raw)} images of '{source}' have {what}: leave them out or replace these")
    return holes


def _range(raw: np.ndarray, options: ImageOptions, known: ImageFormat | None, source: str) -> tuple[float, float]:
    """Returns the values of an array that mean black and white."""
    low, high = (float(bound(raw)) for bound in (np.nanmin, np.nanmax))
    found = f"'{source}' has {raw.dtype} values from {low:g} to {high:g}"
    if options.range or (known and known.range and known.dtype == str(raw.dtype)):
        black, white = options.range or known.range  # type: ignore[union-attr, misc]
        if low < black or high > white:
            where = "config.images.range is" if options.range else "the run was trained on"
            raise UserError(f"{found}, but {where} ({black:g}, {white:g})")
        return black, white
    if raw.dtype == bool or (raw.dtype.kind == "f" and low >= 0 and high <= 1):
        return 0, 1
    if (raw.dtype == np.uint8 and high != 1) or (low >= 0 and 128 <= high <= 255):
        if high < 64:
            logging.warning("%s: if %g is white, set config.images.range to (0, %g)", found, high, high)
        return 0, 255
    if raw.dtype == np.uint16 and high >= _WHITE_16 // 2:
        return 0, _WHITE_16
    if raw.dtype.kind == "f" and -1 <= low <= -0.5 and 0.5 <= high <= 1:
        return -1, 1
    if known:
        raise UserError(f"{found}, of which black and white are unclear: save them as uint8 from 0 to 255")
    raise UserError(f"{found}: set config.images.range to (black, white), such as ({min(low, 0):g}, {max(high, 1):g})")


def _fit_array(unit: np.ndarray, options: ImageOptions, source: str) -> np.ndarray:
    """Crops and resizes float32 images `[N, H, W, C]`."""
    if options.crop is not None:
        top, left, height, width = options.crop
        if top + height > unit.shape[1] or left + width > unit.shape[2]:
            found = f"does not lie inside the images of '{source}', which have {_size(unit.shape[1:3])} pixels"
            raise OptionError("config.images.crop", f"is {options.crop}, which {found}")
        unit = unit[:, top : top + height, left : left + width]
    if options.size is not None and unit.shape[1:3] != (options.size, options.size):
        only_size = dataclasses.replace(options, crop=None)
        channels = [
            [np.asarray(_fit(Image.fromarray(image[..., c]), only_size, source)) for c in range(unit.shape[3])]
            for image in unit
        ]
        unit = np.moveaxis(np.array(channels), 1, -1)
    if math.prod(unit.shape[1:3]) > _MAX_SIDE**2:
        raise UserError(
            f"the images of '{source}' have {_size(unit.shape[1:3])} pixels, more than {_MAX_SIDE}x{_MAX_SIDE}: set "
            "config.images.size, which resizes them"
        )
    return unit


def _with_channels(unit: np.ndarray, options: ImageOptions, known: ImageFormat | None) -> np.ndarray:
    channels = options.channels or max(unit.shape[3], known.shape[2] if known else 1)
    if channels < unit.shape[3]:
        return unit @ np.array([[0.299], [0.587], [0.114]], np.float32)  # luma (ITU-R BT.601), as Pillow computes it
    return np.repeat(unit, channels // unit.shape[3], axis=3)


def _array_labels(
    arrays: list[np.ndarray | None], known: tuple[str, ...], source: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns the index of each image's label, and the labels' names."""
    flat = [array.reshape(len(array), -1) for array in arrays if array is not None and array.ndim]
    if len(flat) < len(arrays):
        return None, known
    if any(array.shape[1] != 1 or array.dtype.kind not in "biuUS" for array in flat):
        raise UserError(f"the labels of '{source}' must be integers or text, one per image")
    values, label = np.unique(np.concatenate(flat)[:, 0], return_inverse=True)
    names = tuple(map(str, values.tolist()))
    if not known:
        return label.astype(np.int32), names
    if not set(names) <= set(known):
        logging.warning("some labels of '%s' are none of the run's (%s): all are ignored", source, _first(known))
        return None, known
    return np.array([known.index(name) for name in names], np.int32)[label], known


def as_stored(images: Images, filled: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Returns filled images in the type, range and order of axes of the array that they were read from.

    Args:
        images: Read from `.npy`.
        filled: `[N, H, W, C]` in [0, 1].
        observed: `[N, H, W, 1]` bool; there, the values are those of the array.
    """
    black, white = images.format.range or (0.0, 1.0)
    dtype = np.dtype(images.format.dtype or np.float32)

    def stored(unit: np.ndarray) -> np.ndarray:
        values = black + unit.astype(np.float64) * (white - black)
        return (np.rint(values) if dtype.kind in "biu" else values).astype(dtype)

    original = stored(images.x / images.max_value) if images.original is None else images.original
    result = np.where(observed, original, stored(filled))
    return {"NHW": lambda a: a[..., 0] if a.shape[3] == 1 else a, "NCHW": lambda a: np.moveaxis(a, -1, 1)}.get(
        images.axes, lambda a: a
    )(result)


# Masks ---------------------------------------------------------------------------------------------------------------


def read_masks(source: str | Path, images: Images, options: ImageOptions) -> np.ndarray:
    """Reads the masks of images: white (or 1) is observed, black (or 0) a hole.

    A mask has the size of its image, and is cropped and resized like it, or the size that the model sees. When resized,
    a pixel is observed only if all pixels that it is made of are.

    Args:
        source: One mask for all images, or a folder or `.zip` of masks named like the images, up to the suffix; or
            `.npy`, `[H, W]` or `[N, H, W]`.
        images: The images.
        options: The options with which they were read.

    Returns:
        `[N, H, W, 1]` bool, True = observed.

    Raises:
        UserError: A mask is missing, cannot be read, is not black and white, or has another size than its image.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"no file or folder '{source}'")
    try:
        if path.suffix.lower() == ".npy":
            return np.stack(list(_array_masks(path, images, options)))
        with _opened(path) as (names, read, _):
            if path.is_file() and path.suffix.lower() != ".zip":
                of_image = [path.name] * len(images)
            else:
                by_stem = {_stem(name): name for name in names if Path(name).suffix.lower() in _suffixes()}
                lacking = [name for name in images.names if _stem(name) not in by_stem]
                if lacking:
                    of = f"{len(lacking)} of {len(images)} images ({_first(lacking)})"
                    raise UserError(f"'{source}' has no masks for {of}: a mask has the name of its image")
                of_image = [by_stem[_stem(name)] for name in images.names]
            decode = functools.lru_cache(maxsize=1)(lambda name: _decode_mask(name, read, str(path)))
            return np.stack([_fit_mask(decode(n), n, i, images, options) for i, n in enumerate(of_image)])
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read '{source}': {_reason(error)}") from error


def _stem(name: str) -> str:
    return name.removesuffix(Path(name).suffix)


def _decode_mask(name: str, read: Callable[[str], bytes], source: str) -> Image.Image:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(read(name)), formats=_formats()) as image:
            warnings.simplefilter("ignore")
            return _opaque(ImageOps.exif_transpose(image)).convert("L")
    except Exception as error:  # whatever Pillow and zipfile raise for damaged files
        raise UserError(f"cannot read '{name}' of '{source}' ({_reason(error)})") from error


def _array_masks(path: Path, images: Images, options: ImageOptions) -> Iterator[np.ndarray]:
    masks = np.load(path, allow_pickle=False)
    masks = masks[None] if masks.ndim == 2 else masks[..., 0] if masks.ndim == 4 and masks.shape[3] == 1 else masks
    if masks.ndim != 3 or len(masks) not in (1, len(images)) or not set(np.unique(masks)) <= {0, 1}:
        raise UserError(
            f"'{path}' must hold zeros (holes) and ones (observed), [H, W] or [{len(images)}, H, W], but it has shape "
            f"{list(masks.shape)} and values from {masks.min():g} to {masks.max():g}"
        )
    for i in range(len(images)):
        mask = Image.fromarray(masks[i % len(masks)].astype(np.uint8) * 255)
        yield _fit_mask(mask, str(path), i, images, options)


def _fit_mask(mask: Image.Image, name: str, i: int, images: Images, options: ImageOptions) -> np.ndarray:
    """Returns the mask of image `i` as the model sees it, `[H, W, 1]` bool, True = observed."""
    levels = np.asarray(mask)
    if ((levels >= 32) & (levels < 224)).mean() > 0.05:
        raise UserError(f"the mask '{name}' is not black and white: white is observed, black a hole")
    holes = Image.fromarray((levels < 128).astype(np.float32))
    height, width = images.x.shape[1:3]
    before = tuple(images.sizes[i])
    if levels.shape == before:
        holes = _fit(holes, options, name)
    elif levels.shape != (height, width):
        raise UserError(
            f"the mask '{name}' is {_size(levels.shape)}, but the image '{images.names[i]}' is {_size(before)}: give "
            "it the size of the image"
        )
    return np.asarray(holes)[..., None] == 0
