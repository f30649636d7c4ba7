"""Fills the holes of a file of rows or of images, and trains on the rows first if asked to; `impute.py` in Python."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from posterior_matching import config as configs
from posterior_matching import runs
from posterior_matching.config import option
from posterior_matching.data import DataOptions, TableOptions, TableSchema, read_table, saved_schema
from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.images.source import is_images
from posterior_matching.errors import UserError
from posterior_matching.impute.defaults import changed, table_config
from posterior_matching.impute.imputer import ImputationMode, NumImputations, Unknown
from posterior_matching.impute.pictures import impute_images
from posterior_matching.impute.rows import impute_file, output_files
from posterior_matching.training.pm_vae import FAMILY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `impute` takes; each is a flag of `impute.py`."""

    run_dir: str = option(
        dataclasses.MISSING, "Use the run in this directory, made by a training script or with --train (required)."
    )
    input: str = option(
        dataclasses.MISSING,
        "Fill the missing cells of this file of rows, or the holes of these images: a folder, .zip, .png, .npy ...",
    )
    output: str = option(
        dataclasses.MISSING,
        "Write the filled rows to this file, NAME.csv; several imputations go to NAME_1.csv, NAME_2.csv and so on. "
        "Filled images go to this new folder, as PNG files under their names.",
    )
    train: bool = option(
        False,
        "If the run directory holds no run yet, train the default config on the input first; --config.table.KEY=VALUE "
        "sets how to read it, and --config.KEY=VALUE changes any other key. A run that was interrupted is resumed.",
    )
    mask: str | None = option(
        None,
        "The holes of the images: a mask for all of them, or a folder of masks with the names of the images. White is "
        "observed, black a hole.",
    )
    mask_generator: str | None = option(
        None,
        "Draw the holes of images with this generator, given with its options as in SquareMaskGenerator:size=4; "
        "'config' uses the generator the run was trained with.",
    )
    num_imputations: NumImputations = option(1, "Write this many completed copies, which differ in their draws.")
    kind: ImputationMode | None = option(
        None,
        "Fill with 'point' estimates (means, and the most likely categories) or with 'draws' from p(x_u | x_o); by "
        "default with draws if there are several copies.",
    )
    unknown_categories: Unknown = option(
        "error", "Treat categories that the run does not know as an 'error' or as 'missing'."
    )
    checkpoint: str | None = option(
        None,
        "Load this checkpoint, 'best' or 'latest'; by default the one set by the run's config.evaluate_checkpoint.",
    )
    batch_size: configs.Count | None = option(
        None, "Fill this many rows or images at once; by default 128 rows or 8 images."
    )
    num_samples: configs.Count | None = option(
        None,
        "Draw this many z for a point estimate, and for draws of rows to choose from; by default 256 for rows, 64 for "
        "images.",
    )
    seed: configs.Seed = option(0, "Seed the imputations with this number.")


def impute(
    run_dir: str, input: str, output: str, *, config: Mapping[str, Any] | None = None, **options: Any
) -> list[pathlib.Path]:
    """Fills the holes of a file of rows (`rows.impute_file`) or of images (`pictures.impute_images`).

    The run is a PM-VAE trained on a table with these columns, or a model of images. `config` changes `table_config` by
    key, `{"table.drop": ("id",)}`, for a run to be trained; the other arguments are those of `Options`. Returns the
    files written; if the run, the file or the options do not match, a UserError is raised and none is written.
    """
    given = vars(configs.call(Options, {"run_dir": run_dir, "input": input, "output": output} | options))
    common = {key: given[key] for key in ("num_imputations", "kind", "checkpoint", "seed")}
    common |= {key: given[key] for key in ("batch_size", "num_samples") if given[key] is not None}
    exists = (pathlib.Path(run_dir) / "config.json").exists()
    if config and (exists or not given["train"]):
        why = f"{run_dir} holds a run already" if exists else "nothing is trained without --train"
        raise UserError(f"--config.{next(iter(config))} changes how to train, but {why}")
    if exists and len(runs.read_description(run_dir)["input_shape"]) == 3:
        if given["unknown_categories"] != "error":
            raise UserError(f"--unknown_categories is for tables, but {run_dir} was trained on images")
        return impute_images(
            run_dir, input, output, mask=given["mask"], mask_generator=given["mask_generator"], **common
        )
    for key in ("mask", "mask_generator"):
        if given[key] is not None:
            raise UserError(f"--{key} is for images: the holes of a table are its missing cells")
    if given["train"]:
        if is_images(input):
            raise UserError(
                f"--train is for tables: train a model of the images '{input}' first, see configs/*_images.py"
            )
        output_files(input, output, given["num_imputations"])  # before hours of training
        _resume(run_dir, input) if exists else _train(run_dir, input, config or {})
    return impute_file(run_dir, input, output, unknown_categories=given["unknown_categories"], **common)


def _train(run_dir: str, input: str, changes: Mapping[str, Any]) -> None:
    """Trains the default config for the table, with changes to it by dotted key."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *groups, name = key.split(".")
        functools.reduce(lambda group, part: group.setdefault(part, {}), groups, nested)[name] = value
    nested = configs.plain(nested)
    table = read_table(input, configs.call(TableOptions, nested.get("table", {}), "config.table"))
    config = configs.plain(table_config(len(table), len(table.names))) | {"table": {}, "dataset": input}
    FAMILY.train(changed(config, nested), run_dir, table)


def _resume(run_dir: str, input: str) -> None:
    """Goes on training a run on this table; does nothing if the run was trained on another."""
    description = runs.read_description(run_dir, "pm_vae")
    schema, path = saved_schema(description), pathlib.Path(input)
    if isinstance(schema, TableSchema) and path.is_file() and file_fingerprint(path) == description["fingerprint"]:
        options = schema.reading(DataOptions.of_run(description).table)
        FAMILY.train(description["config"], run_dir, read_table(input, options, schema.names))
