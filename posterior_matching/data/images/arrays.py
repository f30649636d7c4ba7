"""Reads users' images from arrays: `.npy`, and `.npz` with parts and labels."""

import contextlib
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.images.options import PARTS, ImageFormat, ImageOptions, Images, first_names, fit
from posterior_matching.errors import UserError


def dimensions(path: Path) -> list[int]:
    """Returns the number of dimensions of each array of a file, without reading them; empty if it is no such file."""
    found = []
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError):
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    with archive.open(member) as array:
                        found.append(_header_dimensions(array))
        else:
            with path.open("rb") as file:
                found.append(_header_dimensions(file))
    return found


def _header_dimensions(file: Any) -> int:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return len(read(file)[0])


def read_array(path: Path, options: ImageOptions, known: ImageFormat | None, with_holes: bool) -> Images:
    """Reads the images of a `.npy` or `.npz`; `with_holes`: NaN are holes, not an error."""
    source = str(path)
    groups = _groups(path)
    raw = np.concatenate([images for images, _ in groups.values()])
    shown = f"'{source}' has shape {list(raw.shape)} and type {raw.dtype}"
    if not len(raw) or raw.dtype.kind not in "biuf" or raw.ndim not in (3, 4):
        raise UserError(f"{shown}, but images are numbers, [N, H, W] or [N, H, W, C]")
    if raw.ndim == 3:
        raw = raw[..., None]
    elif options.channels_first:
        raw = np.moveaxis(raw, 1, -1)
    if raw.shape[3] not in (1, 3):
        last = "set config.images.channels_first=True if they come first"
        raise UserError(f"{shown}, but images have 1 or 3 channels in the last axis: {last}")
    holes = np.isnan(raw).any(-1, keepdims=True)
    infinite = np.isinf(raw)
    if infinite.any() or holes.all() or (holes.any() and not with_holes):
        count = (infinite | holes).any((1, 2, 3)).sum()
        raise UserError(f"{count} of the {len(raw)} images of '{source}' have NaN or infinite values: replace these")
    black, white = _range(raw, options, known, source)
    unit = np.where(holes, 0, (raw.astype(np.float32) - black) / (white - black)).astype(np.float32)
    x = _with_channels(np.clip(_fitted(unit, options, source), 0, 1), options, known)
    whole = raw.dtype.kind != "f" and black == 0 and white <= 255 and white % 1 == 0
    label, labels = _array_labels([label for _, label in groups.values()], known.labels if known else (), source)
    ends = np.cumsum([len(images) for images, _ in groups.values()])
    parts = {part: np.arange(end - len(groups[part][0]), end) for part, end in zip(groups, ends, strict=True)}
    return Images(
        source,
        x=np.rint(x * np.float32(white)).astype(np.uint8) if whole else x,
        max_value=white if whole else 1.0,
        names=tuple(f"{i:0{len(str(len(raw) - 1))}d}" for i in range(len(raw))),
        format=ImageFormat(x.shape[1:], str(raw.dtype), (black, white), labels),
        fingerprint=file_fingerprint(path),
        sizes=np.tile(raw.shape[1:3], (len(raw), 1)),
        label=label,
        parts=parts if len(parts) > 1 else None,
        holes=_fitted(holes.astype(np.float32), options, source) != 0 if holes.any() else None,
    )


def _groups(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Returns the images and labels of each part; the part is "" if there are none."""
    if zipfile.is_zipfile(path) != (path.suffix.lower() == ".npz"):  # np.load looks at the content, not at the name
        raise UserError(f"cannot read '{path}': its content is not that of a {path.suffix}, rename it")
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {"": (loaded, None)}
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    with loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    for name, array in arrays.items():
        part = next((PARTS[word] for word in re.split("[^a-z]+", name.lower()) if word in PARTS), "")
        (images if array.ndim >= 3 else labels)[part] = array
    if (
        len(images) + len(labels) < len(arrays)  # two of one part
        or not (set(images) == {""} or ("train" in images and "" not in images))
        or any(part not in images or labels[part].shape[:1] != images[part].shape[:1] for part in labels)
    ):
        raise UserError(
            f"'{path}' must hold one array of images, or one for each of train, val and test, and one label for each "
            f"image or none: it has {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}"
        )
    kinds = {f"{list(array.shape[1:])} of {array.dtype}" for array in images.values()}
    if len(kinds) > 1:
        raise UserError(f"the arrays of '{path}' differ in shape or type: {' and '.join(sorted(kinds))}")
    return {part: (images[part], labels.get(part)) for part in ("", "train", "val", "test") if part in images}


def _range(raw: np.ndarray, options: ImageOptions, known: ImageFormat | None, source: str) -> tuple[float, float]:
    """Returns the values that mean black and white, of which none lies outside."""
    low, high = float(np.nanmin(raw)), float(np.nanmax(raw))
    found = f"'{source}' has {raw.dtype} values from {low:g} to {high:g}"
    usual = {"uint8": (0.0, 255.0), "bool": (0.0, 1.0)}.get(
        str(raw.dtype), (0.0, 1.0) if raw.dtype.kind == "f" else None
    )
    of_run = known.range if known and known.dtype == str(raw.dtype) else None
    black, white = options.range or of_run or usual or (low, low)
    faint = raw.dtype == np.uint8 and high == 1 and not (options.range or of_run)  # black and white, more likely
    if faint or not black <= low <= high <= white or black == white:
        if options.range:
            raise UserError(f"{found}, but config.images.range is ({black:g}, {white:g})")
        if known:
            raise UserError(f"{found}, but the run was trained without config.images.range: save uint8 from 0 to 255")
        raise UserError(f"{found}: set config.images.range to (black, white), such as ({min(low, 0):g}, {high:g})")
    return float(black), float(white)


def _fitted(unit: np.ndarray, options: ImageOptions, source: str) -> np.ndarray:
    """Crops and resizes float32 images `[N, H, W, C]`, channel by channel."""
    channels = np.moveaxis(unit, -1, 1)
    fitted = [[np.asarray(fit(Image.fromarray(channel), options, source)) for channel in image] for image in channels]
    return np.moveaxis(np.array(fitted), 1, -1)


def _with_channels(unit: np.ndarray, options: ImageOptions, known: ImageFormat | None) -> np.ndarray:
    channels = options.channels or max(unit.shape[3], known.shape[2] if known else 1)
    if channels < unit.shape[3]:
        return unit @ np.array([[0.299], [0.587], [0.114]], np.float32)  # luma (ITU-R BT.601), as Pillow computes it
    return np.repeat(unit, channels // unit.shape[3], axis=3)


def _array_labels(
    arrays: list[np.ndarray | None], known: tuple[str, ...], source: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns the index of each image's label, and the labels' names."""
    given = [array for array in arrays if array is not None]
    if len(given) < len(arrays):
        return None, known
    if any(array.size != len(array) or array.dtype.kind not in "biuUS" for array in given):
        raise UserError(f"the labels of '{source}' must be integers or text, one per image")
    values, label = np.unique(np.concatenate([array.ravel() for array in given]), return_inverse=True)
    names = tuple(map(str, values.tolist()))
    if not known:
        return label.astype(np.int32), names
    if not set(names) <= set(known):
        logging.warning("some labels of '%s' are none of the run's (%s): all are ignored", source, first_names(known))
        return None, known
    return np.array([known.index(name) for name in names], np.int32)[label], known
