"""Configs: `call`, `build`, `parse` and `plain`; and every key of every experiment, with every kind of bad value."""

import copy
import dataclasses
import functools
import math
import re
from typing import Annotated, Literal
from unittest import mock

import pytest
from flax import nnx
from ml_collections import ConfigDict, config_dict
from pydantic import Field, PlainValidator

from benchmarks import synthetic
from helpers.configs import CONFIGS, FAMILIES, leaves, load
from helpers.runs import refusal
from posterior_matching import models
from posterior_matching.config import Config, Count, Dropout, Width, build, call, naming, parse, plain
from posterior_matching.errors import OptionError, UserError, nearest


def layer(size: Count, activation: str = "relu", *, rngs):
    return size, activation, rngs


def other(width: int = 3):
    return width


REGISTRY = {"layer": layer, "other": other}


# call, build, parse, plain -------------------------------------------------------------------------------------------


def test_call_passes_options_and_context():
    assert call(layer, {"size": 3}, "net", rngs="r") == (3, "relu", "r")
    assert call(layer, {"size": 3, "activation": "gelu"}, "net", rngs="r") == (3, "gelu", "r")
    assert call(layer, ConfigDict({"size": 4}).to_dict(), rngs="r") == (4, "relu", "r")


@dataclasses.dataclass
class Inner:
    rate: Dropout


@dataclasses.dataclass
class Options:
    a: int
    b: Annotated[float, Field(ge=0, lt=1)] = 0.5
    kind: Literal["mean", "sum"] = "mean"
    pair: tuple[Width, Width] = (1, 1)
    inner: Annotated[Inner, PlainValidator(functools.partial(call, Inner))] | None = None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"a": 1, "bb": 2}, "unknown key 'config.net.bb': did you mean 'b'?"),
        ({"a": 1, "xyz": 2}, "unknown key 'config.net.xyz': known: a, b, inner, kind, pair"),
        ({"b": 0.1}, "missing key 'config.net.a'"),
        ({"a": 1.5}, "config.net.a must be a valid integer, not 1.5"),
        ({"a": "3"}, "config.net.a must be a valid integer, not '3'"),
        ({"a": True}, "config.net.a must be a valid integer, not True"),
        ({"a": None}, "config.net.a must be a valid integer, not None"),
        ({"a": 1, "b": 1.0}, "config.net.b must be less than 1, not 1.0"),
        ({"a": 1, "b": -0.1}, "config.net.b must be at least 0, not -0.1"),
        ({"a": 1, "b": math.nan}, "config.net.b must be "),
        ({"a": 1, "b": math.inf}, "config.net.b must be "),
        ({"a": 1, "kind": "max"}, "config.net.kind must be 'mean' or 'sum', not 'max'"),
        ({"a": 1, "pair": (1, 0)}, "config.net.pair[1] must be at least 1, not 0"),
        ({"a": 1, "pair": (1,)}, "config.net.pair has a wrong number of entries: (1,)"),
        ({"a": 1, "pair": (1, 2, 3)}, "config.net.pair has a wrong number of entries: (1, 2, 3)"),
        ({"a": 1, "inner": {"rate": 1.0}}, "config.net.inner.rate must be less than 1, not 1.0"),
        ({"a": 1, "inner": {"rat": 1.0}}, "unknown key 'config.net.inner.rat': did you mean 'rate'?"),
        ({"a": 1, "inner": 3}, "config.net.inner must be a group of options, not 3"),
        ("a", "config.net must be a group of options, not 'a'"),
    ],
)
def test_call_checks_every_option_by_its_annotation_and_names_its_path(options, message):
    assert message in refusal(call, Options, options, "config.net")


def test_call_reads_the_parameters_of_classes_and_dataclasses_and_takes_what_fits():
    options = {"a": 1, "b": 0, "pair": (2, 3), "inner": {"rate": 0.5}}
    assert call(Options, options) == Options(1, 0.0, "mean", (2, 3), Inner(0.5))
    with pytest.raises(OptionError, match=r"unknown key 'config\.features'"):
        call(nnx.Linear, {"in_features": 1, "out_features": 2, "features": 3}, "config", rngs=nnx.Rngs(0))


