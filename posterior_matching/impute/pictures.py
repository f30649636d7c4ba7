"""Fills the holes of images."""

import contextlib
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image
from tqdm import tqdm

from posterior_matching import atomic, mask_generators, masking, runs
from posterior_matching.config import Count, Seed, check
from posterior_matching.data import DataOptions, ImageFormat, saved_schema
from posterior_matching.data.images.source import Images, as_stored, is_images, read_images, read_masks
from posterior_matching.errors import UserError
from posterior_matching.impute.imputer import ImputationMode, NumImputations, RowImputer
from posterior_matching.impute.rows import imputation_mode, output_files
from posterior_matching.models import MODELS
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE, UnitRange

_NO_FOLDER = (".npy", ".npz", ".zip", ".png", ".jpg", ".jpeg", ".csv")


def impute_images(
    run_dir: str,
    input: str,
    output: str,
    *,
    mask: str | None = None,
    mask_generator: str | None = None,
    num_imputations: NumImputations = 1,
    kind: ImputationMode | None = None,
    checkpoint: str | None = None,
    batch_size: Count = 8,
    num_samples: Count = 64,
    seed: Seed = 0,
) -> list[pathlib.Path]:
    """Fills the holes of images. Observed pixels are unchanged, at the size at which the run sees the images.

    An image gets the same imputations regardless of the images around it.

    Args:
        run_dir: Run directory of a model of images that can impute.
        input: The images, see `data.images`. NaN in arrays are holes.
        output: A new folder for PNG files under the names of the images, `NAME.png` or, with several imputations,
            `NAME_1.png`, `NAME_2.png`, ... For a single image it may also be a file, `NAME.png`, and for `.npy` an
            array of the same kind, `NAME.npy`.
        mask: The masks, white or 1 = observed, black or 0 = hole, see `data.images.read_masks`.
        mask_generator: Draws the masks instead, see `mask_generators.mask_generator_from_spec`; "config": the run's.
        num_imputations: Number of completed copies to write.
        kind: "point" estimates (the mean of `num_samples` draws, weighted) or "draws"; None: draws if there are
            several copies. Draws are decoder means, without the noise of p(x | z).
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        batch_size: Images at once.
        num_samples: Draws of z that a point estimate averages.
        seed: Random seed of imputations and masks.

    Returns:
        The files written.

    Raises:
        UserError: The run, the images, the masks or the options do not match; in that case nothing is written.
    """
    check(impute_images, dict(locals()))
    kind = imputation_mode(kind, num_imputations)
    description = runs.read_description(run_dir)
    if not hasattr(MODELS[description["model"]], "impute"):
        raise UserError(f"{run_dir} is a run of {description['model']}, which cannot impute: pass the run built on it")
    if not is_images(input):
        raise UserError(f"'{input}' is no folder, .zip or file of images, but {run_dir} was trained on images")
    to_files = pathlib.Path(output).suffix.lower() if pathlib.Path(input).is_file() else ""
    to_files = to_files if to_files in (".png", ".npy") else ""
    targets = output_files(input, output, num_imputations) if to_files else [_output_folder(input, output)]
    options, image_format = DataOptions.of_run(description).images, saved_schema(description)
    assert isinstance(image_format, ImageFormat)
    images = read_images(input, options, image_format, for_imputation=True)
    if (to_files == ".npy" and not images.axes) or (to_files == ".png" and len(images) > 1):
        raise UserError(f"cannot write '{input}' as '{output}': name a folder")
    names = [str(pathlib.PurePosixPath(name).with_suffix("")) for name in images.names]
    if not to_files and len({name.casefold() for name in names}) < len(names):
        twice = next(name for i, name in enumerate(names) if name.casefold() in {n.casefold() for n in names[:i]})
        raise UserError(f"two images of '{input}' are named '{twice}', up to suffix and case: rename one")
    key = jax.random.key(seed)
    b = _image_masks(images, mask, mask_generator, options, description, key)
    if b.all():
        raise UserError("the masks have no holes: they are white or 1 everywhere, which means observed")
    model = runs.load_model(run_dir, checkpoint=checkpoint)
    model = UnitRange(model) if isinstance(model, PosteriorMatchingVDVAE) else model
    imputer = RowImputer(model, seed=seed, batch_size=batch_size, num_samples=num_samples)
    try:
        with _image_writer(targets, names, images, b, num_imputations) as write:
            for start in tqdm(range(0, len(images), batch_size), desc="imputing", unit="batch", disable=None):
                rows = slice(start, start + batch_size)
                x = images.x[rows].astype(np.float32) / np.float32(images.max_value)
                for copy in range(num_imputations):
                    filled = x if b[rows].all() else imputer.image(x, b[rows], None if kind == "point" else copy)
                    write(rows, copy, np.where(b[rows] == 1, x, filled))
    except OSError as error:
        raise UserError(f"cannot write '{output}': {error.strerror or error}") from error
    if targets[0].is_dir():
        return [targets[0] / file for file in _files_in_folder(names, num_imputations)]
    return targets


