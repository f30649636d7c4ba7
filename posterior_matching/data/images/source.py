"""Reads users' images: files of any format that Pillow reads, or arrays.

| source | images |
|---|---|
| a folder, or a `.zip` | the image files in it and in its subfolders, by name |
| an image file | one |
| `.npy` | `[N, H, W]` or `[N, H, W, C]`, 8 bit or floats in [0, 1] |
| `.npz` | one such array, or one per part: `train`, `val`, `test`, also as in `x_train`; 1-D arrays are labels |
"""

import zipfile
from pathlib import Path
from typing import Any

from posterior_matching.data.images.arrays import dimensions, read_array
from posterior_matching.data.images.files import fingerprint, read_files, state, suffixes
from posterior_matching.data.images.options import ImageFormat, ImageOption, ImageOptions, Images, reason, size_text
from posterior_matching.data.tables.read import is_table
from posterior_matching.errors import UserError

__all__ = [
    "ImageFormat",
    "ImageOption",
    "ImageOptions",
    "Images",
    "fingerprint",
    "is_images",
    "read_images",
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
    and files that cannot be read are left out: a warning counts each.

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
