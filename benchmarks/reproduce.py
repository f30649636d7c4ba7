"""Runs every experiment: those of the paper and the built-in ones, each a training and its evaluations.

    python benchmarks/reproduce.py --folder runs/reproduce              # everything that is not done yet
    python benchmarks/reproduce.py --only pm_vqvae_digits --seeds 3     # and the VQ-VAEs it builds on
    python benchmarks/reproduce.py --status                             # what is done, and why the rest is not
    python benchmarks/reproduce.py --table RESULTS.md                   # writes the results into a document

Run directories are `<folder>/<config>_<seed>`. An interrupted command resumes where it stopped. An experiment whose
data cannot be had, or whose base is missing, is skipped with the reason, and the next one runs.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from absl import flags

from benchmarks.synthetic import ROOT
from posterior_matching import cli
from posterior_matching.atomic import write_text
from posterior_matching.errors import UserError, nearest


class Evaluation(NamedTuple):
    """A call of an evaluation script."""

    script: str
    folder: str  # that it writes in the run directory
    metrics: Sequence[str]  # of its `results.json`, that the table shows
    options: Mapping[str, Any]  # its flags


def _uci(*metrics: str, **options: Any) -> Evaluation:
    shown = ("nrmse", "ac_ll_nats", "effective_sample_size_x", "effective_sample_size_xo", *metrics)
    return Evaluation("eval_pm_vae_uci.py", "uci_results", shown, options)


def _inpainting(script: str, **options: Any) -> Evaluation:
    baselines = ("psnr_mean_db", "psnr_knn_db") if options.get("baselines") else ()
    return Evaluation(script, "imputation_results", ("psnr_db", *baselines, "precision", "recall"), options)


def _likelihood(**options: Any) -> Evaluation:
    return Evaluation("eval_pm_vdvae_likelihood.py", "likelihood_results", ("bpd", "ac_ll_nats"), options)


def _acquisition(**options: Any) -> Evaluation:
    metrics = [f"rmse_{policy}_mean" for policy in ("sampling", "lookahead", "random")]
    return Evaluation("eval_greedy_acquisition.py", "trajectories", metrics, options)


class Experiment(NamedTuple):
    """A training by `train_<family>.py` and its evaluations."""

    family: str
    evaluations: Sequence[Evaluation] = ()
    base: str | None = None  # the experiment that it builds on
    metrics: Sequence[str] = ()  # of its last validation, that the table shows


_BASELINES = ("nrmse_mean", "nrmse_knn", "nrmse_iterative")
_ELBO = ("val_elbo_nats", "val_matching_ll_nats")
_VQVAE = Experiment("vqvae", metrics=("val_reconstruction_ll_nats", "val_perplexity"))
_VADE = Experiment("vade", metrics=("val_clustering_accuracy", "val_nmi"))
_VDVAE_SCRIPT, _VQVAE_SCRIPT = "eval_pm_vdvae_imputation.py", "eval_pm_vqvae.py"
_PIXELS = {"embedding": "pixels", "baselines": True, "num_trials": 2, "weighted": True}

# By config, bases before what builds on them.
EXPERIMENTS = {
    f"pm_vae_{name}": Experiment("pm_vae", [_uci()])
    for name in ("power", "gas", "gas_gaussian", "hepmass", "miniboone", "bsds")
}
EXPERIMENTS |= {
    "pm_vae_adult": Experiment(
        "pm_vae", [_uci("accuracy", *_BASELINES, "accuracy_mean", "accuracy_knn", "accuracy_iterative", baselines=True)]
    ),
    "pm_vae_mnist": Experiment("pm_vae", [_uci(num_samples=64, num_trials=2)], metrics=_ELBO),
    "pm_vae_mnist16": Experiment("pm_vae", metrics=_ELBO),
    "lookahead_mnist16": Experiment(
        "lookahead_posterior", [_acquisition(num_steps=21, num_instances=256, batch_size=64)], "pm_vae_mnist16"
    ),
    "vqvae_mnist": _VQVAE,
    "pm_vqvae_mnist": Experiment("pm_vqvae", [_inpainting(_VQVAE_SCRIPT, baselines=True)], "vqvae_mnist"),
    "vqvae_celeb_a": _VQVAE,
    "pm_vqvae_celeb_a": Experiment("pm_vqvae", [_inpainting(_VQVAE_SCRIPT)], "vqvae_celeb_a"),
    "pm_vdvae_mnist": Experiment("pm_vdvae", [_inpainting(_VDVAE_SCRIPT, baselines=True), _likelihood()]),
    "pm_vdvae_celeb_a": Experiment("pm_vdvae", [_inpainting(_VDVAE_SCRIPT)]),
    "vade_mnist": _VADE,
    "pm_vade_mnist": Experiment("pm_vade", base="vade_mnist", metrics=_VADE.metrics),
    "pm_vae_digits": Experiment("pm_vae", [_uci(*_BASELINES, baselines=True)]),
    "pm_vae_whitewine": Experiment("pm_vae", [_uci(*_BASELINES, baselines=True)]),
    "pm_vae_mixture": Experiment("pm_vae", [_uci("ac_ll_exact_nats", *_BASELINES, baselines=True, num_trials=2)]),
    "pm_vae_digits_sparse": Experiment("pm_vae", metrics=_ELBO),
    "lookahead_digits": Experiment(
        "lookahead_posterior", [_acquisition(num_steps=21, num_instances=200)], "pm_vae_digits_sparse"
    ),
    "vqvae_digits": _VQVAE,
    "pm_vqvae_digits": Experiment("pm_vqvae", [_inpainting(_VQVAE_SCRIPT, **_PIXELS, num_samples=100)], "vqvae_digits"),
    "pm_vdvae_digits": Experiment(
        "pm_vdvae", [_inpainting(_VDVAE_SCRIPT, **_PIXELS, num_samples=200), _likelihood(num_samples=200, num_trials=1)]
    ),
    "vade_digits": _VADE,
    "pm_vade_digits": Experiment("pm_vade", base="vade_digits", metrics=_VADE.metrics),
}

# Of ACE (Strauss and Oliva 2021) and DEformer (Alcorn and Nguyen 2021), from the README of rystrauss/deformer, whose
# NRMSE of DEformer counts observed entries too and cannot be compared.
PUBLISHED: dict[str, dict[str, tuple[str, str]]] = {
    "pm_vae_power": {"ac_ll_nats": ("0.631", "0.641"), "nrmse": ("0.828", "")},
    "pm_vae_gas": {"ac_ll_nats": ("9.643", "10.272"), "nrmse": ("0.335", "")},
    "pm_vae_hepmass": {"ac_ll_nats": ("-3.859", "-0.899"), "nrmse": ("0.830", "")},
    "pm_vae_miniboone": {"ac_ll_nats": ("0.310", "1.758"), "nrmse": ("0.432", "")},
    "pm_vae_bsds": {"ac_ll_nats": ("86.701", "87.01"), "nrmse": ("0.525", "")},
    "pm_vae_adult": {"ac_ll_nats": ("2.38", "2.66"), "nrmse": ("0.90", "0.88"), "accuracy": ("0.69", "0.70")},
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

    @property
    def experiment(self) -> Experiment:
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
        train = [f"train_{family}.py", "--config", f"configs/{self.config}.py", f"--config.seed={self.seed}"]
        if self.base is not None:
            train += [f"--config.{EXPERIMENTS[self.base.config].family}_dir={self.base.path}"]
        commands = [[*train, "--run_dir", str(self.path)]]
        for evaluation in self.experiment.evaluations:
            arguments = [
                f"--{key}" if value is True else f"--{key}={value}" for key, value in evaluation.options.items()
            ]
            commands.append([evaluation.script, "--run_dir", str(self.path), *arguments])
        return commands

    def record(self) -> dict[str, Any]:
        """The record, or that of a run which has not begun."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "records" / f"{self.path.name}.json").read_text())
        return {"commit": _commit(), "training_seconds": 0.0, "ended": [], "error": None}

    def remaining(self) -> list[list[str]]:
        """The commands that have not ended, or whose run directory is gone."""
        ended = self.record()["ended"] if (self.path / "config.json").exists() else []
        return [command for command in self.commands() if shlex.join(command) not in ended]

    def status(self) -> str:
        """What is done, or why not."""
        remaining = self.remaining()
        if not remaining:
            return "done"
        trained = len(remaining) < len(self.commands())
        state = "trained, not evaluated" if trained else "interrupted, or running" if self.path.exists() else "not run"
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
        (records := self.folder / "records").mkdir(parents=True, exist_ok=True)
        write_text(records / f"{self.path.name}.json", json.dumps(record, indent=2) + "\n")

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


