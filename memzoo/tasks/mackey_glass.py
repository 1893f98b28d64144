"""Prediction of the chaotic Mackey-Glass series."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memzoo.tasks import delay, sampling, task as task_lib
from memzoo.tasks.generator import Generator

_SUBSTEPS = 10  # Euler steps per unit of time
_WASHOUT = 100
# Mean of tanh(x - 1) over the series, which the reference takes off.
_MEAN = -0.066


@dataclasses.dataclass(frozen=True, kw_only=True)
class MackeyGlass(Generator):
  """Predict a chaotic series so many steps ahead, at every step.

  The series solves x'(t) = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x(t) by
  Euler's rule with step 1/10, from x = 1.2 and a history of independent
  numbers uniform in [1.1, 1.3), and is read at whole times after the first
  100. The input at step t is z_t = tanh(x(t) - 1) + 0.066, float32 [T, 1], the
  target z_{t + ahead}, float32 [T, 1].

  There is no oracle: the input does not hold the state between whole times.
  Rows agree byte for byte on one platform; on another, rounding grows with t
  as it does in any chaotic system.

  Attributes:
    length: T.
    tau: the delay of the system; chaotic from about 17.
    ahead: steps from the input to the target.

  Presets:
    mackey_glass_lmu: T = 5000, tau = 17, 15 steps ahead, 64 rows for training
      and 64 for the test; there half of the former held out, 500 epochs, batch
      32, Adam.
    mackey_glass_small: T = 64, 5 steps ahead, fresh rows. Not a published
      setting.

  Differs: the mean that is taken off is a constant (the reference takes that
    of its 128 rows, about -0.066). The constants are those of the authors'
    notebook.

  Paper: Voelker, Kajic, Eliasmith 2019, Legendre Memory Units, NeurIPS 2019,
    section on Mackey-Glass; the system from Mackey and Glass 1977, Oscillation
    and Chaos in Physiological Control Systems, Science 197.
  """

  kind: ClassVar[str] = "regression"
  d_input: ClassVar[int] = 1
  num_outputs: ClassVar[int] = 1

  length: int = 5000
  tau: int = 17
  ahead: int = 15

  def __post_init__(self):
    super().__post_init__()
    for name in ("length", "tau", "ahead"):
      task_lib.check_int("MackeyGlass", name, getattr(self, name), 1)

  @property
  def chance(self) -> float:
    """Estimated from rows of the test split; no closed form is known."""
    return delay.best_constant(self)

  def example(self, key):
    (word,) = sampling.words(key, self.tau * _SUBSTEPS)
    uniform = (word >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    # Row i of the history: the substeps of time i modulo tau.
    history = (1.1 + 0.2 * uniform).reshape(self.tau, _SUBSTEPS)

    def substep(x, delayed):
      growth = 0.2 * delayed / (1 + delayed**10)
      return x + (growth - 0.1 * x) / _SUBSTEPS, x

    def step(carry, time):
      x, history = carry
      row = time % self.tau
      x, passed = jax.lax.scan(substep, x, history[row])
      return (x, history.at[row].set(passed)), x

    times = jnp.arange(_WASHOUT + self.length + self.ahead, dtype=jnp.int32)
    _, series = jax.lax.scan(step, (jnp.float32(1.2), history), times)
    z = jnp.tanh(series[_WASHOUT:] - 1) - _MEAN
    weights = jnp.ones((self.length,), jnp.float32)
    return z[: self.length, None], z[self.ahead :, None], weights


task_lib.register("mackey_glass_lmu", MackeyGlass, num_train=64, num_test=64)
task_lib.register("mackey_glass_small", MackeyGlass, length=64, ahead=5)
