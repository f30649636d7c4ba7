"""The families, the configs of `configs/`, and small experiments of every family."""

import importlib
import pathlib

import pytest
from flax import nnx
from ml_collections import ConfigDict

from benchmarks import synthetic
from posterior_matching import data, models
from posterior_matching.config import plain
from posterior_matching.training.pretrained import Pretrained

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"  # small files of our own, each with the trait of a user's file
SHARED = ROOT.parent / "shared" / "data"  # the users' files and public tables, which are not part of the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*_*.py"))
FAMILIES = synthetic.families()

MLP = {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 8}
DIAGONAL = {"name": "DiagonalGaussian"}
GMM = {"name": "AutoregressiveGMM", "num_components": 2, "residual_blocks": 0, "hidden_units": 8}
LEAST = {"latent_dim": 2, "encoder": MLP, "decoder": MLP, "posterior": DIAGONAL}  # what every VAE must be told
LEAST |= {"likelihood": {"name": "IdentityGaussian"}}

# The config of an imputer that is fitted within a second.
TINY = {"steps": 2, "validation_every": 2, "batch_size": 2}
TINY["model"] = {"latent_dim": 2, "posterior": DIAGONAL, "partial_posterior": DIAGONAL}
TINY["model"] |= dict.fromkeys(("encoder", "decoder", "partial_encoder"), MLP | {"hidden_units": 4})

QUICK = {"train_split": "test", "steps": 6, "validation_every": 3, "log_every": 1, "batch_size": 4}
_PARTIAL = {"model.latent_dim": 2, "model.partial_posterior": GMM}
TABULAR = _PARTIAL | {f"model.{part}": MLP for part in ("encoder", "decoder", "partial_encoder")}
_ENCODER = {"name": "ConvEncoder", "conv_layers": ((4, 3, 1), (6, 3, 2), (8, 4, 1))}
_IMAGES = _PARTIAL | {"model.encoder": _ENCODER, "model.partial_encoder": _ENCODER}
_IMAGES |= {"model.decoder.conv_layers": ((6, 4, 1), (4, 3, 2), (1, 3, 1))}
_VADE = {"model.encoder": MLP, "model.decoder": MLP, "model.latent_dim": 2, "pretraining.steps": 2}
_VADE |= {"pretraining.mixture_inits": 1, "pretraining.mixture_iterations": 200}
# What makes the configs of the README and of the tests quick; a network without blocks compiles fastest.
SMALL = {
    "pm_vae_digits": _IMAGES,
    "pm_vae_digits_sparse": _IMAGES | {"model.partial_posterior": DIAGONAL},
    "pm_vae_mixture": TABULAR,
    "pm_vae_whitewine": TABULAR | {"train_split": "train"},
    "pm_vae_table": TABULAR | {"train_split": "train"},
    "pm_vae_images": TABULAR | {"model.likelihood": {"name": "IdentityGaussian"}, "train_split": "train"},
    "pm_vae_gas": TABULAR | {"dataset": "mixture"},  # of as many features
    "vqvae_digits": {
        "model.hidden_units": 8,
        "model.residual_units": 4,
        "model.residual_blocks": 1,
        "model.embedding_dim": 3,
    },
    "pm_vqvae_digits": {
        "model.conditional_dim": 4,
        "model.pixel_cnn.num_resnet": 1,
        "model.pixel_cnn.num_filters": 4,
    },
    "pm_vdvae_digits": {
        "model.encoder": "8x1,8d8,1x1",
        "model.decoder": "1x1,8m1",
        "model.latent_dim": 2,
        "model.width": 8,
        "model.bottleneck": 0.5,
        "model.num_components": 2,
    },
    "vade_digits": _VADE,
    "vade_table": _VADE | {"train_split": "train"},
    "pm_vade_digits": {"model.partial_posterior": GMM},
    "pm_vade_table": {"model.partial_posterior": GMM, "train_split": "train"},
    "lookahead_digits": {"model_samples": 2, "lookahead_subsample": 2, "model.lookahead_encoder": MLP},
}


def load(name):
    """The config of `configs/<name>.py`."""
    return importlib.import_module(f"configs.{name}").get_config()


def changed(config, changes):
    """A copy of a config with other values, named by paths such as `model.latent_dim`."""
    config = ConfigDict(config.to_dict())
    for path, value in changes.items():
        *groups, last = path.split(".")
        group = config
        for key in groups:
            group = group[key]
        with config.ignore_type():
            group[last] = value
    return config


def small(name, **changes):
    """The small config of a family, or of a file in `configs/`. Keys with dots are written `model__latent_dim`."""
    name = f"{name}_digits" if name in FAMILIES else name
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return changed(load(name), QUICK | SMALL.get(name, {}) | changes)


def untrained(name, config, rows):
    """What `config` trains on `rows`; on a small untrained base if the family needs one."""
    family, pretrained = FAMILIES[name], None
    if family.base and family.base.required:
        base = family.base
        base_config = plain(small(base.model).model)
        part = models.build(base.model, base_config, rows.input_shape, nnx.Rngs(0))
        description = {"input_shape": rows.input_shape, "config": {"dataset": rows.name}}
        pretrained = Pretrained(base, part, {base.part: base_config}, description)
    source = data.ArraySource(rows.name, lambda *_: rows)
    return family.experiment(family.parse(config), source, pretrained)


def leaves(config, path=()):
    """The paths to all values of nested dicts, lists and tuples."""
    parts = config.items() if hasattr(config, "items") else enumerate(config)
    for key, value in parts:
        if isinstance(value, dict | list | tuple):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)
