"""The command line of all scripts: flags, one-line errors with exit status 1, JAX's compilation cache."""

import inspect
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
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

# The flags of all evaluations, one per parameter of an `evaluate` function: its definer and its help.
_EVALUATION_FLAGS: dict[str, tuple[Callable[..., flags.FlagHolder], str]] = {
    "run_dir": (flags.DEFINE_string, "Evaluate the run in this directory (required)."),
    "dataset": (
        flags.DEFINE_string,
        "Evaluate on this dataset, a name or the path of a file; by default the one the run was trained on.",
    ),
    "split": (flags.DEFINE_string, "Evaluate on this split of the dataset; 'all' takes every row of your own file."),
    "checkpoint": (
        flags.DEFINE_string,
        "Load this checkpoint, 'best' or 'latest'; by default the one set by the run's config.evaluate_checkpoint.",
    ),
    "mask_generator": (
        flags.DEFINE_string,
        "Draw masks from this generator, given with its options as in UniformMaskGenerator:bounds=0.0,0.2 or "
        "SquareMaskGenerator:size=4; 'config' uses the generator the run was trained with.",
    ),
    "num_instances": (
        flags.DEFINE_integer,
        "Evaluate only this many examples, from the start of the split; by default all.",
    ),
    "batch_size": (
        flags.DEFINE_integer,
        "Process this many examples at once on each device; the results do not depend on it.",
    ),
    "chunk_size": (flags.DEFINE_integer, "Draw at most this many samples of an example at once, to save memory."),
    "num_samples": (flags.DEFINE_integer, "Draw this many samples of z for each example and estimate."),
    "refine_steps": (
        flags.DEFINE_integer,
        "Fit the proposals of the likelihoods to each example by so many gradient steps; 400 is a good number.",
    ),
    "annealing_steps": (
        flags.DEFINE_integer,
        "Make each sample of the likelihoods a chain of so many steps of annealed importance sampling.",
    ),
    "num_trials": (flags.DEFINE_integer, "Repeat the evaluation this many times, with new masks and samples."),
    "num_steps": (
        flags.DEFINE_integer,
        "Visit this many states, from nothing observed to num_steps - 1 features acquired.",
    ),
    "policies": (flags.DEFINE_list, "Compare these policies for choosing the next feature, separated by commas."),
    "seed": (flags.DEFINE_integer, "Seed all masks, samples and clusterings with this number."),
    "embedding": (
        flags.DEFINE_string,
        "Compute precision and recall in this embedding of images, 'inception' (a download of 96 MB) or 'pixels'; or "
        "neither, with 'none'.",
    ),
    "memory_budget_gb": (
        flags.DEFINE_float,
        "Let the sampling policy evaluate as many features together as fit into this many gigabytes on each device.",
    ),
    "input": (
        flags.DEFINE_string,
        "Fill the missing cells of this file of rows, or the holes of these images: a folder, .zip, .png, .npy ...",
    ),
    "output": (
        flags.DEFINE_string,
        "Write the filled rows to this file, NAME.csv; several imputations go to NAME_1.csv, NAME_2.csv and so on. "
        "Filled images go to this new folder, as PNG files under their names.",
    ),
    "mask": (
        flags.DEFINE_string,
        "The holes of the images: a mask for all of them, or a folder of masks with the names of the images. White is "
        "observed, black a hole.",
    ),
    "num_imputations": (flags.DEFINE_integer, "Write this many completed copies, which differ in their draws."),
    "kind": (
        flags.DEFINE_string,
        "Fill with 'point' estimates (means, and the most likely categories) or with 'draws' from p(x_u | x_o); by "
        "default with draws if there are several copies.",
    ),
    "unknown_categories": (
        flags.DEFINE_string,
        "Treat categories that the run does not know as an 'error' or as 'missing'.",
    ),
    "train": (
        flags.DEFINE_bool,
        "If the run directory holds no run yet, train the default config on the input first; --config.table.KEY=VALUE "
        "sets how to read it, and --config.KEY=VALUE changes any other key.",
    ),
    "weighted": (
        flags.DEFINE_bool,
        "Weigh the draws that a point estimate averages by p(x_o, z) / q(z | x_o); they are not weighted in the paper.",
    ),
    "baselines": (flags.DEFINE_bool, "Also score imputation by scikit-learn on the same masks."),
}


def evaluation_main(evaluate: Callable[..., Any], config: ConfigDict | None = None, **own_help: str) -> None:
    """Runs a script that has one flag for every parameter of `evaluate`, with the parameter's default.

    Args:
        evaluate: A function whose parameters are all in `_EVALUATION_FLAGS`, except `config`.
        config: A default config whose keys become flags too; `evaluate` gets those that were given as its `config`,
            `{"table.drop": ("id",), ...}`.
        own_help: Help texts, by flag name, that replace the common ones.
    """
    values = {}
    if config is not None:
        if problem := _override_problem([a for a in sys.argv if "=" in a], config):
            _fail(problem)  # ml_collections would raise
        config_flags.DEFINE_config_dict("config", config, "Changes to the default config.", lock_config=True)
    for name, parameter in inspect.signature(evaluate).parameters.items():
        if name == "config":
            continue
        define, text = _EVALUATION_FLAGS[name]
        required = parameter.default is inspect.Parameter.empty
        default = list(parameter.default) if define is flags.DEFINE_list else parameter.default
        values[name] = define(name, None if required else default, own_help.get(name, text), required=required)

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
