"""TFDS datasets as arrays, without TensorFlow: prepared on first use as ArrayRecord, decoded once, then cached."""

import contextlib
import difflib
import functools
import gzip
import io
import json
import os
import re
import runpy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from posterior_matching.data.cache import cached
from posterior_matching.data.dataset import resolve_split, unknown_split
from posterior_matching.data.gaussian import GaussianCheck
from posterior_matching.errors import UserError, first_line

TABULAR = ("gas", "power", "hepmass", "miniboone", "bsds")
_CHUNK = 1024  # examples decoded at a time; bounds the memory for images before they are cropped


def read(name: str, split: str) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Reads one split of a TFDS dataset with `image` or `features`, downloading and preparing it if necessary.

    Returns the split's own name; [N, H, W, C] images (uint8, or float32 in [0, 1]) or [N, d] float32 features; and [N]
    int32 labels, if there are any. A UserError says what is unknown, or cannot be downloaded, prepared or read.
    """
    base, derive = _DERIVED.get(name, (name, None))
    _check_features(base)
    builder = _builder(base)
    if not builder.data_path.exists():
        _prepare(builder)
        builder = _builder(base)
        if check := gaussian_check(base):
            check.report()
    elif base in TABULAR:
        builder.check_sources()
    if not builder.info.splits:
        raise UserError(f"'{builder.data_path}' is an incomplete TFDS dataset: delete it to prepare it again")
    split = resolve_split(split, builder.info.splits)
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise unknown_split(name, split, builder.info.splits) from error
    sources = [path for path in Path(builder.data_path).iterdir() if path.is_file()]
    arrays = cached(f"{builder.info.full_name}-{split}", sources, lambda: _decode_all(builder, split))
    x = arrays["x"]
    if x.dtype == np.float32 and np.isinf(x).any():
        raise UserError(
            f"dataset '{name}' has infinite values in split '{split}': use finite numbers and NaN (missing)"
        )
    return split, derive(x) if derive else x, arrays.get("label")


def gaussian_check(name: str) -> GaussianCheck | None:
    """Returns the check of one of the `TABULAR` datasets, prepared if necessary; None for any other name."""
    if name not in TABULAR:
        return None
    builder = _builder(name)
    if not builder.data_path.exists():
        read(name, "test")
        builder = _builder(name)
    return GaussianCheck(name, builder.info.metadata["gaussian_nats"], builder.GAUSSIAN_NATS)


def is_known(name: str) -> bool:
    """Whether `name` is a dataset of TFDS or of this module."""
    import tensorflow_datasets as tfds

    return name in (*TABULAR, *_DERIVED, *tfds.list_builders(with_community_datasets=False))


def _check_features(name: str) -> None:
    """Refuses a prepared dataset whose `features.json` names a module that is not TFDS's own: TFDS would import it."""
    from tensorflow_datasets.core.utils.file_utils import list_data_dirs

    dataset = re.split("[/:]", name)[0]
    for folder in list_data_dirs(os.environ.get("TFDS_DATA_DIR")):
        for path in Path(folder, dataset).glob("**/features.json"):
            try:
                stored = json.dumps(json.loads(path.read_text()))
            except (OSError, ValueError, RecursionError) as error:
                remedy = "delete that folder to prepare the dataset again"
                raise UserError(f"cannot read '{path}' ({first_line(error)}): {remedy}") from error
            for kind in re.findall(r'"pythonClassName": "(.*?)"', stored):
                if not re.fullmatch(r"tensorflow_datasets\.core\.features\.\w+\.\w+", kind):
                    raise UserError(f"'{path}' names the feature type '{kind}', which is not one of TFDS's own")


# Builders ------------------------------------------------------------------------------------------------------------


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    data_dir = os.environ.get("TFDS_DATA_DIR")  # TFDS itself reads it once, at import
    try:
        own_class = tabular_builder(name) if name in TABULAR else _idx_builder_class(tfds.builder_cls(name))
    except ValueError:  # unknown to TFDS; perhaps "name/config", or prepared on disk by another builder
        own_class = None
    try:
        return own_class(data_dir=data_dir) if own_class else tfds.builder(name, data_dir=data_dir)
    except Exception as error:
        builtin = ("adult", "digits", "mixture", "patches", *TABULAR, *_DERIVED)
        known = (*builtin, *tfds.list_builders(with_community_datasets=False))
        if name in known:
            raise UserError(f"TFDS cannot open dataset '{name}': {first_line(error)}") from error
        close = difflib.get_close_matches(name, known, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(builtin)}, the names of TFDS"
        raise UserError(f"unknown dataset '{name}': {hint} (or the path of your own data)") from error