def _output_folder(input: str, output: str) -> pathlib.Path:
    folder, source = pathlib.Path(output), pathlib.Path(input)
    if not folder.parent.is_dir():
        raise UserError(f"cannot write '{output}': there is no directory '{folder.parent}'")
    if folder.suffix.lower() in _NO_FOLDER:
        raise UserError(f"cannot write '{input}' as '{output}': name a folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"the output '{output}' exists: name a new folder")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"the output '{output}' lies in the input: name a folder outside of it")
    return folder


@contextlib.contextmanager
def _image_writer(
    targets: list[pathlib.Path], names: list[str], images: Images, b: np.ndarray, num_imputations: int
) -> Iterator[Callable[[slice, int, np.ndarray], None]]:
    """Yields a function that takes rows, the number of the copy and its pixels in [0, 1]. Writes all files or none."""
    with contextlib.ExitStack() as stack:
        if targets[0].suffix.lower() == ".npy":
            filled = np.zeros((num_imputations, *images.x.shape), np.float32)

            def write(rows: slice, copy: int, pixels: np.ndarray) -> None:
                filled[copy, rows] = pixels

            yield write
            for target, pixels in zip(targets, filled, strict=True):
                with stack.enter_context(atomic.replacing(target)).open("wb") as array:
                    np.save(array, as_stored(images, pixels, b == 1), allow_pickle=False)
        elif targets[0].suffix.lower() == ".png":
            files = [stack.enter_context(atomic.replacing(target)) for target in targets]
            yield lambda _, copy, pixels: _save_png(files[copy], pixels[0])
        else:
            folder = stack.enter_context(atomic.replacing_folder(targets[0]))
            files = [folder / file for file in _files_in_folder(names, num_imputations)]

            def write(rows: slice, copy: int, pixels: np.ndarray) -> None:
                for file, image in zip(files[copy::num_imputations][rows], pixels, strict=True):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    _save_png(file, image)

            yield write


def _files_in_folder(names: list[str], num_imputations: int) -> list[str]:
    """The copies of every image, one image after the other."""
    if num_imputations == 1:
        return [f"{name}.png" for name in names]
    return [f"{name}_{copy + 1}.png" for name in names for copy in range(num_imputations)]


def _image_masks(
    images: Images,
    mask: str | None,
    mask_generator: str | None,
    options: Any,
    description: Mapping[str, Any],
    key: jax.Array,
) -> np.ndarray:
    """Returns the masks, `[N, H, W, 1]` float32, 1 = observed."""
    if mask is not None and mask_generator is not None:
        raise UserError("--mask and --mask_generator both give holes: choose one")
    if mask is None and mask_generator is None and images.holes is None:
        raise UserError("nothing says where the holes are: set --mask to an image (black = hole) or --mask_generator")
    b = np.ones((*images.x.shape[:3], 1), np.float32) if images.holes is None else 1 - images.holes.astype(np.float32)
    if mask is not None:
        return b * read_masks(mask, images, options)
    if mask_generator is None:
        return b
    if mask_generator == "config":
        generator = mask_generators.build_mask_generator(description["config"]["mask_generator"])
    else:
        generator = mask_generators.mask_generator_from_spec(mask_generator)
    shape = masking.mask_shape(images.x.shape[1:])
    generator.check(shape)
    draw = jax.jit(jax.vmap(lambda h: generator(jax.random.fold_in(jax.random.fold_in(key, 1), h), (1, *shape))[0]))
    hashes = np.array([zlib.crc32(image.tobytes()) for image in images.x], np.uint32)
    parts = [np.asarray(draw(np.resize(hashes[i : i + 64], 64)))[: len(hashes) - i] for i in range(0, len(hashes), 64)]
    return b * np.concatenate(parts)


def _save_png(path: pathlib.Path, image: np.ndarray) -> None:
    levels = np.rint(image * 255).astype(np.uint8)
    PIL.Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(path, format="PNG")
