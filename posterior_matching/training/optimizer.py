"""Adam with a learning-rate schedule, and schedules of the KL weight beta (paper, appendix on experiments)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from pydantic import Field, PlainValidator

from posterior_matching.config import Config, Count, NonNegative, Positive, Steps, build, call

Schedule = Callable[[jax.Array], jax.Array]  # step -> value


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Adam with decoupled weight decay; `config.optimizer`."""

    learning_rate: NonNegative
    decay_rate: Positive  # learning_rate * decay_rate ** (step / transition_steps)
    transition_steps: Count
    staircase: bool  # decay in jumps: floor(step / transition_steps)
    warmup_steps: Steps  # linear from 0
    weight_decay: NonNegative  # of matrices and convolution kernels only
    clip_norm: Positive | None  # of the global gradient
    eps: Positive

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        decay = optax.exponential_decay(
            self.learning_rate, self.transition_steps, self.decay_rate, staircase=self.staircase
        )
        if not self.warmup_steps:
            return decay
        return lambda step: decay(step) * jnp.minimum(1.0, step / self.warmup_steps)

    def direction(self) -> optax.GradientTransformation:
        """Returns the transformation of gradients into steps, without the factor `-learning_rate`."""
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        decay = optax.add_decayed_weights(self.weight_decay, lambda p: jax.tree.map(lambda a: jnp.ndim(a) >= 2, p))
        return optax.chain(clip, optax.scale_by_adam(eps=self.eps), decay if self.weight_decay else optax.identity())


OptimizerOption = Annotated[OptimizerOptions, PlainValidator(functools.partial(call, OptimizerOptions))]


def constant(value: NonNegative = 1.0) -> Schedule:
    """Always `value`."""
    return lambda step: jnp.full(jnp.shape(step), value)


def monotonic(low: NonNegative, high: NonNegative, transition_begin: Steps, transition_steps: Count) -> Schedule:
    """`low` until `transition_begin`, then linear, reaching `high` after `transition_steps` more steps."""
    return lambda step: low + (high - low) * jnp.clip((step - transition_begin) / transition_steps, 0.0, 1.0)


def cyclic(low: NonNegative, high: NonNegative, period: Annotated[Count, Field(ge=2)], delay: Steps) -> Schedule:
    """0 before `delay`; then cycles of `period` steps: linear from `low` to `high` over `period // 2` steps, then
    `high`."""

    def beta(step: jax.Array) -> jax.Array:
        risen = ((step - delay) % period) / (period // 2)
        return jnp.where(step < delay, 0.0, low + (high - low) * jnp.minimum(risen, 1.0))

    return beta


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": constant, "monotonic": monotonic, "cyclic": cyclic}


def build_schedule(options: Config) -> Schedule:
    """Builds a schedule from options such as `{"name": "cyclic", ...}`; the keys are the arguments of the function.

    Raises:
        OptionError: The name or a key is unknown or missing, or a value is out of range.
    """
    return build(SCHEDULES, options)


ScheduleOption = Annotated[Schedule, PlainValidator(build_schedule)]
