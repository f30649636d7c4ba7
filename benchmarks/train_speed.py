"""Measures a training step of any config, on random data of the dataset's shape.

    python benchmarks/train_speed.py --config configs/pm_vae_gas.py [--config.key=value ...] [--seconds 20]
    python benchmarks/train_speed.py --config configs/pm_vae_gas.py --against ../other_checkout [--rounds 2]
    python benchmarks/train_speed.py --config configs/pm_vae_gas.py --against ../posterior-matching \\
      --published_python ../old/bin/python

Prints steps per second (the median), the time from process start to the end of the first step, compile time, peak
memory, the floating-point operations that XLA counts (the body of a loop once), and a bound: the time that the step's
own matrix products and convolutions take, each run by itself.

With `--against`, this checkout and another one are measured in turn, each with its own code and its own config of that
name, and the ratios of their speeds are printed. Machines are noisy: raise `--rounds` before you believe a difference
of a few percent. The other checkout may be the published code, which runs in a Python of its own:
`published_speed.py` says how to make one.
"""

import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import synthetic, timing
from posterior_matching import cli
from posterior_matching.errors import UserError


def compare(other: pathlib.Path, rounds: int, published_python: str | None, arguments: Sequence[str]) -> None:
    """Measures two checkouts in turn, theirs first, and prints their steps per second and the ratios.

    Raises:
        UserError: `other` is no checkout, or a measurement failed.
    """
    own = ("--against", "--published_python", "--rounds")
    arguments = [argument for argument in _joined(arguments) if argument.split("=")[0] not in own]
    command = [sys.executable, "benchmarks/train_speed.py", *arguments]
    other_command = command
    if not (other / "benchmarks" / "train_speed.py").is_file():
        if not (other / "posterior_matching" / "models" / "pixel_cnn.py").is_file():
            raise UserError(f"--against={other} is not a checkout of this repository or of the published code")
        if published_python is None:
            problem = "is the published code: set --published_python, as benchmarks/published_speed.py says"
            raise UserError(f"--against={other} {problem}")
        script = str(synthetic.ROOT / "benchmarks" / "published_speed.py")
        other_command = [str(pathlib.Path(published_python).absolute()), script, f"--checkout={other}", *arguments]
    ratios = []
    for number in range(rounds):
        theirs = steps_per_second(other, other_command)
        ours = steps_per_second(synthetic.ROOT, command)
        ratios.append(ours / theirs)
        print(f"round {number + 1}: theirs {theirs:.4g}, ours {ours:.4g} steps/s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"ratio, ours / theirs: median {np.median(ratios):.3f} ({spread(ratios)})")


def _joined(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--flag value` written `--flag=value`."""
    joined: list[str] = []
    for argument in arguments:
        if argument.startswith("-"):
            joined.append(f"--{argument.lstrip('-')}")
        else:
            joined[-1] += f"={argument}"
    return joined


def steps_per_second(checkout: pathlib.Path, command: Sequence[str]) -> float:
    """Measures a checkout in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    printed = re.search(r"^steps per second +(\S+)", result.stdout, re.MULTILINE)
    if result.returncode or printed is None:
        raise UserError(f"measuring {checkout} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(printed[1])


def measure(config: ConfigDict, seconds: float, products: bool) -> None:
    """Measures this checkout and prints."""
    import resource  # Windows has none

    if config.batch_size is None:
        raise UserError("the batch size of this config depends on the data: set --config.batch_size")
    dataset = synthetic.dataset_of(cli.config_name(), config)
    step = synthetic.TrainingStep(
        cli.config_name(), config, synthetic.dataset(dataset, 4 * config.batch_size * jax.device_count())
    )
    step.run()
    first_step_seconds = time.time() - psutil.Process().create_time()
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # before the products, as the next one
    device_memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    cost: Any = step.compiled.cost_analysis()

    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        start, dispatches = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 10 or dispatches < 2:
            step.dispatch()
            dispatches += 1
        step.wait()
        rates.append(dispatches * step.per_dispatch / (time.perf_counter() - start))
    rate = float(np.median(rates))
    print(f"device                 {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"config                 {cli.config_path()}, batch {config.batch_size} per device")
    print(f"steps per second       {rate:.4g}  ({spread(rates)})")
    print(f"steps per dispatch     {step.per_dispatch}")
    print(f"time to first step     {first_step_seconds:.1f} s from process start")
    print(f"compile time           {step.compile_seconds:.1f} s (less when the compilation cache is warm)")
    print(f"peak host memory       {gigabytes:.2f} GB")
    if device_memory:
        print(f"peak device memory     {device_memory / 1e9:.2f} GB")
    print(f"operations per step    {cost['flops'] / 1e9:.4g} GFLOP on each device")
    if products:
        count, alone = timing.seconds_of_products(step.jaxpr())
        share = alone * rate / step.per_dispatch
        print(f"its products alone     {share:.0%} of the step, {count / step.per_dispatch:.0f} of them")


def spread(values: Sequence[float]) -> str:
    """Formats the number of values, their minimum and their maximum."""
    return f"{len(values)} samples, {min(values):.4g} to {max(values):.4g}"


if __name__ == "__main__":
    _config = cli.config_flag("the experiment to measure")
    _seconds = flags.DEFINE_float("seconds", 20.0, "How long to measure.", lower_bound=0.1)
    _products = flags.DEFINE_bool("products", True, "Measure the step's own matrix products and convolutions, too.")
    _against = flags.DEFINE_string("against", None, "Another checkout of this repository, to compare with this one.")
    _python = flags.DEFINE_string(
        "published_python", None, "If --against is the published code: a Python that has its packages."
    )
    _rounds = flags.DEFINE_integer("rounds", 2, "With --against: measurements of each checkout.", lower_bound=1)

    def main() -> None:
        """Measures one checkout, or compares two."""
        if _against.value is None:
            measure(_config.value, _seconds.value, _products.value)
        else:
            compare(pathlib.Path(_against.value).resolve(), _rounds.value, _python.value, sys.argv[1:])

    cli.run(main)
