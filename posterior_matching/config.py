"""Builds objects from config entries. A key that the builder does not take is an error, never ignored."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from posterior_matching.errors import UserError, nearest


def call(fn: Callable[..., Any], config: Mapping[str, Any], where: str, **context: Any) -> Any:
    """Calls `fn(**config, **context)` after checking that `fn` takes every key of `config`.

    Args:
        fn: A function or class with named parameters only (no `**kwargs`).
        config: Values from a config file, by parameter name.
        where: The path of `config` in the config file, for messages (``config.optimizer``).
        context: Values that code, not the config, provides (input shapes, `rngs`).

    Raises:
        UserError: A key is unknown, or a parameter without a default is missing.
    """
    parameters = _parameters(fn)
    known = [name for name in parameters if name not in context]
    for key in config:
        if key not in known:
            raise UserError(f"unknown key '{where}.{key}': {nearest(key, known)}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in config:
            raise UserError(f"missing key '{where}.{name}'")
    return fn(**config, **context)


def build(registry: Mapping[str, Callable[..., Any]], config: Mapping[str, Any], where: str, **context: Any) -> Any:
    """Builds the object that `config["name"]` names from the rest of `config`.

    `context` entries that the builder does not take are left out, so that, for example, every head of a model can be
    offered `rngs`.

    Raises:
        UserError: The name is missing or not in `registry`, or see `call`.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name is None:
        raise UserError(f"missing key '{where}.name': one of {', '.join(sorted(registry))}")
    if name not in registry:
        raise UserError(f"unknown {where}.name '{name}': {nearest(str(name), registry)}")
    taken = _parameters(registry[name])
    return call(registry[name], options, where, **{k: v for k, v in context.items() if k in taken})


def parse(config: Mapping[str, Any], *option_types: type) -> tuple[Any, ...]:
    """Distributes the top level of a config over dataclasses of options and returns one instance of each.

    Raises:
        UserError: A key belongs to none of them, or one without a default is missing.
    """
    fields = [{field.name for field in dataclasses.fields(option_type)} for option_type in option_types]
    known = set().union(*fields)
    for key in config:
        if key not in known:
            raise UserError(
                f"unknown key 'config.{key}': {nearest(key, known)} (or the config is one for another script)"
            )
    return tuple(
        call(option_type, {key: config[key] for key in config if key in names}, "config")
        for option_type, names in zip(option_types, fields, strict=True)
    )


def _parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # A class is asked for its __init__: the metaclass of Flax modules hides the signature of the class itself.
    signature = inspect.signature(fn.__init__ if inspect.isclass(fn) else fn)
    return {name: parameter for name, parameter in signature.parameters.items() if name != "self"}
