"""Compares imputers on tables: errors of the imputed cells, and how honest the draws are.

    python benchmarks/imputation.py --table mine.csv --table digits [--folder runs/imputation] [--seeds 3]
    python benchmarks/imputation.py --table "air.csv:drop=('Date','Time'),missing_values=(-200,)" --shares 0.3
    python benchmarks/imputation.py --table winequality-white.csv --mechanisms VAEAC --max_rows 10000

For every table, mechanism (`missingness.py`), share of missing cells and seed, cells are hidden in 70% of the rows, on
which a method is fitted and whose cells it imputes (`in`), and in the other 30%, which it has not seen (`out`). Cells
that are missing in the file are never scored. After a colon come keys of `config.table`. The mechanism VAEAC is the
protocol of Ivanov et al. 2019: all rows are trained on, and half of their cells are hidden, by the mask of
github.com/tigvarts/vaeac.

Reported per method: NRMSE (root-mean-square error over the column's standard deviation) and MAE (in standard
deviations) of real columns, accuracy of categorical ones; of 99 draws, CRPS (in standard deviations) and the share of
true values in the central 90% interval; seconds of fitting. A method without draws is scored as a point mass.
`posterior_matching` is `PosteriorMatchingImputer` with its defaults.

Every result is kept as a JSON file under `folder`; the same command runs what is missing.
"""

import functools
import itertools
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import pandas as pd
from absl import flags
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from benchmarks.chained import ChainedImputer
from benchmarks.missingness import MECHANISMS
from posterior_matching import cli, data
from posterior_matching.atomic import write_text
from posterior_matching.config import call, read_options
from posterior_matching.errors import UserError, nearest
from posterior_matching.evaluation import baselines
from posterior_matching.evaluation.metrics import category_accuracy, crps, interval_coverage, nrmse
from posterior_matching.impute.estimator import PosteriorMatchingImputer

NUM_DRAWS = 99  # between the 5th smallest and the 5th largest lies a new draw with probability 0.9
METRICS = ("nrmse", "accuracy", "mae", "crps", "coverage", "seconds")
VAEAC, VAEAC_SHARE, VAEAC_SEED = "VAEAC", 0.5, 239


class Rows(NamedTuple):
    """A table in the units of its columns: encoded, standardised on all rows, NaN where the file has no value."""

    name: str
    x: np.ndarray  # [N, d]
    schema: data.TableSchema


class Imputations(NamedTuple):
    """Completed rows."""

    point: np.ndarray  # [N, d]
    draws: np.ndarray | None = None  # [S, N, d]; None if the method has none


Impute = Callable[[np.ndarray], Imputations]  # of incomplete rows [N, d]
Method = Callable[[Rows, np.ndarray, int], Impute]  # the table, its incomplete training rows and a seed


