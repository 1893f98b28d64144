"""Bernoulli sources whose rate changes at moments that are not observed."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator
from memzoo.tasks.task import Batch

PRIORS = ("static", "ptw", "lin", "regular", "uniform", "geometric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bernoulli(Generator):
  """Predict the next bit of a source that changes its rate now and then.

  The bits x_0..x_{T-1}, T = length, are cut into segments. Each segment has a
  rate of its own, drawn from Beta(beta, beta); given the rate its bits are
  independent. The input at step t is x_{t-1} (token 2, the start, at t = 0),
  the target is x_t, at every step.

  Where segments end is drawn from `prior`. With s the first step of a segment,
  n = t - s its length so far and I = interval, a new segment begins at t > s
  with the probability (the hazard)

    static     0
    ptw        that of a partition tree: a block of 2^d steps, the least power
               of two that holds T, is cut in halves with probability 1/2, and
               so are the halves, down to blocks of one step
    lin        1 / (2 n)
    regular    1 where I divides t, else 0
    uniform    1 / (I - n + 1): lengths are uniform in 1..I
    geometric  1 / I: lengths are geometric with mean I

  A segment of the partition tree that begins at s is the largest block that
  begins there, of M steps (M the highest power of two that divides s; 2^d for
  s = 0), or with half the probability its first half, and so on. The hazard is
  hence 1 / M for n = 1, 1 / (2 M / n - 1) for n = 2, 4, ..., M, and else 0.

  The bits themselves cannot be known in advance, so `oracle` is not defined:
  the reference is the exact Bayes probability, `predictor`, and what a model
  loses to it is its `regret`.

  Attributes:
    length: T.
    prior: one of `PRIORS`.
    interval: I, of the last three priors.
    beta: both parameters of the Beta distribution of the rates: 0.5 (of which
      the predictor within a segment is that of Krichevsky and Trofimov) or 1
      (uniform).

  Presets:
    bernoulli_mbml_ptw, bernoulli_mbml_lin, bernoulli_mbml_regular,
      bernoulli_mbml_uniform: the four sources of the paper at T = 256, with
      Beta(1/2, 1/2); defaults of the authors' code: Adam, batch 128, rate
      1e-4, gradients clipped at norm 1.
    bernoulli_small: prior ptw, T = 32. Not a published setting.

  Differs: T = 256 and the intervals, 20 for `regular` and 1..20 for `uniform`,
    are not in the authors' code, which leaves them to the configuration, and
    were not checked against the paper. In the code the lengths of `uniform`
    are a rounded real distribution that may yield 0, after which no further
    change comes; here they are 1 or more. The first bit counts (the authors
    leave it out; every Bayes predictor says 1/2). `geometric` is the constant
    hazard of Adams and MacKay 2007, arXiv:0710.3742, not in the paper.

  Paper: Genewein, Deletang, Ruoss et al. 2023, Memory-Based Meta-Learning on
    Non-Stationary Distributions, arXiv:2302.03067; ptw from Veness et al.
    2013, Partition Tree Weighting, arXiv:1211.0587; lin from Willems 1996,
    Coding for a Binary Independent Piecewise-Identically-Distributed Source.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: ClassVar[int] = 3
  num_outputs: ClassVar[int] = 2
  chance: ClassVar[float] = 0.5

  length: int = 256
  prior: str = "ptw"
  interval: int = 20
  beta: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("Bernoulli", "length", self.length, 1)
    task_lib.check_choice("Bernoulli", "prior", self.prior, PRIORS)
    task_lib.check_int("Bernoulli", "interval", self.interval, 1)
    if self.beta not in (0.5, 1):
      raise ValueError(f"Bernoulli: beta must be 0.5 or 1; got {self.beta!r}")

  def example(self, key):
    change, rate, bit = (
      (word >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
      for word in sampling.words(key, *(3 * [self.length]))
    )
    if self.beta == 0.5:  # Beta(1/2, 1/2) is the arcsine distribution
      rate = jnp.square(jnp.sin(jnp.float32(np.pi / 2) * rate))

    def step(first, inputs):
      time, uniform, hazard = inputs
      first = jnp.where(uniform < hazard[first], time, first)
      return first, first

    hazards = _hazards(self.prior, self.length, self.interval)
    times = jnp.arange(self.length, dtype=jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    xs = (times, change, jnp.asarray(hazards, jnp.float32))
    _, first = jax.lax.scan(step, zero, xs)
    bits = (bit < rate[first]).astype(jnp.int32)
    inputs = jnp.concatenate([jnp.full((1,), 2, jnp.int32), bits[:-1]])
    return inputs, bits, jnp.ones((self.length,), jnp.float32)

  def predictor(self, batch: Batch) -> np.ndarray:
    """P(x_t = 1 | x_0..x_{t-1}) under the source, float64 [B, T].

    With w_s the posterior probability that the present segment began at s, and
    k_s, n_s the ones and the bits in it so far,

      w_t = sum_s w_s h(s, t),   w_s <- w_s (1 - h(s, t)),
      P(x_t = 1) = sum_s w_s (k_s + beta) / (n_s + 2 beta),
      w_s <- w_s P(x_t | k_s, n_s) / P(x_t).

    Args:
      batch: of this task; its inputs alone are read.
    """
    inputs = np.asarray(batch.inputs)
    rows, length = inputs.shape
    hazards = _hazards(self.prior, length, self.interval)
    ones = np.zeros((rows, length + 1))
    ones[:, 1:length] = np.cumsum(inputs[:, 1:], axis=1)
    weights = np.zeros((rows, length))
    weights[:, 0] = 1
    result = np.zeros((rows, length))
    for t in range(length):
      past = weights[:, :t]
      weights[:, t] += past @ hazards[t, :t]
      past *= 1 - hazards[t, :t]
      first = np.arange(t + 1)
      seen = ones[:, t, None] - ones[:, first]
      one = (seen + self.beta) / (t - first + 2 * self.beta)
      result[:, t] = (weights[:, : t + 1] * one).sum(1)
      if t + 1 < length:
        bit = inputs[:, t + 1, None] == 1
        weights[:, : t + 1] *= np.where(bit, one, 1 - one)
        weights[:, : t + 1] /= weights[:, : t + 1].sum(1, keepdims=True)
    return result

  def regret(self, log_probs: np.ndarray, batch: Batch) -> np.ndarray:
    """What a model loses to the Bayes predictor, in bits, float64 [B].

      regret = sum_t (log2 P(x_t | x_{<t}) - log2 Q(x_t | x_{<t}))

    with P the `predictor` and Q the model; its mean over sequences of the
    source is a divergence, 0 or more; that of one sequence may be negative.

    Args:
      log_probs: natural logarithms of the model's Q, float [B, T, V] with V 2
        or more; what the model gives to tokens other than 0 and 1 is lost.
      batch: of this task; steps of weight 0 are left out.

    Returns:
      One number for each sequence.

    Raises:
      ValueError: `log_probs` has another shape.
    """
    targets = np.asarray(batch.targets)
    log_probs = np.asarray(log_probs, np.float64)
    if log_probs.ndim != 3 or log_probs.shape[:2] != targets.shape:
      raise ValueError(
        f"Bernoulli: log_probs must have the shape {targets.shape} and a third"
        f" axis of 2 or more; got {log_probs.shape}"
      )
    one = self.predictor(batch)
    exact = np.log(np.where(targets == 1, one, 1 - one))
    model = np.take_along_axis(log_probs, targets[..., None], axis=2)[..., 0]
    counted = np.asarray(batch.weights) > 0
    return np.where(counted, exact - model, 0).sum(1) / np.log(2)


@functools.lru_cache(maxsize=16)
def _hazards(prior: str, length: int, interval: int) -> np.ndarray:
  """h[t, s], float64 [T, T]: a segment from s < t ends before t."""
  t, s = np.indices((length, length))
  n = np.maximum(t - s, 1)
  if prior == "static":
    hazard = np.zeros((length, length))
  elif prior == "ptw":
    block = np.where(s == 0, 2 ** (length - 1).bit_length(), s & -s)
    hazard = np.where(n == 1, 1 / block, 1 / np.maximum(2 * block / n - 1, 1))
    hazard = np.where((n & (n - 1) == 0) & (n <= block), hazard, 0)
  elif prior == "lin":
    hazard = 1 / (2 * n)
  elif prior == "regular":
    hazard = (t % interval == 0).astype(np.float64)
  elif prior == "uniform":
    hazard = 1 / np.maximum(interval - n + 1, 1)
  else:
    hazard = np.full((length, length), 1 / interval)
  hazard = np.where(s < t, hazard, 0.0)
  hazard.setflags(write=False)
  return hazard


for _prior in ("ptw", "lin", "regular", "uniform"):
  task_lib.register(f"bernoulli_mbml_{_prior}", Bernoulli, prior=_prior)
task_lib.register("bernoulli_small", Bernoulli, length=32)
