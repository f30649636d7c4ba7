"""Reads users' images: files of any format that Pillow reads, or arrays.

| source | images |
|---|---|
| a folder, or a `.zip` | the image files in it and in its subfolders, by name |
| an image file | one |
| `.npy` | `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` |
| `.npz` | one such array, or one per part: `train`, `val`, `test`, also as in `x_train`; 1-D arrays are labels |
"""

import functools
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from posterior_matching.data.images.arrays import as_stored, dimensions, read_array
from posterior_matching.data.images.files import fingerprint, formats, opaque, opened, read_files, state, suffixes
from posterior_matching.data.images.options import (
    ImageFormat,
    ImageOption,
    ImageOptions,
    Images,
    first_names,
    fit,
    reason,
    size_text,
)
from posterior_matching.data.tables.read import is_table
from posterior_matching.errors import UserError

__all__ = [
    "ImageFormat",
    "ImageOption",
    "ImageOptions",
    "Images",
    "as_stored",
    "fingerprint",
    "is_images",
    "read_images",
    "read_masks",
]


def is_images(source: Any) -> bool:
    """Whether `source` is the name of a folder, an archive other than of tables, an image, or an array of images."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    kind = path.suffix.lower()
    if kind in (".npy", ".npz"):
        return any(ndim >= 3 for ndim in dimensions(path))
    return path.is_dir() or (kind == ".zip" and not is_table(path)) or kind in suffixes()


def read_images(
    source: str | Path,
    options: ImageOptions = ImageOptions(),  # noqa: B008
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
        before = state(path)
        if path.suffix.lower() in (".npy", ".npz"):
            images = read_array(path, options, known, for_imputation)
        else:
            images = read_files(path, options, known, for_imputation)
        unchanged = state(path) == before
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read '{source}': {reason(error)}") from error
    if not unchanged:
        raise UserError(f"'{source}' changed while it was read: try again when it is complete")
    if known and images.x.shape[1:] != known.shape:
        raise UserError(
            f"the images of '{source}' are {size_text(images.x.shape[1:])}, but the run was trained on "
            f"{size_text(known.shape)}: {'use other images' if options.size or options.crop else 'resize them'}"
        )
    return images


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
        with opened(path) as (names, read, _):
            if path.is_file() and path.suffix.lower() != ".zip":
                of_image = [path.name] * len(images)
            else:
                by_stem = {_stem(name): name for name in names if Path(name).suffix.lower() in suffixes()}
                lacking = [name for name in images.names if _stem(name) not in by_stem]
                if lacking:
                    of = f"{len(lacking)} of {len(images)} images ({first_names(lacking)})"
                    raise UserError(f"'{source}' has no masks for {of}: a mask has the name of its image")
                of_image = [by_stem[_stem(name)] for name in images.names]
            decode = functools.lru_cache(maxsize=1)(lambda name: _decode_mask(name, read, str(path)))
            return np.stack([_fit_mask(decode(n), n, i, images, options) for i, n in enumerate(of_image)])
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read '{source}': {reason(error)}") from error


def _stem(name: str) -> str:
    return name.removesuffix(Path(name).suffix)


def _decode_mask(name: str, read: Callable[[str], bytes], source: str) -> Image.Image:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(read(name)), formats=formats()) as image:
            warnings.simplefilter("ignore")
            return opaque(ImageOps.exif_transpose(image)).convert("L")
    except Exception as error:  # whatever Pillow and zipfile raise for damaged files
        raise UserError(f"cannot read '{name}' of '{source}' ({reason(error)})") from error


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
        holes = fit(holes, options, name)
    elif levels.shape != (height, width):
        found = f"the mask '{name}' is {size_text(levels.shape)}, but the image '{images.names[i]}'"
        raise UserError(f"{found} is {size_text(before)}: give it the size of the image")
    return np.asarray(holes)[..., None] == 0