@functools.cache
def tabular_builder(name: str) -> Any:
    """Returns the builder class of one of `TABULAR`, from `datasets/<name>/<name>.py` of the wheel or the checkout.

    It is loaded as a file, as other packages are called `datasets`, too.
    """
    import tensorflow_datasets as tfds

    package = Path(__file__).parents[1]
    folder = next(path for path in (package / "datasets", package.parent / "datasets") if path.is_dir())
    with tfds.core.registered.skip_registration():
        module = runpy.run_path(str(folder / name / f"{name}.py"), run_name=f"posterior_matching.datasets.{name}")
    return module[name.capitalize()]


def _idx_builder_class(parent: Any) -> Any:
    """Returns TFDS's MNIST builder, or a subclass of it, without TensorFlow; None for other builders.

    TFDS opens the idx files and compresses the images with TensorFlow; here NumPy and Pillow do. Name, URLs and
    checksums are the same, and so is the dataset on disk.
    """
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.image_classification import mnist

    if not issubclass(parent, mnist.MNIST):
        return None

    def generate_examples(self: Any, num_examples: int, data_path: Any, label_path: Any) -> Iterator[Any]:
        del self
        images, labels = _read_idx(data_path), _read_idx(label_path)
        if not num_examples == len(images) == len(labels):
            raise UserError(f"'{data_path}' has {len(images)} images and {len(labels)} labels, not {num_examples}")
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            png.seek(0)
            yield index, {"image": png, "label": int(label)}

    with tfds.core.registered.skip_registration():
        body = {"name": parent.name, "url_infos": parent.url_infos, "_generate_examples": generate_examples}
        return type(parent.__name__, (parent,), body)


def _read_idx(path: Any) -> np.ndarray:
    """Reads an idx(.gz) file: two zero bytes, type (8 = uint8), number of axes, big-endian sizes, then the values."""
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    if not data.startswith(b"\0\0\x08"):
        raise UserError(f"'{path}' is not an idx file of bytes: delete it to download it again")
    start = 4 + 4 * data[3]
    return np.frombuffer(data, np.uint8, offset=start).reshape(struct.unpack(f">{data[3]}I", data[4:start]))


def _prepare(builder: Any) -> None:
    """Downloads and prepares the dataset. TFDS writes to a temporary folder and renames it once it is complete."""
    import logging as pythonlogging

    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    logging.info("preparing dataset '%s' in %s", builder.name, builder.data_path)
    pythonlogging.getLogger("urllib3").setLevel(pythonlogging.ERROR)  # no line per retry
    downloader.MAX_RETRIES = 4  # instead of 10, which take minutes to report a missing network
    remedy = f"try again, or copy the folder from a machine that has it to '{builder.data_path}'"
    root = Path(builder.data_dir_root)
    before = _folders(root)
    try:
        # Looking for copies in Google's cloud would only waste time: they are TFRecord files.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except UserError:
        raise
    except ImportError as error:
        missing = "a package that is not installed, most likely TensorFlow"
        raise UserError(f"TFDS prepares dataset '{builder.name}' with {missing}: {remedy}") from error
    except Exception as error:
        if builder.data_path.exists():  # another process was faster
            return
        if isinstance(error, OSError) and error.errno is None:  # of requests
            raise UserError(f"cannot download dataset '{builder.name}' (no network?): {remedy}") from error
        raise UserError(f"cannot prepare dataset '{builder.name}' ({first_line(error)}): {remedy}") from error
    finally:
        for folder in sorted(_folders(root) - before, reverse=True):  # subfolders first
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _folders(root: Path) -> set[Path]:
    """The folders in `root`, with itself and those that it lies in."""
    return {path for path in (root, *root.parents, *root.rglob("*")) if path.is_dir()}


# Records -------------------------------------------------------------------------------------------------------------


