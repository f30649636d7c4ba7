"""Fills the missing cells of tables with a trained PM-VAE, and scores any of their columns given any others."""

import contextlib
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from posterior_matching import runs
from posterior_matching.config import Count, Seed, check
from posterior_matching.data.tables import iter_chunks, table_writer
from posterior_matching.errors import UserError
from posterior_matching.progress import progress_bar

Kind = Literal["point", "draws"]
Unknown = Literal["error", "missing"]
NumImputations = Annotated[int, Field(ge=1, le=1000)]
_CHUNK_ROWS = 65_536


class Imputer:
    """A trained PM-VAE that fills rows.

    The random numbers of a row depend only on the seed and the row's contents, and every batch has the same size. A row
    therefore gets the same imputations regardless of the rows around it, and equal rows get equal ones.

    Args:
        model: The model.
        seed: Random seed of the imputations.
        batch_size: Rows at once.
        num_samples: Draws of z that a point estimate averages.
    """

    def __init__(self, model: Any, *, seed: int = 0, batch_size: int = 128, num_samples: int = 64):
        self._graphdef, self._state = nnx.split(model)
        self._key, self._batch_size, self._num_samples = jax.random.key(seed), batch_size, num_samples

    def point(self, x: np.ndarray) -> np.ndarray:
        """Returns rows `[N, d]` with NaN filled by point estimates: means, and the most likely categories."""
        return self._filled(x, _point, self._num_samples, self._key)

    def draws(self, x: np.ndarray, num_imputations: int) -> Iterator[np.ndarray]:
        """Yields copies of rows `[N, d]`, one at a time, with NaN filled by draws of p(x_u | x_o).

        Copy i does not depend on the number of copies.
        """
        for i in range(num_imputations):
            yield self._filled(x, _draw, 1, jax.random.fold_in(self._key, i))

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

    def _filled(self, x: np.ndarray, fn: "_RowFunction", num_samples: int, key: jax.Array) -> np.ndarray:
        holes = np.isnan(x)
        filled, rows = np.array(x, np.float32), holes.any(axis=1)
        if rows.any():
            values = self._over_batches(fn, num_samples, key, filled[rows], 1 - holes[rows].astype(np.float32))
            filled[rows] = np.where(holes[rows], values, filled[rows])
        return filled

    def _over_batches(self, fn: "_RowFunction", num_samples: int, key: jax.Array, x: np.ndarray, b: np.ndarray) -> Any:
        x = np.nan_to_num(np.asarray(x, np.float32)) + 0.0  # no -0.0, whose bytes differ
        hashes = np.array([zlib.crc32(m.tobytes(), zlib.crc32(r.tobytes())) for r, m in zip(x, b, strict=True)])
        parts = []
        for start in range(0, len(x), self._batch_size):
            rows = slice(start, start + self._batch_size)
            size = len(x[rows])
            batch = [np.resize(a[rows], (self._batch_size, *a.shape[1:])) for a in (hashes.astype(np.uint32), x, b)]
            parts.append(np.asarray(_compiled(fn, self._graphdef, num_samples, self._state, key, *batch))[:size])
        return np.concatenate(parts)


# model, key, row [1, d] without NaN, masks [1, ...], number of samples -> the row's result
_RowFunction = Callable[[Any, jax.Array, jax.Array, jax.Array, int], jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(fn, graphdef, num_samples, state, key, hashes, x, b):
    """Maps a function over rows, each with its own key. Models of one architecture share the compiled program."""
    model = nnx.merge(graphdef, state)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    return jax.vmap(lambda key, x, b: fn(model, key, x[None], b[None], num_samples)[0])(keys, x, b)


def _point(model, key, x, b, num_samples):
    return model.point(x, b, num_samples, key=key)


def _draw(model, key, x, b, num_samples):
    return model.draw(x, b, num_samples, key=key)[0]


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
    num_samples: Count = 64,
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
        num_samples: Draws of z that a point estimate averages.
        seed: Random seed.

    Returns:
        The files written.

    Raises:
        UserError: The run, the file or the options do not match; in that case nothing is written.
    """
    check(impute_file, dict(locals()))
    kind = kind or ("draws" if num_imputations > 1 else "point")
    if kind == "point" and num_imputations > 1:
        raise UserError(f"num_imputations={num_imputations} with kind=point: all copies would be equal, use kind=draws")
    description = runs.read_description(run_dir, "pm_vae")
    columns = runs.saved_columns(description)
    if columns is None:
        raise UserError(f"{run_dir} was trained on {description['config']['dataset']}, not on a table of your own")
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
