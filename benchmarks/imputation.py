"""Compares imputers on tables: errors of the imputed cells, and how honest the draws are.

    python benchmarks/imputation.py --table mine.csv --table digits [--folder runs/imputation] [--seeds 3]
    python benchmarks/imputation.py --table "air.csv:drop=('Date','Time'),missing_values=(-200,)" --shares 0.3

For every table, mechanism (`posterior_matching/missingness.py`), share of missing cells and seed, cells are hidden in
70% of the rows, on which a method is fitted and whose cells it imputes (`in`), and in the other 30%, which it has not
seen (`out`). Cells that are missing in the file are never scored. What a file does not say by itself is given after a
colon, as in `config.table`.

Reported per method: NRMSE (root-mean-square error over the column's standard deviation) and MAE (in standard
deviations) of real columns, accuracy of categorical ones; of 99 draws, CRPS (in standard deviations) and the share of
true values in the central 90% interval; seconds of fitting. A method without draws is scored as a point mass.
`posterior_matching` is `PosteriorMatchingImputer` with its defaults. HyperImpute is compared, too, in an environment
that has it: `python -m pip install hyperimpute "pandas<3" "scikit-learn<1.8"` after the requirements.

Every result is kept as a JSON file under `folder`; the same command runs what is missing.
"""

import importlib.metadata
import importlib.util
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


class Rows(NamedTuple):
    """A table in the units of its columns: encoded, standardised on all rows, NaN where the file has no value."""

    name: str
    x: np.ndarray  # [N, d]
    columns: data.TableSchema


class Imputations(NamedTuple):
    """What a method makes of incomplete rows."""

    point: np.ndarray  # [N, d]
    draws: np.ndarray | None  # [S, N, d]; None if the method has none


Impute = Callable[[np.ndarray, int], Imputations]  # incomplete rows [N, d] and a number of draws, 0 for none
Method = Callable[[Rows, np.ndarray, int], Impute]  # the table, its incomplete training rows and a seed


def posterior_matching(rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """`PosteriorMatchingImputer` with its defaults, given frames as users have them."""

    def frame(x: np.ndarray) -> pd.DataFrame:
        return rows.columns.decode(np.nan_to_num(x)).mask(np.isnan(x))

    def encoded(filled: pd.DataFrame) -> np.ndarray:
        return rows.columns.encode(data.read_table(filled, options))

    categorical = tuple(column.name for column in rows.columns.columns if column.values)
    real = tuple(column.name for column in rows.columns.columns if not column.values)
    options = data.TableOptions(categorical=categorical, real=real)
    imputer = PosteriorMatchingImputer(
        categorical=categorical, real=real, unknown_categories="missing", random_state=seed
    ).fit(frame(train))

    def impute(x: np.ndarray, num_draws: int) -> Imputations:
        given = frame(x)
        copies = [encoded(copy) for copy in imputer.sample(given, num_draws)] if num_draws else []
        return Imputations(encoded(imputer.transform(given)), np.stack(copies) if copies else None)

    return impute


def iterative(rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """Chained regressions, Bayesian ridge and logistic: their predictions, and draws of them (multiple imputation)."""
    rng, cardinalities = np.random.default_rng(seed), rows.columns.cardinalities
    point, draws = baselines.ChainedImputer(cardinalities).fit(train), baselines.ChainedImputer(cardinalities)
    draws.fit(train, rng)

    def impute(x: np.ndarray, num_draws: int) -> Imputations:
        copies = [draws.sample(x, rng) for _ in range(num_draws)]
        return Imputations(point.transform(x), np.stack(copies) if copies else None)

    return impute


def of_baseline(name: str) -> Method:
    """An imputer of `evaluation/baselines.py`, without draws."""

    def method(rows: Rows, train: np.ndarray, seed: int) -> Impute:
        del seed
        imputer = baselines.fit(train, (name,), cardinalities=rows.columns.cardinalities)[name]
        return lambda x, _: Imputations(imputer(x), None)

    return method


def hyperimpute(rows: Rows, train: np.ndarray, seed: int) -> Impute:
    """HyperImpute (Jarrett et al. 2022, arXiv 2206.07769) with its defaults, without draws.

    It keeps no model, so new rows are imputed together with the training rows.
    """
    from hyperimpute.plugins.imputers import Imputers

    categories = np.array(rows.columns.cardinalities) > 0

    def filled(x: np.ndarray) -> np.ndarray:
        values = np.asarray(Imputers().get("hyperimpute", random_state=seed).fit_transform(pd.DataFrame(x)), float)
        return np.where(categories, np.rint(values), values)

    known = filled(train)

    def impute(x: np.ndarray, _: int) -> Imputations:
        if np.array_equal(x, train, equal_nan=True):
            return Imputations(known, None)
        return Imputations(filled(np.concatenate([train, x]))[len(train) :], None)

    return impute


METHODS: dict[str, Method] = {
    "posterior_matching": posterior_matching,
    "mean": of_baseline("mean"),
    "knn": of_baseline("knn"),
    "iterative": iterative,
    "forest": of_baseline("forest"),
    "hyperimpute": hyperimpute,
}


def _hyperimpute_works() -> bool:
    """Whether HyperImpute is installed, beside packages with which 0.1.17 works.

    It assigns to parts of a frame, which pandas 3 ignores, so that it would return the means of the columns, and passes
    an argument that scikit-learn 1.8 refuses.
    """

    def before(package: str, *version: int) -> bool:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2])) < version

    return bool(importlib.util.find_spec("hyperimpute")) and before("pandas", 3, 0) and before("scikit-learn", 1, 8)


