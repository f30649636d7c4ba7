"""Reads and writes users' images as arrays: their axes, range of values, parts and labels."""

import contextlib
import dataclasses
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.images.options import (
    MAX_SIDE,
    PARTS,
    WHITE_16,
    ImageFormat,
    ImageOptions,
    Images,
    first_names,
    fit,
    size_text,
)
from posterior_matching.errors import OptionError, UserError


def dimensions(path: Path) -> list[int]:
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


def read_array(path: Path, options: ImageOptions, known: ImageFormat | None, with_holes: bool) -> Images:
    """Reads the images of a `.npy` or `.npz`; `with_holes`: NaN are holes, not an error."""
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
        file_fingerprint(path),
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
        part = next((PARTS[word] for word in re.split("[^a-z]+", name.lower()) if word in PARTS), "")
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
    if raw.dtype == np.uint16 and high >= WHITE_16 // 2:
        return 0, WHITE_16
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
            found = f"does not lie inside the images of '{source}', which have {size_text(unit.shape[1:3])} pixels"
            raise OptionError("config.images.crop", f"is {options.crop}, which {found}")
        unit = unit[:, top : top + height, left : left + width]
    if options.size is not None and unit.shape[1:3] != (options.size, options.size):
        only_size = dataclasses.replace(options, crop=None)
        channels = [
            [np.asarray(fit(Image.fromarray(image[..., c]), only_size, source)) for c in range(unit.shape[3])]
            for image in unit
        ]
        unit = np.moveaxis(np.array(channels), 1, -1)
    if math.prod(unit.shape[1:3]) > MAX_SIDE**2:
        raise UserError(
            f"the images of '{source}' have {size_text(unit.shape[1:3])} pixels, more than {MAX_SIDE}x{MAX_SIDE}: set "
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
        logging.warning("some labels of '%s' are none of the run's (%s): all are ignored", source, first_names(known))
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
    if images.axes == "NCHW":
        return np.moveaxis(result, -1, 1)
    return result[..., 0] if images.axes == "NHW" and result.shape[3] == 1 else result
