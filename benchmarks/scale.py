"""Measures how time and memory grow with rows, features, latent dimensions, samples and devices.

    python benchmarks/scale.py [--folder runs/scale] [--only rows,features] [--seconds 5]

The model is `configs/pm_vae_gas_gaussian.py`, a PM-VAE of eight features and 16 latent dimensions with batches of 512,
and one thing is varied at a time:

rows         `train_pm_vae.py` on a `.npy` file of so many rows, streamed: seconds up to the first step, and of a step
features     of a training step
latent       dimensions, of a training step with full-covariance posteriors
latent_gmm   the same with `configs/pm_vae_gas.py`, an autoregressive partial posterior
samples      of the likelihoods of 32 rows, 128 at a time
devices      of a training step on so many devices, which are threads on the same cores, with 512 rows on all together

Every point is measured in a process of its own, whose peak memory includes what Python and JAX need. The exponent is
that of time between the two largest values: 1 if twice as much takes twice as long. Prints a table, and draws
`scale.png` in the folder. Measured points are kept there.
"""

import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from absl import flags

from posterior_matching import cli
from posterior_matching.atomic import write_text
from posterior_matching.errors import UserError, nearest

ROOT = pathlib.Path(__file__).parents[1]
AXES: dict[str, tuple[int, ...]] = {
    "rows": (10_000, 100_000, 1_000_000, 10_000_000),
    "features": (10, 32, 100, 316, 1000),
    "latent": (16, 32, 64, 128, 256),
    "latent_gmm": (16, 32, 64, 128, 256),
    "samples": (64, 256, 1024, 4096),
    "devices": (1, 2, 4, 8),
}
_POINT = "SCALE_POINT"  # the variable by which the parent tells a process what to measure


def step_seconds(config_name: str, num_features: int, seconds: float, **changes: Any) -> float:
    """Median seconds of a training step of a config with these changes, on random rows."""
    import jax

    from benchmarks import synthetic
    from posterior_matching import data

    config = importlib.import_module(f"configs.{config_name}").get_config()
    config.update_from_flattened_dict(changes)
    x = np.random.default_rng(0).standard_normal((4 * config.batch_size * jax.device_count(), num_features), np.float32)
    step = synthetic.TrainingStep(config_name, config, data.Dataset("random", "train", x))
    step.run()
    return _median_seconds(step.run, seconds) / step.per_dispatch


def rows(count: int, _: float) -> dict[str, float]:
    """Trains on a file of `count` rows."""
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
        script, file = ROOT / "train_pm_vae.py", ROOT / "configs/pm_vae_gas_gaussian.py"
        command = [sys.executable, str(script), "--config", str(file), *arguments, "--run_dir", str(run)]
        start, until_training = time.perf_counter(), np.nan
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("training from step 0"):
                    until_training = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError("train_pm_vae.py failed")
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = 1 / logged[-1]["steps_per_second"]
    return {"seconds": seconds, "start_seconds": until_training, "gigabytes": _peak(resource.RUSAGE_CHILDREN)}


def features(count: int, seconds: float) -> dict[str, float]:
    """A training step on rows of `count` features."""
    return {"seconds": step_seconds("pm_vae_gas_gaussian", count, seconds)}


def latent(count: int, seconds: float) -> dict[str, float]:
    """A training step with `count` latent dimensions and full-covariance Gaussians."""
    return {"seconds": step_seconds("pm_vae_gas_gaussian", 8, seconds, **{"model.latent_dim": count})}


def latent_gmm(count: int, seconds: float) -> dict[str, float]:
    """A training step with `count` latent dimensions and an autoregressive partial posterior."""
    return {"seconds": step_seconds("pm_vae_gas", 8, seconds, **{"model.latent_dim": count})}


def samples(count: int, seconds: float) -> dict[str, float]:
    """Likelihoods of 32 rows with `count` samples."""
    import jax
    from flax import nnx

    from benchmarks import synthetic

    config = importlib.import_module("configs.pm_vae_gas_gaussian").get_config()
    data = synthetic.dataset("gas", 32)
    model: Any = synthetic.experiment("pm_vae_gas_gaussian", config, data).phases[-1].model
    b = np.random.default_rng(0).integers(0, 2, data.x.shape).astype(np.float32)

    @nnx.jit
    def estimate(model: Any, key: jax.Array) -> Any:
        return model.is_log_prob(data.x, b, count, key=key)

    def run() -> None:
        jax.block_until_ready(estimate(model, jax.random.key(0)))

    run()
    return {"seconds": _median_seconds(run, seconds)}


