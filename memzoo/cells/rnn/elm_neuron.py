"""Expressive leaky memory neuron."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import product
from memzoo.ops import arguments
from memzoo.ops.linear_recurrence import linear_recurrence
from memzoo.ops.step_loop import cast, step_loop


class State(NamedTuple):
  s: jax.Array  # [S] float32, the synapses' traces
  m: jax.Array  # [M] float32, the memory units


@register(
  "elm_neuron",
  family="rnn",
  year=2023,
  paper="Spieler et al. 2023, arXiv:2306.16922",
  write="leaky mix of what a dendrite computes",
  evidence="silver",
  tiny=dict(d_model=6, num_memory=5, d_mlp=7, tau_max=50.0),
)
@dataclasses.dataclass(frozen=True)
class ELMNeuron(cell.Cell):
  """Expressive leaky memory (ELM) neuron: leaky units, a dendrite that mixes.

    s_t  = κ_s s_{t−1} + w_s ⊙ x_t
    Δm_t = tanh(MLP([s_t, κ_m ⊙ m_{t−1}]))
    m_t  = κ_m ⊙ m_{t−1} + λ (1 − κ_m) ⊙ Δm_t
    y_t  = W_y m_t

  with κ = exp(−Δt / τ), τ_m log-spaced in [tau_min, tau_max], and an MLP of one
  hidden layer of rectifiers.

  Branch-ELM: with `num_branches` B the dendrite sees sums over branches for
  s_t. Branch i has `branch_size` synapses, on the inputs from i ceil(D / B)
  on: neighbours, that further branches may see too; what is past the last
  input is cut off. Else every input has one synapse, which the dendrite sees.

  State: s [S] and m [M] float32, from zero; S = D, or B · branch_size.
  Params: w_s [S] (rectified), in_s [B or D, F], in_m [M, F], in_b [F],
    out [F, M], out_b [M], y [M, D], y_b [D]; with `learn_tau` tau_m [M], for
    τ_m = tau_min + (tau_max − tau_min) σ(tau_m). M = num_memory, F = d_mlp or
    2M.
  Forms: step O(F (S + M) + M D) a token; scan makes all of s by
    `linear_recurrence`, hoists its part of the MLP and W_y, and loops in
    O(F M); pallas does that loop in one kernel.
  Differs: as in the authors' code, tanh(a) is 1.7159 tanh(2a / 3), w_s is
    rectified and one τ_s, which is not trained, serves all synapses. Its
    interlocked routing of excitatory and inhibitory inputs is the caller's.
  Paper: Spieler, Rahaman, Martius, Schölkopf, Levina 2023 (ICLR 2024), "The
    Expressive Leaky Memory Neuron: an Efficient and Expressive
    Phenomenological Neuron Model Can Solve Long-Horizon Tasks",
    arXiv:2306.16922, section 2; the authors' code (AaronSpieler/elmneuron, the
    first version of the model).
  """

  d_model: int
  num_memory: int = 100
  d_mlp: int | None = None
  num_branches: int | None = None
  branch_size: int | None = None
  lam: float = 5.0
  tau_s: float = 5.0
  tau_min: float = 1.0
  tau_max: float = 1000.0
  learn_tau: bool = False
  dt: float = 1.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_memory")
    given = lambda field: getattr(self, field) is not None
    optional = ("d_mlp", "num_branches", "branch_size")
    arguments.check_positive(self, *filter(given, optional))
    for field in ("lam", "tau_s", "dt"):
      if not getattr(self, field) > 0:
        raise ValueError(
          f"ELMNeuron: {field} must be above 0, got {getattr(self, field)!r}"
        )
    if not 0 < self.tau_min < self.tau_max:
      raise ValueError(
        "ELMNeuron: needs 0 < tau_min < tau_max, got "
        f"tau_min={self.tau_min!r}, tau_max={self.tau_max!r}"
      )
    branches = self.num_branches or 1
    if (branches - 1) * -(-self.d_model // branches) >= self.d_model:
      raise ValueError(
        f"ELMNeuron: num_branches={branches} leaves a branch without inputs"
      )
    if self.branch_size and not self.num_branches:
      raise ValueError("ELMNeuron: branch_size needs num_branches, got None")

  @property
  def routes(self) -> np.ndarray:
    """The inputs of each branch's synapses, int [B, branch_size]; D stands for
    none."""
    branches = self.num_branches or self.d_model
    stride = -(-self.d_model // branches)
    first = stride * np.arange(branches)[:, None]
    inputs = first + np.arange(self.branch_size or stride)
    return np.minimum(inputs, self.d_model)

  def init(self, key) -> dict[str, Any]:
    d, m = self.d_model, self.num_memory
    f, (seen, size) = self.d_mlp or 2 * m, self.routes.shape
    keys = jax.random.split(key, 7)
    draw = lambda key, shape, n: initializers.uniform(key, shape, n**-0.5)
    params = {
      "w_s": jnp.full((seen * size,), 0.5),
      "in_s": draw(keys[0], (seen, f), seen + m),
      "in_m": draw(keys[1], (m, f), seen + m),
      "in_b": draw(keys[2], (f,), seen + m),
      "out": draw(keys[3], (f, m), f),
      "out_b": draw(keys[4], (m,), f),
      "y": draw(keys[5], (m, d), m),
      "y_b": draw(keys[6], (d,), m),
    }
    if self.learn_tau:
      share = (self.spaced - self.tau_min) / (self.tau_max - self.tau_min)
      share = np.clip(share, 1e-6, 1 - 1e-6)
      params["tau_m"] = jnp.asarray(np.log(share / (1 - share)), jnp.float32)
    return params

  def initial_state(self, params, key=None) -> State:
    sizes = self.routes.size, self.num_memory
    return State(*(jnp.zeros((n,), jnp.float32) for n in sizes))

  def step(self, params, state, x):
    kappa_s, write = self._synapses(params, x)
    s = kappa_s * state.s + write
    drive = self._drive(params, s.astype(x.dtype))
    m, _ = Step(self.lam)(state.m, drive, cast(self._constants(params)))
    return State(s, m), _read_out(params, m.astype(x.dtype))

  def parallel(self, params, state, xs, reset, mask, implementation):
    how = dict(reset=reset, mask=mask, implementation=implementation)
    kappa_s, writes = self._synapses(params, xs)
    s, ss = linear_recurrence(state.s, writes, decay=kappa_s, **how)
    m, ms = step_loop(
      Step(self.lam), state.m, self._drive(params, ss.astype(xs.dtype)),
      self._constants(params), dtype=xs.dtype, **how,
    )  # fmt: skip
    return State(s, m), _read_out(params, ms.astype(xs.dtype))

  @property
  def spaced(self) -> np.ndarray:
    """τ_m at the start."""
    return np.geomspace(self.tau_min, self.tau_max, self.num_memory)

  def _constants(self, params):
    """What `Step` takes; κ_m among it."""
    tau = jnp.asarray(self.spaced, jnp.float32)
    if self.learn_tau:
      share = jax.nn.sigmoid(params["tau_m"].astype(jnp.float32))
      tau = self.tau_min + (self.tau_max - self.tau_min) * share
    kappa = jnp.exp(-self.dt / tau)
    return params["in_m"], params["out"], params["out_b"], kappa

  def _synapses(self, params, x):
    """κ_s [S], and w_s ⊙ x at the synapses: [..., D] -> float32 [..., S]."""
    none = jnp.zeros_like(x[..., :1])
    x = jnp.concatenate([x, none], axis=-1)[..., self.routes.ravel()]
    w_s = jax.nn.relu(params["w_s"].astype(jnp.float32))
    kappa_s = jnp.full(w_s.shape, np.exp(-self.dt / self.tau_s), jnp.float32)
    return kappa_s, w_s * x.astype(jnp.float32)

  def _drive(self, params, s):
    """The synapses' part of the hidden layer: [..., S] -> float32 [..., F]."""
    branches = jnp.sum(s.reshape(*s.shape[:-1], *self.routes.shape), axis=-1)
    drive = dot(branches, params["in_s"]).astype(jnp.float32)
    return drive + params["in_b"].astype(jnp.float32)


class Step(NamedTuple):
  """The memory's step, after the synapses' part of the hidden layer."""

  lam: float

  def __call__(self, m, drive, constants):
    in_m, out, out_b, kappa = constants
    m = kappa * m
    new = product(jax.nn.relu(drive + product(m, in_m)), out) + out_b
    m = m + self.lam * (1 - kappa) * 1.7159 * jnp.tanh(2 / 3 * new)
    return m, m


def _read_out(params, m):
  return dot(m, params["y"]) + params["y_b"].astype(m.dtype)
