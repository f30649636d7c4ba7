"""Measures a training step of the published code, for `train_speed.py --against`.

    OLD_PYTHON benchmarks/published_speed.py --config=configs/pm_vae_gas.py --checkout=../posterior-matching

It runs the training scripts of a checkout of https://github.com/lupalab/posterior-matching on one batch of random data,
with the training loop of Bax replaced by one that measures: the step, its random key, and the metrics brought to the
host. The experiments that need a trained base get an untrained one. It needs an old JAX, so it imports nothing of this
repository, and no TensorFlow:

    python3.11 -m venv old
    old/bin/pip install --no-deps -r benchmarks/published_requirements.txt
"""

import argparse
import contextlib
import importlib
import pathlib
import pickle  # only to write a state for the published scripts, which load it
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

SHAPES = {"gas": (8,), "mnist16": (16, 16, 1), "mnist": (28, 28, 1)}
SCRIPTS = {"lookahead": "lookahead_posterior", "pm_vae_gas": "pm_vae"}  # where the script is not named as the config
BASES = {"pm_vqvae": "vqvae", "pm_vade": "vade", "lookahead_posterior": "pm_vae"}


class RandomData:
    """A dataset of one batch, with those methods of `tf.data.Dataset` that the training scripts call."""

    def __init__(self, batch: Any):
        self.only_batch = self.element_spec = batch

    def as_numpy_iterator(self) -> Iterator[Any]:
        return iter([self.only_batch])

    def map(self, function: Callable[[Any], Any]) -> "RandomData":
        return RandomData(function(self.only_batch))

    def unbatch(self, *_: Any, **__: Any) -> "RandomData":
        return self

    batch = repeat = unbatch


def load_datasets(config: Any, normalize_images: bool = True) -> tuple[RandomData, RandomData]:
    """Stands for the function of this name in the published code."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (config.train_batch_size, *SHAPES[config.dataset])
    if len(shape) == 2:
        batch = {"features": rng.standard_normal(shape, np.float32)}
    else:
        image = rng.random(shape, np.float32)
        batch = {"image": image if normalize_images else 255 * image, "label": np.arange(shape[0]) % 10}
    if "mask_generator" in config:
        batch["mask"] = rng.integers(0, 2, shape).astype(np.float32)
    return RandomData(batch), RandomData(batch)


def steps_per_second(trainer: Any, state: Any, batch: Mapping[str, Any], seconds: float) -> float:
    """Median rate of the steps of a `bax.Trainer`, measured as `train_speed.py` does."""
    import jax

    def step() -> None:
        nonlocal state
        state, *metrics = trainer._grad_fn(state, trainer._get_pmap_keys(), 0, batch)
        jax.device_get(metrics)

    step()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 10 or steps < 2:
            step()
            steps += 1
        rates.append(steps / (time.perf_counter() - start))
    return statistics.median(rates)


def run(script_name: str, config: Any, seconds: float | None = None) -> tuple[str, float | None]:
    """Runs `train_<script_name>.py`, and measures for `seconds` where its last training loop would begin.

    Returns the run directory, with an untrained state, and the steps per second; None without `seconds`.
    """
    from absl import flags
    from bax import Trainer

    directory = tempfile.mkdtemp(dir=".")
    rate = None

    def fit(trainer: Any, train_dataset: Any, *_: Any, **given: Any) -> Any:
        nonlocal rate
        batch = train_dataset.only_batch
        initial = given.get("initial_params"), given.get("initial_state")
        state = trainer._get_initial_train_state(trainer._prng.next(), batch, *initial, None)
        pathlib.Path(directory, "train_state.pkl").write_bytes(pickle.dumps(state))
        if seconds is not None:
            rate = steps_per_second(trainer, state, batch, seconds)
        return state

    script = importlib.import_module(f"train_{script_name}")
    with (
        mock.patch.object(Trainer, "fit", fit),
        mock.patch.object(flags, "FLAGS", types.SimpleNamespace(config=config)),
        mock.patch.multiple(script, load_datasets=load_datasets, make_run_dir=lambda **_: directory),
        contextlib.redirect_stdout(sys.stderr),
    ):
        script.main(None)
    return directory, rate


def config_of(name: str) -> Any:
    """The published counterpart of `configs/<name>.py`.

    There, the keys of the partial posterior's mixture are misspelt, so a Gaussian is trained, as in
    `pm_vae_gas_gaussian`. For `pm_vae_gas` they are set right here.
    """
    config = importlib.import_module(f"configs.{name.removesuffix('_gaussian')}").get_config()
    if name == "pm_vae_gas":
        config.model.partial_posterior_dist = config.model.masked_posterior_dist
        config.model.partial_posterior_dist_config = config.model.masked_posterior_config
        config.model.partial_posterior_dist_config.event_size = config.model.latent_dim
    return config


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configs/NAME.py, with NAME as in this repository")
    parser.add_argument("--checkout", required=True, type=pathlib.Path, help="a checkout of the published code")
    parser.add_argument("--seconds", default=20.0, type=float, help="how long to measure")
    options = parser.parse_args()
    name = pathlib.Path(options.config).stem
    dataset, file = name.removesuffix("_gaussian").rpartition("_")[2], f"{name.removesuffix('_gaussian')}.py"
    if dataset not in SHAPES or not (options.checkout / "configs" / file).is_file():
        parser.error(f"--config={options.config} is not a published experiment on {', '.join(SHAPES)}")

    sys.path.insert(0, str(options.checkout.resolve()))
    for absent in ("tensorflow", "tensorflow_datasets", "keras", "keras.metrics"):
        sys.modules[absent] = mock.MagicMock()
    import jax
    from ml_collections.config_flags import config_flags

    vars(jax)["tree_multimap"] = jax.tree_util.tree_map  # Bax calls it by its old name
    config_flags.DEFINE_config_file = mock.MagicMock()  # each training script defines --config
    script = SCRIPTS.get(name.rpartition("_")[0], name.rpartition("_")[0])
    base = BASES.get(script)
    for used in filter(None, (script, base)):
        importlib.import_module(f"train_{used}")
    del sys.modules["tensorflow"]  # einops would take the stand-in for the real one

    config = config_of(name)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        if base is not None:
            config[f"{base}_dir"], _ = run(base, config_of(f"{base}_{config.data.dataset}"))
        _, rate = run(script, config, options.seconds)
    print(f"steps per second       {rate:.4g}")


if __name__ == "__main__":
    main()
