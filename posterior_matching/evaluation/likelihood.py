"""Importance-sampled likelihoods of a PM-VDVAE: log p(x), log p(x_o), hence log p(x_u | x_o) (paper, section 5.3)."""

import math
import os

import jax
import numpy as np

from posterior_matching.config import Count, Seed, check
from posterior_matching.evaluation.examples import Checkpoint, ExampleMap, open_run
from posterior_matching.evaluation.metrics import finite_mean
from posterior_matching.evaluation.results import PartialResults, Results
from posterior_matching.mask_generators import MaskGenerator
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE
from posterior_matching.progress import with_log

INSTANCES_PER_DEVICE = 625  # as published


def evaluate(
    run_dir: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    split: str = "test",
    checkpoint: Checkpoint | None = None,
    mask_generator: str | MaskGenerator = "config",
    num_instances: Count | None = None,
    batch_size: Count = 16,
    chunk_size: Count = 16,
    num_samples: Count = 10_000,
    num_trials: Count = 5,
    seed: Seed = 0,
) -> Results:
    """Evaluates a PM-VDVAE and writes `likelihood_results/` in its run directory.

    The folder holds `x_lls.npy` and `xo_lls.npy` (log p(x) and log p(x_o) in nats, [trials, N]), `bpd.npy` (bits per
    dimension, [trials]) and `results.json`. Finished batches are kept in `likelihood_results/parts/` until the end, so
    the same call resumes an interrupted evaluation.

    Args:
        run_dir: The run directory.
        dataset: The dataset; None: the one the run was trained on.
        split: Its split.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        mask_generator: The generator of the masks, see `Evaluation.masks`.
        num_instances: Evaluate only this many examples, from the first; None: `INSTANCES_PER_DEVICE` on each device, or
            all if fewer.
        batch_size: Examples at once on each device.
        chunk_size: Maximum samples per example at once.
        num_samples: Samples of z per example and estimate.
        num_trials: Trials, each with its own masks and samples.
        seed: Random seed of masks and samples.

    Raises:
        UserError: An argument is wrong, or does not match the run or the evaluation to resume; or it was interrupted.
    """
    arguments = check(evaluate, dict(locals()))
    at_most = INSTANCES_PER_DEVICE * jax.local_device_count()
    run = open_run(
        run_dir,
        "pm_vdvae",
        dataset=dataset,
        split=split,
        checkpoint=checkpoint,
        num_instances=num_instances,
        at_most=at_most,
    )
    generator = run.masks(mask_generator)
    trained: PosteriorMatchingVDVAE = run.model

    def evaluate_example(model: PosteriorMatchingVDVAE, key: jax.Array, x: jax.Array, available: jax.Array):
        key_mask, key_likelihood = jax.random.split(key)
        b = generator(key_mask, (1, *run.mask_shape)) * available[None]
        likelihood = model.is_log_prob(
            model.to_levels(x[None]),
            b,
            num_samples,
            key=key_likelihood,
            available=available[None],
            chunk_size=chunk_size,
        )
        return {name: value[0] for name, value in likelihood._asdict().items()}

    evaluate_all = ExampleMap(evaluate_example, trained, run.dataset, batch_size)
    settings = run.settings(
        mask_generator=repr(generator),
        batch_size=batch_size,
        chunk_size=chunk_size,
        num_samples=num_samples,
        seed=seed,
        gaps=True,  # earlier versions kept parts without them
    )
    folder = run.path / "likelihood_results"
    parts = PartialResults.open(folder / "parts", settings)
    results = Results(folder, len(run.dataset), arguments)
    trials = []

    for trial in with_log(range(num_trials), "trial"):
        key = jax.random.fold_in(jax.random.key(seed), trial)
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
