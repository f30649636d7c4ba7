"""Posterior Matching with scikit-learn's conventions.

imputer = PosteriorMatchingImputer().fit(frame)
filled = imputer.transform(frame)           # all cells filled: means, and the most likely categories
copies = imputer.sample(frame, 5)           # multiple imputation: draws of p(x_u | x_o)
imputer.log_prob(frame, given=["age"], of=["income"])
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from posterior_matching import config as configs
from posterior_matching import models, runs
from posterior_matching.data import DataOptions, Table, TableOptions, TableSchema, read_table, saved_schema
from posterior_matching.data.tables import spelling
from posterior_matching.errors import UserError, nearest
from posterior_matching.impute.defaults import changed, table_config
from posterior_matching.impute.imputer import ImputationMode, RowImputer, Unknown
from posterior_matching.training import loop
from posterior_matching.training.pm_vae import FAMILY

DensityUnit = Literal["table", "standardised"]
_MIN_ROWS = 10  # one of them for validation


class PosteriorMatchingImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Imputes columns of any kind with a PM-VAE, and estimates likelihoods of any of them given any others.

    Fitted on a DataFrame, it takes and returns DataFrames, with their dtypes, indices and observed cells; fitted on an
    array, it returns arrays. Columns are real, integer or categorical (texts, booleans, pandas categories, and those in
    `categorical`), see `data.tables.kinds`. Constant and empty columns are set aside and dropped ones passed through;
    an empty column stays empty.
    Of the rows given to `fit`, nine tenths are used for training and one tenth to decide when training stops.

    Invalid input raises a one-line `ValueError`.

    Args:
        categorical: Columns to treat as categories although they hold numeric codes or many different texts. Here and
            below, columns are given by name or, for arrays, by index.
        real: Columns to treat as quantities although they look like codes or row numbers.
        log: Positive columns to model on a logarithmic scale; imputations are positive.
        quantile: Columns to model by their ranks; imputations stay between the smallest and the largest value.
        drop: Columns to pass through unchanged.
        missing_values: Values that mean missing, besides NaN and the usual spellings: `(-200, "?")`.
        unknown_categories: How to treat categories that `fit` has not seen: as an "error" or as "missing".
        kind: What `transform` fills in: "point" estimates, or "draws" of p(x_u | x_o).
        num_samples: Draws of z per row that a point estimate averages, weighted by how well they explain the row's
            observed cells, and among which `sample` chooses by the same weights.
        batch_size: Rows filled at once.
        config: Changes to `table_config`: `{"steps": 1000, "model": {"latent_dim": 4}}`.
        run_dir: A run directory to train in, resumed if it holds this run; None: a temporary one.
        random_state: Seed of training and imputations: an int, a `RandomState`, or None for a new seed in every fit.
        verbose: Whether to show the progress of training.

    Attributes:
        model_: The trained `models.vae.PosteriorMatchingVAE`.
        columns_: Its columns, see `data.TableSchema`.
        description_: The run's `config.json`.
        n_iter_: Step of the weights in use.
        n_features_in_: Number of columns given to `fit`.
        feature_names_in_: Their names, if all are strings.
    """

    def __init__(
        self,
        *,
        categorical: Sequence[str | int] = (),
        real: Sequence[str | int] = (),
        log: Sequence[str | int] = (),
        quantile: Sequence[str | int] = (),
        drop: Sequence[str | int] = (),
        missing_values: Sequence[str | float] = (),
        unknown_categories: Unknown = "error",
        kind: ImputationMode = "point",
        num_samples: int = 256,
        batch_size: int = 128,
        config: Mapping[str, Any] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ):
        self.categorical = categorical
        self.real = real
        self.log = log
        self.quantile = quantile
        self.drop = drop
        self.missing_values = missing_values
        self.unknown_categories = unknown_categories
        self.kind = kind
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.config = config
        self.run_dir = run_dir
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002
        """Trains on the rows of `X`, a DataFrame or array `[N, d]` of at least 10 rows; cells may be missing."""
        with _value_errors():
            self._check_parameters()
            seed = self.random_state
            if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
                seed = check_random_state(seed).randint(1_000_000_000)
            table = self._table(X, reset=True)
            validation, train = np.split(np.random.default_rng(int(seed)).permutation(len(table)), [len(table) // 10])
            table = dataclasses.replace(table, parts={"train": np.sort(train), "val": np.sort(validation)})
            config = configs.plain(table_config(len(train), len(table.names)))
            config = changed(config, configs.plain(self.config or {}))
            config |= {"seed": int(seed), "table": configs.plain(dataclasses.asdict(table.options))}
            with contextlib.ExitStack() as stack:
                if not self.verbose:
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                run_dir = self.run_dir
                if run_dir is None:
                    run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="posterior_matching_"))
                try:
                    FAMILY.train(config, str(run_dir), table)
                except loop.InterruptedRunError as error:
                    raise KeyboardInterrupt(str(error) if self.run_dir else "training") from None
                self._adopt(run_dir)
        return self

    def transform(self, X: Any) -> Any:
        """Returns `X`, a DataFrame or array `[N, d]`, with missing cells filled according to `kind`."""
        with _value_errors():
            table, x = self._encoded(X)
            filled = self._imputer.point(x) if self.kind == "point" else next(self._imputer.draws(x, 1))
            return self._like(X, self.columns_.fill(table, filled))

    def sample(self, X: Any, n: int = 1) -> list[Any]:
        """Returns `n` copies of `X` with missing cells filled by draws of p(x_u | x_o): multiple imputation.

        The missing cells of a row are drawn jointly, those of different rows independently, equal rows or not.
        """
        with _value_errors():
            if not isinstance(n, int | np.integer) or n < 1:
                raise UserError(f"n must be a number of copies, at least 1, not {n!r}")
            table, x = self._encoded(X)
            return [self._like(X, self.columns_.fill(table, filled)) for filled in self._imputer.draws(x, int(n))]

    def score_samples(self, X: Any, units: DensityUnit = "standardised", num_samples: int = 512) -> np.ndarray:
        """Estimates log p(x_o) of every row, over all cells that are not missing.

        Args:
            X: DataFrame or array `[N, d]`.
            units: Whether densities of quantities are per standardised unit or per unit of the table, see `log_prob`.
            num_samples: Importance samples per row. The estimate is biased slightly downwards, less so with more.

        Returns:
            `[N]` float64, nats.
        """
        return self.log_prob(X, units=units, num_samples=num_samples)

    def score(self, X: Any, y: Any = None) -> float:  # noqa: ARG002
        """Returns the mean of `score_samples`, for model selection."""
        return float(self.score_samples(X).mean())

    def log_prob(
        self,
        X: Any,
        given: Sequence[str | int] = (),
        of: Sequence[str | int] | None = None,
        units: DensityUnit = "table",
        num_samples: int = 512,
    ) -> np.ndarray:
        """Estimates log p(x_of | x_given) of every row by importance sampling.

        Missing cells are neither scored nor conditioned on. Categorical columns contribute log-probabilities,
        quantities log-densities.

        Args:
            X: DataFrame or array `[N, d]`.
            given: The columns conditioned on, by name or index.
            of: The columns scored; None: all others.
            units: Densities "table": per unit of the table's columns; "standardised": per standard deviation of the
                training rows (on the logarithmic or rank scale of `log` and `quantile` columns), so that columns can
                be compared.
            num_samples: Importance samples for each of log p(x_of, x_given) and log p(x_given).

        Returns:
            `[N]` float64, nats; 0 for rows where nothing is scored.
        """
        with _value_errors():
            configs.check(_check_log_prob, {"units": units, "num_samples": num_samples})
            _, x = self._encoded(X)
            names = [column.name for column in self.columns_.columns]
            is_given = np.isin(names, self._names(X, given))
            is_scored = np.ones(len(names), bool) if of is None else np.isin(names, self._names(X, of))
            log_prob = self._imputer.log_prob(x, is_given, is_scored, num_samples).astype(np.float64)
            if units == "table":
                log_prob += (self.columns_.log_det_jacobian(x) * (is_scored & ~is_given)).sum(axis=1)
            return log_prob

    def info_gains(self, X: Any, num_samples: int = 64) -> pd.DataFrame:
        """Estimates what measuring each missing cell would tell about the row: the expected information gain on z.

        That is H[q(z | x_o)] - E[H[q(z | x_o, x_i)]] for column i, see `PosteriorMatchingVAE.expected_info_gains`.

        Args:
            X: DataFrame or array `[N, d]`.
            num_samples: Draws of x_i to average over.

        Returns:
            `[N, d']` for the d' columns of the model, nats; NaN where a cell is observed. The column to measure next
            is `gains.idxmax(axis=1)`.
        """
        with _value_errors():
            configs.check(_check_log_prob, {"units": "table", "num_samples": num_samples})
            _, x = self._encoded(X)
            index = X.index if isinstance(X, pd.DataFrame) else None
            names = [column.name for column in self.columns_.columns]
            return pd.DataFrame(self._imputer.info_gains(x, num_samples), index, names)

    def save(self, run_dir: str | os.PathLike[str]) -> None:
        """Saves the model as a run directory, for `load`, `impute.py` and the evaluations."""
        check_is_fitted(self)
        with _value_errors():
            path = pathlib.Path(run_dir)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"{run_dir} exists: save in another directory")
            saved = self.description_
            kept = {key: saved[key] for key in ("input_shape", "columns", "images", "fingerprint")}
            run = runs.open_run(str(run_dir), "pm_vae", saved["config"], kept)
            run.create()
            with run.finished_saving():
                weights = models.flat_weights(self.model_)
                record = {"log": {}, "stalled_validations": 0}
                step = {"step": np.int32(self.n_iter_)}
                run.save(self.n_iter_, {name: np.asarray(a) for name, a in weights.items()}, step, record, best=True)

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str], checkpoint: str | None = None, **parameters: Any) -> Self:
        """Returns a fitted imputer from the run directory of a PM-VAE trained on a table.

        Args:
            run_dir: Made by `save`, `train_pm_vae.py` or `impute.py --train`.
            checkpoint: "best" or "latest"; None: the one named in the run's config.
            **parameters: Parameters of the constructor.
        """
        with _value_errors():
            description = runs.read_description(run_dir, "pm_vae")
            columns = saved_schema(description)
            if not isinstance(columns, TableSchema):
                raise UserError(f"{run_dir} was trained on {description['config']['dataset']}, not on a table")
            options = DataOptions.of_run(description).table
            saved = {key: getattr(options, key) for key in ("categorical", "real", "log", "quantile", "drop")}
            saved |= {"missing_values": columns.missing_values, "random_state": description["config"]["seed"]}
            imputer = cls(**(saved | parameters))
            imputer._adopt(run_dir, checkpoint)
            names = columns.names or tuple(column.name for column in columns.columns)
            imputer.n_features_in_ = len(names)
            if imputer._has_names:
                imputer.feature_names_in_ = np.array(names, object)
            return imputer

    def _adopt(self, run_dir: str | os.PathLike[str], checkpoint: str | None = None) -> None:
        self.description_ = runs.read_description(run_dir, "pm_vae")
        columns = saved_schema(self.description_)
        assert isinstance(columns, TableSchema)
        self.columns_ = columns
        self.model_ = runs.load_model(run_dir, "pm_vae", checkpoint)
        self.n_iter_ = runs.latest_step(run_dir, checkpoint or self.description_["config"]["evaluate_checkpoint"])

    @property
    def _imputer(self) -> RowImputer:
        seed = self.description_["config"]["seed"]
        return RowImputer(self.model_, seed=seed, batch_size=self.batch_size, num_samples=self.num_samples)

    @property
    def _has_names(self) -> bool:
        """Whether the columns had names when the model was trained, as those of arrays do not."""
        return not spelling.is_unnamed(self.columns_.names)

    def _check_parameters(self) -> None:
        parameters = {key: getattr(self, key) for key in ("unknown_categories", "kind", "num_samples", "batch_size")}
        configs.check(_check_constructor, parameters)

    def _encoded(self, X: Any) -> tuple[Table, np.ndarray]:
        check_is_fitted(self)
        self._check_parameters()
        table = self._table(X, reset=False)
        return table, self.columns_.encode(table, self.unknown_categories)

    def _table(self, X: Any, reset: bool) -> Table:
        """Checks `X` like scikit-learn's estimators, and reads it."""
        least = _MIN_ROWS if reset else 1
        if isinstance(X, pd.DataFrame):
            validate_data(self, X, skip_check_array=True, reset=reset)
            if len(X) < least or not len(X.columns):
                raise UserError(f"the table has {len(X)} rows and {len(X.columns)} columns: give at least {least} rows")
            source = X
        else:
            source = validate_data(
                self, X, dtype=None, ensure_all_finite="allow-nan", ensure_min_samples=least, reset=reset
            )
            if source.dtype.kind in "iuf":
                source = source.astype(np.float64)
            names = getattr(self, "feature_names_in_", None)
            source = pd.DataFrame(source, columns=names) if names is not None else source
        keys = ("categorical", "real", "log", "quantile", "drop")
        options: dict[str, Any] = {key: tuple(self._names(X, getattr(self, key))) for key in keys}
        return read_table(source, TableOptions(**options, missing_values=tuple(self.missing_values)))

    def _names(self, X: Any, columns: Sequence[str | int]) -> list[str]:
        """Returns the names in `columns_` of columns given by name or index."""
        if isinstance(columns, str):
            raise UserError(f"columns are given as a list, not as {columns!r}: ['{columns}']")
        known = getattr(self, "feature_names_in_", None)
        if known is None:
            known = [str(c) for c in X.columns] if isinstance(X, pd.DataFrame) else None
        if known is None:
            known = list(spelling.unnamed(self.n_features_in_))
        names = []
        for column in columns:
            if str(column) in known:
                names.append(str(column))
            elif not isinstance(column, str) and 0 <= column < len(known):
                names.append(str(known[column]))
            else:
                raise UserError(f"no column {column!r}: {nearest(str(column), map(str, known))}")
        return names

    def _like(self, X: Any, table: Table) -> Any:
        """Returns the rows of a table in the type of `X`."""
        if isinstance(X, pd.DataFrame) and self._has_names:  # else fitted on an array: arrays come out
            return table.frame.set_axis(X.columns, axis=1)
        array, dtype = table.frame.to_numpy(), np.asarray(X).dtype
        return array.astype(dtype) if dtype.kind in "iufb" else array

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "model_" in state:
            weights = models.flat_weights(state["model_"])
            state["model_"] = {name: np.asarray(array) for name, array in weights.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model_" in state:
            self.model_ = models.with_weights(runs.abstract_model(self.description_), state["model_"])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.string = tags.input_tags.categorical = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _check_constructor(
    unknown_categories: Unknown, kind: ImputationMode, num_samples: configs.Count, batch_size: configs.Count
) -> None:
    """Declares what these parameters may be, for `config.check`."""


def _check_log_prob(units: DensityUnit, num_samples: configs.Count) -> None:
    """Declares what these parameters may be, for `config.check`."""


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """Turns a UserError into the ValueError that scikit-learn expects, in terms of the estimator's parameters."""
    try:
        yield
    except UserError as error:
        message = re.sub(r"config\.table\.", "", str(error))
        raise ValueError(re.sub(r"--unknown_categories=missing", "unknown_categories='missing'", message)) from error