def test_what_code_provides_cannot_be_set_in_a_config():
    for options in ({"size": 3, "rngs": "mine"}, {"name": "layer", "size": 3, "rngs": "mine"}):
        function = (lambda o: call(layer, o, "net", rngs="r")) if "name" not in options else None
        function = function or (lambda o: build(REGISTRY, o, "net", rngs="r"))
        assert "unknown key 'net.rngs'" in refusal(function, options)


def test_errors_of_nested_groups_name_the_whole_path():
    def inside(*, part: Config):
        return build(REGISTRY, part, "part", rngs="r")

    def refuses(*, size: int):
        raise OptionError("size", f"must be even, not {size}")

    assert refusal(call, inside, {"part": {"name": "layer", "size": 0}}, "config.model").startswith(
        "config.model.part.size must be at least 1, not 0"
    )
    assert refusal(call, refuses, {"size": 3}, "config.model") == "config.model.size must be even, not 3"

    def names():
        with naming("outer"), naming(""), naming("inner"):
            raise OptionError("x", "the {} is wrong")

    assert refusal(names) == "the outer.inner.x is wrong"


def test_build_offers_context_to_those_who_take_it_and_leaves_the_options_as_they_are():
    options = {"name": "other", "width": 5}
    assert build(REGISTRY, {"name": "layer", "size": 1}, rngs="r") == (1, "relu", "r")
    assert build(REGISTRY, options, rngs="r") == build(REGISTRY, options) == 5
    assert options == {"name": "other", "width": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1}, "missing key 'config.net.name': one of layer, other"),
        ({"name": "Layer"}, "unknown config.net.name 'Layer': did you mean 'layer'?"),
        ({"name": "xyz"}, "unknown config.net.name 'xyz': known: layer, other"),
        ({"name": 3}, "unknown config.net.name '3': known: layer, other"),
        (3, "config.net must be a group of options with a name (layer, other), not 3"),
        (None, "config.net must be a group of options with a name (layer, other), not None"),
    ],
)
def test_build_says_which_names_there_are(options, message):
    assert refusal(build, REGISTRY, options, "config.net") == message


@dataclasses.dataclass
class First:
    a: int
    shared: int = 0


@dataclasses.dataclass
class Second:
    b: str
    shared: int = 1


class Renamed(Second):
    RENAMED = {"c": "b"}  # noqa: RUF012


def test_parse_gives_every_dataclass_its_own_keys_and_all_what_they_share():
    assert parse({"a": 1, "b": "x"}, First, Second) == (First(1, 0), Second("x", 1))
    assert parse({"a": 1, "b": "x", "shared": 7}, First, Second) == (First(1, 7), Second("x", 7))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"a": 1, "b": "x", "share": 7},
            "unknown key 'config.share': did you mean 'shared'? (or the config is one for",
        ),
        ({"a": 1}, "missing key 'config.b'"),
        ({"a": 1, "c": "x"}, "unknown key 'config.c': it is now b"),
    ],
)
def test_parse_refuses_unknown_missing_and_renamed_keys(options, message):
    assert message in refusal(parse, options, First, Renamed)


def test_plain_copies_and_refuses_what_json_does_not_know():
    config = ConfigDict({"a": [1, (2.0, None)], "b": {"c": config_dict.placeholder(str)}, "d": True})
    assert plain(config) == {"a": (1, (2.0, None)), "b": {"c": None}, "d": True}
    values = {"a": {"b": [1]}}
    plain(values)["a"]["b"] = 2
    assert values == {"a": {"b": [1]}}
    assert "config.a[1] must be a number, a string, a list or a group of keys, not set" in refusal(
        plain, {"a": [0, set()]}
    )


def test_nearest_names_one_close_name_or_all():
    assert nearest("stpes", ["steps", "seed"]) == "did you mean 'steps'?"
    assert nearest("q", ["b", "a"]) == "known: a, b"


# Every key of every experiment ---------------------------------------------------------------------------------------


def shallow(name):
    """A config of few layers: it has the same keys and is read faster."""
    config = load(name)
    if "pixel_cnn" in config.model:
        config.model.pixel_cnn.num_resnet = 1
    if name.startswith("pm_vdvae"):
        config.model.update(
            {key: re.sub(r"x\d+", "x1", config.model[key]) for key in ("encoder", "decoder") if config.model[key]}
        )
    for network in config.model.values():
        if isinstance(network, ConfigDict) and "residual_blocks" in network:
            network.residual_blocks = 1
    return config


