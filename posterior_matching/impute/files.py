"""Fills the holes of a file of rows or of images, and trains on the rows first if asked to; `impute.py` in Python."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from posterior_matching import config as configs
from posterior_matching import runs
from posterior_matching.data import DataOptions, TableOptions, TableSchema, read_table, saved_schema
from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.images.source import is_images
from posterior_matching.errors import UserError
from posterior_matching.impute.defaults import changed, table_config
from posterior_matching.impute.imputer import ImputationMode, NumImputations, Unknown
from posterior_matching.impute.pictures import impute_images
from posterior_matching.impute.rows import impute_file, output_files
from posterior_matching.training.pm_vae import FAMILY


def impute(
    run_dir: str,
    input: str,
    output: str,
    *,
    train: bool = False,
    mask: str | None = None,
    mask_generator: str | None = None,
    num_imputations: NumImputations = 1,
    kind: ImputationMode | None = None,
    unknown_categories: Unknown = "error",
    checkpoint: str | None = None,
    batch_size: configs.Count | None = None,
    num_samples: configs.Count | None = None,
    seed: configs.Seed = 0,
    config: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
    """Fills the holes of a file of rows (`rows.impute_file`) or of images (`pictures.impute_images`).

    Args:
        run_dir: Run directory of a PM-VAE trained on a table with these columns, or of a model of images.
        input: The file, or the images.
        output: The filled file, or a folder for the filled images.
        train: If `run_dir` holds no run yet, train `table_config` on the input, a table; if that was interrupted,
            resume it.
        mask: The holes of images.
        mask_generator: Draws the holes of images.
        num_imputations: Number of completed copies to write.
        kind: "point" estimates or "draws" of p(x_u | x_o); None: draws if there are several, else point estimates.
        unknown_categories: How to treat categories that the run does not know.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        batch_size: Rows or images at once; None: 128 rows or 8 images.
        num_samples: Draws of z that a point estimate averages, and among which the draws of rows choose; None: 256 for
            rows, 64 for images.
        seed: Random seed of the imputations.
        config: Changes to `table_config` by key, `{"table.drop": ("id",)}`; only for a run to be trained.

    Returns:
        The files written.

    Raises:
        UserError: The run, the file or the options do not match; in that case no output is written.
    """
    given = configs.check(impute, dict(locals()))
    common = {key: given[key] for key in ("num_imputations", "kind", "checkpoint", "seed")}
    common |= {key: given[key] for key in ("batch_size", "num_samples") if given[key] is not None}
    exists = (pathlib.Path(run_dir) / "config.json").exists()
    if config and (exists or not train):
        why = f"{run_dir} holds a run already" if exists else "nothing is trained without --train"
        raise UserError(f"--config.{next(iter(config))} changes how to train, but {why}")
    if exists and len(runs.read_description(run_dir)["input_shape"]) == 3:
        if unknown_categories != "error":
            raise UserError(f"--unknown_categories is for tables, but {run_dir} was trained on images")
        return impute_images(run_dir, input, output, mask=mask, mask_generator=mask_generator, **common)
    for key in ("mask", "mask_generator"):
        if given[key] is not None:
            raise UserError(f"--{key} is for images: the holes of a table are its missing cells")
    if train:
        if is_images(input):
            raise UserError(
                f"--train is for tables: train a model of the images '{input}' first, see configs/*_images.py"
            )
        output_files(input, output, num_imputations)  # before hours of training
        _resume(run_dir, input) if exists else _train(run_dir, input, config or {})
    return impute_file(run_dir, input, output, unknown_categories=unknown_categories, **common)


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
