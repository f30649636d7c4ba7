"""Greedy acquisition for each example: how the imputation of the remaining features improves (paper, section 4.3)."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
from pydantic import Field

from posterior_matching.config import Count, NonNegative, Seed, check
from posterior_matching.data import decode
from posterior_matching.errors import UserError, nearest
from posterior_matching.evaluation.examples import Checkpoint, ExampleMap, open_run
from posterior_matching.evaluation.results import Arrays, PartialResults, Results
from posterior_matching.models.greedy import POLICIES, Policy, acquire, features_that_fit, sampling_policy
from posterior_matching.models.lookahead import LookaheadPosterior
from posterior_matching.progress import with_log

# The numbers of acquisitions that results.json reports on; the arrays hold all.
BUDGETS = (1, 3, 5, 10, 20, 30)
MOST_INSTANCES = 1000


def evaluate(
    run_dir: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    split: str = "test",
    checkpoint: Checkpoint | None = None,
    policies: Sequence[str] = tuple(POLICIES),
    num_instances: Count | None = None,
    batch_size: Count = 32,
    num_samples: Count = 50,
    num_steps: Annotated[Count, Field(ge=2)] = 31,
    seed: Seed = 0,
    memory_budget_gb: NonNegative = 2.0,
) -> Results:
    """Acquires with every policy and writes `trajectories/` in the run directory of a lookahead posterior.

    The folder holds `<policy>.npz`, with the arrays of `acquisition.Trajectory`, `[N, T, ...]`, and the data `x`; and
    `results.json`. Finished parts are kept, so the same call resumes an interrupted evaluation.

    Args:
        run_dir: The run directory.
        dataset: The dataset; None: the one the run was trained on.
        split: Its split.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        policies: Keys of `acquisition.POLICIES`; they choose the next feature.
        num_instances: Evaluate only this many examples, from the first; None: `MOST_INSTANCES`, or all if fewer.
        batch_size: Examples at once on each device.
        num_samples: Imputations per example and step.
        num_steps: T, states to visit: from none observed to T - 1 features acquired.
        seed: Random seed of the samples.
        memory_budget_gb: Gigabytes on each device for the features that the sampling policy evaluates together.

    Raises:
        UserError: An argument is wrong, or does not match the run or the evaluation to resume; or it was interrupted.
    """
    arguments = check(evaluate, dict(locals()))
    for name in policies:
        if name not in POLICIES:
            raise UserError(f"unknown policy '{name}': {nearest(name, POLICIES)}")
    run = open_run(
        run_dir,
        "lookahead",
        dataset=dataset,
        split=split,
        checkpoint=checkpoint,
        num_instances=num_instances,
        at_most=MOST_INSTANCES,
    )
    num_features = math.prod(run.mask_shape)
    if num_steps > num_features:
        raise UserError(f"num_steps must be at most {num_features}, the number of features, not {num_steps}")
    trained: LookaheadPosterior = run.model
    settings = run.settings(batch_size=batch_size, num_samples=num_samples, num_steps=num_steps, seed=seed)
    folder = run.path / "trajectories"
    trajectories = PartialResults.open(folder, settings)
    results = Results(folder, len(run.dataset), arguments)

    def trajectories_of(name: str, batches: PartialResults) -> Arrays:
        policy: Policy = POLICIES[name]
        if name == "sampling":
            rows = decode(np.resize(run.dataset.x, (batch_size, *run.dataset.input_shape)), run.dataset.max_value)
            at_once = features_that_fit(trained, *rows, num_samples, memory_budget_gb)
            policy = functools.partial(sampling_policy, features_at_once=at_once)

        def acquire_example(model: LookaheadPosterior, key: jax.Array, x: jax.Array, available: jax.Array):
            options = {"num_steps": num_steps, "num_samples": num_samples}
            return acquire(policy, model, key, x, available, **options)._asdict()

        acquire_all = ExampleMap(acquire_example, trained, run.dataset, batch_size)
        return acquire_all(jax.random.key(seed), name, batches) | {"x": run.x}

    for name in with_log(policies, "policy"):
        batches = trajectories.within(f"{name}.parts")
        found = trajectories.get(name, functools.partial(trajectories_of, name, batches))
        batches.remove()
        for metric in ("rmse", "unobserved_rmse"):
            curve = found[metric].mean(0)  # over examples, [T]
            budgets = [budget for budget in BUDGETS if budget < num_steps]
            results.add(**{f"{metric}_{name}_{budget}": curve[budget] for budget in budgets})
            results.add(**{f"{metric}_{name}_mean": curve[1:].mean()})
    results.write()
    return results
