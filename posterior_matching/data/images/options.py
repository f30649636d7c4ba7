"""What is known of users' images: the options to read them with, their format, and the images in memory."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field, PlainValidator

from posterior_matching.config import call
from posterior_matching.errors import OptionError, UserError, first_line

MAX_SIDE = 1024
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

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
        range: The stored values that mean black and white; None: 0 and 255 in 8 bits, 0 and 1 in floats.
        channels_first: Whether arrays are `[N, C, H, W]`; None: no.
    """

    size: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
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
        sizes: [N, 2], the heights and widths before cropping and resizing.
        label: [N] int32 indices of `format.labels`, or None.
        parts: Indices of `train`, `val` and `test`; None for arrays without parts.
        holes: [N, H, W, 1] bool, where a value of an array is NaN; None: nowhere.
    """

    source: str
    x: np.ndarray
    max_value: float
    names: tuple[str, ...]
    format: ImageFormat
    fingerprint: str
    sizes: np.ndarray
    label: np.ndarray | None = None
    parts: dict[str, np.ndarray] | None = None
    holes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)


def fit(image: Image.Image, options: ImageOptions, name: str) -> Image.Image:
    """Crops and resizes an image as `options` say; `name` is for messages.

    Raises:
        UserError: The part to crop does not lie inside the image, or the image stays too large.
    """
    if options.crop is not None:
        top, left, height, width = options.crop
        if top + height > image.height or left + width > image.width:
            found = f"does not lie inside '{name}', which has {image.height}x{image.width} pixels"
            raise OptionError("config.images.crop", f"is {options.crop}, which {found}")
        image = image.crop((left, top, left + width, top + height))
    if options.size is not None and image.size != (options.size, options.size):
        image = ImageOps.fit(image, (options.size, options.size), Image.Resampling.BICUBIC)
    if image.width * image.height > MAX_SIDE**2:
        found = f"the image '{name}' has {image.height}x{image.width} pixels, more than {MAX_SIDE}x{MAX_SIDE}"
        raise UserError(f"{found}: set config.images.size, which resizes the images")
    return image


def hash_text(value: Any) -> str:
    """Returns the SHA-256 of what `ascii` shows of a value."""
    return hashlib.sha256(ascii(value).encode()).hexdigest()


def reason(error: Exception) -> str:
    """Returns an error's first line, without the addresses of objects."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return re.sub(r" ?<_io\.BytesIO object at \w+>", "", text)


def size_text(shape: Sequence[int]) -> str:
    """Returns "64x48 with 3 channels", or "64x48", for a shape `(H, W)` or `(H, W, C)`."""
    return f"{shape[0]}x{shape[1]}" + (f" with {shape[2]} channel{'s'[: shape[2] - 1]}" if len(shape) == 3 else "")


def first_names(names: Collection[str]) -> str:
    """Returns the first two of some names, for messages."""
    return ", ".join(list(names)[:2]) + (", ..." if len(names) > 2 else "")
