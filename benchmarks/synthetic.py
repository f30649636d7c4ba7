"""Experiments on random data of the right shape: what benchmarks measure and tests build, without any download."""

import importlib
import pathlib
from types import ModuleType

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import data, runs
from posterior_matching.training.loop import Experiment
from posterior_matching.training.pretrained import Base

SHAPES = {
    "power": (6,),
    "gas": (8,),
    "hepmass": (21,),
    "miniboone": (43,),
    "bsds": (63,),
    "patches": (63,),
    "mixture": (8,),
    "winequality-white.csv": (12,),
    "digits": (8, 8, 1),
    "mnist16": (16, 16, 1),
    "mnist": (28, 28, 1),
    "celeb_a": (64, 64, 3),
}
# What a config's file name begins with -> its training script, and the model it is built on.
SCRIPTS = {
    "pm_vae": "train_pm_vae",
    "vqvae": "train_vqvae",
    "pm_vqvae": "train_pm_vqvae",
    "vade": "train_vade",
    "pm_vade": "train_pm_vade",
    "lookahead": "train_lookahead_posterior",
    "pm_vdvae": "train_pm_vdvae",
}
BASES = {
    "pm_vqvae": "vqvae",
    "pm_vade": "vade",
    "lookahead": "pm_vae",
}
# Whose base has another config than that of the same dataset.
BASE_CONFIGS = {"lookahead_digits": "pm_vae_digits_sparse"}


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


def script(config_name: str) -> ModuleType:
    """The training script of the config `configs/<config_name>.py`."""
    return importlib.import_module(SCRIPTS[_family(config_name)])


def experiment(config_name: str, config: ConfigDict, rows: data.Dataset) -> Experiment:
    """What `configs/<config_name>.py`, perhaps changed to `config`, trains; on an untrained base if it has one."""
    family = _family(config_name)
    if family not in BASES:
        return script(config_name).make_experiment(config, rows, rows)
    name = BASES[family]
    base_name = BASE_CONFIGS.get(config_name, config_name.replace(family, name, 1))
    base_config = importlib.import_module(f"configs.{base_name}").get_config()
    model = runs.MODELS[name].from_config(base_config.model, rows.input_shape, nnx.Rngs(0))
    base = Base(name, model, base_config.model.to_dict(), config.dataset, rows.input_shape)
    return script(config_name).make_experiment(config, rows, rows, base)


def _family(config_name: str) -> str:
    return max((family for family in SCRIPTS if config_name.startswith(family)), key=len)
