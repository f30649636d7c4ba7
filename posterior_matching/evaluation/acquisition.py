"""Greedy acquisition for each example: how the imputation of the remaining features improves (paper, section 4.3)."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from pydantic import Field

from posterior_matching.config import Count, NonNegative, call, option
from posterior_matching.data import decode
from posterior_matching.errors import UserError, nearest
from posterior_matching.evaluation.examples import EvaluationOptions, ExampleMap
from posterior_matching.evaluation.results import Arrays, PartialResults, Results, with_log
from posterior_matching.models.greedy import POLICIES, Policy, acquire, features_that_fit, sampling_policy
from posterior_matching.models.lookahead import LookaheadPosterior

# The numbers of acquisitions that results.json reports on; the arrays hold all.
BUDGETS = (1, 3, 5, 10, 20, 30)
MOST_INSTANCES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """The options of this evaluation; each is a flag of its script."""

    run_dir: str | os.PathLike[str] = option(
        dataclasses.MISSING, "Evaluate the run in this directory, made by train_lookahead_posterior.py (required)."
    )
    policies: Sequence[str] = option(
        tuple(POLICIES), "Compare these policies for choosing the next feature, separated by commas."
    )
    num_instances: Count | None = option(
        None,
        "Evaluate only this many examples, from the start of the split; by default "
        f"{MOST_INSTANCES}, or all if there are fewer.",
    )
    batch_size: Count = option(
        32,
        "Process this many examples at once on each device; the results do not depend on it, but an interruption loses "
        "the current batch.",
    )
    num_samples: Count = option(50, "Draw this many imputations of each example at each step.")
    num_steps: Annotated[Count, Field(ge=2)] = option(
        31, "Visit this many states, from nothing observed to num_steps - 1 features acquired."
    )
    memory_budget_gb: NonNegative = option(
        2.0,
        "Let the sampling policy evaluate as many features together as fit into this many gigabytes on each device.",
    )


def evaluate(run_dir: str | os.PathLike[str], **options: Any) -> Results:
    """Acquires with every policy and writes `trajectories/` in the run directory of a lookahead posterior.

    The folder holds `<policy>.npz`, with the arrays of `acquisition.Trajectory`, `[N, T, ...]`, and the data `x`; and
    `results.json`. Finished parts are kept, so the same call resumes an interrupted evaluation.

    Args:
        run_dir: The run directory.
        options: Fields of `Options`.

    Raises:
        UserError: An argument is wrong, or does not match the run or the evaluation to resume; or it was interrupted.
    """
    chosen = call(Options, {"run_dir": run_dir} | options)
    for name in chosen.policies:
        if name not in POLICIES:
            raise UserError(f"unknown policy '{name}': {nearest(name, POLICIES)}")
    run = chosen.open_run("lookahead", at_most=MOST_INSTANCES)
    batch_size, num_samples, num_steps = chosen.batch_size, chosen.num_samples, chosen.num_steps
    num_features = math.prod(run.mask_shape)
    if num_steps > num_features:
        raise UserError(f"num_steps must be at most {num_features}, the number of features, not {num_steps}")
    trained: LookaheadPosterior = run.model
    settings = run.settings(batch_size=batch_size, num_samples=num_samples, num_steps=num_steps, seed=chosen.seed)
    folder = run.path / "trajectories"
    trajectories = PartialResults.open(folder, settings)
    results = Results(folder, len(run.dataset), vars(chosen))

    def trajectories_of(name: str, batches: PartialResults) -> Arrays:
        policy: Policy = POLICIES[name]
        if name == "sampling":
            rows = decode(np.resize(run.dataset.x, (batch_size, *run.dataset.input_shape)), run.dataset.max_value)
            at_once = features_that_fit(trained, *rows, num_samples, chosen.memory_budget_gb)
            policy = functools.partial(sampling_policy, features_at_once=at_once)

        def acquire_example(
            model: LookaheadPosterior, key: jax.Array, x: jax.Array, available: jax.Array
        ) -> dict[str, jax.Array]:
            options = {"num_steps": num_steps, "num_samples": num_samples}
            return acquire(policy, model, key, x, available, **options)._asdict()

        acquire_all = ExampleMap(acquire_example, trained, run.dataset, batch_size)
        return acquire_all(jax.random.key(chosen.seed), name, batches) | {"x": run.x}

    for name in with_log(chosen.policies, "policy"):
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