AVAILABLE = [name for name in METHODS if name != "hyperimpute" or _hyperimpute_works()]


def check_methods(names: Sequence[str]) -> None:
    """Refuses methods that are not in `METHODS` or not available.

    Raises:
        UserError: There is one.
    """
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: unknown '{name}': {nearest(name, METHODS)}")
        if name not in AVAILABLE:
            raise UserError(
                f"--methods: {name} needs an environment with: python -m pip install {name} 'pandas<3' "
                "'scikit-learn<1.8'"
            )


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
    columns = data.TableSchema.fit(table)
    x = columns.encode(table)
    chosen = np.random.default_rng(0).permutation(len(x))[:max_rows]
    return Rows(pathlib.Path(path).stem, x[np.sort(chosen)].astype(np.float64), columns)


def compare(rows: Rows, mechanism: str, share: float, seed: int, method: str) -> dict[str, dict[str, float]]:
    """Hides cells, fits a method to 70% of the rows, and scores what it imputes there and in the others."""
    rng = np.random.default_rng(seed)
    b = MECHANISMS[mechanism](rows.x, share, rng, rows.columns.cardinalities)
    train, test = np.split(rng.permutation(len(rows.x)), [round(0.7 * len(rows.x))])
    incomplete = np.where(b == 1, rows.x, np.nan)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, that the iterations have not converged
        impute = METHODS[method](rows, incomplete[train], seed)
        fitted = time.perf_counter() - start
        results = {}
        for name, part in {"in": train, "out": test}.items():
            found = impute(incomplete[part], NUM_DRAWS)
            results[name] = score(rows, rows.x[part], found, 1 - b[part]) | {"seconds": fitted}
    return results


def score(rows: Rows, truth: np.ndarray, found: Imputations, hidden: np.ndarray) -> dict[str, float]:
    """The metrics of imputed cells `[N, d]` where `hidden` is 1 and the truth is known."""
    real = np.array(rows.columns.cardinalities) == 0
    scored = (hidden == 1) & ~np.isnan(truth)
    results = {}
    if scored[:, ~real].any():
        results["accuracy"] = category_accuracy(truth[:, ~real], found.point[:, ~real], scored[:, ~real])
    if scored[:, real].any():
        results["nrmse"] = nrmse(truth[:, real], found.point[:, real], scored[:, real])
        cells = scored & real
        draws = found.point[None] if found.draws is None else found.draws
        results["mae"] = float(np.abs(found.point - truth)[cells].mean())
        results["crps"] = float(crps(truth[cells], draws[:, cells]).mean())
        if found.draws is not None:
            results["coverage"] = float(interval_coverage(truth[cells], draws[:, cells]).mean())
    return results


