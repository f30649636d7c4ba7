"""Runs every experiment: those of the paper and the built-in ones, each a training and its evaluations.

    python benchmarks/reproduce.py --folder runs/reproduce              # everything that is not done yet
    python benchmarks/reproduce.py --only pm_vqvae_digits --seeds 3     # and the VQ-VAEs it builds on
    python benchmarks/reproduce.py --status                             # what is done, and why the rest is not
    python benchmarks/reproduce.py --table RESULTS.md                   # writes the results into a document
    python benchmarks/reproduce.py --scale 0.01 --folder runs/rehearsal # a rehearsal of everything on stand-ins

Run directories are `<folder>/<config>_<seed>`. An interrupted command resumes where it stopped. An experiment whose
data cannot be had, or whose base is missing, is skipped with the reason, and the next one runs.

A rehearsal multiplies batch sizes and samples by the scale and steps by its square, to ten at most, takes one layer
where deep models repeat it, evaluates a few examples, and replaces the data with small built-in ones of the same shape.
It tries the commands and says nothing about the models.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import filelock
import numpy as np
from absl import flags

from benchmarks.synthetic import ROOT, SHAPES
from posterior_matching import cli
from posterior_matching.atomic import replacing, write_text
from posterior_matching.errors import UserError, nearest
from posterior_matching.evaluation.metrics import NUM_CLUSTERS


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A call of an evaluation script.

    Args:
        script: The script.
        folder: The folder that it writes in the run directory.
        options: Its flags.
        metrics: The metrics of its `results.json` that the table shows.
    """

    script: str
    folder: str
    options: Mapping[str, Any]
    metrics: Sequence[str]


def _uci(*metrics: str, **options: Any) -> Evaluation:
    shown = ("nrmse", "ac_ll_nats", "effective_sample_size_x", "effective_sample_size_xo", *metrics)
    return Evaluation("eval_pm_vae_uci.py", "uci_results", options, shown)


def _inpainting(script: str, **options: Any) -> Evaluation:
    baselines = ("psnr_mean_db", "psnr_knn_db") if options.get("baselines") else ()
    return Evaluation(script, "imputation_results", options, ("psnr_db", *baselines, "precision", "recall"))


def _likelihood(**options: Any) -> Evaluation:
    return Evaluation("eval_pm_vdvae_likelihood.py", "likelihood_results", options, ("bpd", "ac_ll_nats"))