def main(folder: pathlib.Path, only: Sequence[str], seeds: int, status: bool, document: str | None) -> None:
    """Runs everything that is not done, or only prints the status, or writes the results into a Markdown document."""
    for name in only:
        if name not in EXPERIMENTS:
            raise UserError(f"unknown experiment '{name}': {nearest(name, EXPERIMENTS)}")
    wanted = set(only or EXPERIMENTS)
    names = [name for name in EXPERIMENTS if name in wanted | {EXPERIMENTS[other].base for other in wanted}]
    runs = [Run(name, seed, folder) for name in names for seed in range(seeds)]
    if document is not None:
        _write_table(pathlib.Path(document), table(runs))
        return
    if not status:
        for run in runs:
            run.run()
    print("\n" + "\n".join(f"{run.path.name:24} {run.status()}" for run in runs))
    if not status and any(run.remaining() for run in runs):
        raise UserError("not everything ran, for the reasons above; the same command tries it again")


def table(runs: Sequence[Run]) -> str:
    """The results in Markdown: ours, the mean and its standard error over seeds, and published ones.

    Experiments without either are left out.
    """
    rows = ["| experiment | metric | here | seeds | ACE | DEformer | training, s | commit |", "|---" * 8 + "|"]
    for config in dict.fromkeys(run.config for run in runs):
        seeds, published = [run for run in runs if run.config == config], PUBLISHED.get(config, {})
        measured: dict[str, list[float]] = {}
        for run in seeds:
            for name, value in run.values():
                measured.setdefault(name, []).append(value)
        records = [run.record() for run in seeds if dict(run.values()) or not run.remaining()]
        seconds = " ".join(f"{record['training_seconds']:.0f}" for record in records)
        commits = " ".join(dict.fromkeys(record["commit"] for record in records))
        for name in measured | published:
            values = measured.get(name, [])
            here = _mean_and_error(values) if values else "not run"
            theirs = " | ".join(published.get(name, ("", "")))
            rows.append(f"| `{config}` | `{name}` | {here} | {len(values)} | {theirs} | {seconds} | {commits} |")
    return "\n".join(rows) + "\n"


