"""Filling the holes of tables with a trained PM-VAE, in the table's own units and categories."""

import contextlib
import functools
import pathlib
import zlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from posterior_matching import runs
from posterior_matching.config import Count, Seed, check
from posterior_matching.data import Columns, Table
from posterior_matching.data.tables import iter_chunks, table_writer
from posterior_matching.errors import UserError
from posterior_matching.progress import progress_bar

Kind = Literal["point", "draws"]
Unknown = Literal["error", "missing"]
_CHUNK_ROWS = 65_536


class Imputer:
    """A trained PM-VAE that fills rows.

    The random numbers of a row are a function of the seed and of what the row holds: the same row gets the same
    imputations, whatever rows are around it.

    Args:
        model: The model.
        columns: The columns of the table it was trained on.
        seed: Random seed of the imputations.
        batch_size: Rows at once.
        num_samples: Draws of z that a point estimate averages.
    """

    def __init__(self, model: Any, columns: Columns, *, seed: int = 0, batch_size: int = 512, num_samples: int = 64):
        self.columns = columns
        self._batch_size, self._key = batch_size, jax.random.key(seed)
        graphdef, self._state = nnx.split(model)

        def of_rows(fn):
            """Compiles `fn(model, key, x [1, d], b [1, d])` for a batch of rows, each with a key of its own."""

            def run(state, key, hashes, rows):
                model = nnx.merge(graphdef, state)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
                b = 1.0 - jnp.isnan(rows)
                return jax.vmap(lambda key, x, b: fn(model, key, x[None], b[None]))(keys, jnp.nan_to_num(rows), b)

            return jax.jit(run)

        self._point = of_rows(lambda model, key, x, b: model.point(x, b, num_samples, key=key)[0])
        self._draw = functools.cache(lambda m: of_rows(lambda model, key, x, b: model.draw(x, b, m, key=key)[:, 0]))

    def point(self, x: np.ndarray) -> np.ndarray:
        """Returns rows `[N, d]` with their holes (NaN) filled by point estimates: means, and the likeliest category."""
        return self._over_batches(self._point, x)

    def draws(self, x: np.ndarray, num_imputations: int) -> np.ndarray:
        """Returns draws of p(x_u | x_o) for rows `[N, d]` with holes: `[num_imputations, N, d]`, nothing NaN."""
        return np.moveaxis(self._over_batches(self._draw(num_imputations), x), 1, 0)

    def _over_batches(self, fn: Any, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        hashes = np.array([zlib.crc32(row.tobytes()) for row in x], np.uint32)
        parts = []
        for start in range(0, len(x), self._batch_size):
            rows = slice(start, start + self._batch_size)
            padding = self._batch_size - len(x[rows])  # one shape, compiled once
            padded = np.pad(x[rows], ((0, padding), (0, 0)))
            values = fn(self._state, self._key, np.pad(hashes[rows], (0, padding)), padded)
            parts.append(np.asarray(values)[: len(x[rows])])
        return np.concatenate(parts)


def impute_file(
    run_dir: str,
    input: str,
    output: str,
    *,
    num_imputations: Annotated[int, Field(ge=1, le=1000)] = 1,
    kind: Kind | None = None,
    unknown_categories: Unknown = "error",
    checkpoint: str | None = None,
    batch_size: Count = 512,
    seed: Seed = 0,
) -> list[pathlib.Path]:
    """Fills the holes of a file of rows, in memory that does not grow with their number.

    All other cells leave as they came.

    Args:
        run_dir: Run directory of a PM-VAE trained on a table with these columns.
        input: The file, see `tables.read_table`.
        output: Where the filled file goes; of several imputations, `NAME_1.csv`, `NAME_2.csv`, ... for `NAME.csv`.
        num_imputations: How many completed copies to write.
        kind: "point" estimates or "draws" of p(x_u | x_o); None: draws if there are several, else point estimates.
        unknown_categories: What becomes of categories that the run does not know.
        checkpoint: "best" or "latest"; None: what the run's config says.
        batch_size: Rows at once.
        seed: Random seed.

    Returns:
        The files written.

    Raises:
        UserError: The run, the file or the options do not fit; nothing is written then.
    """
    check(impute_file, dict(locals()))
    kind = kind or ("draws" if num_imputations > 1 else "point")
    if kind == "point" and num_imputations > 1:
        raise UserError(f"num_imputations={num_imputations} with kind=point: copies would be equal, use kind=draws")
    description = runs.read_description(run_dir, "pm_vae")
    columns = runs.saved_columns(description)
    if columns is None:
        raise UserError(f"{run_dir} was trained on {description['config']['dataset']}, not on a table of your own")
    path = pathlib.Path(output)
    targets = [path]
    if num_imputations > 1:
        stem, endings = path.name.partition(".")[0], "".join(path.suffixes)
        targets = [path.with_name(f"{stem}_{i + 1}{endings}") for i in range(num_imputations)]
    model = runs.load_model(run_dir, "pm_vae", checkpoint)
    imputer = Imputer(model, columns, seed=seed, batch_size=batch_size)
    options = columns.reading(runs.saved_table_options(description))
    _write(imputer, iter_chunks(input, options, _CHUNK_ROWS, columns.names), targets, kind, unknown_categories)
    return targets


def _write(
    imputer: Imputer, chunks: Iterator[Table], targets: list[pathlib.Path], kind: Kind, unknown_categories: Unknown
) -> None:
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(table_writer(target)) for target in targets]
        bar = stack.enter_context(progress_bar(desc="imputing", unit="row"))
        for table in chunks:
            x = imputer.columns.encode(table, unknown_categories)
            filled = imputer.point(x)[None] if kind == "point" else imputer.draws(x, len(targets))
            for write, rows in zip(writers, filled, strict=True):
                write(imputer.columns.fill(table, rows))
            bar.update(len(table))
