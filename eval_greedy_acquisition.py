"""Acquires features greedily, example by example, and measures how the imputation of the others improves.

    python eval_greedy_acquisition.py --run_dir DIR [--policies sampling,lookahead,random] [--num_instances N]

Writes `trajectories/` in the run directory: `<policy>.npz` with the arrays of `acquisition.Trajectory`, `[N, T, ...]`,
and the data `x`; and `results.json`. An interrupted evaluation goes on with the same command.
"""

import functools
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import flags

from posterior_matching import acquisition, cli, runs
from posterior_matching.data import Dataset, decode
from posterior_matching.errors import UserError, nearest
from posterior_matching.evaluation.examples import ExampleMap, Results, load_dataset, load_npz, open_parts, save_npz
from posterior_matching.masking import mask_shape
from posterior_matching.models.lookahead import LookaheadPosterior

_RUN_DIR = flags.DEFINE_string("run_dir", None, "run directory of train_lookahead_posterior.py", required=True)
_DATASET = flags.DEFINE_string("dataset", None, "Dataset; default: the one the run was trained on.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the dataset; 'all' for every row of your own file.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["best", "latest"], "Default: config.evaluate_checkpoint of the run."
)
_POLICIES = flags.DEFINE_list("policies", list(acquisition.POLICIES), "What chooses the next feature.")
_INSTANCES = flags.DEFINE_integer("num_instances", None, "Evaluate only the first examples; default: 1000, or all.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    32,
    "Examples at once per device, and what is lost when interrupted; no effect on results.",
    lower_bound=1,
)
_SAMPLES = flags.DEFINE_integer("num_samples", 50, "Imputations per example and step.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "num_steps", 31, "States to visit: from none observed to num_steps - 1 acquired.", lower_bound=2
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0)
_MEMORY = flags.DEFINE_float(
    "memory_budget_gb", 2.0, "Per device, for the features that the sampling policy looks at together.", lower_bound=0.0
)

# How many acquisitions results.json reports on; the arrays have all.
BUDGETS = (1, 3, 5, 10, 20, 30)


def main() -> None:
    """Acquires with every policy and writes the results."""
    policies = {name: acquisition.POLICIES.get(name) for name in _POLICIES.value}
    for name, policy in policies.items():
        if policy is None:
            raise UserError(f"unknown policy '{name}' in --policies: {nearest(name, acquisition.POLICIES)}")
    description = runs.read_description(_RUN_DIR.value, "lookahead")
    dataset = _load_instances(description)
    num_features = math.prod(mask_shape(dataset.input_shape))
    if _STEPS.value > num_features:
        raise UserError(
            f"--num_steps={_STEPS.value}: the data have {num_features} features to acquire: at most that many"
        )
    model = runs.load_model(_RUN_DIR.value, "lookahead", _CHECKPOINT.value)
    folder = pathlib.Path(_RUN_DIR.value) / "trajectories"
    open_parts(folder, _settings(description, dataset))
    key = jax.random.key(_SEED.value)
    x = np.asarray(decode(dataset.x, dataset.max_value)[0])
    results = Results(folder, len(dataset), _SEED.value)

    for name, policy in policies.items():
        path = folder / f"{name}.npz"
        if path.exists():
            found = load_npz(path)
        else:
            if name == "sampling":
                policy = functools.partial(policy, features_at_once=_features_at_once(model, dataset))

            def acquire(model, key, x, available, policy=policy):
                options = {"num_steps": _STEPS.value, "num_samples": _SAMPLES.value}
                return acquisition.acquire(policy, model, key, x, available, **options)._asdict()

            parts = folder / f"{name}.parts"
            parts.mkdir(exist_ok=True)
            try:
                found = ExampleMap(acquire, model, dataset, _BATCH_SIZE.value)(key, name, parts) | {"x": x}
            except KeyboardInterrupt:
                raise UserError(f"interrupted: the same command goes on from what {parts} holds") from None
            save_npz(path, found)
            shutil.rmtree(parts)
        for metric in ("rmse", "unobserved_rmse"):
            curve = found[metric].mean(0)  # over examples, [T]
            budgets = [budget for budget in BUDGETS if budget < _STEPS.value]
            results.add(**{f"{metric}_{name}_{budget}": curve[budget] for budget in budgets})
            results.add(**{f"{metric}_{name}_mean": curve[1:].mean()})
    results.write()


def _load_instances(description: dict) -> Dataset:
    """The examples to evaluate, at most 1000 unless a number is given."""
    dataset = load_dataset(description, _DATASET.value, _SPLIT.value, _INSTANCES.value)
    if _INSTANCES.value is None and len(dataset) > 1000:
        return load_dataset(description, _DATASET.value, _SPLIT.value, 1000)
    return dataset


def _features_at_once(model: LookaheadPosterior, dataset: Dataset) -> int:
    """What the memory budget allows the sampling policy."""
    rows = np.resize(dataset.x, (_BATCH_SIZE.value, *dataset.input_shape))
    return acquisition.features_that_fit(model, *decode(rows, dataset.max_value), _SAMPLES.value, _MEMORY.value)


def _settings(description: dict, dataset: Dataset) -> dict[str, Any]:
    """What the trajectories depend on."""
    checkpoint = _CHECKPOINT.value or description["config"]["evaluate_checkpoint"]
    return {
        "step": runs.latest_step(_RUN_DIR.value, checkpoint),
        "dataset": dataset.name,
        "split": dataset.split,
        "num_instances": len(dataset),
        "batch_size": _BATCH_SIZE.value,
        "num_devices": jax.local_device_count(),
        "num_samples": _SAMPLES.value,
        "num_steps": _STEPS.value,
        "seed": _SEED.value,
    }


if __name__ == "__main__":
    cli.run(main, exact=True)
