"""Reads the masks of users' images."""

import functools
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from posterior_matching.data.images.files import formats, opened, suffixes
from posterior_matching.data.images.options import ImageOptions, Images, first_names, fit, reason, size_text
from posterior_matching.errors import UserError


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
            masks = _array_masks(path, len(images))
            found = [_fit_mask(mask, str(path), i, images, options) for i, mask in enumerate(masks)]
            return np.stack(found)
        with opened(path) as (names, read, _):
            of_image = [path.name] * len(images)
            if path.is_dir() or path.suffix.lower() == ".zip":
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


def _decode_mask(name: str, read: Callable[[str], bytes], source: str) -> np.ndarray:
    """Returns a mask's levels, `[H, W]` in 0..255."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(read(name)), formats=formats()) as image:
            warnings.simplefilter("ignore")
            upright = ImageOps.exif_transpose(image)
            levels = np.asarray(upright.convert("L"))
            transparent = upright.has_transparency_data and (np.asarray(upright.convert("RGBA"))[..., 3] < 255).any()
    except Exception as error:  # whatever Pillow and zipfile raise for damaged files
        raise UserError(f"cannot read '{name}' of '{source}' ({reason(error)})") from error
    if transparent:
        raise UserError(f"the mask '{name}' is transparent: save it in black (hole) and white (observed)")
    return levels * np.uint8(255) if levels.max() == 1 else levels


def _array_masks(path: Path, count: int) -> np.ndarray:
    """Returns the masks' levels, `[count, H, W]`."""
    masks = np.load(path, allow_pickle=False)
    masks = masks[None] if masks.ndim == 2 else masks[..., 0] if masks.ndim == 4 and masks.shape[3] == 1 else masks
    if masks.ndim != 3 or len(masks) not in (1, count) or not np.isin(masks, (0, 1)).all():
        raise UserError(
            f"'{path}' must hold zeros (holes) and ones (observed), [H, W] or [{count}, H, W], but it has shape "
            f"{list(masks.shape)} and values from {masks.min():g} to {masks.max():g}"
        )
    return np.broadcast_to(masks.astype(np.uint8) * np.uint8(255), (count, *masks.shape[1:]))


def _fit_mask(levels: np.ndarray, name: str, i: int, images: Images, options: ImageOptions) -> np.ndarray:
    """Returns the mask of image `i` as the model sees it, `[H, W, 1]` bool, True = observed."""
    if ((levels >= 32) & (levels < 224)).mean() > 0.05:
        raise UserError(f"the mask '{name}' is not black and white: white is observed, black a hole")
    holes = Image.fromarray((levels < 128).astype(np.float32))
    before = tuple(images.sizes[i])
    if levels.shape == before:
        holes = fit(holes, options, name)
    elif levels.shape != images.x.shape[1:3]:
        found = f"the mask '{name}' is {size_text(levels.shape)}, but the image '{images.names[i]}'"
        raise UserError(f"{found} is {size_text(before)}: give it the size of the image")
    return np.asarray(holes)[..., None] == 0