BUILD, BUILT = models.build, {}


def build_once(name, config, input_shape, rngs):  # noqa: ARG001
    """Builds a model without allocating or computing any weights, and once for each config of it."""
    if (key := repr((name, config, input_shape))) not in BUILT:
        BUILT[key] = nnx.eval_shape(lambda: BUILD(name, config, input_shape, nnx.Rngs(0)))
    return BUILT[key]


def read(name, config):
    """What a training run does with its config. (The bases that `synthetic` keeps get no weights either.)"""
    rows = synthetic.dataset(synthetic.dataset_of(name, load(name)), 16)
    with mock.patch.object(models, "build", build_once):
        return synthetic.experiment(name, config, rows).phases[-1].model


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_for_its_dataset_and_builds_a_model(name):
    config = load(name)
    assert synthetic.dataset_of(name, config) in synthetic.SHAPES
    assert (config.train_split, config.validation_split) == ("train", "validation")
    assert config.steps >= config.validation_every >= config.log_every
    assert isinstance(read(name, config), models.MODELS[synthetic.family(name).name])


def put(config, path, value):
    """A copy of nested dicts and tuples with another value at a path."""
    if not path:
        return value
    changed = list(config) if isinstance(config, tuple) else dict(config)
    changed[path[0]] = put(config[path[0]], path[1:], value)
    return tuple(changed) if isinstance(config, tuple) else changed


def keys():
    """Every key once for each family and each kind of group that it occurs in, with the config that it is from."""
    found = {}
    for name in sorted(CONFIGS, key=lambda name: ("digits" not in name, name)):
        config = plain(shallow(name))
        for path in leaves(config):
            groups = [functools.reduce(lambda node, key: node[key], path[:i], config) for i in range(len(path))]
            kinds = [group.get("name") if isinstance(group, dict) else None for group in groups]
            found.setdefault((synthetic.family(name).name, path, kinds[-1]), (name, path, kinds))
    return found.values()


def parts():
    """The keys of each named part, such as an encoder, once: it reads them itself. Of lists, the first item."""
    found = {}
    for name, path, kinds in KEYS:
        named = max((i for i, kind in enumerate(kinds) if kind), default=None)
        part = synthetic.family(name).name if named is None else kinds[named]
        below = tuple(key for key in path[named or 0 :] if isinstance(key, str))
        found.setdefault((part, *below), (name, path))
    return list(found.values())


KEYS = keys()
PARTS = parts()
BAD = [None, True, "some text", (), (1, "a"), {}, {"a": 1}, 0, -1, -0.5]
BAD += [math.nan, math.inf, -math.inf, 1.5, 10**12, 1e300]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in PARTS}))
def test_every_bad_value_of_every_key_gets_one_line_or_is_valid(name):
    """Never another exception, never a hang."""
    config, failures = plain(shallow(name)), []
    for path in (path for where, path in PARTS if where == name):
        for value in BAD:
            try:
                read(name, put(config, path, value))
            except UserError as error:
                if "\n" in str(error) or not str(error):
                    failures.append((path, value, str(error)))
            except Exception as error:
                failures.append((path, value, repr(error)))
    assert not failures, "\n".join(f"{'.'.join(map(str, path))} = {value!r}: {e[:200]}" for path, value, e in failures)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_key_has_a_reader(family):
    """Renaming any one key of any config is an error that names it."""
    for name, path, _ in KEYS:
        if synthetic.family(name).name != family or isinstance(path[-1], int):
            continue
        config = plain(shallow(name))
        group = functools.reduce(lambda node, key: node[key], path[:-1], config)
        renamed = copy.copy(group)
        renamed[f"{path[-1]}_"] = renamed.pop(path[-1])
        # `name` is what tells builders apart: without it nothing else of its group can be checked.
        expected = f"missing key '.*{path[-1]}'" if path[-1] == "name" else f"unknown key '.*{path[-1]}_'"
        with pytest.raises(UserError, match=f"^{expected}") as error:
            read(name, put(config, path[:-1], renamed))
        where = "config" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
        assert f"'{where}" in str(error.value)
