"""Imputation error and conditional likelihood of a PM-VAE (paper, UCI experiments), on any dataset."""

import os

import jax
import numpy as np

from posterior_matching import data
from posterior_matching.config import Count, Seed, check
from posterior_matching.evaluation import baselines as rivals
from posterior_matching.evaluation.examples import Checkpoint, ExampleMap, open_run
from posterior_matching.evaluation.metrics import accuracy, nrmse
from posterior_matching.evaluation.results import Results
from posterior_matching.masking import MaskGenerator
from posterior_matching.models.columns import is_real
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.progress import with_log


def evaluate(
    run_dir: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    split: str = "test",
    checkpoint: Checkpoint | None = None,
    mask_generator: str | MaskGenerator = "BernoulliMaskGenerator",
    num_instances: Count | None = None,
    batch_size: Count = 32,
    num_samples: Count = 512,
    num_trials: Count = 5,
    seed: Seed = 0,
    baselines: bool = False,
) -> Results:
    """Evaluates a PM-VAE and writes `uci_results/` in its run directory.

    The folder holds `nrmse.npy` and `ac_lls.npy`, one value per trial, `results.json` and, for images,
    `imputations.png`.

    Args:
        run_dir: The run directory.
        dataset: The dataset; None: the one the run was trained on.
        split: Its split.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        mask_generator: The generator of the masks, see `Evaluation.masks`.
        num_instances: Evaluate only this many examples, from the first; None: all.
        batch_size: Examples at once on each device.
        num_samples: Samples of z per example and estimate.
        num_trials: Trials, each with its own masks.
        seed: Random seed of masks and samples.
        baselines: Also score mean (of categories, mode), kNN and iterative imputation on the same masks.

    Real columns are scored by their NRMSE, categorical ones by the share that is imputed right.

    Raises:
        UserError: An argument is wrong, or does not match the run.
    """
    arguments = check(evaluate, dict(locals()))
    run = open_run(run_dir, "pm_vae", dataset=dataset, split=split, checkpoint=checkpoint, num_instances=num_instances)
    generator = run.masks(mask_generator)
    trained: PosteriorMatchingVAE = run.model

    def evaluate_example(model: PosteriorMatchingVAE, key: jax.Array, x: jax.Array, available: jax.Array):
        key_mask, key_impute, key_likelihood = jax.random.split(key, 3)
        x, available = x[None], available[None]
        b = generator(key_mask, (1, *run.mask_shape)) * available
        likelihood = model.is_log_prob(x, b, num_samples, key=key_likelihood, available=available)
        return {
            "b": b[0],
            "imputation": model.point(x, b, num_samples, key=key_impute)[0],
            "ac_ll": likelihood.log_p_xu_given_xo[0],
            "log_p_x": likelihood.log_p_x[0],
            "ess_x": likelihood.ess_x[0],
            "ess_xo": likelihood.ess_xo[0],
        }

    evaluate_all = ExampleMap(evaluate_example, trained, run.dataset, batch_size)
    x, available = (np.asarray(a) for a in data.decode(run.dataset.x, run.dataset.max_value))
    truth = np.where(available == 1, x, np.nan)
    cardinalities = run.dataset.columns.cardinalities if run.dataset.columns else ()
    imputers = rivals.fit(run.training_rows(), cardinalities=cardinalities) if baselines else {}
    real = np.broadcast_to(is_real(cardinalities), x.shape[-1:])
    results = Results(run.path / "uci_results", len(run.dataset), arguments)

    def scores(imputation: np.ndarray, b: np.ndarray, suffix: str = "") -> dict[str, float]:
        scored = np.broadcast_to(1 - b, truth.shape)
        result = {f"nrmse{suffix}": nrmse(truth[..., real], imputation[..., real], scored[..., real])}
        if not real.all():
            result[f"accuracy{suffix}"] = accuracy(truth[:, ~real], imputation[:, ~real], scored[:, ~real])
        return result

    for trial in with_log(range(num_trials), "trial"):
        found = evaluate_all(jax.random.fold_in(jax.random.key(seed), trial), f"trial {trial + 1}")
        results.add(**scores(found["imputation"], found["b"]))
        results.add_mean(ac_ll_nats=found["ac_ll"], log_p_x_nats=found["log_p_x"])
        results.add_mean(effective_sample_size_x=found["ess_x"], effective_sample_size_xo=found["ess_xo"])
        if run.dataset.name == "mixture":
            exact = data.mixture_log_prob(x, np.ones_like(x)) - data.mixture_log_prob(x, found["b"])
            results.add(ac_ll_exact_nats=exact.mean())
        for name, imputation in rivals.impute(imputers, truth, found["b"]):
            results.add(**scores(imputation, found["b"], f"_{name}"))

    results.write(nrmse=results.trials("nrmse"), ac_lls=results.trials("ac_ll_nats"))
    if x.ndim == 4:
        results.draw_imputations(trained, x, generator)
    return results
