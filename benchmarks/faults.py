"""Tries to break runs in many ways, and counts how often what should hold held.

    python benchmarks/faults.py [--only kills,files,disks,processes] [--tries 10] [--seed 0]

kills      a training process gets SIGKILL, SIGTERM or SIGINT at a random moment, and the command is given again until
           it finishes: weights and metrics equal those of an undisturbed run bit for bit
files      a file of a run is cut, emptied, overwritten, replaced by a folder or deleted, or one of its bits flips: the
           run loads with the same weights or is refused; and it resumes, ending as if nothing had happened, or is
           refused
disks      the disk of the run directory is full or read-only (as root, on Linux): training is refused
processes  one of two processes is killed: the other ends with one line, and the run goes on as if nothing had happened

"Refused" means one line that is no stack trace, and exit status 1; JAX aborts a process that has lost another, which
gives another status. The tests have short forms: test_end_to_end.py, test_runs.py.
"""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from absl import flags

import train_pm_vae
from benchmarks.synthetic import ROOT
from configs import pm_vae_mixture
from posterior_matching import cli, models, runs
from posterior_matching.config import plain
from posterior_matching.errors import UserError, nearest

Outcome = tuple[str, str | None]  # what was tried, and what did not hold; None: it held
COMMON = {"steps": 60, "validation_every": 20, "log_every": 10, "checkpoint_every": 7, "train_split": "test"}
COMMON |= {"batch_size": 16}
TRAININGS: dict[str, dict[str, Any]] = {  # short ones, by config
    "pm_vae_mixture": COMMON | {"ema_decay": 0.9},
    "vade_digits": COMMON | {"pretraining.steps": 25, "pretraining.mixture_inits": 1},
    "vqvae_digits": COMMON,
}


def main(only: list[str], tries: int, seed: int) -> None:
    """Tries everything and prints a table."""
    for name in only:
        if name not in FAULTS:
            raise UserError(f"--only: unknown '{name}': {nearest(name, FAULTS)}")
    broken = []
    print(f"{'':10} {'tried':>6} {'held':>6} {'seconds':>8}")
    for name in only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="faults_") as folder:
            outcomes = list(FAULTS[name](pathlib.Path(folder), tries, random.Random(seed)))
        problems = [f"{what}: {problem}" for what, problem in outcomes if problem]
        seconds = time.perf_counter() - start
        print(f"{name:10} {len(outcomes):6} {len(outcomes) - len(problems):6} {seconds:8.0f}", flush=True)
        broken += problems
    if broken:
        print("\n" + "\n".join(broken))
        raise UserError(f"{len(broken)} did not hold")


def small_config(**changes: Any) -> dict[str, Any]:
    """A PM-VAE that compiles within seconds."""
    config = pm_vae_mixture.get_config()
    for network in (config.model.encoder, config.model.decoder, config.model.partial_encoder):
        network.update(residual_blocks=0, hidden_units=8)
    config.model.latent_dim = 2
    config.model.partial_posterior.update(residual_blocks=0, hidden_units=8, num_components=2)
    config.update(steps=12, validation_every=6, log_every=3, checkpoint_every=4, batch_size=8, train_split="test")
    config.ema_decay = 0.9
    return plain(config) | changes


def difference(ours: pathlib.Path, theirs: pathlib.Path, rows: bool = True) -> str | None:
    """Says how two runs differ; None if the latest weights, and the rows of metrics, are equal bit for bit."""

    def weights(run_dir: pathlib.Path) -> dict[str, bytes]:
        state = models.flat_weights(runs.load_model(run_dir, checkpoint="latest"))
        return {name: np.asarray(value).tobytes() for name, value in state.items()}

    def metrics(run_dir: pathlib.Path) -> list[dict[str, float]]:
        logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in logged]

    if weights(ours) != weights(theirs):
        return "other weights"
    return "other metrics" if rows and metrics(ours) != metrics(theirs) else None


def held(attempt: Callable[[], str | None]) -> str | None:
    """Returns what did not hold; being refused with one line holds, too."""
    try:
        return attempt()
    except UserError as error:
        message = str(error)
        return None if message.strip() and "\n" not in message else f"not one line: {message[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ends(process: subprocess.Popen[str]) -> str | None:
    """Waits for a process that should succeed; returns the end of what it wrote to stderr if it does not."""
    _, err = process.communicate(timeout=600)
    return f"status {process.returncode}: {err[-300:]}" if process.returncode else None


def is_refused(process: subprocess.Popen[str], any_status: bool = False) -> str | None:
    """Waits for a process that has to end with one line and status 1, or any but 0; returns what did not hold."""
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hangs"
    lines = [line for line in err.splitlines() if line.strip() and "[Gloo]" not in line and line[:5] != "step "]
    if process.returncode == 0 or (process.returncode != 1 and not any_status):
        return f"status {process.returncode}: {lines[-1:]}"
    return None if len(lines) == 1 and lines[0].startswith("error: ") else f"not one line: {lines[-3:]}"