def report(results: pd.DataFrame) -> str:
    """A table of new rows and one of training rows: by share, mechanism and method, the mean over tables of every
    metric, with its standard error over seeds, and the mean rank.

    Args:
        results: One row per result: table, mechanism, share, seed, method, rows (`in` or `out`) and the metrics.
    """
    results = results.assign(error=_errors(results))
    results["rank"] = results.groupby(["rows", "share", "mechanism", "table", "seed"])["error"].rank()
    metrics = [m for m in METRICS if m in results]
    lines = []
    for where, part in results.groupby("rows", sort=False):
        lines.append(f"\n{where}-sample rows; rank: of NRMSE + 1 - accuracy, mean over tables and seeds")
        lines.append("| hidden | method | " + " | ".join((*metrics, "rank")) + " |\n|" + "---|" * (len(metrics) + 3))
        for _, chosen in part.groupby(["share", "mechanism", "method"], sort=False):
            first, seeds = chosen.iloc[0], chosen.groupby("seed")[metrics].mean()
            cells = [_mean_and_error(seeds[m]) for m in metrics] + [f"{chosen['rank'].mean():.2f}"]
            lines.append(f"| {first.share:.0%}, {first.mechanism} | {first.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _errors(part: pd.DataFrame) -> pd.Series:
    missing = pd.Series(np.nan, part.index)
    return part.get("nrmse", missing).fillna(0) + (1 - part.get("accuracy", missing)).fillna(0)


def _mean_and_error(values: pd.Series) -> str:
    values = values.dropna()
    if not len(values):
        return ""
    error = f" ± {values.std() / np.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


def figure(results: pd.DataFrame, path: pathlib.Path) -> None:
    """Draws NRMSE, accuracy, CRPS and coverage against the share of missing cells, one column per mechanism."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [m for m in ("nrmse", "accuracy", "crps", "coverage") if m in results]
    mechanisms = list(dict.fromkeys(results["mechanism"]))
    fig, axes = plt.subplots(
        len(shown), len(mechanisms), sharex=True, sharey="row", squeeze=False, figsize=(9, 9), layout="constrained"
    )
    out = results[results["rows"] == "out"]
    for row, metric in zip(axes, shown, strict=True):
        row[0].set_ylabel(metric)
        for ax, mechanism in zip(row, mechanisms, strict=True):
            for method, part in out[out["mechanism"] == mechanism].groupby("method", sort=False):
                means = part.groupby("share")[metric].mean()
                ax.plot(means.index, means, "o-", label=method)
            if metric == "coverage":
                ax.axhline(0.9, color="black", linewidth=0.5)
    for ax, mechanism in zip(axes[0], mechanisms, strict=True):
        ax.set_title(mechanism)
    for ax in axes[-1]:
        ax.set_xlabel("share of missing cells")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(
    tables: Sequence[str],
    mechanisms: Sequence[str],
    shares: Sequence[float],
    seeds: int,
    methods: Sequence[str],
    max_rows: int,
    folder: pathlib.Path,
) -> pd.DataFrame:
    """Runs what is missing, prints the report and draws `imputation.png` in the folder; returns all results.

    Raises:
        UserError: A table, mechanism or method is unknown.
    """
    check_methods(methods)
    for name in mechanisms:
        if name not in MECHANISMS:
            raise UserError(f"--mechanisms: unknown '{name}': {nearest(name, MECHANISMS)}")
    if not tables:
        raise UserError("missing --table: a file, or the name of a built-in dataset")
    rows = {source: read(source, max_rows) for source in tables}
    found: list[dict[str, Any]] = []
    # Seeds outermost, so that a comparison is balanced wherever it is interrupted.
    for seed, share, mechanism, source, method in itertools.product(range(seeds), shares, mechanisms, tables, methods):
        table = rows[source]
        path = folder / table.name / f"{mechanism}_{share:g}_{seed}_{method}.json"
        if not path.exists():
            print(f"{table.name}: {mechanism} {share:.0%}, seed {seed}, {method}", flush=True)
            results = compare(table, mechanism, share, seed, method)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(results, indent=2) + "\n")
        for where, scores in json.loads(path.read_text()).items():
            found.append({"table": table.name, "mechanism": mechanism, "share": share, "seed": seed})
            found[-1].update(method=method, rows=where, **scores)
    frame = pd.DataFrame(found)
    print(report(frame))
    figure(frame, folder / "imputation.png")
    print(f"\n{folder / 'imputation.png'}")
    return frame


if __name__ == "__main__":
    _tables = flags.DEFINE_multi_string("table", [], "A file, or the name of a built-in dataset; may be repeated.")
    _mechanisms = flags.DEFINE_list("mechanisms", list(MECHANISMS), "Mechanisms by which cells go missing.")
    _shares = flags.DEFINE_list("shares", ["0.1", "0.3", "0.5"], "Shares of missing cells.")
    _seeds = flags.DEFINE_integer("seeds", 1, "Number of seeds: 0, 1, ...", lower_bound=1)
    _methods = flags.DEFINE_list("methods", AVAILABLE, "Methods to compare.")
    _max_rows = flags.DEFINE_integer("max_rows", 2000, "Rows of each table, drawn at random.", lower_bound=30)
    _folder = flags.DEFINE_string("folder", "runs/imputation", "Folder of the results.")
    cli.run(
        lambda: main(
            _tables.value,
            _mechanisms.value,
            [float(share) for share in _shares.value],
            _seeds.value,
            _methods.value,
            _max_rows.value,
            pathlib.Path(_folder.value),
        )
    )
