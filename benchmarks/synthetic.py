"""Experiments on random data of the right shape, for benchmarks and tests; nothing is downloaded."""

import functools
import importlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from posterior_matching import data, parallel
from posterior_matching.training import loop
from posterior_matching.training.experiment import Experiment
from posterior_matching.training.family import Family
from posterior_matching.training.pretrained import Pretrained
from posterior_matching.training.step import CompiledPhase

ROOT = pathlib.Path(__file__).parents[1]
SHAPES = {
    "power": (6,),
    "gas": (8,),
    "hepmass": (21,),
    "miniboone": (43,),
    "bsds": (63,),
    "patches": (63,),
    "mixture": (8,),
    "winequality-white.csv": (12,),
    "adult": (14,),
    "digits": (8, 8, 1),
    "mnist16": (16, 16, 1),
    "mnist": (28, 28, 1),
    "celeb_a": (64, 64, 3),
    "table": (8,),  # stands for a table of the user's own
    "images": (32, 32, 3),  # stands for images of the user's own
}
# Configs whose base is not the config of the same name in the base's family.
BASE_CONFIGS = {"lookahead_digits": "pm_vae_digits_sparse"}


def dataset_of(config_name: str, config: ConfigDict) -> str:
    """The dataset of `configs/<config_name>.py`; "table" or "images" if it is the user's own."""
    return config.dataset or config_name.rpartition("_")[2]


def dataset(name: str, rows: int) -> data.Dataset:
    """Random data of the shape and storage type of dataset `name`, images with labels 0..9."""
    shape = SHAPES[pathlib.Path(name).name]
    rng = np.random.default_rng(0)
    if len(shape) == 3:
        max_value = 16 if name == "digits" else 255
        stored = rng.integers(0, max_value, (rows, *shape), np.uint8, endpoint=True)
        label = np.arange(rows, dtype=np.int32) % 10
        return data.Dataset(name, "train", stored, label, max_value=float(max_value))
    return data.Dataset(name, "train", rng.standard_normal((rows, *shape), np.float32))


def load(config_name: str) -> ConfigDict:
    """The config of `configs/<config_name>.py`."""
    return importlib.import_module(f"configs.{config_name}").get_config()


@functools.cache
def families() -> dict[str, Family]:
    """The families of all training scripts, by name."""
    scripts = (importlib.import_module(path.stem) for path in sorted(ROOT.glob("train_*.py")))
    return {script.FAMILY.name: script.FAMILY for script in scripts}


def family(config_name: str) -> Family:
    """The family of `configs/<config_name>.py`: the one with the longest name that is a prefix of the file's."""
    return families()[max((name for name in families() if config_name.startswith(name)), key=len)]


@functools.cache
def untrained_base(config_name: str) -> Pretrained | None:
    """The untrained base that the family of `configs/<config_name>.py` needs; None if it needs none."""
    chosen, base = family(config_name), family(config_name).base
    if base is None or not base.required:
        return None
    name = BASE_CONFIGS.get(config_name, config_name.replace(chosen.name, base.model, 1))
    config = load(name)
    rows = dataset(dataset_of(name, config), 16)
    untrained = experiment(name, config, rows)
    description = {"input_shape": rows.input_shape, "config": {"dataset": rows.name}}
    return Pretrained(base, untrained.phases[-1].model, {base.part: untrained.config["model"]}, description)


def experiment(config_name: str, config: ConfigDict, rows: data.Dataset) -> Experiment:
    """The experiment of `configs/<config_name>.py` with this `config`, on an untrained base if it needs one."""
    chosen = family(config_name)
    source = data.ArraySource(rows.name, lambda *_: rows)
    return chosen.experiment(chosen.parse(config), source, untrained_base(config_name))


class TrainingStep:
    """The compiled training step of `configs/<config_name>.py` with this `config`, on the rows of a dataset.

    Attributes: `compiled`, the program; `compile_seconds`; `per_dispatch`, the steps of one dispatch.
    """

    def __init__(self, config_name: str, config: ConfigDict, rows: data.Dataset):
        chosen = experiment(config_name, config, rows)
        phase = CompiledPhase(chosen, chosen.phases[-1], 0, chosen.options.steps)
        self._state, self._constants = parallel.replicate(phase.initial_state())
        devices, share = jax.local_device_count(), len(rows) // jax.device_count()
        arrays = {"x": rows.x} | ({} if rows.label is None else {"label": rows.label})
        self._arrays = parallel.shard({k: a.reshape(devices, share, *a.shape[1:]) for k, a in arrays.items()})
        self.per_dispatch = loop.max_steps_per_dispatch(chosen.options)
        shape = (self.per_dispatch, config.batch_size)
        indices = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % share
        self._indices = np.broadcast_to(indices, (devices, *shape))
        self._metrics: Any = None
        start = time.perf_counter()
        self._train = phase.train
        self.compiled = self._train.lower(self._state, self._constants, self._arrays, self._indices).compile()
        self.compile_seconds = time.perf_counter() - start

    def jaxpr(self) -> Any:
        """The program of a dispatch, as traced."""
        return jax.make_jaxpr(self._train)(self._state, self._constants, self._arrays, self._indices).jaxpr

    def dispatch(self) -> None:
        """Starts a dispatch once the one before has ended; as in training, one runs and one waits."""
        jax.block_until_ready(self._metrics)
        self._state, self._metrics = self.compiled(self._state, self._constants, self._arrays, self._indices)

    def wait(self) -> None:
        """Waits until all dispatches have ended."""
        jax.block_until_ready(self._state)

    def run(self) -> None:
        """One dispatch, to its end."""
        self.dispatch()
        self.wait()
