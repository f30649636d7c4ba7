"""The command line of all scripts: flags, one-line errors with exit status 1, JAX's compilation cache."""

import dataclasses
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from posterior_matching import parallel
from posterior_matching.data import cache
from posterior_matching.errors import UserError, first_line, nearest
from posterior_matching.numerics.memory import keep_freed_memory
from posterior_matching.training.family import Family
from posterior_matching.training.loop import InterruptedRunError

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # flags defined here count as the script's own, in --help too


def train_main(family: Family) -> None:
    """Runs a training script: `--config FILE [--config.key=value ...] [--run_dir DIR]`, and multi-host flags."""
    example = f"configs/{family.name}_digits.py"
    config = config_flag(f"The experiment, for example {example}; --config.KEY=VALUE changes one of its keys.")
    run_dir = flags.DEFINE_string(
        "run_dir", None, "The run directory, resumed if it holds this run. Default: runs/<model>-<dataset>-<time>."
    )
    coordinator = flags.DEFINE_string(
        "coordinator_address", None, "For training on several hosts: host:port of process 0."
    )
    num_processes = flags.DEFINE_integer(
        "num_processes", 1, "For training on several hosts: the number of processes.", lower_bound=1
    )
    process_id = flags.DEFINE_integer(
        "process_id", 0, "For training on several hosts: the index of this process, from 0.", lower_bound=0
    )

    def join() -> None:
        if num_processes.value > 1:
            if coordinator.value is None or run_dir.value is None:
                raise UserError("--num_processes above 1 needs --coordinator_address and --run_dir")
            if process_id.value >= num_processes.value:
                raise UserError(f"--process_id={process_id.value} must be below --num_processes={num_processes.value}")
            parallel.initialize(coordinator.value, num_processes.value, process_id.value)

    run(lambda: family.train(config.value, run_dir.value), join=join)


def config_flag(meaning: str) -> flags.FlagHolder:
    """Defines the required flag `--config FILE`, whose keys are flags too; `meaning` is its help."""
    config = config_flags.DEFINE_config_file("config", None, meaning, lock_config=True)
    flags.mark_flag_as_required("config")
    return config