def posterior_matching(rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """`PosteriorMatchingImputer` with its defaults, given frames as users have them."""
    columns = rows.schema.columns
    categorical = tuple(column.name for column in columns if column.values)
    real = tuple(column.name for column in columns if not column.values)
    options = data.TableOptions(categorical=categorical, real=real)

    def frame(x: np.ndarray) -> pd.DataFrame:
        return rows.schema.decode(np.nan_to_num(x)).mask(np.isnan(x))

    def encoded(filled: pd.DataFrame) -> np.ndarray:
        return rows.schema.encode(data.read_table(filled, options))

    imputer = PosteriorMatchingImputer(
        categorical=categorical, real=real, unknown_categories="missing", random_state=seed
    ).fit(frame(train))

    def impute(x: np.ndarray) -> Imputations:
        given = frame(x)
        copies = imputer.sample(given, NUM_DRAWS)
        return Imputations(encoded(imputer.transform(given)), np.stack([encoded(copy) for copy in copies]))

    return impute


def iterative(rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """Chained regressions, Bayesian ridge and logistic: their predictions, and draws of them (multiple imputation)."""
    rng, cardinalities = np.random.default_rng(seed), rows.schema.cardinalities
    point, draws = ChainedImputer(cardinalities).fit(train), ChainedImputer(cardinalities).fit(train, rng)
    return lambda x: Imputations(point.complete(x), np.stack([draws.complete(x, rng) for _ in range(NUM_DRAWS)]))


def forest(rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """Chained random forests (missForest: Stekhoven and Buehlmann 2012), without draws."""
    trees = RandomForestRegressor(n_jobs=-1, random_state=seed), RandomForestClassifier(n_jobs=-1, random_state=seed)
    imputer = ChainedImputer(rows.schema.cardinalities, *trees, num_rounds=5).fit(train)
    return lambda x: Imputations(imputer.complete(x))


def of_baseline(name: str, rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """An imputer of `evaluation/baselines.py`, without draws."""
    del seed
    imputer = baselines.fit(train, (name,), cardinalities=rows.schema.cardinalities)[name]
    return lambda x: Imputations(imputer(x))


METHODS: dict[str, Method] = {
    "posterior_matching": posterior_matching,
    "mean": functools.partial(of_baseline, "mean"),
    "knn": functools.partial(of_baseline, "knn"),
    "iterative": iterative,
    "forest": forest,
}


def read(source: str, max_rows: int) -> Rows:
    """Reads a table, a file or the name of a built-in dataset, and keeps `max_rows` rows at random.

    Raises:
        UserError: It cannot be read, or its options are wrong.
    """
    path, _, written = source.partition(":")
    options = read_options(written, "table")
    if not pathlib.Path(path).exists():
        parts = [data.load(path, split) for split in ("train", "validation", "test")]
        x = np.concatenate([part.x.reshape(len(part), -1) for part in parts])
        table = data.read_table(pd.DataFrame(x).add_prefix("x"))  # names, by which constant columns may be left out
    else:
        table = data.read_table(path, call(data.TableOptions, options, "table"))
    schema = data.TableSchema.fit(table)
    x = schema.encode(table)
    chosen = np.random.default_rng(0).permutation(len(x))[:max_rows]
    return Rows(pathlib.Path(path).stem, x[np.sort(chosen)].astype(np.float64), schema)


def compare(rows: Rows, mechanism: str, share: float, seed: int, method: str) -> dict[str, dict[str, float]]:
    """Hides cells, fits a method to the training rows, and scores what it imputes there and in new rows."""
    if mechanism == VAEAC:
        b = np.random.RandomState(VAEAC_SEED).choice(2, size=rows.x.shape, p=[VAEAC_SHARE, 1 - VAEAC_SHARE])
        parts = {"in": np.arange(len(rows.x))}
    else:
        rng = np.random.default_rng(seed)
        b = MECHANISMS[mechanism](rows.x, share, rng, rows.schema.cardinalities)
        train, test = np.split(rng.permutation(len(rows.x)), [round(0.7 * len(rows.x))])
        parts = {"in": train, "out": test}
    incomplete = np.where(b == 1, rows.x, np.nan)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, that the iterations have not converged
        impute = METHODS[method](rows, incomplete[parts["in"]], seed)
        fitted = time.perf_counter() - start
        return {
            name: score(rows, rows.x[part], impute(incomplete[part]), 1 - b[part]) | {"seconds": fitted}
            for name, part in parts.items()
        }


def score(rows: Rows, truth: np.ndarray, imputed: Imputations, hidden: np.ndarray) -> dict[str, float]:
    """The metrics of imputed cells `[N, d]` where `hidden` is 1 and the truth is known."""
    real = np.array(rows.schema.cardinalities) == 0
    scored = (hidden == 1) & ~np.isnan(truth)
    results = {}
    if scored[:, ~real].any():
        results["accuracy"] = category_accuracy(truth[:, ~real], imputed.point[:, ~real], scored[:, ~real])
    if scored[:, real].any():
        results["nrmse"] = nrmse(truth[:, real], imputed.point[:, real], scored[:, real])
        cells = scored & real
        draws = imputed.point[None] if imputed.draws is None else imputed.draws
        results["mae"] = float(np.abs(imputed.point - truth)[cells].mean())
        results["crps"] = float(crps(truth[cells], draws[:, cells]).mean())
        if imputed.draws is not None:
            results["coverage"] = float(interval_coverage(truth[cells], draws[:, cells]).mean())
    return results


def report(results: pd.DataFrame) -> str:
    """Markdown tables of new and of training rows: the mean over tables of every metric, with its standard error over
    seeds, and the mean rank, by share, mechanism and method; from one row per result, as `main` returns them.
    """
    missing = pd.Series(np.nan, results.index)
    error = results.get("nrmse", missing).fillna(0) + (1 - results.get("accuracy", missing)).fillna(0)
    results = results.assign(error=error)
    results["rank"] = results.groupby(["rows", "share", "mechanism", "table", "seed"])["error"].rank()
    metrics = [m for m in METRICS if m in results]
    lines = []
    for where, part in results.groupby("rows", sort=False):
        lines.append(f"\n{where}-sample rows; rank: of NRMSE + 1 - accuracy, mean over tables and seeds")
        lines.append("| hidden | method | " + " | ".join((*metrics, "rank")) + " |\n|" + "---|" * (len(metrics) + 3))
        for _, chosen in part.groupby(["share", "mechanism", "method"], sort=False):
            first, seeds = chosen.iloc[0], chosen.groupby("seed")[metrics].mean()
            cells = [_mean_and_error(seeds[m].dropna()) for m in metrics] + [f"{chosen['rank'].mean():.2f}"]
            lines.append(f"| {first.share:.0%}, {first.mechanism} | {first.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_error(values: pd.Series) -> str:
    error = f" ± {values.std() / np.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}" if len(values) else ""


def main(
    tables: Sequence[str],
    mechanisms: Sequence[str],
    shares: Sequence[float],
    seeds: int,
    methods: Sequence[str],
    max_rows: int,
    folder: pathlib.Path,
) -> pd.DataFrame:
    """Runs what is missing and prints the report; returns all results.

    Raises:
        UserError: A table, mechanism or method is unknown.
    """
    for flag, names, known in (("methods", methods, METHODS), ("mechanisms", mechanisms, [*MECHANISMS, VAEAC])):
        for name in names:
            if name not in known:
                raise UserError(f"--{flag}: unknown '{name}': {nearest(name, known)}")
    if not tables:
        raise UserError("missing --table: a file, or the name of a built-in dataset")
    rows = {source: read(source, max_rows) for source in tables}
    results: list[dict[str, Any]] = []
    # Seeds outermost, so that a comparison is balanced wherever it is interrupted.
    masks = [(share, m) for share in shares for m in mechanisms if m != VAEAC]
    masks += [(VAEAC_SHARE, VAEAC)] if VAEAC in mechanisms else []
    for seed, (share, mechanism), source, method in itertools.product(range(seeds), masks, tables, methods):
        table = rows[source]
        path = folder / table.name / f"{mechanism}_{share:g}_{seed}_{method}.json"
        if not path.exists():
            print(f"{table.name}: {mechanism} {share:.0%}, seed {seed}, {method}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(compare(table, mechanism, share, seed, method), indent=2) + "\n")
        case = {"table": table.name, "mechanism": mechanism, "share": share, "seed": seed, "method": method}
        results += [case | {"rows": where} | scores for where, scores in json.loads(path.read_text()).items()]
    frame = pd.DataFrame(results)
    print(report(frame))
    return frame


if __name__ == "__main__":
    _tables = flags.DEFINE_multi_string("table", [], "A file, or the name of a built-in dataset; may be repeated.")
    _mechanisms = flags.DEFINE_list("mechanisms", list(MECHANISMS), "Mechanisms by which cells go missing; or VAEAC.")
    _shares = flags.DEFINE_list("shares", ["0.1", "0.3", "0.5"], "Shares of missing cells.")
    _seeds = flags.DEFINE_integer("seeds", 1, "Number of seeds: 0, 1, ...", lower_bound=1)
    _methods = flags.DEFINE_list("methods", list(METHODS), "Methods to compare.")
    _max_rows = flags.DEFINE_integer("max_rows", 2000, "Rows of each table, drawn at random.", lower_bound=30)
    _folder = flags.DEFINE_string("folder", "runs/imputation", "Folder of the results.")

    def run() -> None:
        """Calls `main` with the flags."""
        hidden = _mechanisms.value, [float(share) for share in _shares.value], _seeds.value
        main(_tables.value, *hidden, _methods.value, _max_rows.value, pathlib.Path(_folder.value))

    cli.run(run)
