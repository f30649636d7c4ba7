"""Imputation error and conditional likelihood of a PM-VAE (paper, UCI experiments), on any dataset."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from posterior_matching import data
from posterior_matching.config import Count, Steps, call, help_of, option
from posterior_matching.evaluation import baselines as rivals
from posterior_matching.evaluation.examples import WEIGHTED, ExampleMap, MaskedOptions, first_examples
from posterior_matching.evaluation.metrics import category_accuracy, nrmse
from posterior_matching.evaluation.results import Results, with_log
from posterior_matching.mask_generators import MaskGenerator
from posterior_matching.models.vae import PosteriorMatchingVAE

_MOST_SIMULATED = 1000  # their gaps are as costly as a trial, and the mean over more would hardly differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(MaskedOptions):
    """The options of this evaluation; each is a flag of its script."""

    run_dir: str | os.PathLike[str] = option(
        dataclasses.MISSING, "Evaluate the run in this directory, made by train_pm_vae.py (required)."
    )
    mask_generator: str | MaskGenerator = option("BernoulliMaskGenerator", help_of(MaskedOptions, "mask_generator"))
    num_samples: Count = option(512, "Draw this many samples of z for each example and estimate.")
    chunk_size: Count = option(128, "Draw at most this many samples of an example at once, to save memory.")
    refine_steps: Steps = option(
        0, "Fit the proposals of the likelihoods to each example by so many gradient steps; 400 is a good number."
    )
    weighted: bool = option(False, WEIGHTED)
    baselines: bool = option(False, "Also score mean, k-nearest-neighbour and iterative imputation on the same masks.")


def evaluate(run_dir: str | os.PathLike[str], **options: Any) -> Results:
    """Evaluates a PM-VAE and writes `uci_results/` in its run directory.

    The folder holds `nrmse.npy` and `ac_lls.npy`, one value per trial, `results.json` and, for images,
    `imputations.png`.

    `simulated_gap_x_nats` and `simulated_gap_xo_nats` bound what the likelihoods lack on data drawn from the model.

    The NRMSE is over real columns, the accuracy over categorical ones. Log-likelihoods are per standardised unit of the
    real columns; for a table of the user's own, `ac_ll_table_nats` and `log_p_x_table_nats` are per unit of the table.

    Args:
        run_dir: The run directory.
        options: Fields of `Options`.

    Raises:
        UserError: An argument is wrong, or does not match the run.
    """
    chosen = call(Options, {"run_dir": run_dir} | options)
    run = chosen.open_run("pm_vae")
    generator = run.masks(chosen.mask_generator)
    trained: PosteriorMatchingVAE = run.model
    num_samples, sampling = chosen.num_samples, {"chunk_size": chosen.chunk_size, "refine_steps": chosen.refine_steps}

    def evaluate_example(
        model: PosteriorMatchingVAE, key: jax.Array, x: jax.Array, available: jax.Array
    ) -> dict[str, jax.Array]:
        key_mask, _, key_likelihood = jax.random.split(key, 3)
        x, available = x[None], available[None]
        b = generator(key_mask, (1, *run.mask_shape)) * available
        point, likelihood = model.point_and_log_prob(
            x, b, num_samples, key=key_likelihood, available=available, weighted=chosen.weighted, **sampling
        )
        return {
            "b": b[0],
            "imputation": point[0],
            "ac_ll": likelihood.log_p_xu_given_xo[0],
            "log_p_x": likelihood.log_p_x[0],
            "ess_x": likelihood.ess_x[0],
            "ess_xo": likelihood.ess_xo[0],
            "gap_x": likelihood.gap_x[0],
            "gap_xo": likelihood.gap_xo[0],
        }

    def simulate_example(
        model: PosteriorMatchingVAE, key: jax.Array, _: jax.Array, available: jax.Array
    ) -> dict[str, jax.Array]:
        key_mask, key_simulation = jax.random.split(key)
        b = generator(key_mask, (1, *run.mask_shape))
        gap_x, gap_xo = model.simulated_gaps(b, num_samples, key=key_simulation, available=available[None], **sampling)
        return {"x": gap_x[0], "xo": gap_xo[0]}

    evaluate_all = ExampleMap(evaluate_example, trained, run.dataset, chosen.batch_size)
    x, available = (np.asarray(a) for a in data.decode(run.dataset.x, run.dataset.max_value))
    truth = np.where(available == 1, x, np.nan)
    columns = run.source.schema if isinstance(run.source.schema, data.TableSchema) else None
    cardinalities = columns.cardinalities if columns else ()
    imputers = rivals.fit(run.training_rows(), cardinalities=cardinalities) if chosen.baselines else {}
    # For densities per unit of the table: sum over columns of log |d standardised / d table units|.
    log_slopes = np.where(available == 1, columns.log_det_jacobian(x), 0.0) if columns else None
    results = Results(run.path / "uci_results", len(run.dataset), vars(chosen))

    for trial in with_log(range(chosen.num_trials), "trial"):
        found = evaluate_all(jax.random.fold_in(jax.random.key(chosen.seed), trial), f"trial {trial + 1}")
        results.add(**_errors(truth, found["imputation"], 1 - found["b"], cardinalities))
        results.add_mean(ac_ll_nats=found["ac_ll"], log_p_x_nats=found["log_p_x"])
        if log_slopes is not None:
            unobserved = (log_slopes * (1 - found["b"])).sum(1)  # over columns
            results.add_mean(ac_ll_table_nats=found["ac_ll"] + unobserved)
            results.add_mean(log_p_x_table_nats=found["log_p_x"] + log_slopes.sum(1))
        results.add_mean(effective_sample_size_x=found["ess_x"], effective_sample_size_xo=found["ess_xo"])
        results.add_mean(gap_x_nats=found["gap_x"], gap_xo_nats=found["gap_xo"])
        if run.dataset.name == "mixture":
            exact = data.mixture_log_prob(x, np.ones_like(x)) - data.mixture_log_prob(x, found["b"])
            results.add(ac_ll_exact_nats=exact.mean())
        for name, imputation in rivals.impute(imputers, truth, found["b"]):
            errors = _errors(truth, imputation, 1 - found["b"], cardinalities)
            results.add(**{f"{metric}_{name}": value for metric, value in errors.items()})

    simulate_all = ExampleMap(
        simulate_example, trained, first_examples(run.dataset, _MOST_SIMULATED), chosen.batch_size
    )
    gaps = simulate_all(jax.random.fold_in(jax.random.key(chosen.seed), chosen.num_trials), "data drawn from the model")
    results.add_mean(simulated_gap_x_nats=gaps["x"], simulated_gap_xo_nats=gaps["xo"])
    if gaussian := data.gaussian_check(run.dataset.name):
        results.add(gaussian_ll_nats=gaussian.measured)
    nrmses = {"nrmse": results.trials("nrmse")} if not cardinalities or 0 in cardinalities else {}
    results.write(**nrmses, ac_lls=results.trials("ac_ll_nats"))
    if gaussian:
        gaussian.report()
    if x.ndim == 4:
        results.draw_imputations(trained, x, generator)
    return results


def _errors(
    truth: np.ndarray, imputation: np.ndarray, scored: np.ndarray, cardinalities: Sequence[int]
) -> dict[str, float]:
    """Returns the NRMSE of the real columns, and the accuracy of the categorical ones."""
    if not any(cardinalities):
        return {"nrmse": nrmse(truth, imputation, scored)}
    real = np.array(cardinalities) == 0
    errors = {"accuracy": category_accuracy(truth[:, ~real], imputation[:, ~real], scored[:, ~real])}
    return errors | ({"nrmse": nrmse(truth[:, real], imputation[:, real], scored[:, real])} if real.any() else {})
