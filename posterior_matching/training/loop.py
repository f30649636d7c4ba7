"""The training loop, from a run's latest checkpoint, or the start, to its last step."""

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posterior_matching import data, models, parallel, runs
from posterior_matching.config import naming
from posterior_matching.errors import UserError
from posterior_matching.numerics import on_cpu
from posterior_matching.training.batching import Arrays, TrainingFeed, ValidationChunks
from posterior_matching.training.experiment import Experiment, TrainingOptions
from posterior_matching.training.log import TrainingLog
from posterior_matching.training.step import CompiledPhase

_MAX_STEPS_PER_DISPATCH = 1000


class InterruptedRunError(UserError):
    """Training was interrupted, after saving."""


def fit(experiment: Experiment, run: runs.Run) -> nnx.Module:
    """Trains from the run's latest checkpoint, or the start, and returns the model with its evaluation weights.

    Args:
        experiment: What to train.
        run: Where checkpoints, metrics and TensorBoard events go.

    Raises:
        UserError: The loss is not finite, too many consecutive updates were skipped, or Ctrl-C or SIGTERM was received.
    """
    options, trainer = experiment.options, Trainer(experiment, run)
    first_step = trainer.step
    with run.finished_saving(), trainer.log as log, _interruptible() as signalled:
        while trainer.step < options.steps and not trainer.has_converged():
            if trainer.phase_is_over():
                trainer.begin_next_phase()
            trainer.run_dispatch()
            step, phase_is_over = trainer.step, trainer.phase_is_over()
            # At the end of a phase, the initial model of the next phase is validated instead.
            validates = (step % options.validation_every == 0 or step == options.steps) and not phase_is_over
            saves = phase_is_over or (options.checkpoint_every is not None and step % options.checkpoint_every == 0)
            # All processes must stop at the same step, so they ask each other, though not at every step.
            asks = jax.process_count() == 1 or step % options.log_every == 0
            interrupted = asks and parallel.any_process(signalled())
            if step % options.log_every == 0 or validates or saves:
                log.write_training()  # stops at a non-finite step, before anything is saved
            elif interrupted:
                log.collect()  # likewise; the collected metrics are saved, and logged on resuming
            if validates:
                trainer.validate_and_save()
            elif saves or interrupted:
                trainer.save(best=False)
            if interrupted and step < options.steps and not trainer.has_converged():
                raise InterruptedRunError(f"interrupted: saved at step {step}; resume with --run_dir={run.path}")
    if jax.process_index() == 0:
        done = "nothing to do" if first_step >= trainer.step else "done"
        print(f"{done}: step {trainer.step} of {options.steps}; run directory: {run.path}")
    return trainer.evaluation_model()


