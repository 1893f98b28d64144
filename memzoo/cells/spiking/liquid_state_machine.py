"""Liquid state machine."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, reservoir
from memzoo.ops.spiking_network import Kind, Network, State, Step, Synapses
from memzoo.ops.step_loop import cast, step_loop

# Appendix B of the paper: milliseconds, millivolts, nanoamperes, megaohms.
_TAU = dict(tau_m=30.0, tau_e=3.0, tau_i=6.0, tau_r=30.0)
_THRESHOLD, _RESET, _BACKGROUND = 15.0, (13.8, 14.5), 13.5
_REFRACTORY, _INHIBITORY = (3.0, 2.0), 0.2
_INPUT, _FED = np.array([18.0, 9.0]), 0.3
# From (row) and to (column) excitatory and inhibitory neurons.
_CHANCE = np.array([[0.3, 0.2], [0.4, 0.1]])
_STRENGTH = np.array([[30.0, 60.0], [-19.0, -19.0]])
_USE = np.array([[0.5, 0.05], [0.25, 0.32]])
_RECOVER = np.array([[1100.0, 125.0], [700.0, 144.0]])
_RELAX = np.array([[50.0, 1200.0], [20.0, 60.0]])


@register(
  "liquid_state_machine",
  family="spiking",
  year=2002,
  paper="Maass et al. 2002, doi:10.1162/089976602760407955",
  write="spikes of an untrained network",
  evidence="silver",
  tiny=dict(d_model=6, grid=(1, 3, 3), dt=4.0, input_scale=2.0),
)
@dataclasses.dataclass(frozen=True)
class LiquidStateMachine(cell.Cell):
  """Liquid state machine: a network of spikes that ripple, and a read-out.

    I_t = κ_s I_{t−1} + Σ_j A_j u_j R_j s_{t−1,j}
    v_t = κ_m v_{t−1} + (1 − κ_m) R_m (I_b + I_t + W_in x_t)
    s_t = [v_t > θ] ,  and after a spike v rests at v_reset for a while
    r_t = κ_r r_{t−1} + s_t ,  y_t = W_out r_t + b_out

  with κ = exp(−dt / τ), κ_s that of the sender's kind, and u, R of a synapse as
  in `memzoo.ops.spiking_network`: it tires and eases with its spikes. The
  liquid is drawn once: neurons on a grid, a fifth of them inhibitory, joined
  with probability C exp(−d² / λ²) over the distance d. Only the memoryless
  read-out is trained, by `fit` in closed form or by gradients.

  State: v, s, wait, i_e, i_i, r and 2 × 2 of synapses, [N] float32 each, from
    zero, which is rest; N = the neurons of `grid`.
  Params: out [N, D], out_b [D]; buffers: w_in [D, N], w [N, N] (A; row: from),
    inhibitory [N] (0 or 1), reset [N] (millivolts).
  Forms: step O(N (N + D)) a token; scan hoists W_in x and W_out, the same
    order of work; pallas keeps A on chip.
  Differs: U, D and F of a synapse are the means of its kind, where the paper
    draws them; A is drawn from an exponential distribution, which has the
    paper's deviation. A spike arrives one step later (there after 0.8 or 1.5
    ms). Inputs are currents, there spike trains; a token lasts dt. Neurons
    start at their reset. Spikes have no gradient, so the input gets none.
  Paper: Maass, Natschläger, Markram 2002, "Real-Time Computing Without Stable
    States: A New Framework for Neural Computation Based on Perturbations",
    Neural Computation 14(11), section 3 (the machine) and appendix B (the
    liquid), doi:10.1162/089976602760407955.
  """

  d_model: int
  grid: tuple = (3, 3, 15)
  reach: float = 2.0  # λ
  dt: float = 1.0
  input_scale: float = 1.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")
  differentiable: ClassVar[bool] = False

  def __post_init__(self):
    arguments.check_positive(self, "d_model")
    who, g = "LiquidStateMachine", self.grid
    if [type(n) for n in g] != [int] * 3 or min(g) < 1:
      raise ValueError(f"{who}: grid must be three positive integers, got {g}")
    for field in ("reach", "dt", "input_scale"):
      value = getattr(self, field)
      if not value > 0:
        raise ValueError(f"{who}: {field} must be above 0, got {value!r}")

  @property
  def num_neurons(self) -> int:
    """N."""
    return math.prod(self.grid)

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.num_neurons
    keys = jax.random.split(key, 7)
    ranks = jax.random.permutation(keys[0], n)
    kind = (ranks < round(_INHIBITORY * n)).astype(jnp.int32)
    pair = kind[:, None], kind[None]
    f32 = lambda table: jnp.asarray(table, jnp.float32)
    place = np.stack(np.unravel_index(np.arange(n), self.grid), axis=1)
    square = np.sum((place[:, None] - place[None]) ** 2, axis=-1)
    chance = f32(_CHANCE)[pair] * f32(np.exp(-square / self.reach**2))
    joined = jax.random.bernoulli(keys[1], chance) & ~np.eye(n, dtype=bool)
    fed = jax.random.bernoulli(keys[2], _FED, (d, n))
    spread = lambda key, mean: mean * jax.random.exponential(key, mean.shape)
    w = spread(keys[3], f32(_STRENGTH)[pair])
    w_in = f32(self.input_scale * _INPUT)[kind]
    w_in = spread(keys[4], jnp.broadcast_to(w_in, (d, n)))
    return {
      "out": initializers.lecun_normal(keys[5], (n, d)),
      "out_b": jnp.zeros((d,)),
      "buffers": {
        "w_in": jnp.where(fed, w_in, 0),
        "w": jnp.where(joined, w, 0),
        "inhibitory": kind.astype(jnp.float32),
        "reset": jax.random.uniform(keys[6], (n,), jnp.float32, *_RESET),
      },
    }

  def initial_state(self, params, key=None) -> State:
    zeros = jnp.zeros((self.num_neurons,), jnp.float32)
    return State(*[zeros] * 6, (Synapses(zeros, zeros),) * 2)

  def step(self, params, state, x):
    network = cast(self._network(params))
    state, r = self._step(state, _drive(params, x), network)
    return state, _read_out(params, r.astype(x.dtype))

  def parallel(self, params, state, xs, reset, mask, implementation):
    state, rs = self._ripple(params, state, xs, reset, mask, implementation)
    return state, _read_out(params, rs.astype(xs.dtype))

  def states(self, params, xs):
    """The liquid state r after each of the inputs xs [T, D]: [T, N]."""
    start = self.initial_state(params)
    return self._ripple(params, start, xs, None, None, "scan")[1]

  def _ripple(self, params, state, xs, reset, mask, implementation):
    return step_loop(
      self._step, state, _drive(params, xs), self._network(params),
      dtype=jnp.float32, reset=reset, mask=mask, implementation=implementation,
    )  # fmt: skip

  def fit(self, params, xs, targets, *, penalty=1e-3, washout=0):
    """params with the best read-out: `memzoo.ops.reservoir.fit` over xs and
    targets [B, T, D]."""
    states = jax.vmap(lambda x: self.states(params, x))(xs)
    out, out_b = reservoir.fit(states, targets, penalty, washout)
    return {**params, "out": out, "out_b": out_b}

  @property
  def _step(self) -> Step:
    return Step(self.dt, **_TAU)

  def _network(self, params) -> Network:
    fixed = jax.lax.stop_gradient(params["buffers"])
    fixed = {k: v.astype(jnp.float32) for k, v in fixed.items()}
    kind, reset = fixed["inhibitory"], fixed["reset"]
    of = lambda pair: pair[0] + (pair[1] - pair[0]) * kind  # of each neuron
    onto = []
    for to, columns in enumerate((1 - kind, kind)):
      fade = lambda tau, to=to: of(np.exp(-self.dt / tau[:, to]).tolist())
      use, w = of(_USE[:, to].tolist()), fixed["w"] * columns
      onto.append(Kind(w, use, fade(_RECOVER), fade(_RELAX)))
    rest = of([round(t / self.dt) for t in _REFRACTORY])
    levels = _BACKGROUND - reset, _THRESHOLD - reset
    return Network(tuple(onto), 1 - kind, kind, *levels, rest)


def _drive(params, x):
  """W_in x, in float32 whatever x is: a spike has no half."""
  w_in = jax.lax.stop_gradient(params["buffers"]["w_in"])
  return dot(x.astype(jnp.float32), w_in.astype(jnp.float32))


def _read_out(params, r):
  return dot(r, params["out"]) + params["out_b"].astype(r.dtype)
