"""Measures what evaluations compute, on random weights and random data of the dataset's shape.

    python benchmarks/evaluation_speed.py --config configs/pm_vae_gas.py [--num_samples 512] [--batch_size 32]

PM-VAE       rows per second: imputations and likelihoods with so many samples, as in `eval_pm_vae_uci.py`
PM-VQVAE     imputations per second
PM-VDVAE     imputations per second; samples per second of the likelihoods, each of x and of x_o
lookahead    decisions per second of both policies: the choice of the next feature of an example

Medians of interleaved repetitions. A bound of each is the time that its matrix products and convolutions take, each run
by itself.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import synthetic, timing
from posterior_matching import cli, data, mask_generators
from posterior_matching.errors import UserError
from posterior_matching.models import greedy

_CONFIG = cli.config_flag("the experiment whose evaluation is measured")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples at once.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("num_samples", 50, "Samples per example.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Repetitions.", lower_bound=1)
_PRODUCTS = flags.DEFINE_bool("products", True, "Measure the matrix products and convolutions by themselves, too.")

# (model, x [B, ...], b, keys [B]) -> arrays, and their count per example; by the name of what is counted
Evaluations = dict[str, tuple[Callable[..., Any], int]]


def evaluations(samples: int) -> dict[str, Evaluations]:
    """What is measured of each family."""

    def row(model: Any, x: jax.Array, b: jax.Array, keys: jax.Array) -> Any:
        return jax.vmap(lambda x, b, key: model.point_and_log_prob(x[None], b[None], samples, key=key))(x, b, keys)

    def impute(model: Any, x: jax.Array, b: jax.Array, keys: jax.Array) -> Any:
        return model.impute(model.to_levels(x) if hasattr(model, "to_levels") else x, b, samples, key=keys[0])

    def score(model: Any, x: jax.Array, b: jax.Array, keys: jax.Array) -> Any:
        return model.is_log_prob(model.to_levels(x), b, samples, key=keys[0])

    def decide(policy: greedy.Policy, model: Any, x: jax.Array, b: jax.Array, keys: jax.Array) -> Any:
        return jax.vmap(lambda x, b, key: greedy.greedy_action(policy(model, x, b, samples, key)))(x, b, keys)

    policies = {name: functools.partial(decide, greedy.POLICIES[name]) for name in ("sampling", "lookahead")}
    return {
        "pm_vae": {"rows": (row, 1)},
        "pm_vqvae": {"imputations": (impute, samples)},
        "pm_vdvae": {"imputations": (impute, samples), "likelihood samples": (score, samples)},
        "lookahead": {f"decisions by {name}": (policy, 1) for name, policy in policies.items()},
    }


def main() -> None:
    """Measures and prints."""
    config, name = _CONFIG.value, cli.config_name()
    family, known = synthetic.family(name).name, evaluations(_SAMPLES.value)
    if family not in known:
        raise UserError(f"nothing is measured of the family {family}: choose a config of {', '.join(known)}")
    rows = synthetic.dataset(synthetic.dataset_of(name, config), _BATCH_SIZE.value)
    model: Any = synthetic.experiment(name, config, rows).phases[-1].model
    x, available = data.decode(rows.x, rows.max_value)
    mask_generator = mask_generators.build_mask_generator(config.mask_generator)
    b = mask_generator(jax.random.key(0), available.shape)
    keys = jax.random.split(jax.random.key(1), len(x))
    print(f"device                               {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"config                               {cli.config_path()}, {len(x)} examples, {_SAMPLES.value} samples")

    graph, weights = nnx.split(model)  # once: `nnx.jit` does it in every call, which takes milliseconds

    def on_weights(fn: Callable[..., Any], weights: nnx.State, *arguments: jax.Array) -> Any:
        return fn(nnx.merge(graph, weights), *arguments)

    compiled = {name: jax.jit(functools.partial(on_weights, fn)) for name, (fn, _) in known[family].items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for repeat in range(-1, _REPEATS.value):  # the first repetition compiles
        for name, fn in compiled.items():
            start, calls = time.perf_counter(), 0
            while calls == 0 or (repeat >= 0 and time.perf_counter() - start < 0.5):
                jax.block_until_ready(fn(weights, x, b, keys))
                calls += 1
            if repeat >= 0:
                seconds[name].append((time.perf_counter() - start) / calls)
    for name, (_, per_example) in known[family].items():
        count = per_example * len(x)
        fastest, slowest = count / min(seconds[name]), count / max(seconds[name])
        rate = count / float(np.median(seconds[name]))
        print(f"{name + ' per second':36} {rate:.4g}  ({slowest:.4g} to {fastest:.4g})")
        if _PRODUCTS.value:
            jaxpr = jax.make_jaxpr(compiled[name])(weights, x, b, keys).jaxpr
            products, alone = timing.seconds_of_products(jaxpr)
            print(f"{'  its products alone':36} {alone * rate / count:.0%} of the time, {products} of them")


if __name__ == "__main__":
    cli.run(main)