def devices(count: int, seconds: float) -> dict[str, float]:
    """A training step on `count` devices, which the parent has made."""
    import jax

    assert jax.device_count() == count
    return {"seconds": step_seconds("pm_vae_gas_gaussian", 8, seconds, batch_size=512 // count)}


MEASUREMENTS: dict[str, Callable[[int, float], dict[str, float]]] = {
    "rows": rows,
    "features": features,
    "latent": latent,
    "latent_gmm": latent_gmm,
    "samples": samples,
    "devices": devices,
}


def _median_seconds(run: Callable[[], None], seconds: float) -> float:
    found: list[float] = []
    while len(found) < 3 or sum(found) < seconds:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def _peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1e6


def measure_here() -> None:
    """Measures the point that the parent asks for, and prints it as JSON."""
    axis, value, seconds = json.loads(os.environ[_POINT])
    found = MEASUREMENTS[axis](value, seconds)
    print(json.dumps({"gigabytes": _peak(resource.RUSAGE_SELF)} | found))


def measure(axis: str, value: int, seconds: float) -> dict[str, float]:
    """Measures a point in a process of its own.

    Raises:
        UserError: The process failed.
    """
    environment = os.environ | {_POINT: json.dumps([axis, value, seconds])}
    if axis == "devices":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={value}"
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{axis} {value}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def exponent(values: Sequence[int], found: Sequence[float]) -> float:
    """The slope of log(found) in log(value) between the two largest values."""
    return float(np.log(found[-1] / found[-2]) / np.log(values[-1] / values[-2]))


def table(points: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """The points in Markdown, with the exponent of each axis."""
    lines = ["| varied | value | seconds | exponent | start, s | peak memory, GB |", "|---" * 6 + "|"]
    for axis, found in points.items():
        for value, point in found.items():
            last = len(found) > 1 and value == max(found)
            slope = f"{exponent(list(found), [p['seconds'] for p in found.values()]):.2f}" if last else ""
            start = f"{point['start_seconds']:.1f}" if "start_seconds" in point else ""
            memory = f"{point['gigabytes']:.2f}"
            lines.append(f"| {axis} | {value:,} | {point['seconds']:.3g} | {slope} | {start} | {memory} |")
    return "\n".join(lines)


def figure(points: Mapping[str, Mapping[int, Mapping[str, float]]], path: pathlib.Path) -> None:
    """Draws time and memory against what is varied."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, len(points), squeeze=False, sharex="col", sharey="row", figsize=(2 * len(points), 4.5))
    for column, (axis, found) in zip(axes.T, points.items(), strict=True):
        values = list(found)
        column[0].loglog(values, [point["seconds"] for point in found.values()], "o-", label="step")
        if "start_seconds" in found[values[0]]:
            column[0].loglog(values, [point["start_seconds"] for point in found.values()], "o--", label="start")
            column[0].legend(fontsize=7)
        column[1].semilogx(values, [point["gigabytes"] for point in found.values()], "o-")
        column[1].set_xticks(values[:: max(1, len(values) - 1)], [f"{v:,}" for v in values[:: max(1, len(values) - 1)]])
        column[1].minorticks_off()
        column[1].set_xlabel(axis)
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GB")
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(folder: pathlib.Path, only: Sequence[str], seconds: float, most: int | None) -> None:
    """Measures what is missing, prints the table and draws the figure.

    Raises:
        UserError: An axis is unknown, or a measurement failed.
    """
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
                found = measure(axis, value, seconds)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(found) + "\n")
            points[axis][value] = json.loads(path.read_text())
    print(table(points))
    figure(points, folder / "scale.png")
    print(f"\n{folder / 'scale.png'}")


if __name__ == "__main__":
    if _POINT in os.environ:
        measure_here()
    else:
        _folder = flags.DEFINE_string("folder", "runs/scale", "Folder of the measurements.")
        _only = flags.DEFINE_list("only", [], "What to vary; empty: everything.")
        _seconds = flags.DEFINE_float("seconds", 5.0, "How long to measure each point.", lower_bound=0.0)
        _most = flags.DEFINE_integer("most", None, "Only so many values of each, from the smallest.", lower_bound=1)
        cli.run(lambda: main(pathlib.Path(_folder.value), _only.value, _seconds.value, _most.value))