def _source(builder: Any, split: str) -> Any:
    """Returns the serialised examples of a split, in order, by index."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        stored = ", ".join(formats) or "an unknown format"
        raise UserError(f"'{builder.data_path}' is stored as {stored}: delete it to prepare it again as array_record")
    for part in builder.info.splits[split].file_instructions:
        reader = ArrayRecordReader(part.filename)
        if part.skip + part.take > (size := reader.num_records()):
            raise ValueError(f"'{part.filename}' holds {size} examples, not {part.skip + part.take}")
        reader.close()
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw, file_format="array_record")


def _decoder(builder: Any) -> tuple[str, Callable[[list[Any]], np.ndarray]]:
    """Returns `image` or `features`, and a function that turns a list of n stored values into an array [n, ...]."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image, row = features.get("image"), features.get("features")
    if isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8 and None not in image.shape:
        transform = _crop_faces if builder.name == "celeb_a" else lambda images: images
        return "image", lambda values: transform(np.stack([_decode_image(value[0], image.shape) for value in values]))
    if isinstance(row, tfds.features.Tensor) and len(row.shape) == 1 and None not in row.shape:
        return "features", lambda values: np.array(values, np.float32)
    found = ", ".join(f"{key} {feature.shape}" for key, feature in features.items())
    raise UserError(f"dataset '{builder.name}' has neither a uint8 'image' nor 'features' of one fixed shape: {found}")


def _decode_image(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image  # not OpenCV, which TFDS uses if installed: they decode a JPEG to different pixels

    mode = {1: "L", 3: "RGB", 4: "RGBA"}[shape[-1]]
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(shape)


def _decode_all(builder: Any, split: str) -> dict[str, np.ndarray]:
    """Decodes only the required fields of every example of a split, many times faster than TFDS decodes all of them."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    key, decode = _decoder(builder)
    total = builder.info.splits[split].num_examples
    labelled = isinstance(dict(builder.info.features.items()).get("label"), tfds.features.ClassLabel)
    if not total:
        raise UserError(f"split '{split}' of dataset '{builder.name}' is empty")
    arrays: dict[str, np.ndarray] = {}
    try:
        source = _source(builder, split)
        with tqdm(disable=None, total=total, desc=f"decoding {builder.name} {split}", delay=5) as bar:
            for start in range(0, total, _CHUNK):
                rows = range(start, min(start + _CHUNK, total))
                examples = [tf_example_pb2.Example.FromString(r).features.feature for r in source.__getitems__(rows)]
                chunk = {"x": decode([_value(example[key]) for example in examples])}
                if labelled:
                    chunk["label"] = np.array([_value(example["label"])[0] for example in examples], np.int32)
                if not arrays:
                    arrays = {name: np.empty((total, *v.shape[1:]), v.dtype) for name, v in chunk.items()}
                for name, values in chunk.items():
                    arrays[name][rows] = values
                bar.update(len(examples))
    except UserError:
        raise
    except Exception as error:
        remedy = "delete that folder to prepare it again"
        raise UserError(f"cannot read '{builder.data_path}' ({first_line(error)}): {remedy}") from error
    return arrays


def _value(feature: Any) -> Any:
    """Returns the list of floats, integers or byte strings of a `tf.train.Feature`."""
    return getattr(feature, feature.WhichOneof("kind")).value


# Preprocessing -------------------------------------------------------------------------------------------------------


def resize_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes [N, H, W, C] images to float32 [N, size, size, C], with half-pixel centres and no antialiasing."""

    def weights(length: int) -> np.ndarray:  # [size, length], rows sum to 1
        centre = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        distance = np.abs(centre[:, None] - np.arange(length))
        return np.maximum(1 - distance, 0).astype(np.float32)

    vertical, horizontal = weights(images.shape[1]), weights(images.shape[2])
    return np.einsum("ih,jw,nhwc->nijc", vertical, horizontal, images.astype(np.float32), optimize=True)


def _crop_faces(images: np.ndarray) -> np.ndarray:
    """[N, 218, 178, 3] to [N, 64, 64, 3], uint8."""
    return np.rint(resize_bilinear(images[:, 45:-45, 25:-25], 64)).astype(np.uint8)


def _mnist16(images: np.ndarray) -> np.ndarray:
    return resize_bilinear(images, 16) / np.float32(255)


_DERIVED = {"mnist16": ("mnist", _mnist16), "mnist16_flat": ("mnist", lambda x: _mnist16(x).reshape(len(x), -1))}
