"""The adding problem."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator

VARIANTS = ("lstm", "halves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adding(Generator):
  """Add the two numbers that were marked.

  Inputs float32 [T, 2]: a random number and a marker at each step. One real
  target a row, [1].

  Variant 'lstm', with N = steps: a row has a length L, uniform in
  N..N + N // 10; T = N + N // 10, and `mask` is False from L on. Numbers are
  uniform in [-1, 1). One of the first ten steps is marked by 1, then another
  one among the first N // 2. The first and the last step have the marker -1 in
  any case, and if the first was chosen, its number counts as 0. The target is
  0.5 + (X_1 + X_2) / 4, with X the marked numbers. The paper calls a row
  solved if the error is below 0.04.

  Variant 'halves': T = N; numbers are uniform in [0, 1), one step of the first
  T // 2 and one of the T // 2 after them are marked by 1, the other markers
  are 0. The target is the sum; always to say 1 has the mean squared error 1/6.

  Attributes:
    steps: N.
    variant: one of `VARIANTS`.

  Presets:
    adding_lstm_{100,500,1000}: the problem of the LSTM paper, fresh rows.
    adding_urnn_{100,200,400,750}: variant 'halves', 100,000 training and
      10,000 test rows; the problem of the unitary RNN.
    adding_small: variant 'halves', T = 64, fresh rows. Not a published
      setting.

  Differs: nothing known. (The LSTM paper speaks of the case that the first
    step is chosen for X_1; it is treated alike for X_2.)

  Paper: Hochreiter and Schmidhuber 1997, Long Short-Term Memory, Neural
    Computation 9(8), section 5.4; 'halves' from Arjovsky, Shah, Bengio 2015,
    Unitary Evolution Recurrent Neural Networks, arXiv:1511.06464, section 5.2.
  """

  kind: ClassVar[str] = "regression"
  d_input: ClassVar[int] = 2
  num_outputs: ClassVar[int] = 1

  steps: int = 100
  variant: str = "lstm"

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_choice("Adding", "variant", self.variant, VARIANTS)
    least = 20 if self.variant == "lstm" else 2
    task_lib.check_int("Adding", "steps", self.steps, least)

  @property
  def length(self) -> int:
    if self.variant == "lstm":
      return self.steps + self.steps // 10
    return self.steps

  @property
  def chance(self) -> float:
    """Variance of the target: a number has 1/3 in 'lstm', 1/12 in 'halves'."""
    if self.variant == "halves":
      return 2 / 12
    # Chosen, but 0: the first step, as the one number or as the other.
    lost = 0.1 + 0.9 / (self.steps // 2 - 1)
    return (2 - lost) / 3 / 16

  def example(self, key):
    numbers, places = sampling.words(key, self.length, 3)
    numbers = (numbers >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    half = self.steps // 2
    step = np.arange(self.length)
    if self.variant == "halves":
      first = sampling.below(places[0], half)
      second = sampling.below(places[1], half) + half
      marked = (step == first) | (step == second)
      markers = marked.astype(jnp.float32)
      target = jnp.sum(jnp.where(marked, numbers, 0.0))
      mask = None
    else:
      numbers = 2 * numbers - 1
      first = sampling.below(places[0], 10)
      second = sampling.below(places[1], half - 1)
      second = second + (second >= first).astype(jnp.int32)
      length = sampling.below(places[2], self.steps // 10 + 1) + self.steps
      mask = step < length
      marked = ((step == first) | (step == second)) & (step > 0)
      markers = jnp.where(marked, 1.0, 0.0).astype(jnp.float32)
      markers = jnp.where((step == 0) | (step == length - 1), -1.0, markers)
      target = 0.5 + jnp.sum(jnp.where(marked, numbers, 0.0)) / 4
      numbers = jnp.where(mask, numbers, 0.0)
      markers = jnp.where(mask, markers, 0.0)
    inputs = jnp.stack([numbers, markers], axis=1)
    weights = jnp.ones((), jnp.float32)
    return inputs, target[None], weights, None, mask

  def oracle(self, batch):
    numbers, markers = np.moveaxis(np.asarray(batch.inputs), 2, 0)
    total = (numbers * (markers == 1)).sum(1, keepdims=True)
    return 0.5 + total / 4 if self.variant == "lstm" else total


for _steps in (100, 500, 1000):
  task_lib.register(f"adding_lstm_{_steps}", Adding, steps=_steps)
for _steps in (100, 200, 400, 750):
  task_lib.register(
    f"adding_urnn_{_steps}",
    Adding,
    steps=_steps,
    variant="halves",
    num_train=100_000,
    num_test=10_000,
  )
task_lib.register("adding_small", Adding, steps=64, variant="halves")
