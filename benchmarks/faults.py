"""Tries to break runs in many ways, and counts how often what should hold held.

    python benchmarks/faults.py [--only kills,flips,files,options,disks,processes] [--tries 10] [--seed 0]

kills      a training process gets SIGKILL, SIGTERM or SIGINT at a random moment, and the command is given again until
           it finishes: weights and metrics equal those of an undisturbed run bit for bit
flips      one bit of a checkpoint is flipped: the run loads with the same weights, or is refused
files      a file of a run is cut, emptied, overwritten, replaced by a folder or deleted: the run loads with the same
           weights or is refused; and it resumes, ending as if nothing had happened, or is refused
options    every key of a small config with every bad value: it is refused, or it is a valid value
disks      the run directory cannot be made or written (a full disk is tried by root only): it is refused
processes  two processes differ, or one ends or is killed: each ends with one line, and the run goes on as if nothing
           had happened

"Refused" means one line that is no stack trace, and exit status 1; JAX aborts a process that has lost another, which
gives another status. `tests/test_faults.py` names the short forms.
"""

import contextlib
import json
import math
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
from configs import pm_vae_mixture
from posterior_matching import cli, models, runs
from posterior_matching.config import plain
from posterior_matching.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]

_ONLY = flags.DEFINE_list("only", None, "Try only these, separated by commas; by default all.")
_TRIES = flags.DEFINE_integer("tries", 10, "How often to try what is random, in each place.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all random choices.")

Outcome = tuple[str, str | None]  # what was tried, and what did not hold; None: it held
# Trainings to kill: script, config, changes that make it short.
COMMON: dict[str, Any] = {
    "steps": 60,
    "validation_every": 20,
    "log_every": 10,
    "checkpoint_every": 7,
    "train_split": "test",
}
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "pm_vae": ("pm_vae_mixture", {"batch_size": 16, "ema_decay": 0.9}),
    "vade": ("vade_digits", {"batch_size": 16, "pretraining.steps": 25, "pretraining.mixture_inits": 1}),
    "vqvae": ("vqvae_digits", {"batch_size": 16}),
}
BAD_VALUES: list[Any] = [None, True, "text", (), {}, {"a": 1}, 0, -1, -0.5, math.nan, math.inf, 1.5, 10**12, 1e300]


def main() -> None:
    """Tries everything and prints a table."""
    chosen = _ONLY.value or list(FAULTS)
    if unknown := set(chosen) - set(FAULTS):
        raise UserError(f"unknown --only={','.join(sorted(unknown))}: choose from {', '.join(FAULTS)}")
    table = [(name, run(name, _TRIES.value, _SEED.value)) for name in chosen]
    print(f"\n{'':10} {'tried':>6} {'held':>6} {'seconds':>8}")
    for name, (outcomes, seconds) in table:
        held = sum(problem is None for _, problem in outcomes)
        print(f"{name:10} {len(outcomes):6} {held:6} {seconds:8.0f}")
    if broken := [f"{what}: {problem}" for _, (outcomes, _) in table for what, problem in outcomes if problem]:
        print("\n" + "\n".join(broken))
        raise UserError(f"{len(broken)} did not hold")


def run(name: str, tries: int, seed: int) -> tuple[list[Outcome], float]:
    """Tries one kind of fault; returns what was tried and how long it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        outcomes = list(FAULTS[name](pathlib.Path(folder), tries, random.Random(seed)))
    return outcomes, time.perf_counter() - start


# Runs ----------------------------------------------------------------------------------------------------------------


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


def weights(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the latest checkpoint's model."""
    model = runs.load_model(run_dir, checkpoint="latest")
    return {name: np.asarray(value) for name, value in models.flat_weights(model).items()}


