"""Imputation error and conditional likelihood of a PM-VAE (paper, UCI experiments), on any of its datasets.

    python eval_pm_vae_uci.py --run_dir DIR [--dataset NAME] [--baselines] [--num_samples 512] [--num_trials 5]

Writes `uci_results/` in the run directory: `nrmse.npy` and `ac_lls.npy` (one value per trial), `results.json`, and for
images `imputations.png`.
"""

import pathlib

import jax
import numpy as np
from absl import flags
from flax import nnx

from posterior_matching import cli, data, masking, runs
from posterior_matching.evaluation import baselines, metrics
from posterior_matching.evaluation.examples import ExampleMap, Results, load_dataset, rows, training_rows
from posterior_matching.evaluation.pictures import imputation_grid, save_png

_RUN_DIR = flags.DEFINE_string("run_dir", None, "run directory of train_pm_vae.py", required=True)
_DATASET = flags.DEFINE_string("dataset", None, "Dataset; default: the one the run was trained on.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the dataset; 'all' for every row of your own file.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["best", "latest"], "Default: config.evaluate_checkpoint of the run."
)
_MASK = flags.DEFINE_string(
    "mask_generator", "BernoulliMaskGenerator", "Name of a mask generator, or 'config': the run's."
)
_INSTANCES = flags.DEFINE_integer("num_instances", None, "Evaluate only the first examples; default: all.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Examples at once per device; no effect on results.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer("num_samples", 512, "Samples of z per example and estimate.", lower_bound=1)
_TRIALS = flags.DEFINE_integer("num_trials", 5, "Trials, each with fresh masks.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of masks and samples.", lower_bound=0)
_BASELINES = flags.DEFINE_bool("baselines", False, "Also score mean, kNN and iterative imputation on the same masks.")


def main() -> None:
    """Evaluates and writes the results."""
    description = runs.read_description(_RUN_DIR.value, "pm_vae")
    trained_on = masking.build_mask_generator(description["config"]["mask_generator"])
    named = {"name": _MASK.value}
    generator = trained_on if _MASK.value == "config" else masking.build_mask_generator(named, "--mask_generator")
    dataset = load_dataset(description, _DATASET.value, _SPLIT.value, _INSTANCES.value)
    event_shape = masking.mask_shape(dataset.input_shape)
    generator.check(event_shape)
    model = runs.load_model(_RUN_DIR.value, "pm_vae", _CHECKPOINT.value)

    def evaluate_example(model, key, x, available):
        key_mask, key_impute, key_likelihood = jax.random.split(key, 3)
        x, available = x[None], available[None]
        b = generator(key_mask, (1, *event_shape)) * available
        likelihood = model.is_log_prob(x, b, _SAMPLES.value, key=key_likelihood, available=available)
        return {
            "b": b[0],
            "imputation": model.impute(x, b, _SAMPLES.value, key=key_impute).mean(0)[0],
            "ac_ll": likelihood.log_p_xu_given_xo[0],
            "log_p_x": likelihood.log_p_x[0],
            "ess_xo": likelihood.ess_xo[0],
        }

    evaluate = ExampleMap(evaluate_example, model, dataset, _BATCH_SIZE.value)
    x, available = (np.asarray(a) for a in data.decode(dataset.x, dataset.max_value))
    truth = rows(np.where(available == 1, x, np.nan))
    results = Results(pathlib.Path(_RUN_DIR.value) / "uci_results", len(dataset), _SEED.value)
    rivals = baselines.fit(training_rows(description)) if _BASELINES.value else {}
    non_finite = 0

    for trial in range(_TRIALS.value):
        found = evaluate(jax.random.fold_in(jax.random.key(_SEED.value), trial), f"trial {trial + 1}")
        observed = rows(np.broadcast_to(found["b"], x.shape))
        scored = 1 - observed
        results.add(nrmse=metrics.nrmse(truth, rows(found["imputation"]), scored))
        ac_ll_nats, bad = metrics.finite_mean(found["ac_ll"])
        non_finite += bad
        results.add(ac_ll_nats=ac_ll_nats, log_p_x_nats=metrics.finite_mean(found["log_p_x"])[0])
        results.add(effective_sample_size=metrics.finite_mean(found["ess_xo"])[0])
        if dataset.name == "mixture":
            exact = data.mixture_log_prob(x, np.ones_like(x)) - data.mixture_log_prob(x, observed)
            results.add(ac_ll_exact_nats=exact.mean())
        for name, imputer in rivals.items():
            imputation = imputer(np.where(observed == 1, truth, np.nan))
            results.add(**{f"nrmse_{name}": metrics.nrmse(truth, imputation, scored)})

    results.write(nrmse=results.trials("nrmse"), ac_lls=results.trials("ac_ll_nats"))
    if non_finite:
        print(f"warning: {non_finite} non-finite conditional likelihoods were left out of the mean of ac_ll_nats")
    if len(dataset.input_shape) == 3:
        path = results.folder / "imputations.png"
        shown = slice(0, min(10, len(dataset)))
        key_mask, key_impute = jax.random.split(jax.random.key(_SEED.value))
        b = trained_on(key_mask, (len(x[shown]), *event_shape))
        draws = nnx.jit(lambda model: model.impute(x[shown], b, 6, key=key_impute))(model)
        save_png(path, imputation_grid(x[shown], b, draws))
        print(f"original, observed part, six imputations: {path}")


if __name__ == "__main__":
    cli.run(main, exact=True)
