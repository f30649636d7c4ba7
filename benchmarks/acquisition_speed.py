"""Measures the cost of one decision of each acquisition policy, on random weights and data of the dataset's shape.

    python benchmarks/acquisition_speed.py --config configs/lookahead_mnist16.py [--num_samples 50] [--batch_size 4]

A decision is the choice of the next feature of one example, from the gains of all its features. Prints the time per
decision and the ratio of the two, as medians over interleaved repetitions.
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import synthetic
from posterior_matching import acquisition, cli, data, masking

_CONFIG = cli.config_flag("the lookahead experiment to measure")
_SAMPLES = flags.DEFINE_integer("num_samples", 50, "Imputations per example.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Examples processed at once.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Number of repetitions.", lower_bound=1)


def main() -> None:
    """Measures and prints."""
    config = _CONFIG.value
    rows = synthetic.dataset(synthetic.dataset_of(cli.config_name(), config), _BATCH_SIZE.value)
    model: Any = synthetic.experiment(cli.config_name(), config, rows).phases[-1].model
    x, available = data.decode(rows.x, rows.max_value)
    b = masking.build_mask_generator(config.mask_generator)(jax.random.key(0), available.shape)
    keys = jax.random.split(jax.random.key(1), len(x))

    @nnx.jit(static_argnames="name")
    def decide(model, name, x, b, keys):
        gains = jax.vmap(lambda *example: acquisition.POLICIES[name](model, *example[:2], _SAMPLES.value, example[2]))
        return jax.vmap(acquisition.greedy_action)(gains(x, b, keys))

    names = ("sampling", "lookahead")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, _REPEATS.value):  # the first repetition compiles
        for name in names:
            start, count = time.perf_counter(), 0
            while count == 0 or (repeat >= 0 and time.perf_counter() - start < 0.5):
                jax.block_until_ready(decide(model, name, x, b, keys))
                count += 1
            if repeat >= 0:
                seconds[name].append((time.perf_counter() - start) / count / len(x))
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    print(f"device                 {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"config                 {cli.config_path()}, {_SAMPLES.value} samples, {len(x)} examples at once")
    for name in names:
        least, most = min(seconds[name]) * 1e3, max(seconds[name]) * 1e3
        print(f"{name:22} {median[name] * 1e3:.4g} ms per decision  ({least:.4g} to {most:.4g})")
    print(f"ratio                  {median['sampling'] / median['lookahead']:.4g}")


if __name__ == "__main__":
    cli.run(main)