def _mean_and_error(values: Sequence[float]) -> str:
    if np.ptp(values) <= 1e-9 * abs(values[0]):  # one, or of what does not depend on the seed
        return f"{values[0]:.4g}"
    return f"{np.mean(values):.4g} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2g}"


def _write_table(path: pathlib.Path, text: str) -> None:
    begin, end = "<!-- reproduce.py: begin -->\n", "<!-- reproduce.py: end -->"
    try:
        before, _, after = path.read_text(encoding="utf-8").partition(begin)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if end not in after:
        raise UserError(f"{path} must have the lines '{begin.strip()}' and '{end}', between which the table goes")
    write_text(path, before + begin + text + end + after.partition(end)[2])


def _call(command: Sequence[str]) -> str | None:
    """Runs a script of the repository; returns the last line it wrote to stderr if it fails."""
    arguments = [str(ROOT / argument) if argument.startswith("configs/") else argument for argument in command[1:]]
    last = "no message"
    command = [sys.executable, str(ROOT / command[0]), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() or last
        except BaseException:
            process.terminate()  # the script saves a checkpoint
            raise
    return last.removeprefix("error: ") if process.returncode else None


@functools.cache
def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


if __name__ == "__main__":
    _folder = flags.DEFINE_string("folder", "runs/reproduce", "Folder of the run directories.")
    _only = flags.DEFINE_list("only", [], "Only these experiments, separated by commas, and those they build on.")
    _seeds = flags.DEFINE_integer("seeds", 1, "Number of seeds: 0, 1, ...", lower_bound=1)
    _status = flags.DEFINE_bool("status", False, "Print what is done, and run nothing.")
    _table = flags.DEFINE_string("table", None, "Write the results into this Markdown file, and run nothing.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running script is told
    cli.run(lambda: main(pathlib.Path(_folder.value), _only.value, _seeds.value, _status.value, _table.value))
