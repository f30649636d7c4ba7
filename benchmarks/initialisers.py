"""Compares Flax's initial weights with Haiku's, the published ones, by validation losses after equal numbers of steps.

    python benchmarks/initialisers.py [--num_seeds 3] [--folder runs/initialisers]

For each seed, trains every experiment with Flax's initial weights and with each of Haiku's that applies, and prints the
losses in nats. With the same seed, they have the same batches, masks and noise, and the same initial weights up to
their scale, so the difference is taken per seed. Finished runs are read, interrupted ones resumed.

kernels     Haiku does not rescale its truncated normal distribution to the standard deviation 1 / sqrt(fan_in), so its
            kernels are Flax's times 0.88. In the published PixelCNN, the fan-in also counts the masked taps of a
            kernel, which makes it narrower still.
embedding   Haiku's embedding of the codes in the PixelCNN has a standard deviation of 0.88, Flax's of
            1 / sqrt(num_filters).
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from absl import flags
from flax import nnx
from scipy import stats

from posterior_matching import cli, models, runs

_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Number of seeds: 0, 1, ...", lower_bound=2)
_FOLDER = flags.DEFINE_string("folder", "runs/initialisers", "Folder for the run directories.")

# Config, number of steps, and Haiku's weights to try.
EXPERIMENTS = (
    ("vqvae_mnist", 3000, ["kernels"]),  # the base of the next
    ("pm_vqvae_mnist", 1000, ["kernels", "embedding"]),
    ("pm_vae_mnist16", 600, ["kernels"]),
    ("vqvae_mnist", 10_000, ["kernels"]),
)
SMALL_PIXEL_CNN = {"num_resnet": 1, "num_filters": 32}  # for a CPU

TRUNCATED_STD = float(stats.truncnorm.std(-2, 2))  # of a standard normal distribution truncated at 2: 0.88
# The share of the taps of a published kernel that its mask leaves, by the path of the convolutions.
UNMASKED = {
    "pixel_cnn.vertical_in.": 6 / 15,
    "pixel_cnn.horizontal_in_above.": 3 / 9,
    "pixel_cnn.horizontal_in_left.": 1 / 9,
    "pixel_cnn.vertical.": 6 / 9,
    "pixel_cnn.horizontal.": 4 / 9,
}


def build_published(*args: Any, build: Callable[..., nnx.Module] = models.build) -> nnx.Module:
    """Builds a model with the published kernels."""
    model = build(*args)
    arrays = models.flat_weights(model)
    for path, array in arrays.items():
        if path.endswith(".kernel"):
            unmasked = [share for start, share in UNMASKED.items() if path.startswith(start) and array.ndim == 4]
            arrays[path] = TRUNCATED_STD * np.prod(unmasked) ** 0.5 * array
    return models.with_weights(model, arrays)


def train(name: str, steps: int, weights: str, seed: int) -> list[tuple[int, float]]:
    """Trains a model, or reads its log if it is trained; returns steps and validation losses."""
    run_dir = f"{_FOLDER.value}/{name}_{steps}_{weights}_{seed}"
    config = importlib.import_module(f"configs.{name}").get_config()
    build: Callable[..., nnx.Module] = models.build
    config.update({"seed": seed, "steps": steps, "validation_every": steps // 2, "validation_split": "test[:2000]"})
    family = name.rpartition("_")[0]
    if family == "vqvae":
        config.model.kernel_scale = TRUNCATED_STD if weights == "kernels" else 1.0
    elif weights == "kernels":
        build = build_published
    if family == "pm_vqvae":
        base, base_steps, _ = EXPERIMENTS[0]
        config.vqvae_dir = f"{_FOLDER.value}/{base}_{base_steps}_flax_{seed}"
        config.model.pixel_cnn.update(SMALL_PIXEL_CNN)
        config.model.pixel_cnn.embedding_std = TRUNCATED_STD if weights == "embedding" else None
    if runs.latest_step(run_dir) < steps:
        with mock.patch.object(models, "build", build):
            importlib.import_module(f"train_{family}").train(config, run_dir)
    lines = pathlib.Path(run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row["val_loss"]) for row in map(json.loads, lines)]


def main() -> None:
    """Trains and prints."""
    seeds = range(_SEEDS.value)
    for name, steps, sets in EXPERIMENTS:
        flax = np.array([train(name, steps, "flax", seed) for seed in seeds])  # [seeds, validations, (step, loss)]
        for which in sets:
            haiku = np.array([train(name, steps, which, seed) for seed in seeds])
            for (step, _), before, after in zip(flax[0], flax[..., 1].T, haiku[..., 1].T, strict=True):
                change = after - before
                print(
                    f"{name:16} {which:10} step {step:6.0f}  Flax {before.mean():9.2f}  Haiku {after.mean():9.2f}  "
                    f"Haiku - Flax {change.mean():+.2f} +- {stats.sem(change):.2f}  by seed "
                    + " ".join(f"{c:+.2f}" for c in change),
                    flush=True,
                )


if __name__ == "__main__":
    cli.run(main)
