"""Fills the holes of tables and images with a trained model, and scores any columns given any others."""

import contextlib
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from pydantic import Field

from posterior_matching import atomic, masking, runs
from posterior_matching.config import Count, Seed, check
from posterior_matching.data.images import Images, as_stored, is_images, read_images, read_masks
from posterior_matching.data.tables import iter_chunks, table_writer
from posterior_matching.errors import UserError
from posterior_matching.models import MODELS
from posterior_matching.models.likelihood import tempered_weights, weighted_mean
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE, UnitRange
from posterior_matching.numerics.random import random_key
from posterior_matching.progress import progress_bar

Kind = Literal["point", "draws"]
Unknown = Literal["error", "missing"]
NumImputations = Annotated[int, Field(ge=1, le=1000)]
_CHUNK_ROWS = 65_536


class Imputer:
    """A trained model that fills rows or images.

    The random numbers of a row depend only on the seed and the row's contents, and every batch has the same size. A row
    therefore gets the same imputations regardless of the rows around it, and equal rows get equal ones.

    Args:
        model: The model.
        seed: Random seed of the imputations.
        batch_size: Rows at once.
        num_samples: Draws of z that a point estimate averages, and among which `draws` choose, see `vae.Imputing`.
    """

    def __init__(self, model: Any, *, seed: int = 0, batch_size: int = 128, num_samples: int = 256):
        self._graphdef, self._state = nnx.split(model)
        self._key, self._batch_size, self._num_samples = random_key(seed), batch_size, num_samples

    def point(self, x: np.ndarray) -> np.ndarray:
        """Returns rows `[N, d]` with NaN filled by point estimates: means, and the most likely categories."""
        return next(self._filled(x, _point, (self._num_samples, 1)))

    def draws(self, x: np.ndarray, num_imputations: int) -> Iterator[np.ndarray]:
        """Yields copies of rows `[N, d]` with NaN filled by draws of p(x_u | x_o).

        Copy i does not depend on the number of copies.
        """
        return self._filled(x, _draws, (self._num_samples, num_imputations))

    def image(self, x: np.ndarray, b: np.ndarray, copy: int | None = None) -> np.ndarray:
        """Returns images `[N, H, W, C]` in [0, 1] with the pixels where `b: [N, H, W, 1]` is 0 filled.

        Args:
            x: The images, in [0, 1]; unobserved pixels have no influence.
            b: The masks, float32.
            copy: Fill with draws, with others for each number; None: with point estimates, the weighted mean
                of `num_samples`, see `likelihood.tempered_weights`.
        """
        x = np.where(b == 1, x, np.float32(0))
        if copy is None:
            return self._over_batches(_mean_image, self._num_samples, self._key, x, b)
        return self._over_batches(_image_draw, 1, jax.random.fold_in(self._key, copy), x, b)

    def log_prob(self, x: np.ndarray, given: np.ndarray, of: np.ndarray, num_samples: int) -> np.ndarray:
        """Estimates log p(x_of | x_given) of rows by importance sampling, per standardised unit.

        Args:
            x: `[N, d]`, NaN where missing; missing values are neither scored nor conditioned on.
            given: `[d]` bool, the columns conditioned on.
            of: `[d]` bool, the columns scored, except where they are also given.
            num_samples: Draws of z for each of the two estimates.

        Returns:
            `[N]` float32, nats; 0 where nothing is scored.
        """
        available = ~np.isnan(x)
        masks = np.stack([available & of & ~given, available & given], axis=1).astype(np.float32)
        return self._over_batches(_log_prob, num_samples, self._key, x, masks)

    def info_gains(self, x: np.ndarray, num_samples: int) -> np.ndarray:
        """Estimates the expected information, in nats, that each hole of rows `[N, d]` holds about z; NaN elsewhere."""
        holes = np.isnan(x)
        gains = self._over_batches(_info_gains, num_samples, self._key, x, 1 - holes.astype(np.float32))
        return np.where(holes, gains, np.nan)

    def _filled(self, x: np.ndarray, fn: "_RowFunction", sizes: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yields copies of the rows; `fn` returns all copies of a row, `[1, copies, d]`, given `(samples, copies)`."""
        holes = np.isnan(x)
        rows = holes.any(axis=1)
        incomplete = np.array(x[rows], np.float32)
        values = self._over_batches(fn, sizes, self._key, incomplete, 1 - holes[rows]) if rows.any() else None
        for copy in range(sizes[1]):
            filled = np.array(x, np.float32)
            if values is not None:
                filled[rows] = np.where(holes[rows], values[:, copy], incomplete)
            yield filled

    def _over_batches(self, fn: "_RowFunction", num_samples: Any, key: jax.Array, x: np.ndarray, b: np.ndarray) -> Any:
        b = np.asarray(b, np.float32)
        x = np.nan_to_num(np.asarray(x, np.float32)) + 0.0  # no -0.0, whose bytes differ
        hashes = np.array([zlib.crc32(m.tobytes(), zlib.crc32(r.tobytes())) for r, m in zip(x, b, strict=True)])
        parts = []
        for start in range(0, len(x), self._batch_size):
            rows = slice(start, start + self._batch_size)
            size = len(x[rows])
            batch = [np.resize(a[rows], (self._batch_size, *a.shape[1:])) for a in (hashes.astype(np.uint32), x, b)]
            parts.append(np.asarray(_compiled(fn, self._graphdef, num_samples, self._state, key, *batch))[:size])
        return np.concatenate(parts)


# model, key, row [1, d] without NaN, masks [1, ...], number (or numbers) of samples -> the row's result [1, ...]
_RowFunction = Callable[[Any, jax.Array, jax.Array, jax.Array, Any], jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(fn, graphdef, num_samples, state, key, hashes, x, b):
    """Maps a function over rows, each with its own key. Models of one architecture share the compiled program."""
    model = nnx.merge(graphdef, state)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    return jax.vmap(lambda key, x, b: fn(model, key, x[None], b[None], num_samples)[0])(keys, x, b)


def _point(model, key, x, b, sizes):
    return model.point(x, b, sizes[0], key=key, weighted=True)[:, None]


def _draws(model, key, x, b, sizes):
    samples, copies = sizes
    return jnp.moveaxis(model.draw(x, b, copies, key=key, candidates=samples), 0, 1)


def _image_draw(model, key, x, b, _):
    return jnp.clip(model.impute(x, b, 1, key=key)[0], 0.0, 1.0)


def _mean_image(model, key, x, b, num_samples):
    def draw(key):  # one at a time, to save memory
        imputations, log_weights = model.impute_and_weigh(x, b, 1, key=key)
        return jnp.clip(imputations[0], 0.0, 1.0), log_weights[0]

    imputations, log_weights = jax.lax.map(draw, jax.random.split(key, num_samples))
    return weighted_mean(imputations, tempered_weights(log_weights))


def _log_prob(model, key, x, masks, num_samples):
    of, given = masks[:, 0], masks[:, 1]
    return jnp.where(of.any(axis=-1), model.log_prob_of(x, of, given, num_samples, key=key), 0.0)


def _info_gains(model, key, x, b, num_samples):
    return model.expected_info_gains(x[0], b[0], num_samples, key=key)[None]


def impute_file(
    run_dir: str,
    input: str,
    output: str,
    *,
    num_imputations: NumImputations = 1,
    kind: Kind | None = None,
    unknown_categories: Unknown = "error",
    checkpoint: str | None = None,
    batch_size: Count = 128,
    num_samples: Count = 256,
    seed: Seed = 0,
) -> list[pathlib.Path]:
    """Fills the missing cells of a file of rows, in memory that does not grow with their number.

    All other cells are unchanged.

    Args:
        run_dir: Run directory of a PM-VAE trained on a table with these columns.
        input: The file, see `tables.read_table`.
        output: The filled file, `NAME.csv`; several imputations go to `NAME_1.csv`, `NAME_2.csv`, ...
        num_imputations: Number of completed copies to write.
        kind: "point" estimates or "draws" of p(x_u | x_o); None: draws if there are several, else point estimates.
        unknown_categories: How to treat categories that the run does not know.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        batch_size: Rows at once.
        num_samples: Draws of z that a point estimate averages, and among which `draws` choose.
        seed: Random seed.

    Returns:
        The files written.

    Raises:
        UserError: The run, the file or the options do not match; in that case nothing is written.
    """
    check(impute_file, dict(locals()))
    kind = _kind(kind, num_imputations)
    description = runs.read_description(run_dir, "pm_vae")
    columns = runs.saved_columns(description)
    if columns is None:
        raise UserError(f"{run_dir} was trained on {description['config']['dataset']}, not on a table of your own")
    if is_images(input):
        raise UserError(f"'{input}' holds images, but {run_dir} was trained on a table")
    targets = output_files(input, output, num_imputations)
    model = runs.load_model(run_dir, "pm_vae", checkpoint)
    imputer = Imputer(model, seed=seed, batch_size=batch_size, num_samples=num_samples)
    options = columns.reading(runs.saved_table_options(description))
    chunks = iter_chunks(input, options, _CHUNK_ROWS, columns.names)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(table_writer(target)) for target in targets]
        bar = stack.enter_context(progress_bar(desc="imputing", unit="row", unit_scale=True))
        for table in chunks:
            x = columns.encode(table, unknown_categories)
            filled = iter([imputer.point(x)]) if kind == "point" else imputer.draws(x, num_imputations)
            for write, rows in zip(writers, filled, strict=True):
                write(columns.fill(table, rows))
            bar.update(len(table))
    return targets


def output_files(input: str, output: str, num_imputations: int) -> list[pathlib.Path]:
    """Returns the files that `impute_file` will write.

    Raises:
        UserError: One of them cannot be written, or is the input.
    """
    path = pathlib.Path(output)
    files = [path]
    if num_imputations > 1:
        ending = "".join(path.suffixes[-2:] if path.suffix in (".gz", ".zip") else path.suffixes[-1:])
        stem = path.name.removesuffix(ending)
        files = [path.with_name(f"{stem}_{i + 1}{ending}") for i in range(num_imputations)]
    if not path.parent.is_dir():
        raise UserError(f"cannot write '{output}': there is no directory '{path.parent}'")
    for file in files:
        if file.is_dir():
            raise UserError(f"cannot write '{file}': it is a directory")
        if file.exists() and pathlib.Path(input).exists() and file.samefile(input):
            raise UserError(f"the output '{file}' is the input: give it another name")
    return files


# Images --------------------------------------------------------------------------------------------------------------

_NO_FOLDER = (".npy", ".npz", ".zip", ".png", ".jpg", ".jpeg", ".csv")


def impute_images(
    run_dir: str,
    input: str,
    output: str,
    *,
    mask: str | None = None,
    mask_generator: str | None = None,
    num_imputations: NumImputations = 1,
    kind: Kind | None = None,
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
        mask_generator: Draws the masks instead, see `masking.mask_generator_from_spec`; "config": the run's.
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
    kind = _kind(kind, num_imputations)
    description = runs.read_description(run_dir)
    if not hasattr(MODELS[description["model"]], "impute"):
        raise UserError(f"{run_dir} is a run of {description['model']}, which cannot impute: pass the run built on it")
    if not is_images(input):
        raise UserError(f"'{input}' is no folder, .zip or file of images, but {run_dir} was trained on images")
    to_files = pathlib.Path(output).suffix.lower() if pathlib.Path(input).is_file() else ""
    to_files = to_files if to_files in (".png", ".npy") else ""
    targets = output_files(input, output, num_imputations) if to_files else [_output_folder(input, output)]
    options = runs.saved_image_options(description)
    images = read_images(input, options, runs.saved_image_format(description), for_imputation=True)
    if (to_files == ".npy" and not images.axes) or (to_files == ".png" and len(images) > 1):
        raise UserError(f"cannot write '{input}' as '{output}': name a folder")
    names = [str(pathlib.PurePosixPath(name).with_suffix("")) for name in images.names]
    if not to_files and len({name.casefold() for name in names}) < len(names):
        twice = next(name for i, name in enumerate(names) if name.casefold() in {n.casefold() for n in names[:i]})
        raise UserError(f"two images of '{input}' are named '{twice}', up to suffix and case: rename one")
    key = random_key(seed)
    b = _image_masks(images, mask, mask_generator, options, description, key)
    if b.all():
        raise UserError("the masks have no holes: they are white or 1 everywhere, which means observed")
    model = runs.load_model(run_dir, checkpoint=checkpoint)
    model = UnitRange(model) if isinstance(model, PosteriorMatchingVDVAE) else model
    imputer = Imputer(model, seed=seed, batch_size=batch_size, num_samples=num_samples)
    try:
        with _image_writer(targets, names, images, b, num_imputations) as write:
            for start in progress_bar(range(0, len(images), batch_size), desc="imputing", unit="batch"):
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


def _kind(kind: Kind | None, num_imputations: int) -> Kind:
    if kind == "point" and num_imputations > 1:
        raise UserError(f"num_imputations={num_imputations} with kind=point: all copies would be equal, use kind=draws")
    return kind or ("draws" if num_imputations > 1 else "point")


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
        generator = masking.build_mask_generator(description["config"]["mask_generator"])
    else:
        generator = masking.mask_generator_from_spec(mask_generator)
    shape = masking.mask_shape(images.x.shape[1:])
    generator.check(shape)
    draw = jax.jit(jax.vmap(lambda h: generator(jax.random.fold_in(jax.random.fold_in(key, 1), h), (1, *shape))[0]))
    hashes = np.array([zlib.crc32(image.tobytes()) for image in images.x], np.uint32)
    parts = [np.asarray(draw(np.resize(hashes[i : i + 64], 64)))[: len(hashes) - i] for i in range(0, len(hashes), 64)]
    return b * np.concatenate(parts)


def _save_png(path: pathlib.Path, image: np.ndarray) -> None:
    levels = np.rint(image * 255).astype(np.uint8)
    PIL.Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(path, format="PNG")
