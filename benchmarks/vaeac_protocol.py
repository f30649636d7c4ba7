"""Imputation by the protocol of VAEAC (Ivanov et al. 2019): half of all cells are hidden, and all rows are trained on.

    python benchmarks/vaeac_protocol.py --table winequality-white.csv [--methods posterior_matching,mean,knn,iterative]

The mask is that of github.com/tigvarts/vaeac: `numpy.random.choice(2, size=x.shape, p=[0.5, 0.5])` with seed 239, 0 =
hidden. Reported is the RMSE of the hidden cells of each column over the column's standard deviation in the file, as a
mean over real columns; with categories also their accuracy; and the seconds of fitting and imputing.
"""

import pathlib
import sys
import time
import warnings
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from absl import flags

from benchmarks.imputation import METHODS, check_methods, read, score
from posterior_matching import cli

SEED = 239


def main(source: str, methods: Sequence[str], seed: int = 0) -> dict[str, dict[str, float]]:
    """Prints and returns the metrics of every method.

    Args:
        source: The table, as `benchmarks.imputation.read` takes it.
        methods: Keys of `METHODS`.
        seed: Of the methods.

    Raises:
        UserError: The table cannot be read, or a method is unknown.
    """
    check_methods(methods)
    rows = read(source, max_rows=sys.maxsize)
    hidden = 1 - np.random.RandomState(SEED).choice(2, size=rows.x.shape, p=[0.5, 0.5])
    incomplete = np.where(hidden == 1, np.nan, rows.x)
    results = {}
    for name in methods:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, that the iterations have not converged
            found = METHODS[name](rows, incomplete, seed)(incomplete, 0)
        results[name] = score(rows, rows.x, found, hidden) | {"seconds": time.perf_counter() - start}
        shown = {
            metric: results[name][metric] for metric in ("nrmse", "accuracy", "seconds") if metric in results[name]
        }
        print(f"{name:20}" + "".join(f"  {metric} {value:.4g}" for metric, value in shown.items()), flush=True)
    return results


if __name__ == "__main__":
    _table = flags.DEFINE_string("table", None, "A file, or the name of a built-in dataset.", required=True)
    _methods = flags.DEFINE_list("methods", ["posterior_matching", "mean", "knn", "iterative"], "Methods to compare.")
    _seed = flags.DEFINE_integer("seed", 0, "Seed of the methods.")
    cli.run(lambda: main(_table.value, _methods.value, _seed.value))