class Trainer:
    """A run in memory: its current phase, the phase's state on the devices, and the log."""

    def __init__(self, experiment: Experiment, run: runs.Run):
        options, batch_size = experiment.options, experiment.options.batch_size
        assert batch_size is not None, "the family settles it"
        self._experiment, self._options, self._run = experiment, options, run
        ends = [*itertools.accumulate(phase.steps or 0 for phase in experiment.phases[:-1]), options.steps]
        self._phases = [
            CompiledPhase(experiment, phase, first, last)
            for phase, first, last in zip(experiment.phases, [0, *ends], ends, strict=False)
        ]
        self._index = self._phase_at(run.step)
        with naming("config"):
            self._feed = TrainingFeed(
                _arrays(experiment.train_set), batch_size, options.seed, options.data_memory_budget_gb
            )
        self._chunks = ValidationChunks(_arrays(experiment.validation_set), batch_size, options.data_memory_budget_gb)
        state, self._constants = self._phase.initial_state()
        run.create()  # all input has been checked by now
        self._best_loss, self._stalled, unwritten = math.inf, 0, {}
        if run.step:
            saved, record = run.restore(self._saved_structure)
            state, self._best_loss = saved["state"], float(saved["best_loss"])
            self._stalled, unwritten = record["stalled_validations"], record["log"]
        self.step = run.step
        model, trainable = experiment.phases[-1].model, experiment.phases[-1].trainable
        self.log = TrainingLog(
            run,
            model,
            nnx.state(model, trainable),
            steps=options.steps,
            batch_size=batch_size,
            skip_nonfinite=options.skip_nonfinite_updates,
            unwritten=unwritten,
        )
        self.log.forget_after(self.step - 1 if self.phase_is_over() else self.step)
        self._state, self._constants_everywhere = parallel.replicate((state, self._constants))

    @property
    def _phase(self) -> CompiledPhase:
        return self._phases[self._index]

    @property
    def _in_last_phase(self) -> bool:
        return self._phase is self._phases[-1]

    def _phase_at(self, step: int) -> int:
        """Index of the phase whose state a checkpoint at `step` holds; at a boundary, the phase that ends there."""
        return next((i for i, phase in enumerate(self._phases) if step <= phase.last_step), len(self._phases) - 1)

    def _saved_structure(self, step: int) -> dict[str, Any]:
        self._index = self._phase_at(step)
        state, self._constants = self._phase.initial_state()
        return {"state": state, "best_loss": np.float64(math.inf)}

    def phase_is_over(self) -> bool:
        """Whether the next step belongs to another phase."""
        return not self._in_last_phase and self.step == self._phase.last_step

    def has_converged(self) -> bool:
        """Whether the validation loss has not fallen for `config.patience` validations."""
        return self._options.patience is not None and self._stalled >= self._options.patience

    def begin_next_phase(self) -> None:
        """Builds the next phase's initial model from the one this phase trained, and validates it."""
        self.log.begin("preparing the next phase")
        begin = self._experiment.phases[self._index + 1].begin
        model, numbers = begin(self.evaluation_model()) if begin else (self.evaluation_model(), {})
        self._index += 1
        state, self._constants = self._phase.initial_state(model)
        self._state, self._constants_everywhere = parallel.replicate((state, self._constants))
        self.log.write_validation(self.step, self._validate() | numbers)
        self.log.begin("training")

    def run_dispatch(self) -> None:
        """Runs one compiled call: one step or several."""
        num_steps = next_dispatch(self.step, self._options, self._phase.last_step)
        following = next_dispatch(self.step + num_steps, self._options, self._phase.last_step)
        arrays, indices = self._feed.get(self.step, num_steps, following)
        self._state, metrics = self._phase.train(self._state, self._constants_everywhere, arrays, indices)
        self.step += num_steps
        self.log.add(self.step, num_steps, metrics)

    def validate_and_save(self) -> None:
        """Validates, logs, saves a checkpoint, which may become the best one, and draws pictures."""
        values = self._validate()
        self.log.write_validation(self.step, values)
        best = self._in_last_phase and values["loss"] < self._best_loss
        if best:
            self._best_loss = values["loss"]
        self._stalled = self._stalled + 1 if self._in_last_phase and not best else 0
        self.save(best)
        if self._experiment.pictures and self._in_last_phase and jax.process_index() == 0:
            self.log.write_images(self.step, self._experiment.pictures(self.evaluation_model()))
        self.log.restart_clock()

    def save(self, best: bool) -> None:
        """Saves a checkpoint."""
        # Before the last phase there is no usable model.
        weights = models.flat_weights(self.evaluation_model()) if self._in_last_phase else None
        model = jax.tree.map(np.asarray, weights)
        train = {"state": parallel.unreplicate(self._state), "best_loss": np.float64(self._best_loss)}
        record = {"log": self.log.unwritten(), "stalled_validations": self._stalled}
        self._run.save(self.step, model, train, record, best)
        self.log.restart_clock()

    def evaluation_model(self) -> nnx.Module:
        """Returns the model with the weights that validation uses."""
        weights, mutable = jax.tree.map(jnp.asarray, parallel.unreplicate((self._weights, self._state.mutable)))
        return nnx.merge(self._phase.graphdef, weights, self._constants.frozen, mutable)

    @property
    def _weights(self) -> nnx.State:
        return self._state.trainable if self._state.ema is None else self._state.ema

    def _validate(self) -> dict[str, float]:
        return self._phase.validate(self._weights, self._state.mutable, self._constants_everywhere, self._chunks)


def max_steps_per_dispatch(options: TrainingOptions) -> int:
    """The number of steps in one compiled call: one on CPUs, else a divisor of all intervals."""
    if on_cpu():
        return 1
    intervals = math.gcd(options.log_every, options.validation_every, options.checkpoint_every or 0)
    return max(d for d in range(1, min(intervals, _MAX_STEPS_PER_DISPATCH) + 1) if intervals % d == 0)


def next_dispatch(step: int, options: TrainingOptions, last_step: int) -> int:
    """The number of steps in the compiled call that begins at `step`; fewer after an interruption or before the end."""
    usual = max_steps_per_dispatch(options)
    return max(0, min(usual - step % usual, last_step - step))


def _arrays(dataset: data.Dataset) -> Arrays:
    return {"x": dataset.x} | ({} if dataset.label is None else {"label": dataset.label})


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and Ctrl-C into a flag that the loop checks between dispatches; a second Ctrl-C kills."""
    if threading.current_thread() is not threading.main_thread():  # only the main one receives signals
        yield lambda: False
        return
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in previous:
            signal.signal(number, receive)
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