def run(main: Callable[[], object], *, exact: bool = False, join: Callable[[], None] = lambda: None) -> None:
    """Parses the flags and calls `main`; a UserError or a bad flag prints one line to stderr and exits with status 1.

    Args:
        main: The body of the script.
        exact: Multiply matrices in float32, as evaluations do. By default accelerators round the factors to 8 or 11
            bits, which is faster and accurate enough for training. JAX_DEFAULT_MATMUL_PRECISION overrides this.
        join: Joins the other processes of a distributed run, before JAX is first asked for its devices.
    """

    def guarded(arguments: list[str]) -> None:
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if len(arguments) > 1:
                raise UserError(f"unexpected argument '{arguments[1]}': options are written --name=value")
            keep_freed_memory()  # before JAX's backend starts its threads, after which it has no effect
            join()
            if exact and "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ:
                jax.config.update("jax_default_matmul_precision", "highest")
            _use_compilation_cache()
            main()
        except InterruptedRunError as error:
            # Not through _fail: all processes have stopped at one step, and process 0 may still be saving.
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except UserError as error:
            _fail(error)
        except Exception as error:
            if parallel.is_lost_contact(error):
                _fail(f"lost contact with another process ({first_line(error)}): the same commands resume the run")
            if jax.distributed.is_initialized():
                traceback.print_exc()
                parallel.exit_at_once()
            raise

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    path = config_path(arguments)
    config = None if path is None else _read_config(path)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        return FLAGS(arguments)  # imports the config, which would leave a __pycache__ next to it
    except flags.UnrecognizedFlagError as error:
        _fail(f"unknown flag --{error.flagname}: {_nearest_flag(error.flagname)}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(_override_problem(arguments, config) or _missing_flag(error) or str(error).replace("\n", " "))
    finally:
        sys.dont_write_bytecode = before


def _read_config(path: str) -> ConfigDict:
    """Returns the config that a file defines, or exits with one line, where ml_collections would be less clear."""
    if not pathlib.Path(path).is_file():
        _fail(f"config file '{path}' does not exist: --config takes a file such as configs/pm_vae_digits.py")
    try:
        config = runpy.run_path(path)["get_config"]()
    except KeyError as error:
        _fail(f"cannot read the config {path}: it has no {error}")
    except Exception as error:  # anything can go wrong in the user's Python
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        _fail(f"cannot read the config {path}{line}: {type(error).__name__}: {error}".replace("\n", " "))
    if not isinstance(config, ConfigDict):
        _fail(f"cannot read the config {path}: get_config() returns {type(config).__name__}, not a ConfigDict")
    return config


def _missing_flag(error: Exception) -> str | None:
    """Names the required flag that is missing; None for any other error."""
    missing = re.match(r"flag --(\w+)=None: Flag --\1 must have a value", str(error))
    # Flags that can be repeated have a second line of help.
    return missing and f"missing flag --{missing[1]}: {FLAGS[missing[1]].help.splitlines()[0].rstrip(';')}"


def _nearest_flag(name: str) -> str:
    modules = {module: found for module, found in FLAGS.flags_by_module_dict().items() if not module.startswith("absl")}
    return nearest(name, [flag.name for found in modules.values() for flag in found] + ["help"])


def _override_problem(arguments: list[str], config: ConfigDict | None) -> str | None:
    """Describes the wrong `--config.key=value` in one line; None if there is none."""
    for argument in arguments:
        if config is None or not argument.startswith("--config."):
            continue
        name, _, value = argument.removeprefix("--").partition("=")
        node, where = config, "config"
        for part in name.split(".")[1:]:
            if not isinstance(node, ConfigDict):
                return f"unknown key '{name}': '{where}' is a plain value"
            if part not in node:
                return f"unknown key '{where}.{part}': {nearest(part, node)}"
            node, where = node[part], f"{where}.{part}"
        if isinstance(node, ConfigDict):
            return f"'{where}' is a group of keys ({', '.join(node)}): set one of them"
        kind = type(node)
        try:
            if kind in (int, float):
                kind(value)
        except ValueError:
            return f"bad value '{value}' for '{where}': its type is {kind.__name__}"
    return None


def _fail(message: object) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    parallel.exit_at_once()


def config_path(arguments: Sequence[str] | None = None) -> str | None:
    """Returns the file named by `--config` in the command line, or in these arguments; None without that flag."""
    arguments = sys.argv if arguments is None else arguments
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("--config", "-config"):
            return following
        if argument.startswith(("--config=", "-config=")):
            return argument.partition("=")[2]
    return None


def config_name() -> str:
    """Returns the name of the config that `--config` names, without folder and ending."""
    return pathlib.Path(config_path() or "").stem


def _use_compilation_cache() -> None:
    """Caches compiled programs on disk, so that a script starts within seconds from the second time on."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# Evaluation ----------------------------------------------------------------------------------------------------------

_DEFINERS: dict[Any, Callable[..., flags.FlagHolder]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    Sequence: flags.DEFINE_list,
}


def evaluation_main(evaluate: Callable[..., Any], options: type, config: ConfigDict | None = None) -> None:
    """Runs a script that has one flag for every field of a dataclass of options, with the field's default and help.

    Args:
        evaluate: Takes the fields as keyword arguments.
        options: The dataclass; every field has a "help" in its metadata.
        config: A default config whose keys become flags too; `evaluate` gets those that were given as its `config`,
            `{"table.drop": ("id",), ...}`.
    """
    if config is not None:
        if problem := _override_problem([a for a in sys.argv if "=" in a], config):
            _fail(problem)  # ml_collections would raise
        config_flags.DEFINE_config_dict("config", config, "Changes to the default config.", lock_config=True)
    values, hints = {}, typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kinds = {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}
        define = next((define for kind, define in _DEFINERS.items() if kind in kinds), flags.DEFINE_string)
        required = field.default is dataclasses.MISSING
        default: Any = None if required else field.default
        default = list(default) if define is flags.DEFINE_list else default
        values[field.name] = define(field.name, default, field.metadata["help"], required=required)

    def main() -> None:
        arguments = {name: value.value for name, value in values.items()}
        if config is not None:
            arguments["config"] = config_flags.get_override_values(FLAGS["config"])
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files are deleted
        try:
            evaluate(**arguments)
        except KeyboardInterrupt:
            raise UserError("interrupted: nothing was written") from None

    run(main, exact=True)
