"""Builds objects from groups of options. Every option is declared once, as an annotated parameter or field:

    residual_blocks: Blocks = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

The annotation gives the type and range, which pydantic checks. An undeclared key is an error, never ignored.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import pydantic
from pydantic import Field

from posterior_matching.errors import OptionError, UserError, nearest

Config = Mapping[str, Any]

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Steps = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**31)]
Width = Annotated[int, Field(ge=1, le=65_536)]  # of a layer: channels, hidden units, dimensions of z
Blocks = Annotated[int, Field(ge=0, le=1000)]  # stacked layers
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, le=100)]  # of initial weights
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an exponential moving average

_SHORTER = {"Input should": "must", "greater than or equal to": "at least", "less than or equal to": "at most"}
_STRICT = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)


def option(default: Any, text: str) -> Any:
    """A field of options that are flags of a script, with its default and its help."""
    return dataclasses.field(default=default, metadata={"help": text})


def help_of(options: type, name: str) -> str:
    """Returns the help of a field, for options that only change its default."""
    return next(field.metadata["help"] for field in dataclasses.fields(options) if field.name == name)


def call(fn: Callable[..., Any], options: Config, where: str = "", **context: Any) -> Any:
    """Calls `fn(**options, **context)` after checking every option against the type and range that `fn` declares.

    Args:
        fn: A function or class whose parameters are named and annotated.
        options: Values by parameter name.
        where: The name of the group, for messages: `encoder`, or `config` for a whole config.
        context: Values provided by the code rather than the user (input shapes, `rngs`).

    Raises:
        OptionError: An option is unknown, missing, of the wrong type or out of range; or `fn` rejects it.
    """
    with naming(where):
        return fn(**_checked(fn, options, context.keys()), **context)


def check(fn: Callable[..., Any], arguments: Config) -> dict[str, Any]:
    """Returns a function's arguments after checking that each has the type and range that `fn` declares.

    Raises:
        OptionError: See `call`.
    """
    return _checked(fn, arguments, ())


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefixes the name of a group to the option in an OptionError raised by the block."""
    try:
        yield
    except OptionError as error:
        raise error.within(where) from None


def build(registry: Mapping[str, Callable[..., Any]], options: Config, where: str = "", **context: Any) -> Any:
    """Builds the object that `options["name"]` names from the other options.

    Context that the builder does not accept is dropped, so `rngs` can be passed for every head of a model.

    Raises:
        OptionError: The name is missing or not in `registry`, or see `call`.
    """
    if not isinstance(options, Mapping):
        raise OptionError(where, f"must be a group of options with a name ({', '.join(registry)}), not {options!r}")
    name = options.get("name")
    if name is None:
        raise OptionError("name", f"missing key '{{}}': one of {', '.join(sorted(registry))}").within(where)
    if not isinstance(name, str) or name not in registry:
        raise OptionError("name", f"unknown {{}} '{name}': {nearest(str(name), registry)}").within(where)
    taken = _parameters(registry[name])
    context = {key: value for key, value in context.items() if key in taken}
    return call(registry[name], {k: v for k, v in options.items() if k != "name"}, where, **context)


def parse(options: Config, *option_types: type) -> tuple[Any, ...]:
    """Distributes the top level of a config over dataclasses of options and returns an instance of each.

    A dataclass may list renamed options in a class variable `RENAMED: {old name: hint at the new one}`.

    Raises:
        OptionError: A key belongs to none of them, is missing, or has a wrong value.
    """
    declared = [_parameters(option_type) for option_type in option_types]
    known = set().union(*declared)
    renamed: dict[str, str] = {}
    for option_type in option_types:
        renamed |= getattr(option_type, "RENAMED", {})
    for key in options:
        if key in renamed:
            raise OptionError(key, f"unknown key '{{}}': it is now {renamed[key]}").within("config")
        if key not in known:
            hint = f"{nearest(key, known)} (or the config is one for another script)"
            raise OptionError(key, f"unknown key '{{}}': {hint}").within("config")
    return tuple(
        call(option_type, {key: options[key] for key in options if key in fields}, "config")
        for option_type, fields in zip(option_types, declared, strict=True)
    )


def read_options(text: str, where: str) -> dict[str, Any]:
    """Reads options from one argument: `bounds=0.0,0.2,name='a'`. Values are Python literals.

    Commas separate options where `key=` follows, and the items of a tuple elsewhere.

    Args:
        text: The argument; may be empty.
        where: The name of the group, for messages.

    Raises:
        OptionError: A value is no literal.
    """
    options = {}
    for part in re.split(r",\s*(?=[A-Za-z_]\w*=)", text) if text else []:
        key, _, value = part.partition("=")
        try:
            options[key] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise OptionError(f"{where}.{key}", f"must be a number, 'text' or a tuple, not {value!r}") from None
    return options


def plain(config: Any) -> dict[str, Any]:
    """Returns a config as nested dicts of JSON values, lists as tuples, independent of the original.

    Raises:
        UserError: A value cannot be represented in JSON.
    """

    def convert(value: Any, where: str) -> Any:
        if isinstance(value, Mapping) or hasattr(value, "items"):
            return {str(key): convert(part, f"{where}.{key}") for key, part in value.items()}
        if isinstance(value, list | tuple):
            return tuple(convert(part, f"{where}[{i}]") for i, part in enumerate(value))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UserError(f"{where} must be a number, a string, a list or a group of keys, not {type(value).__name__}")

    return convert(config.to_dict() if hasattr(config, "to_dict") else config, "config")


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested groups into one: `{"config.optimizer.eps": 1e-8, ...}`; sequences become JSON."""
    if isinstance(options, Mapping):
        groups = [flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in options.items()]
        return {key: value for group in groups for key, value in group.items()}
    return {prefix: json.dumps(options) if isinstance(options, list | tuple) else options}


def _checked(fn: Callable[..., Any], options: Config, context: typing.Collection[str]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise OptionError("", f"{{}} must be a group of options, not {options!r}")
    parameters = _parameters(fn)
    known = [name for name in parameters if name not in context]
    for key in options:
        if key not in known:
            raise OptionError(key, f"unknown key '{{}}': {nearest(key, known)}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            raise OptionError(name, "missing key '{}'")
    return {name: _check(_adapter(fn, name), name, value) for name, value in options.items()}


def _check(adapter: pydantic.TypeAdapter, name: str, value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except OptionError as error:  # of an option that is itself built from a group
        raise error.within(name) from None
    except pydantic.ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        at = name + "".join(f"[{index}]" for index in first["loc"] if isinstance(index, int))
        if first["type"] in ("missing", "too_long"):
            raise OptionError(name, f"has a wrong number of entries: {value!r}") from None
        problem = first["msg"]
        for long, short in _SHORTER.items():
            problem = problem.replace(long, short)
        raise OptionError(at, f"{problem}, not {first['input']!r}") from None


@functools.cache
def _adapter(fn: Callable[..., Any], name: str) -> pydantic.TypeAdapter:
    hint = typing.get_type_hints(_signature_of(fn), include_extras=True).get(name, Any)
    # pydantic takes no configuration for dataclasses.
    return pydantic.TypeAdapter(hint, config=None if dataclasses.is_dataclass(_bare(hint)) else _STRICT)


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


@functools.cache
def _parameters(fn: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    signature = inspect.signature(_signature_of(fn))
    return {name: parameter for name, parameter in signature.parameters.items() if name != "self"}


def _signature_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    # For a class, its __init__: the metaclass of Flax modules hides the signature of the class itself.
    return fn.__init__ if inspect.isclass(fn) else fn
