"""Configs: what is not read is an error, in every experiment; and `call`, `build` and `parse` themselves."""

import copy
import dataclasses
import importlib
import pathlib
import re

import pytest
from flax import nnx
from ml_collections import ConfigDict

from benchmarks import synthetic
from posterior_matching.config import build, call, parse
from posterior_matching.errors import UserError, nearest
from posterior_matching.training.loop import OptimizerOptions, TrainingOptions

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*_*.py"))


def layer(size, activation="relu", *, rngs):
    return size, activation, rngs


def other(width: int = 3):
    return width


REGISTRY = {"layer": layer, "other": other}


# call, build, parse


def test_call_passes_config_and_context():
    assert call(layer, {"size": 3}, "config.net", rngs="r") == (3, "relu", "r")
    assert call(layer, {"size": 3, "activation": "gelu"}, "config.net", rngs="r") == (3, "gelu", "r")
    assert call(layer, ConfigDict({"size": 4}), "config.net", rngs="r") == (4, "relu", "r")


def test_an_unknown_key_is_an_error_that_names_its_path_and_the_nearest_key():
    with pytest.raises(UserError, match=r"^unknown key 'config\.net\.activaton': did you mean 'activation'\?$"):
        call(layer, {"size": 3, "activaton": "relu"}, "config.net", rngs="r")
    with pytest.raises(UserError, match=r"^unknown key 'config\.net\.xyz': known: activation, size$"):
        call(layer, {"size": 3, "xyz": 1}, "config.net", rngs="r")


def test_a_missing_key_is_an_error_that_names_its_path():
    with pytest.raises(UserError, match=r"^missing key 'config\.net\.size'$"):
        call(layer, {"activation": "relu"}, "config.net", rngs="r")


def test_what_code_provides_cannot_be_set_in_a_config():
    with pytest.raises(UserError, match=r"unknown key 'config\.net\.rngs'"):
        call(layer, {"size": 3, "rngs": "mine"}, "config.net", rngs="r")


def test_call_reads_the_parameters_of_classes_dataclasses_and_flax_modules():
    @dataclasses.dataclass
    class Options:
        a: int
        b: int = 2

    assert call(Options, {"a": 1}, "config") == Options(1, 2)
    with pytest.raises(UserError, match=r"unknown key 'config\.features'"):
        call(nnx.Linear, {"in_features": 1, "out_features": 2, "features": 3}, "config", rngs=nnx.Rngs(0))


def test_build_offers_context_to_those_who_take_it():
    assert build(REGISTRY, {"name": "layer", "size": 1}, "config.net", rngs="r") == (1, "relu", "r")
    assert build(REGISTRY, {"name": "other"}, "config.net", rngs="r") == 3
    with pytest.raises(UserError, match=r"unknown key 'config\.net\.rngs'"):
        build(REGISTRY, {"name": "other", "rngs": 1}, "config.net", rngs="r")


def test_build_leaves_the_config_as_it_is():
    config = {"name": "other", "width": 5}
    assert build(REGISTRY, config, "config.net") == build(REGISTRY, config, "config.net") == 5
    assert config == {"name": "other", "width": 5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 1}, r"^missing key 'config\.net\.name': one of layer, other$"),
        ({"name": "Layer"}, r"^unknown config\.net\.name 'Layer': did you mean 'layer'\?$"),
        ({"name": "xyz"}, r"^unknown config\.net\.name 'xyz': known: layer, other$"),
        ({"name": 3}, r"^unknown config\.net\.name '3': known: layer, other$"),
    ],
)
def test_build_says_which_names_there_are(config, message):
    with pytest.raises(UserError, match=message):
        build(REGISTRY, config, "config.net")


@dataclasses.dataclass
class First:
    a: int
    shared: int = 0


@dataclasses.dataclass
class Second:
    b: str
    shared: int = 1


def test_parse_gives_every_dataclass_its_own_keys_and_all_what_they_share():
    assert parse({"a": 1, "b": "x"}, First, Second) == (First(1, 0), Second("x", 1))
    assert parse({"a": 1, "b": "x", "shared": 7}, First, Second) == (First(1, 7), Second("x", 7))


def test_parse_refuses_unknown_and_missing_keys():
    hint = r"did you mean 'shared'\? \(or the config is one for another script\)"
    with pytest.raises(UserError, match=rf"^unknown key 'config\.share': {hint}$"):
        parse({"a": 1, "b": "x", "share": 7}, First, Second)
    with pytest.raises(UserError, match=r"^missing key 'config\.b'$"):
        parse({"a": 1}, First, Second)


def test_nearest_names_one_close_name_or_all():
    assert nearest("stpes", ["steps", "seed"]) == "did you mean 'steps'?"
    assert nearest("q", ["b", "a"]) == "known: a, b"


# Every key of every experiment


