"""Builds objects from config entries. A key that the builder does not take is an error, never ignored."""

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
    parameters = inspect.signature(fn).parameters
    known = {name for name in parameters if name not in context and name != "self"}
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
    taken = inspect.signature(registry[name]).parameters
    return call(registry[name], options, where, **{k: v for k, v in context.items() if k in taken})
