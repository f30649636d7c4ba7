"""The training log: progress bar, TensorBoard and `metrics.jsonl`. Only process 0 writes."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from posterior_matching import atomic, models, parallel, runs
from posterior_matching.errors import UserError

_MAX_CONSECUTIVE_SKIPS = 100
_FLUSH_SECONDS = 10.0  # after which TensorBoard sees new events
_COUNTS = ("skipped_updates", "skipped_in_a_row")  # integer metrics


class TrainingLog:
    """The log of one run, starting at the run's step.

    Args:
        run: The run.
        model: The model, for the table of its parameters.
        trainable: The part of its state that is trained.
        steps: The last step.
        batch_size: Per device.
        skip_nonfinite: Whether non-finite updates are skipped and counted; otherwise they are an error.
        unwritten: Metrics of earlier steps that are still to be written, see `unwritten`.
    """

    def __init__(
        self,
        run: runs.Run,
        model: nnx.Module,
        trainable: nnx.State,
        *,
        steps: int,
        batch_size: int,
        skip_nonfinite: bool,
        unwritten: Mapping[str, Sequence[float]],
    ):
        self._run, self._skip_nonfinite = run, skip_nonfinite
        self._unwritten = {
            name: np.array(values, np.int32 if name in _COUNTS else np.float32) for name, values in unwritten.items()
        }
        self._step = run.step  # up to which metrics were collected
        self._pending: list[tuple[int, int, dict[str, jax.Array]]] = []
        self._training: dict[str, float] = {}
        self._writes = jax.process_index() == 0
        self._steps_timed, self._clock = 0, time.perf_counter()
        self._steps, self._validated = steps, 0
        self._metrics = run.path / "metrics.jsonl"
        if not self._writes:
            return
        total, ours = (
            sum(math.prod(a.shape) for a in jax.tree.leaves(s)) for s in (nnx.state(model, nnx.Param), trainable)
        )
        with atomic.writing(run.path):
            atomic.write_text(run.path / "parameters.txt", parameter_overview(model))
        devices = f"{jax.device_count()} {jax.devices()[0].platform} device{'s' if jax.device_count() > 1 else ''}"
        print(f"run directory: {run.path}")
        print(
            f"{devices}, global batch {batch_size * jax.device_count()}; {total:,} parameters, {ours:,} of them trained"
        )
        print(f"training from step {run.step} to {steps}", flush=True)

    def __enter__(self) -> "TrainingLog":
        if self._writes:
            self._events = TensorBoardEvents(self._run)
            self._progress = tqdm(disable=None, total=self._steps, initial=self._run.step, unit="step")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writes:
            self._progress.close()
            self._events.close()

    def forget_after(self, step: int) -> None:
        """Drops the rows of `metrics.jsonl` after `step`, which will be written again, and damaged lines."""
        if self._writes and self._metrics.exists():
            lines = self._metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            atomic.write_text(self._metrics, "".join(line + "\n" for line in lines if _step_of(line) <= step))

    def begin(self, phase: str) -> None:
        """Sets the description of the progress bar, and discards the measurements of the previous phase."""
        self._training = {}
        self.restart_clock()
        if self._writes:
            self._progress.set_description(phase)

    def add(self, step: int, num_steps: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a dispatch, without waiting for them."""
        self._pending.append((step, num_steps, metrics))
        self._steps_timed += num_steps
        if len(self._pending) > 2:  # at most two dispatches ahead of the devices: the bar is exact and Ctrl-C prompt
            jax.block_until_ready(self._pending[-3][2]["loss"])
        if self._writes:
            self._progress.update(num_steps)

    def collect(self) -> None:
        """Waits for the metrics of all steps so far; raises UserError if one was not finite."""
        if not self._pending:
            return
        dispatches = [parallel.unreplicate(metrics) for _, _, metrics in self._pending]
        step = self._pending[-1][0]
        self._pending = []
        series = {name: np.concatenate([metrics[name] for metrics in dispatches]) for name in dispatches[0]}
        self._refuse_nonfinite(step, series)
        for name, values in series.items():
            earlier = self._unwritten.get(name)
            self._unwritten[name] = values if earlier is None else np.concatenate([earlier, values])
        self._step = step

    def unwritten(self) -> dict[str, list[float]]:
        """Returns the metrics collected since the last write, as JSON values, to be saved with a checkpoint."""
        return {name: values.tolist() for name, values in self._unwritten.items()}

    def write_training(self) -> None:
        """Writes the means since the last write; raises UserError if a step was not finite."""
        self.collect()
        series, self._unwritten = self._unwritten, {}
        if not series:
            return
        kept = series["skipped_in_a_row"] == 0
        skipped = float(series.pop("skipped_updates")[-1])
        series.pop("skipped_in_a_row")
        means = {
            name: float(np.mean(v[kept], dtype=np.float64)) if kept.any() else math.nan for name, v in series.items()
        }
        if self._skip_nonfinite:
            means["skipped_updates"] = skipped
        now = time.perf_counter()
        means["steps_per_second"] = self._steps_timed / (now - self._clock)
        self.restart_clock()
        self._training = means
        self._write("train", self._step, means)
        if self._writes:
            self._progress.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """Writes one row of `metrics.jsonl`."""
        if not math.isfinite(values["loss"]):
            raise UserError(f"the validation loss is {values['loss']} at step {step}; {self._last_good()}")
        self._validated = step
        self._write("val", step, values)
        if not self._writes:
            return
        means = {k: v if math.isfinite(v) else None for k, v in self._training.items()}  # JSON has no NaN
        rate = {k: means.pop(k) for k in ("steps_per_second",) if k in means}  # missing where a phase begins
        train, val = ({f"{prefix}_{k}": v for k, v in d.items()} for prefix, d in (("train", means), ("val", values)))
        with atomic.writing(self._run.path), open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | train | val | rate) + "\n")
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.write(f"step {step}: validation {terms}", file=sys.stderr)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Writes images `[H, W, C]` in [0, 1]."""
        for name, image in images.items():
            self._events.add_image(name, image, step)

    def restart_clock(self) -> None:
        """Restarts the timing of steps, so that validation and saving do not count."""
        self._steps_timed, self._clock = 0, time.perf_counter()

    def _write(self, prefix: str, step: int, values: dict[str, float]) -> None:
        if self._writes:
            for name, value in values.items():
                if math.isfinite(value):  # NaN if every update since the last write was skipped
                    self._events.add_scalar(f"{prefix}/{name}", value, step)

    def _refuse_nonfinite(self, step: int, series: dict[str, np.ndarray]) -> None:
        in_a_row = series["skipped_in_a_row"]
        if not in_a_row.any():
            return
        if not self._skip_nonfinite:
            bad = int(np.argmax(in_a_row > 0))
            names = [n for n, v in series.items() if not np.isfinite(v[bad])]
            at = step - len(in_a_row) + bad + 1
            raise UserError(f"{', '.join(names)} not finite at step {at}; {self._last_good()}")
        if in_a_row.max() >= _MAX_CONSECUTIVE_SKIPS:
            count = int(in_a_row.max())
            raise UserError(f"{count} updates in a row not finite and skipped, up to step {step}; {self._last_good()}")

    def _last_good(self) -> str:
        # Without validation, only the loss before the last update of a checkpoint's weights is known to be finite.
        validated = (self._run.path / "checkpoints" / "latest" / str(self._validated)).exists() * self._validated
        good = max(runs.latest_step(self._run.path, "best"), validated)
        saved = "no saved checkpoint was validated" if self._run.step else "no checkpoint was saved"
        saved = f"the last good checkpoint is step {good}" if good else saved
        return f"{saved} in {self._run.path}; try a lower config.optimizer.learning_rate or config.optimizer.clip_norm"


class TensorBoardEvents:
    """The TensorBoard events of a run, on disk within seconds.

    tensorboardX's `SummaryWriter` leaves writing to a thread, and waits for it without end if it fails.
    """

    def __init__(self, run: runs.Run):
        from tensorboardX import event_file_writer

        with atomic.writing(run.path):
            (run.path / "tb").mkdir(exist_ok=True)
            self._file = event_file_writer.EventsWriter(str(run.path / "tb" / "events"))
        self._flushed = -math.inf
        if run.step:  # TensorBoard then forgets what it has of later steps
            from tensorboardX.proto.event_pb2 import SessionLog

            self._write(run.step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point of a curve."""
        from tensorboardX import summary

        self._write(step, summary=summary.scalar(name, value))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds an image `[H, W, C]` in [0, 1]."""
        from tensorboardX import summary

        self._write(step, summary=summary.image(name, np.asarray(image), dataformats="HWC"))

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto import event_pb2

        self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


def parameter_overview(model: nnx.Module) -> str:
    """Returns a table of the parameters: name, shape, size, mean, standard deviation."""
    from clu import parameter_overview as overview

    weights = models.flat_weights(model, nnx.Param)
    return overview.get_parameter_overview(weights, include_stats=True) + "\n"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line truncated by a kill, or damaged
        return float("inf")