def leaves(config, path=()):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def read_everything(name, config):
    """What a training run does with its config, without allocating or computing any weights."""
    rows = synthetic.dataset(config.dataset, 16)
    nnx.eval_shape(lambda: synthetic.experiment(name, config, rows).model)
    options = {k: v for k, v in config.items() if k in TrainingOptions.__dataclass_fields__}
    call(OptimizerOptions, call(TrainingOptions, options, "config").optimizer, "config.optimizer")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_read_to_the_last_key(name):
    """Renaming any one key is an error that names it: so no key is without a reader."""
    original = load(name)
    if "pixel_cnn" in original.model:
        original.model.pixel_cnn.num_resnet = 1  # builds faster, and reads the same keys
    if name.startswith("pm_vdvae"):
        blocks = {key: re.sub(r"x\d+", "x1", original.model[key]) for key in ("encoder", "decoder")}
        original.model.update(blocks)
    dataset, plain = original.dataset, original.to_dict()
    read_everything(name, original)
    checked = list(leaves(plain))
    assert len(checked) >= 20
    for path in checked:
        renamed = copy.deepcopy(plain)
        node = renamed
        for key in path[:-1]:
            node = node[key]
        node[f"{path[-1]}_"] = node.pop(path[-1])
        # `name` is what tells builders apart: without it nothing else of its group can be checked.
        expected = "missing key" if path[-1] == "name" else "unknown key"
        where = ".".join(path) + ("" if path[-1] == "name" else "_")
        config = ConfigDict(renamed)
        with pytest.raises(UserError, match=rf"^{expected} 'config\.{where}'"):
            read_everything(name, config if "dataset" in config else ConfigDict(renamed | {"dataset": dataset}))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_its_dataset_and_names_a_split_to_validate_on(name):
    config = load(name)
    assert config.dataset in synthetic.SHAPES
    assert (config.train_split, config.validation_split) == ("train", "validation")
    assert config.steps >= config.validation_every >= config.log_every


# The hyperparameters of the paper's experiments, from its tables.
TABULAR = {
    #             latent, encoder blocks, decoder blocks, layer norm, dropout, batch, steps, lr decays every
    "pm_vae_power": (16, 2, 2, False, 0.0, 512, 200_000, 5000),
    "pm_vae_gas": (16, 2, 2, False, 0.0, 512, 200_000, 5000),
    "pm_vae_hepmass": (16, 2, 2, False, 0.0, 512, 200_000, 5000),
    "pm_vae_miniboone": (32, 5, 2, True, 0.5, 1024, 22_000, 1000),
    "pm_vae_bsds": (64, 5, 5, True, 0.0, 512, 200_000, 5000),
}


@pytest.mark.parametrize("name", sorted(TABULAR))
def test_tabular_configs_have_the_papers_hyperparameters(name):
    config = load(name)
    model, optimizer = config.model, config.optimizer
    latent, encoder_blocks, decoder_blocks, layer_norm, dropout, batch, steps, transition = TABULAR[name]
    assert (model.latent_dim, config.batch_size, config.steps) == (latent, batch, steps)
    for network, blocks in (
        (model.encoder, encoder_blocks),
        (model.partial_encoder, encoder_blocks),
        (model.decoder, decoder_blocks),
    ):
        assert network.to_dict() == {
            "name": "ResidualMLP",
            "residual_blocks": blocks,
            "hidden_units": 256,
            "layer_norm": layer_norm,
            "dropout": dropout,
        }
    gmm = {"name": "AutoregressiveGMM", "num_components": 10, "residual_blocks": 3, "hidden_units": 256}
    assert model.partial_posterior.to_dict() == gmm
    assert (optimizer.learning_rate, optimizer.decay_rate, optimizer.transition_steps) == (1e-3, 0.9, transition)
    assert (optimizer.weight_decay, config.noise_std, config.matching_ll_stop_gradients) == (1e-5, 1e-3, True)
    assert config.mask_generator.to_dict() == {"name": "BernoulliMaskGenerator", "p": 0.5}
    assert (config.validation_every, config.evaluate_checkpoint, config.matching_coef) == (1000, "latest", 1.0)
    cyclic = {"name": "cyclic", "low": 0.0, "high": 1.0}
    assert config.beta.to_dict() == {
        "pm_vae_miniboone": cyclic | {"period": 5000, "delay": 2000},
        "pm_vae_bsds": {
            "name": "monotonic",
            "low": 0.0,
            "high": 1.0,
            "transition_begin": 30_000,
            "transition_steps": 200_000,
        },
    }.get(name, cyclic | {"period": 50_000, "delay": 1000})


def test_vade_configs_have_the_papers_hyperparameters():
    config, epoch = load("vade_mnist"), 60_000 / 128
    model, optimizer, pretraining = config.model, config.optimizer, config.pretraining
    assert (model.latent_dim, model.num_clusters, config.batch_size) == (10, 10, 128)
    vae = load("pm_vae_mnist").model  # the same networks
    assert all(model[part].to_dict() == vae[part].to_dict() for part in ("encoder", "decoder", "likelihood"))
    assert model.posterior.to_dict() == {"name": "DiagonalGaussian"}
    assert (pretraining.mixture_inits, pretraining.mixture_iterations) == (10, 300)
    assert (config.noise_std, config.distortion_std, config.restarts) == (0.0, 0.0, 1)
    assert abs(pretraining.steps - 150 * epoch) < 1 and abs(config.steps - 450 * epoch) < 2
    constant = pretraining.optimizer
    assert (constant.learning_rate, constant.decay_rate, constant.weight_decay) == (2e-3, 1.0, 0.0)
    assert (optimizer.learning_rate, optimizer.decay_rate, optimizer.eps) == (2e-3, 0.9, 1e-4)
    assert abs(optimizer.transition_steps - 10 * epoch) < 1
    config = load("pm_vade_mnist")
    assert (config.batch_size, config.steps, config.optimizer.learning_rate) == (128, 160_000, 1e-3)
    assert abs(config.optimizer.transition_steps - 10 * epoch) < 1
    assert config.mask_generator.to_dict() == {"name": "UniformMaskGenerator"}
    gmm = {"name": "AutoregressiveGMM", "num_components": 10, "residual_blocks": 2, "hidden_units": 256}
    assert config.model.partial_posterior.to_dict() == gmm and config.model.partial_encoder is None
