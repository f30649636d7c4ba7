"""Measures how time and memory grow with rows, features, latent dimensions and devices.

    python benchmarks/scale.py [--folder runs/scale] [--only rows,features] [--seconds 5]

The model is `configs/pm_vae_gas_gaussian.py`, a PM-VAE of eight features and 16 latent dimensions with batches of 512,
and one thing is varied at a time:

rows         `train_pm_vae.py` on a `.npy` file of so many rows, streamed: seconds up to the first step, and of a step
features     of a training step
latent       dimensions, of a training step with full-covariance posteriors
latent_gmm   the same with `configs/pm_vae_gas.py`, an autoregressive partial posterior
devices      of a training step on so many devices, which are threads on the same cores, with 512 rows on all together

Every point is measured in a process of its own, whose peak memory includes what Python and JAX need. The exponent is
that of time between the two largest values: 1 if twice as much takes twice as long. Prints a table; measured points are
kept in the folder.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from absl import flags

from benchmarks import synthetic
from posterior_matching import cli, data
from posterior_matching.atomic import write_text
from posterior_matching.errors import UserError, nearest

GAUSSIAN = "pm_vae_gas_gaussian"
AXES: dict[str, tuple[int, ...]] = {
    "rows": (10_000, 100_000, 1_000_000, 10_000_000),
    "features": (10, 32, 100, 316, 1000),
    "latent": (16, 32, 64, 128, 256),
    "latent_gmm": (16, 32, 64, 128, 256),
    "devices": (1, 2, 4, 8),
}


def of_a_step(config_name: str, num_features: int, seconds: float, **changes: Any) -> dict[str, float]:
    """Median seconds of a training step of a config with these changes, on random rows."""
    config = synthetic.load(config_name)
    config.update_from_flattened_dict(changes)
    x = np.random.default_rng(0).standard_normal((4 * config.batch_size * jax.device_count(), num_features), np.float32)
    step = synthetic.TrainingStep(config_name, config, data.Dataset("random", "train", x))
    step.run()
    return {"seconds": _median_seconds(step.run, seconds) / step.per_dispatch}


def of_rows(count: int) -> dict[str, float]:
    """Trains on a file of `count` rows: seconds of a step, seconds up to the first one, peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path, run = pathlib.Path(folder) / "rows.npy", pathlib.Path(folder) / "run"
        table = np.lib.format.open_memmap(path, "w+", np.float32, (count, 8))
        rng = np.random.default_rng(0)
        for part in np.array_split(table, max(1, count // 1_000_000)):
            part[:] = rng.standard_normal(part.shape, np.float32)
        table.flush()
        del table
        config = {"dataset": path, "steps": 200, "validation_every": 200, "log_every": 100}
        config |= {"train_split": "train", "validation_split": "validation", "data_memory_budget_gb": 0}
        arguments = [f"--config.{key}={value}" for key, value in config.items()]
        script, file = synthetic.ROOT / "train_pm_vae.py", synthetic.ROOT / f"configs/{GAUSSIAN}.py"
        command = [sys.executable, str(script), "--config", str(file), *arguments, "--run_dir", str(run)]
        start, until_training = time.perf_counter(), np.nan
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("training from step 0"):
                    until_training = time.perf_counter() - start
        if process.returncode:
            raise UserError("train_pm_vae.py failed")
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = 1 / logged[-1]["steps_per_second"]
    return {"seconds": seconds, "start_seconds": until_training, "gigabytes": _peak(children=True)}


MEASUREMENTS: dict[str, Callable[[int, float], dict[str, float]]] = {
    "rows": lambda count, _: of_rows(count),
    "features": lambda count, seconds: of_a_step(GAUSSIAN, count, seconds),
    "latent": lambda count, seconds: of_a_step(GAUSSIAN, 8, seconds, **{"model.latent_dim": count}),
    "latent_gmm": lambda count, seconds: of_a_step("pm_vae_gas", 8, seconds, **{"model.latent_dim": count}),
    "devices": lambda count, seconds: of_a_step(GAUSSIAN, 8, seconds, batch_size=512 // count),
}


def _median_seconds(run: Callable[[], None], seconds: float) -> float:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _peak(children: bool = False) -> float:
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss / 1e6


def _measure_here(axis: str, value: int, seconds: float) -> dict[str, float]:
    if axis == "devices":  # JAX has not been asked for its devices yet
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={value}"
    measured = MEASUREMENTS[axis](value, seconds)
    return {"gigabytes": _peak()} | measured


def measure(axis: str, value: int, seconds: float) -> dict[str, float]:
    """Measures a point in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_measure_here, axis, value, seconds).result()
        except Exception as error:
            raise UserError(f"{axis} {value}: {type(error).__name__}: {error}".replace("\n", " ")) from error


def exponent(values: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log(time) in log(value) between the two largest values."""
    return float(np.log(times[-1] / times[-2]) / np.log(values[-1] / values[-2]))


def table(points: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """The points in Markdown, with the exponent of each axis."""
    lines = ["| varied | value | seconds | exponent | start, s | peak memory, GB |", "|---" * 6 + "|"]
    for axis, of_axis in points.items():
        for value, point in of_axis.items():
            last = len(of_axis) > 1 and value == max(of_axis)
            slope = f"{exponent(list(of_axis), [p['seconds'] for p in of_axis.values()]):.2f}" if last else ""
            start = f"{point['start_seconds']:.1f}" if "start_seconds" in point else ""
            memory = f"{point['gigabytes']:.2f}"
            lines.append(f"| {axis} | {value:,} | {point['seconds']:.3g} | {slope} | {start} | {memory} |")
    return "\n".join(lines)


def main(folder: pathlib.Path, only: Sequence[str], seconds: float, most: int | None) -> None:
    """Measures what is missing and prints the table."""
    for name in only:
        if name not in AXES:
            raise UserError(f"--only: unknown '{name}': {nearest(name, AXES)}")
    points: dict[str, dict[int, dict[str, float]]] = {}
    for axis in only or AXES:
        points[axis] = {}
        for value in AXES[axis][:most]:
            path = folder / f"{axis}_{value}.json"
            if not path.exists():
                print(f"{axis} {value:,}", file=sys.stderr, flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(measure(axis, value, seconds)) + "\n")
            points[axis][value] = json.loads(path.read_text())
    print(table(points))


if __name__ == "__main__":
    _folder = flags.DEFINE_string("folder", "runs/scale", "Folder of the measurements.")
    _only = flags.DEFINE_list("only", [], "What to vary; empty: everything.")
    _seconds = flags.DEFINE_float("seconds", 5.0, "How long to measure each point.", lower_bound=0.0)
    _most = flags.DEFINE_integer("most", None, "Only so many values of each, from the smallest.", lower_bound=1)
    cli.run(lambda: main(pathlib.Path(_folder.value), _only.value, _seconds.value, _most.value))