def _acquisition(**options: Any) -> Evaluation:
    metrics = [f"rmse_{policy}_mean" for policy in ("sampling", "lookahead", "random")]
    return Evaluation("eval_greedy_acquisition.py", "trajectories", options, metrics)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training and its evaluations.

    Args:
        family: Trained by `train_<family>.py`.
        evaluations: The evaluations of the run.
        base: The experiment it builds on.
        metrics: The metrics of its last validation that the table shows.
    """

    family: str
    evaluations: Sequence[Evaluation] = ()
    base: str | None = None
    metrics: Sequence[str] = ()


_BASELINES = ("nrmse_mean", "nrmse_knn", "nrmse_iterative")
_ELBO = ("val_elbo_nats", "val_matching_ll_nats")
_VQVAE = Experiment("vqvae", metrics=("val_reconstruction_ll_nats", "val_perplexity"))
_VADE = Experiment("vade", metrics=("val_clustering_accuracy", "val_nmi"))
_VDVAE = "eval_pm_vdvae_imputation.py"
_PIXELS = {"embedding": "pixels", "baselines": True, "num_trials": 2, "weighted": True}

# By config, bases before what builds on them.
EXPERIMENTS = {
    "pm_vae_power": Experiment("pm_vae", [_uci()]),
    "pm_vae_gas": Experiment("pm_vae", [_uci()]),
    "pm_vae_gas_gaussian": Experiment("pm_vae", [_uci()]),
    "pm_vae_hepmass": Experiment("pm_vae", [_uci()]),
    "pm_vae_miniboone": Experiment("pm_vae", [_uci()]),
    "pm_vae_bsds": Experiment("pm_vae", [_uci()]),
    "pm_vae_adult": Experiment(
        "pm_vae", [_uci("accuracy", *_BASELINES, "accuracy_mean", "accuracy_knn", "accuracy_iterative", baselines=True)]
    ),
    "pm_vae_mnist": Experiment("pm_vae", [_uci(num_samples=64, num_trials=2)], metrics=_ELBO),
    "pm_vae_mnist16": Experiment("pm_vae", metrics=_ELBO),
    "lookahead_mnist16": Experiment(
        "lookahead_posterior", [_acquisition(num_steps=21, num_instances=256, batch_size=64)], base="pm_vae_mnist16"
    ),
    "vqvae_mnist": _VQVAE,
    "pm_vqvae_mnist": Experiment("pm_vqvae", [_inpainting("eval_pm_vqvae.py", baselines=True)], base="vqvae_mnist"),
    "vqvae_celeb_a": _VQVAE,
    "pm_vqvae_celeb_a": Experiment("pm_vqvae", [_inpainting("eval_pm_vqvae.py")], base="vqvae_celeb_a"),
    "pm_vdvae_mnist": Experiment("pm_vdvae", [_inpainting(_VDVAE, baselines=True), _likelihood()]),
    "pm_vdvae_celeb_a": Experiment("pm_vdvae", [_inpainting(_VDVAE)]),
    "vade_mnist": _VADE,
    "pm_vade_mnist": Experiment("pm_vade", base="vade_mnist", metrics=_VADE.metrics),
    "pm_vae_digits": Experiment("pm_vae", [_uci(*_BASELINES, baselines=True)]),
    "pm_vae_whitewine": Experiment("pm_vae", [_uci(*_BASELINES, baselines=True)]),
    "pm_vae_mixture": Experiment("pm_vae", [_uci("ac_ll_exact_nats", *_BASELINES, baselines=True, num_trials=2)]),
    "pm_vae_digits_sparse": Experiment("pm_vae", metrics=_ELBO),
    "lookahead_digits": Experiment(
        "lookahead_posterior", [_acquisition(num_steps=21, num_instances=200)], base="pm_vae_digits_sparse"
    ),
    "vqvae_digits": _VQVAE,
    "pm_vqvae_digits": Experiment(
        "pm_vqvae", [_inpainting("eval_pm_vqvae.py", **_PIXELS, num_samples=100)], base="vqvae_digits"
    ),
    "pm_vdvae_digits": Experiment(
        "pm_vdvae", [_inpainting(_VDVAE, **_PIXELS, num_samples=200), _likelihood(num_samples=200, num_trials=1)]
    ),
    "vade_digits": _VADE,
    "pm_vade_digits": Experiment("pm_vade", base="vade_digits", metrics=_VADE.metrics),
}

# ACE (Strauss and Oliva 2021) and DEformer (Alcorn and Nguyen 2021), from the README of rystrauss/deformer. The NRMSE
# printed there for DEformer counts observed entries too, so it cannot be compared. The tables of the Posterior Matching
# paper could not be read: fill in the third column if you have them.
PUBLISHED: dict[tuple[str, str], tuple[str, str, str]] = {
    ("pm_vae_power", "ac_ll_nats"): ("0.631", "0.641", ""),
    ("pm_vae_gas", "ac_ll_nats"): ("9.643", "10.272", ""),
    ("pm_vae_hepmass", "ac_ll_nats"): ("-3.859", "-0.899", ""),
    ("pm_vae_miniboone", "ac_ll_nats"): ("0.310", "1.758", ""),
    ("pm_vae_bsds", "ac_ll_nats"): ("86.701", "87.01", ""),
    ("pm_vae_adult", "ac_ll_nats"): ("2.38", "2.66", ""),
    ("pm_vae_adult", "nrmse"): ("0.90", "0.88", ""),
    ("pm_vae_adult", "accuracy"): ("0.69", "0.70", ""),
    ("pm_vae_power", "nrmse"): ("0.828", "", ""),
    ("pm_vae_gas", "nrmse"): ("0.335", "", ""),
    ("pm_vae_hepmass", "nrmse"): ("0.830", "", ""),
    ("pm_vae_miniboone", "nrmse"): ("0.432", "", ""),
    ("pm_vae_bsds", "nrmse"): ("0.525", "", ""),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of an experiment.

    `<folder>/records/<config>_<seed>.json` holds the commit at which it began, its seconds of training, the commands
    that have ended, and the last line of one that failed.
    """

    config: str
    seed: int
    folder: pathlib.Path
    scale: float

    @property
    def experiment(self) -> Experiment:
        """The experiment."""
        return EXPERIMENTS[self.config]

    @property
    def path(self) -> pathlib.Path:
        """The run directory."""
        return self.folder / f"{self.config}_{self.seed}"

    @property
    def base(self) -> "Run | None":
        """The run it builds on."""
        return dataclasses.replace(self, config=self.experiment.base) if self.experiment.base else None

    def commands(self) -> list[list[str]]:
        """The command lines, training first."""
        family = self.experiment.family
        train = [f"train_{family}.py", "--config", f"configs/{self.config}.py"]
        train += [f"--config.{key}={value}" for key, value in self._changes().items()]
        if self.base is not None:
            train += [f"--config.{EXPERIMENTS[self.base.config].family}_dir={self.base.path}"]
        commands = [[*train, "--run_dir", str(self.path)]]
        for evaluation in self.experiment.evaluations:
            options = {**evaluation.options, **(self._small(evaluation) if self.scale < 1 else {})}
            arguments = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
            commands.append([evaluation.script, "--run_dir", str(self.path), *arguments])
        return commands

    def _changes(self) -> dict[str, Any]:
        if self.scale == 1:
            return {"seed": self.seed}
        config = _config(self.config)
        steps = min(max(2, round(config.steps * self.scale**2)), 10)
        changes = {"seed": self.seed, "steps": steps, "validation_every": steps, "log_every": 1}
        changes["batch_size"] = max(2, round(config.batch_size * self.scale))
        changes["dataset"] = self.stand_in
        changes |= _shallow(config.get("model", {}))
        if "pretraining" in config:
            changes |= {"pretraining.steps": steps // 2, "pretraining.mixture_inits": 1}
        return changes

    def _small(self, evaluation: Evaluation) -> dict[str, Any]:
        if evaluation.folder == "trajectories":
            return {"num_instances": 4, "num_samples": 2, "num_steps": 3, "batch_size": 4}
        samples = max(2, round(evaluation.options.get("num_samples", 512) * self.scale))
        pixels = {"embedding": "pixels"} if evaluation.folder == "imputation_results" else {}
        return {"num_trials": 1, "num_instances": NUM_CLUSTERS, "num_samples": samples, **pixels}

    @property
    def stand_in(self) -> pathlib.Path:
        """The file that replaces the data in a rehearsal."""
        return self.folder / "stand_ins" / f"{pathlib.Path(_config(self.config).dataset).stem}.npz"

    def record(self) -> dict[str, Any]:
        """The record, or that of a run which has not begun."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._record_path.read_text())
        return {"commit": _commit(), "training_seconds": 0.0, "ended": [], "error": None}

    @property
    def _record_path(self) -> pathlib.Path:
        return self.folder / "records" / f"{self.path.name}.json"

    def remaining(self) -> list[list[str]]:
        """The commands that have not ended, or whose run directory is gone."""
        ended = self.record()["ended"] if (self.path / "config.json").exists() else []
        return [command for command in self.commands() if shlex.join(command) not in ended]

    def status(self) -> str:
        """What is done, or why not."""
        remaining = self.remaining()
        if not remaining:
            return "done"
        if _is_locked(self.path):
            return "running"
        trained = len(remaining) < len(self.commands())
        state = "trained, not evaluated" if trained else "interrupted" if self.path.exists() else "not run"
        error = self.record()["error"]
        return f"{state}: {error}" if error else state

    def run(self) -> None:
        """Runs the remaining commands up to the first that fails."""
        record = self.record() | {"error": None}
        record["ended"] = [line for line in record["ended"] if line not in map(shlex.join, self.remaining())]
        if self.base is not None and len(self.base.remaining()) == len(self.base.commands()):
            self._save(record | {"error": f"needs {self.base.config}, which is not trained"})
            return
        for command in self.remaining():
            print(f"\npython {shlex.join(command)}", flush=True)
            start = time.perf_counter()
            record["error"] = _call(command)
            if command[0].startswith("train_"):
                record["training_seconds"] += time.perf_counter() - start
            if record["error"] is None:
                record["ended"].append(shlex.join(command))
            self._save(record)
            if record["error"]:
                return

    def _save(self, record: Mapping[str, Any]) -> None:
        self._record_path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._record_path, json.dumps(record, indent=2) + "\n")

    def values(self) -> Iterator[tuple[str, float]]:
        """The metrics that the table shows, as far as they have been measured."""
        remaining = [command[0] for command in self.remaining()]
        if not any(script.startswith("train_") for script in remaining):
            last = json.loads((self.path / "metrics.jsonl").read_text().splitlines()[-1])
            yield from ((name, last[name]) for name in self.experiment.metrics if name in last)
        for evaluation in self.experiment.evaluations:
            if evaluation.script not in remaining:
                metrics = json.loads((self.path / evaluation.folder / "results.json").read_text())["metrics"]
                yield from ((name, metrics[name]["mean"]) for name in evaluation.metrics if name in metrics)


def main(
    folder: pathlib.Path, only: Sequence[str], seeds: int, scale: float, status: bool, document: str | None
) -> None:
    """Runs everything that is not done, or only reports.

    Args:
        folder: Folder of the run directories.
        only: Names of experiments; those they build on are added. Empty: all.
        seeds: Number of seeds.
        scale: Below 1, a rehearsal of this size.
        status: Only print what is done.
        document: Only write the results into this Markdown file.

    Raises:
        UserError: A name is unknown, the document cannot be written, or something did not run.
    """
    for name in only:
        if name not in EXPERIMENTS:
            raise UserError(f"unknown experiment '{name}': {nearest(name, EXPERIMENTS)}")
    names = [name for name in EXPERIMENTS if not only or name in _with_bases(only)]
    runs = [Run(name, seed, folder, scale) for name in names for seed in range(seeds)]
    if document is not None:
        _write_table(pathlib.Path(document), table(runs))
        return
    if not status:
        for run in runs:
            if run.scale < 1 and not run.stand_in.exists():
                write_stand_in(run.stand_in, SHAPES[pathlib.Path(_config(run.config).dataset).name])
            run.run()
    print("\n" + "\n".join(f"{run.path.name:24} {run.status()}" for run in runs))
    if not status and any(run.remaining() for run in runs):
        raise UserError("not everything ran, for the reasons above; the same command tries it again")


def table(runs: Sequence[Run]) -> str:
    """The results in Markdown: ours, the mean and its standard error over seeds, beside published ones.

    Experiments without either are left out.
    """
    rows = ["| experiment | metric | here | seeds | ACE | DEformer | paper | training, s | commit |", "|---" * 9 + "|"]
    for config in dict.fromkeys(run.config for run in runs):
        seeds = [run for run in runs if run.config == config]
        measured: dict[str, list[float]] = {}
        for run in seeds:
            for name, value in run.values():
                measured.setdefault(name, []).append(value)
        trained = [run.record() for run in seeds if dict(run.values()) or not run.remaining()]
        seconds = " ".join(f"{record['training_seconds']:.0f}" for record in trained)
        commits = " ".join(dict.fromkeys(record["commit"] for record in trained))
        for name in measured | {key[1]: [] for key in PUBLISHED if key[0] == config}:
            found = measured.get(name, [])
            published = " | ".join(PUBLISHED.get((config, name), ("", "", "")))
            here = _mean_and_error(found) if found else "not run"
            rows.append(f"| `{config}` | `{name}` | {here} | {len(found)} | {published} | {seconds} | {commits} |")
    return "\n".join(rows) + "\n"


def _shallow(model: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a model's options for a rehearsal: fewer layers of a kind, which compile sooner."""
    changes: dict[str, Any] = {}
    if "num_levels" in model:  # a VDVAE
        changes = {f"model.{part}": re.sub(r"x\d+", "x1", model[part]) for part in ("encoder", "decoder")}
        changes["model.num_levels"] = 256  # of the stand-in's pixels
    if "pixel_cnn" in model:
        changes["model.pixel_cnn.num_resnet"] = 1
    return changes


def write_stand_in(path: pathlib.Path, shape: Sequence[int]) -> None:
    """Writes small data of a shape: scikit-learn's digits, enlarged, or rows of a Gaussian with correlated columns."""
    rng = np.random.default_rng(0)
    parts = {"train": 256, "val": 32, "test": 32}
    rows = sum(parts.values())
    if len(shape) == 3:
        from sklearn.datasets import load_digits

        height, width, channels = shape
        digits = load_digits().images[:rows] / 16 * 255
        digits = digits[:, np.arange(height) * 8 // height][:, :, np.arange(width) * 8 // width]
        x = np.repeat(digits[..., None], channels, axis=-1).round().astype(np.uint8)
    else:
        x = (rng.standard_normal((rows, *shape)) @ rng.standard_normal((*shape, *shape))).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    train, val, test = np.split(x, np.cumsum(list(parts.values()))[:-1])
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, train=train, val=val, test=test)


def _mean_and_error(values: Sequence[float]) -> str:
    if np.ptp(values) <= 1e-9 * abs(values[0]):  # one, or of what does not depend on the seed
        return f"{values[0]:.4g}"
    return f"{np.mean(values):.4g} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2g}"


def _write_table(path: pathlib.Path, text: str) -> None:
    begin, end = "<!-- reproduce.py: begin -->\n", "<!-- reproduce.py: end -->"
    try:
        document = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    before, found, after = document.partition(begin)
    if not found or end not in after:
        raise UserError(f"{path} must have the lines '{begin.strip()}' and '{end}', between which the table goes")
    write_text(path, before + begin + text + end + after.partition(end)[2])


def _call(command: Sequence[str]) -> str | None:
    """Runs a script of the repository; returns the last line it wrote to stderr if it fails."""
    arguments = [str(ROOT / argument) if argument.startswith("configs/") else argument for argument in command[1:]]
    with subprocess.Popen([sys.executable, str(ROOT / command[0]), *arguments], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        tail = b""
        try:
            while chunk := process.stderr.read1(65536):  # type: ignore[attr-defined]
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-10_000:]
        except BaseException:
            process.terminate()  # the script saves a checkpoint
            raise
    if process.returncode == 0:
        return None
    lines = tail.decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "no message")


