"""Importance-sampled likelihoods of a PM-VDVAE: log p(x), log p(x_o), hence log p(x_u | x_o) (paper, section 5.3)."""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np

from posterior_matching.config import Count, call, help_of, option
from posterior_matching.evaluation.examples import ExampleMap, MaskedOptions
from posterior_matching.evaluation.metrics import finite_mean
from posterior_matching.evaluation.results import PartialResults, Results, with_log
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE

INSTANCES_PER_DEVICE = 625  # as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(MaskedOptions):
    """The options of this evaluation; each is a flag of its script."""

    run_dir: str | os.PathLike[str] = option(
        dataclasses.MISSING, "Evaluate the run in this directory, made by train_pm_vdvae.py (required)."
    )
    num_instances: Count | None = option(
        None,
        "Evaluate only this many examples, from the start of the split; by default "
        f"{INSTANCES_PER_DEVICE} on each device, or all if there are fewer.",
    )
    batch_size: Count = option(16, help_of(MaskedOptions, "batch_size"))
    chunk_size: Count = option(16, "Draw at most this many samples of an example at once, to save memory.")
    num_samples: Count = option(10_000, "Draw this many samples of z for each example and estimate.")


def evaluate(run_dir: str | os.PathLike[str], **options: Any) -> Results:
    """Evaluates a PM-VDVAE and writes `likelihood_results/` in its run directory.

    The folder holds `x_lls.npy` and `xo_lls.npy` (log p(x) and log p(x_o) in nats, [trials, N]), `bpd.npy` (bits per
    dimension, [trials]) and `results.json`. Finished batches are kept in `likelihood_results/parts/` until the end, so
    the same call resumes an interrupted evaluation.

    Args:
        run_dir: The run directory.
        options: Fields of `Options`.

    Raises:
        UserError: An argument is wrong, or does not match the run or the evaluation to resume; or it was interrupted.
    """
    chosen = call(Options, {"run_dir": run_dir} | options)
    run = chosen.open_run("pm_vdvae", at_most=INSTANCES_PER_DEVICE * jax.local_device_count())
    generator = run.masks(chosen.mask_generator)
    trained: PosteriorMatchingVDVAE = run.model

    def evaluate_example(
        model: PosteriorMatchingVDVAE, key: jax.Array, x: jax.Array, available: jax.Array
    ) -> dict[str, jax.Array]:
        key_mask, key_likelihood = jax.random.split(key)
        b = generator(key_mask, (1, *run.mask_shape)) * available[None]
        likelihood = model.is_log_prob(
            model.to_levels(x[None]),
            b,
            chosen.num_samples,
            key=key_likelihood,
            available=available[None],
            chunk_size=chosen.chunk_size,
        )
        return {name: value[0] for name, value in likelihood._asdict().items()}

    evaluate_all = ExampleMap(evaluate_example, trained, run.dataset, chosen.batch_size)
    settings = run.settings(
        mask_generator=repr(generator),
        **{name: getattr(chosen, name) for name in ("batch_size", "chunk_size", "num_samples", "seed")},
        gaps=True,  # earlier versions kept parts without them
    )
    folder = run.path / "likelihood_results"
    parts = PartialResults.open(folder / "parts", settings)
    results = Results(folder, len(run.dataset), vars(chosen))
    trials = []

    for trial in with_log(range(chosen.num_trials), "trial"):
        key = jax.random.fold_in(jax.random.key(chosen.seed), trial)
        found = evaluate_all(key, f"trial {trial + 1}", parts.within(f"trial_{trial + 1}"))
        log_p_x_nats, non_finite_x = finite_mean(found["log_p_x"])
        log_p_xo_nats, non_finite_xo = finite_mean(found["log_p_xo"])
        results.add(bpd=-log_p_x_nats / (math.prod(run.dataset.input_shape) * math.log(2)))
        results.add_mean(ac_ll_nats=found["log_p_xu_given_xo"])  # log p(x) - log p(x_o)
        results.add(log_p_x_nats=log_p_x_nats, log_p_xo_nats=log_p_xo_nats)
        results.add(non_finite_x=non_finite_x, non_finite_xo=non_finite_xo)  # examples left out of the means
        results.add_mean(effective_sample_size_x=found["ess_x"], effective_sample_size_xo=found["ess_xo"])
        results.add_mean(gap_x_nats=found["gap_x"], gap_xo_nats=found["gap_xo"])
        trials.append(found)

    x_lls, xo_lls = (np.stack([found[name] for found in trials]) for name in ("log_p_x", "log_p_xo"))
    results.write(x_lls=x_lls, xo_lls=xo_lls, bpd=results.trials("bpd"))
    parts.remove()
    return results