def metrics(run_dir: pathlib.Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without what the clock says."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in found]


def difference(found: pathlib.Path, expected: pathlib.Path, rows: bool = True) -> str | None:
    """Says how two runs differ; None if weights and metrics are equal bit for bit."""
    ours, theirs = weights(found), weights(expected)
    if ours.keys() != theirs.keys() or any(ours[k].tobytes() != theirs[k].tobytes() for k in ours):
        return "other weights"
    return "other metrics" if rows and metrics(found) != metrics(expected) else None


def held(attempt: Callable[[], Any]) -> str | None:
    """Calls `attempt`, which may return what did not hold; being refused with one line holds, too."""
    try:
        problem = attempt()
        return problem if isinstance(problem, str) else None
    except UserError as error:
        message = str(error)
        return None if message.strip() and "\n" not in message else f"not one line: {message[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"


def command(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script."""
    line = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def refused(process: subprocess.Popen[str], *, status: int | None = 1) -> str | None:
    """Waits for a process that has to end with one line and this status, or any but 0; says what did not hold."""
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hangs"
    lines = [line for line in err.splitlines() if line.strip() and "[Gloo]" not in line and line[:5] != "step "]
    if process.returncode == 0 or (status is not None and process.returncode != status):
        return f"status {process.returncode}: {lines[-1:]}"
    return None if len(lines) == 1 and lines[0].startswith("error: ") else f"not one line: {lines[-3:]}"


# Faults --------------------------------------------------------------------------------------------------------------


def kills(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Kills trainings of three families at random moments."""
    for family, (config, changes) in TRAININGS.items():
        options = [f"--config.{key}={value}" for key, value in (COMMON | changes).items()]
        arguments = [f"--config={ROOT / 'configs' / config}.py", *options]

        def start(
            name: str, family: str = family, arguments: list[str] = arguments
        ) -> tuple[pathlib.Path, subprocess.Popen[str]]:
            path = folder / f"{family} {name}"
            return path, command(f"train_{family}", *arguments, f"--run_dir={path}")

        begin = time.perf_counter()
        undisturbed, process = start("undisturbed")
        _, err = process.communicate(timeout=600)
        if process.returncode:
            yield f"{family} undisturbed", err[-300:]
            continue
        whole = time.perf_counter() - begin
        for i in range(tries):
            number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            seconds = rng.uniform(0, whole)
            what = f"{family} {number.name} after {seconds:.2f} s"
            path, process = start(str(i))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=seconds)
            process.send_signal(number)
            process.communicate()
            for _ in range(3):
                path, process = start(str(i))
                _, err = process.communicate(timeout=600)
                if (status := process.returncode) == 0:
                    break
            yield what, f"does not resume: {err[-300:]}" if status else difference(path, undisturbed)


def finished(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A finished run."""
    return pathlib.Path(train_pm_vae.train(small_config(**changes), str(folder / f"finished {changes}")))


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """All files under a folder, in order."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def flips(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Flips bits of the latest checkpoint's model."""
    run_dir = finished(folder)
    before = {name: array.tobytes() for name, array in weights(run_dir).items()}
    for file in files_of(run_dir / "checkpoints" / "latest" / "12"):
        content = file.read_bytes()
        for position in sorted(rng.randrange(len(content)) for _ in range(min(tries, len(content)))):
            changed = bytearray(content)
            changed[position] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)

            def same() -> str | None:
                return None if {k: a.tobytes() for k, a in weights(run_dir).items()} == before else "other weights"

            yield f"bit of byte {position} of {file.relative_to(run_dir)}", held(same)
        file.write_bytes(content)


def cut(file: pathlib.Path) -> None:
    """Leaves the first half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def become_a_folder(file: pathlib.Path) -> None:
    """Replaces the file by a folder."""
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[pathlib.Path], object]] = {
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(random.Random(0).randbytes(max(file.stat().st_size, 64))),
    "a number": lambda file: file.write_text("3\n"),
    "a folder": become_a_folder,
    "deleted": lambda file: file.unlink(),
}


def files(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Damages every file of a run; `tries` of all cases are resumed, too, which takes longer."""
    run_dir, whole = finished(folder), finished(folder, steps=18)
    cases = [
        (file.relative_to(run_dir), name)
        for file in files_of(run_dir)
        for name in DAMAGES
        if file.name != ".lock" and "tb" not in file.parts
    ]
    resumed = set(rng.sample(cases, min(tries, len(cases))))
    copy = folder / "damaged"
    for file, name in cases:
        shutil.copytree(run_dir, copy)
        DAMAGES[name](copy / file)
        yield (
            f"{file} {name}, loaded",
            held(lambda: difference(copy, run_dir, rows=False) if runs.latest_step(copy) == 12 else "older"),
        )
        if (file, name) in resumed:
            rows = file.name != "metrics.jsonl"  # rows that are lost stay lost

            def resume(rows: bool = rows) -> str | None:
                train_pm_vae.train(small_config(steps=18), str(copy))
                return difference(copy, whole, rows)

            yield f"{file} {name}, resumed", held(resume)
        shutil.rmtree(copy)


def keys_of(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all values."""
    for key, value in config.items():
        yield from keys_of(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]


def options(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Gives every key bad values, and every key of a run's config.json."""
    del rng
    run_dir, count = finished(folder), 0
    description = json.loads((run_dir / "config.json").read_text())
    for path in keys_of(small_config()):
        for value in BAD_VALUES:
            config = small_config()
            group = config
            for key in path[:-1]:
                group = group[key]
            group[path[-1]] = value
            target, count = folder / f"run {count}", count + 1

            def parse(config: dict[str, Any] = config, target: pathlib.Path = target) -> str | None:
                train_pm_vae.FAMILY.parse(config)
                return "something was written" if target.exists() else None

            yield f"config.{'.'.join(path)} = {value!r}", held(parse)
            if path[0] == "model" and count % max(1, 20 // tries) == 0:
                edited = json.dumps(description | {"config": config}, default=str)
                (run_dir / "config.json").write_text(edited)
                yield f"config.json: {'.'.join(path)} = {value!r}", held(lambda: runs.load_model(run_dir))


def disks(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Trains into directories that cannot be."""
    del tries, rng
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nowhere" / "at all")
    (folder / "loop").symlink_to(folder / "loop")
    places = {
        "below a file": folder / "file" / "run",
        "a file": folder / "file",
        "a dangling link": folder / "dangling",
        "a link to itself": folder / "loop",
        "an over-long name": folder / ("n" * 300),
        "an over-long path": folder.joinpath(*["n" * 200] * 25),
        "a null character": f"{folder}/a\0b",
        "in /proc": pathlib.Path("/proc/run"),
        "in /dev/full": pathlib.Path("/dev/full/run"),
    }
    for name, place in places.items():

        def trains(place: Any = place) -> str | None:
            train_pm_vae.train(small_config(), str(place))
            return "it trained"

        yield name, held(trains)
    if (folder / "file").read_text() != "mine":
        yield "a file of the user's", "overwritten"
    if os.geteuid() == 0 and shutil.which("mount"):
        whole = finished(folder)
        for name, size in (("read-only", "ro"), ("full", "size=64k"), ("almost full", "size=150k")):
            yield from _on_a_small_disk(folder / name, size, whole)


def _on_a_small_disk(place: pathlib.Path, size: str, whole: pathlib.Path) -> Iterator[Outcome]:
    place.mkdir()
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({small_config()!r})\n"
    (config := place.with_suffix(".py")).write_text(text)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True).returncode:
        return

    def train() -> subprocess.Popen[str]:
        return command("train_pm_vae", f"--config={config}", f"--run_dir={place / 'run'}")

    try:
        yield f"{place.name} disk", refused(train())
        if size != "ro":
            subprocess.run(["mount", "-o", "remount,size=100M", str(place)], check=True)
            train().communicate()
            yield f"{place.name} disk, with space again", held(lambda: difference(place / "run", whole))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def processes(folder: pathlib.Path, tries: int, rng: random.Random) -> Iterator[Outcome]:
    """Starts two processes that differ, or kills one of two."""
    common = [f"--config={ROOT / 'configs' / 'pm_vae_mixture.py'}", "--config.train_split=test"]
    common += ["--config.batch_size=8", "--config.validation_every=20", "--config.log_every=5"]

    def both(name: str, *own: list[str], steps: int = 100_000) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = [f"--run_dir={folder / name}", "--num_processes=2", f"--coordinator_address=localhost:{port}"]
        several += [*common, f"--config.steps={steps}"]
        return [command("train_pm_vae", *several, f"--process_id={i}", *own[i]) for i in range(2)]

    changes = {
        "steps": "--config.steps=50",
        "seed": "--config.seed=5",
        "an unknown key": "--config.stepz=5",
        "an unknown flag": "--confug=5",
        "an unknown dataset": "--config.dataset=nowhere.csv",
        "a value out of range": "--config.model.latent_dim=0",
    }
    for name, change in changes.items():
        for process, who in zip(both(name, [], [change]), ("the other", "the one with it"), strict=True):
            yield f"{name} in one process: {who}", refused(process)
    for i in range(max(1, tries // 3)):
        killed, name = rng.randrange(2), f"kill {i}"
        pair = both(name, [], [])
        end = time.monotonic() + 120
        while not (folder / name / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        pair[killed].kill()
        pair[killed].communicate()
        yield f"process {killed} killed: the other", refused(pair[1 - killed], status=None)
        step = runs.latest_step(folder / name)
        problem = None
        for run_name in (name, f"{name} undisturbed"):
            for process in both(run_name, [], [], steps=step + 20):
                _, err = process.communicate(timeout=300)
                problem = problem or (process.returncode and f"{run_name}: {err[-300:]}")
        yield f"process {killed} killed: resumed", problem or difference(folder / name, folder / f"{name} undisturbed")


FAULTS = {
    "kills": kills,
    "flips": flips,
    "files": files,
    "options": options,
    "disks": disks,
    "processes": processes,
}

if __name__ == "__main__":
    cli.run(main)