def _with_bases(names: Sequence[str]) -> set[str]:
    bases = [base for name in names if (base := EXPERIMENTS[name].base) is not None]
    return set(names) | set(bases)


@functools.cache
def _config(name: str) -> Any:
    return importlib.import_module(f"configs.{name}").get_config()


@functools.cache
def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _is_locked(path: pathlib.Path) -> bool:
    if not (path / ".lock").exists():
        return False
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


if __name__ == "__main__":
    _folder = flags.DEFINE_string("folder", "runs/reproduce", "Folder of the run directories.")
    _only = flags.DEFINE_list("only", [], "Only these experiments, separated by commas, and those they build on.")
    _seeds = flags.DEFINE_integer("seeds", 1, "Number of seeds: 0, 1, ...", lower_bound=1)
    _scale = flags.DEFINE_float("scale", 1.0, "Below 1: a rehearsal of this size.", lower_bound=1e-4, upper_bound=1.0)
    _status = flags.DEFINE_bool("status", False, "Print what is done, and run nothing.")
    _table = flags.DEFINE_string("table", None, "Write the results into this Markdown file, and run nothing.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running script is told
    cli.run(
        lambda: main(pathlib.Path(_folder.value), _only.value, _seeds.value, _scale.value, _status.value, _table.value)
    )