def kills(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Kills trainings of three families at random moments."""
    for config, changes in TRAININGS.items():
        options = [f"--config.{key}={value}" for key, value in changes.items()]
        train = functools.partial(
            start, f"train_{config.rpartition('_')[0]}", f"--config={ROOT / 'configs' / config}.py", *options
        )
        begin, undisturbed = time.perf_counter(), folder / f"{config} undisturbed"
        if problem := ends(train(f"--run_dir={undisturbed}")):
            yield f"{config} undisturbed", problem
            continue
        whole = time.perf_counter() - begin
        for i in range(tries):
            number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            seconds, run_dir = rng.uniform(0, whole), folder / f"{config} {i}"
            process = train(f"--run_dir={run_dir}")
            time.sleep(seconds)
            process.send_signal(number)
            process.communicate()
            for _ in range(3):
                if (problem := ends(train(f"--run_dir={run_dir}"))) is None:
                    break
            yield f"{config} {number.name} after {seconds:.2f} s", problem or difference(run_dir, undisturbed)


def _become_a_folder(file: pathlib.Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _flip_a_bit(file: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[pathlib.Path, random.Random], object]] = {
    "cut": lambda file, _: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file, _: file.write_bytes(b""),
    "noise": lambda file, rng: file.write_bytes(rng.randbytes(max(file.stat().st_size, 64))),
    "a folder": _become_a_folder,
    "deleted": lambda file, _: file.unlink(),
    "a flipped bit": _flip_a_bit,
}


def files(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Damages every file of a run; `tries` of all cases are resumed, too, which takes longer."""
    run_dir = pathlib.Path(train_pm_vae.train(small_config(), str(folder / "run")))
    whole = pathlib.Path(train_pm_vae.train(small_config(steps=18), str(folder / "whole")))
    names = [path.relative_to(run_dir) for path in sorted(run_dir.rglob("*")) if path.is_file()]
    names = [name for name in names if name.name != ".lock" and "tb" not in name.parts]
    cases = [(name, damage) for name in names for damage in [*DAMAGES, *["a flipped bit"] * (tries - 1)]]
    resumed = set(rng.sample(range(len(cases)), min(tries, len(cases))))
    copy = folder / "damaged"

    def load() -> str | None:
        return difference(copy, run_dir, rows=False) if runs.latest_step(copy) == 12 else "older"

    def resume(rows: bool) -> str | None:
        train_pm_vae.train(small_config(steps=18), str(copy))
        return difference(copy, whole, rows)

    for number, (name, damage) in enumerate(cases):
        shutil.copytree(run_dir, copy)
        DAMAGES[damage](copy / name, rng)
        yield f"{name} {damage}, loaded", held(load)
        if number in resumed:
            rows = name.name != "metrics.jsonl"  # rows that are lost stay lost
            yield f"{name} {damage}, resumed", held(functools.partial(resume, rows))
        shutil.rmtree(copy)


def disks(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Trains on disks that cannot be written."""
    del tries, rng
    if os.geteuid() or not shutil.which("mount"):
        return
    whole = pathlib.Path(train_pm_vae.train(small_config(), str(folder / "run")))
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({small_config()!r})\n"
    (config := folder / "config.py").write_text(text)
    for name, size in (("read-only", "ro"), ("full", "size=64k"), ("almost full", "size=150k")):
        (place := folder / name).mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True).returncode:
            continue
        arguments = f"--config={config}", f"--run_dir={place / 'run'}"
        try:
            yield f"{name} disk", is_refused(start("train_pm_vae", *arguments))
            if size != "ro":
                subprocess.run(["mount", "-o", "remount,size=100M", str(place)], check=True)
                problem = ends(start("train_pm_vae", *arguments))
                yield f"{name} disk, with space again", problem or difference(place / "run", whole)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)


def processes(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Kills one of two processes."""
    config = f"--config={ROOT / 'configs' / 'pm_vae_mixture.py'}"
    changes = {"train_split": "test", "batch_size": 8, "validation_every": 20, "log_every": 5}
    common = [config, "--num_processes=2", *(f"--config.{key}={value}" for key, value in changes.items())]

    def both(name: str, steps: int = 100_000) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
        arguments = [*common, address, f"--run_dir={folder / name}", f"--config.steps={steps}"]
        return [start("train_pm_vae", *arguments, f"--process_id={i}") for i in range(2)]

    for i in range(max(1, tries // 3)):
        killed, run_dir, end = rng.randrange(2), folder / f"kill {i}", time.monotonic() + 120
        pair = both(run_dir.name)
        while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        pair[killed].kill()
        pair[killed].communicate()
        yield f"process {killed} killed: the other", is_refused(pair[1 - killed], any_status=True)
        steps, undisturbed = runs.latest_step(run_dir) + 20, folder / f"undisturbed {i}"
        problems = [ends(process) for path in (run_dir, undisturbed) for process in both(path.name, steps=steps)]
        yield f"process {killed} killed: resumed", next(filter(None, problems), difference(run_dir, undisturbed))


FAULTS = {"kills": kills, "files": files, "disks": disks, "processes": processes}

if __name__ == "__main__":
    _only = flags.DEFINE_list("only", list(FAULTS), "Try only these, separated by commas.")
    _tries = flags.DEFINE_integer("tries", 10, "How often to try what is random, in each place.", lower_bound=1)
    _seed = flags.DEFINE_integer("seed", 0, "Seed of all random choices.")
    cli.run(lambda: main(_only.value, _tries.value, _seed.value))
