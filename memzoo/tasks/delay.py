"""Reconstruction of a band-limited signal after a delay."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax.numpy as jnp
import jax.random
import numpy as np

from memzoo.tasks import task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delay(Generator):
  """Say what the input was so many steps ago.

  With L = length and D = delay, the input is a random periodic signal

    u_t = sum_{k=1}^K (a_k cos(2 pi k t / L) + b_k sin(2 pi k t / L)),

  K = floor(frequency L / D), a and b standard normal: white noise below
  `frequency` cycles per delay, nothing above, and no mean. It is rotated so
  that it begins where it is closest to 0, and divided by its largest absolute
  value. Inputs are float32 [L, 1]. The targets, float32 [L, O] with
  O = outputs, are the input s_1, ..., s_O steps ago, with s from 0 to D in
  equal distances, rounded down (D alone for O = 1). The first D steps, in
  which the delayed signal has not begun, have weight 0.

  Attributes:
    length: L, above D.
    delay: D.
    frequency: cut-off, in cycles per delay; D / 2 at most.
    outputs: O.

  Presets:
    delay_lmu_{25,100,400,1600,1000,10000,100000}: the capacity task of the
      Legendre memory unit at D steps, L = floor(2.5 D), ten cycles per delay,
      five outputs, 100 rows for training and 100 for the test. There LSTMs of
      100 units were trained for 500 epochs at the first four delays, batch 50,
      Adam, a fifth of the rows held out.
    delay_small: D = 16, L = 64, two cycles per delay, O = 1. Not a published
      setting.

  Differs: steps before D are not asked (the reference trains on them, with
    target 0, and leaves them out of the test error). The constants are those
    of the authors' notebook.

  Paper: Voelker, Kajic, Eliasmith 2019, Legendre Memory Units, NeurIPS 2019,
    section on capacity; no arXiv number.
  """

  kind: ClassVar[str] = "regression"
  d_input: ClassVar[int] = 1

  length: int = 250
  delay: int = 100
  frequency: float = 10.0
  outputs: int = 5

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("Delay", "delay", self.delay, 1)
    task_lib.check_int("Delay", "length", self.length, self.delay + 1)
    task_lib.check_int("Delay", "outputs", self.outputs, 1, self.delay + 1)
    least = self.delay / self.length
    if not least <= self.frequency <= self.delay / 2:
      raise ValueError(
        f"Delay: frequency must be between delay / length = {least} and"
        f" delay / 2 = {self.delay / 2}; got {self.frequency!r}"
      )

  @property
  def num_outputs(self) -> int:
    return self.outputs

  @property
  def chance(self) -> float:
    """Estimated from rows of the test split; no closed form is known."""
    return best_constant(self)

  @property
  def delays(self) -> tuple[int, ...]:
    """Steps between an input and each of the outputs."""
    if self.outputs == 1:
      return (self.delay,)
    last = self.outputs - 1
    return tuple(self.delay * i // last for i in range(self.outputs))

  def example(self, key):
    length = self.length
    # The tolerance is for a product that rounds to just below an integer.
    count = math.floor(self.frequency * length / self.delay + 1e-7)
    waves = jax.random.normal(key, (2, count), jnp.float32)
    if 2 * count == length:  # the sine of the highest frequency is 0
      waves = waves.at[1, -1].set(0.0)
    spectrum = jnp.zeros((length // 2 + 1,), jnp.complex64)
    spectrum = spectrum.at[1 : count + 1].set(
      jax.lax.complex(waves[0], -waves[1])
    )
    signal = jnp.fft.irfft(spectrum, n=length).astype(jnp.float32)
    signal = jnp.roll(signal, -jnp.argmin(jnp.abs(signal)))
    signal = signal / jnp.max(jnp.abs(signal))
    targets = jnp.stack([_shift(signal, s) for s in self.delays], axis=1)
    weights = (np.arange(length) >= self.delay).astype(np.float32)
    return signal[:, None], targets, jnp.asarray(weights)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)[..., 0]
    predictions = np.zeros((*inputs.shape, self.outputs), np.float32)
    for i, s in enumerate(self.delays):
      predictions[:, s:, i] = inputs[:, : inputs.shape[1] - s]
    return predictions


def _shift(signal, steps: int):
  """The signal so many steps ago, 0 before it begins."""
  begin = jnp.zeros((steps,), jnp.float32)
  return jnp.concatenate([begin, signal[: len(signal) - steps]])


@functools.lru_cache(maxsize=64)
def best_constant(task: Generator) -> float:
  """Mean squared error of the best constant, from up to 2^20 test steps."""
  rows = min(task.num_test, max(1, 2**20 // task.length))
  batch = next(task.eval_batches(rows))
  asked = np.asarray(batch.targets)[np.asarray(batch.weights) > 0]
  return float(asked.var(axis=0, dtype=np.float64).mean())


for _delay in (25, 100, 400, 1600, 1000, 10_000, 100_000):
  task_lib.register(
    f"delay_lmu_{_delay}",
    Delay,
    delay=_delay,
    length=_delay * 5 // 2,
    num_train=100,
    num_test=100,
  )
task_lib.register(
  "delay_small", Delay, delay=16, length=64, frequency=2.0, outputs=1
)
