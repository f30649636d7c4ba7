"""Importance-sampled likelihoods of a PM-VDVAE: log p(x), log p(x_o), and so log p(x_u | x_o) (paper, section 5.3).

    python eval_pm_vdvae_likelihood.py --run_dir DIR [--dataset NAME] [--num_samples 10000] [--num_trials 5]

Writes `likelihood_results/` in the run directory: `x_lls.npy` and `xo_lls.npy` (log p(x) and log p(x_o) in nats,
[trials, N]), `bpd.npy` (bits per dimension, [trials]) and `results.json`. It can take hours; an interrupted evaluation
goes on with the same command from what it left in `likelihood_results/parts/`.
"""

import math
import pathlib
import shutil

import jax
import numpy as np
from absl import flags

from posterior_matching import cli, data, masking, runs
from posterior_matching.errors import UserError
from posterior_matching.evaluation import metrics
from posterior_matching.evaluation.examples import ExampleMap, Results, load_dataset, open_parts

_INSTANCES_PER_DEVICE = 625  # as published

_RUN_DIR = flags.DEFINE_string("run_dir", None, "run directory of train_pm_vdvae.py", required=True)
_DATASET = flags.DEFINE_string("dataset", None, "Dataset; default: the one the run was trained on.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the dataset.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["best", "latest"], "Default: config.evaluate_checkpoint of the run."
)
_MASK = flags.DEFINE_string("mask_generator", "config", "Name of a mask generator, or 'config': the run's.")
_INSTANCES = flags.DEFINE_integer(
    "num_instances",
    None,
    f"Evaluate only the first examples; default: {_INSTANCES_PER_DEVICE} per device, at most all.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Examples at once per device; no effect on results.", lower_bound=1
)
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 16, "Samples of an example at once, at most.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("num_samples", 10_000, "Samples of z per example and estimate.", lower_bound=1)
_TRIALS = flags.DEFINE_integer("num_trials", 5, "Trials, each with fresh masks and samples.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of masks and samples.", lower_bound=0)


def main() -> None:
    """Evaluates and writes the results."""
    description = runs.read_description(_RUN_DIR.value, "pm_vdvae")
    trained_on = masking.build_mask_generator(description["config"]["mask_generator"])
    named = {"name": _MASK.value}
    generator = trained_on if _MASK.value == "config" else masking.build_mask_generator(named, "--mask_generator")
    dataset = _load_instances(description)
    mask_shape = masking.mask_shape(dataset.input_shape)
    generator.check(mask_shape)
    model = runs.load_model(_RUN_DIR.value, "pm_vdvae", _CHECKPOINT.value)

    def evaluate_example(model, key, x, available):
        key_mask, key_likelihood = jax.random.split(key)
        b = generator(key_mask, (1, *mask_shape)) * available[None]
        levels = model.to_levels(x[None])
        options = {"available": available[None], "chunk_size": _CHUNK_SIZE.value}
        found = model.is_log_prob(levels, b, _SAMPLES.value, key=key_likelihood, **options)
        return {name: value[0] for name, value in found._asdict().items()}

    evaluate = ExampleMap(evaluate_example, model, dataset, _BATCH_SIZE.value)
    folder = pathlib.Path(_RUN_DIR.value) / "likelihood_results"
    parts = folder / "parts"
    open_parts(parts, _settings(description, dataset))
    results = Results(folder, len(dataset), _SEED.value)
    trials = []

    for trial in range(_TRIALS.value):
        keep_in = parts / f"trial_{trial + 1}"
        keep_in.mkdir(exist_ok=True)
        key = jax.random.fold_in(jax.random.key(_SEED.value), trial)
        try:
            found = evaluate(key, f"trial {trial + 1}", keep_in)
        except KeyboardInterrupt:
            raise UserError(f"interrupted: the same command goes on from what {parts} holds") from None
        log_p_x_nats, bad_x = metrics.finite_mean(found["log_p_x"])
        log_p_xo_nats, bad_xo = metrics.finite_mean(found["log_p_xo"])
        results.add(bpd=-log_p_x_nats / (math.prod(dataset.input_shape) * math.log(2)))
        results.add(ac_ll_nats=metrics.finite_mean(found["log_p_xu_given_xo"])[0])  # log p(x) - log p(x_o)
        results.add(log_p_x_nats=log_p_x_nats, log_p_xo_nats=log_p_xo_nats)
        results.add(non_finite_x=bad_x, non_finite_xo=bad_xo)  # examples left out of the means
        results.add(effective_sample_size_x=metrics.finite_mean(found["ess_x"])[0])
        results.add(effective_sample_size_xo=metrics.finite_mean(found["ess_xo"])[0])
        trials.append(found)

    x_lls, xo_lls = (np.stack([found[name] for found in trials]) for name in ("log_p_x", "log_p_xo"))
    results.write(x_lls=x_lls, xo_lls=xo_lls, bpd=results.trials("bpd"))
    shutil.rmtree(parts)


def _load_instances(description: dict) -> data.Dataset:
    dataset = load_dataset(description, _DATASET.value, _SPLIT.value, _INSTANCES.value)
    most = _INSTANCES_PER_DEVICE * jax.local_device_count()
    if _INSTANCES.value is None and len(dataset) > most:
        return load_dataset(description, _DATASET.value, _SPLIT.value, most)
    return dataset


def _settings(description: dict, dataset: data.Dataset) -> dict:
    """What the results of a batch depend on."""
    checkpoint = _CHECKPOINT.value or description["config"]["evaluate_checkpoint"]
    return {
        "step": runs.latest_step(_RUN_DIR.value, checkpoint),
        "dataset": dataset.name,
        "split": dataset.split,
        "num_instances": len(dataset),
        "mask_generator": _MASK.value,
        "batch_size": _BATCH_SIZE.value,
        "chunk_size": _CHUNK_SIZE.value,
        "num_devices": jax.local_device_count(),
        "num_samples": _SAMPLES.value,
        "seed": _SEED.value,
    }


if __name__ == "__main__":
    cli.run(main, exact=True)
