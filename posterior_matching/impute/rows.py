"""Fills the missing cells of a file of rows."""

import contextlib
import pathlib
from collections import Counter

from tqdm import tqdm

from posterior_matching import runs
from posterior_matching.config import Count, Seed, check
from posterior_matching.data import DataOptions, TableSchema, saved_schema
from posterior_matching.data.images.source import is_images
from posterior_matching.data.tables.read import iter_chunks
from posterior_matching.data.tables.write import table_writer
from posterior_matching.errors import UserError
from posterior_matching.impute.imputer import ImputationMode, NumImputations, RowImputer, Unknown

_CHUNK_ROWS = 65_536


def impute_file(
    run_dir: str,
    input: str,
    output: str,
    *,
    num_imputations: NumImputations = 1,
    kind: ImputationMode | None = None,
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
    kind = imputation_mode(kind, num_imputations)
    description = runs.read_description(run_dir, "pm_vae")
    columns = saved_schema(description)
    if not isinstance(columns, TableSchema):
        raise UserError(f"{run_dir} was trained on {description['config']['dataset']}, not on a table of your own")
    if is_images(input):
        raise UserError(f"'{input}' holds images, but {run_dir} was trained on a table")
    targets = output_files(input, output, num_imputations)
    model = runs.load_model(run_dir, "pm_vae", checkpoint)
    imputer = RowImputer(model, seed=seed, batch_size=batch_size, num_samples=num_samples)
    options = columns.reading(DataOptions.of_run(description).table)
    chunks = iter_chunks(input, options, _CHUNK_ROWS, columns.names)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(table_writer(target)) for target in targets]
        bar = stack.enter_context(tqdm(disable=None, desc="imputing", unit="row", unit_scale=True))
        earlier: Counter[int] = Counter()
        for table in chunks:
            x = columns.encode(table, unknown_categories)
            filled = iter([imputer.point(x)]) if kind == "point" else imputer.draws(x, num_imputations, earlier)
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


def imputation_mode(kind: ImputationMode | None, num_imputations: int) -> ImputationMode:
    """Returns the mode: by default draws if there are several copies, else point estimates."""
    if kind == "point" and num_imputations > 1:
        raise UserError(f"num_imputations={num_imputations} with kind=point: all copies would be equal, use kind=draws")
    return kind or ("draws" if num_imputations > 1 else "point")
