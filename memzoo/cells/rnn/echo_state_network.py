"""Echo state network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import product
from memzoo.ops import arguments, reservoir
from memzoo.ops.step_loop import cast, step_loop


class State(NamedTuple):
  x: jax.Array  # [N] float32, the reservoir


@register(
  "echo_state_network",
  family="rnn",
  year=2001,
  paper="Jaeger 2001, GMD report 148",
  write="leaky mix, untrained",
  evidence="silver",
  tiny=dict(d_model=6, num_units=9, leak=0.7),
)
@dataclasses.dataclass(frozen=True)
class EchoStateNetwork(cell.Cell):
  """Echo state network: a random reservoir, and a read-out that is trained.

    x(n) = (1 − a) x(n−1) + a tanh(W_in u(n) + W x(n−1) + b)
    y(n) = W_out [u(n), x(n)] + b_out

  u is the input, x the reservoir. W_in, W and b are drawn once and not trained:
  W with a share `density` of entries that are not zero, scaled to the spectral
  radius given; W_in and b uniform in ±input_scale and ±bias_scale. With a
  radius below one the reservoir forgets how it began: its state is an echo of
  the inputs alone. `fit` solves W_out by ridge regression over the states that
  a sequence leaves; it may be trained by gradients too.

  State: x [N] float32, starts at zero; N = num_units.
  Params: out [D + N, D], out_b [D]; buffers: w_in [D, N], w [N, N], b [N].
  Forms: step O(N (N + D)) a token; scan hoists W_in u and W_out, the same
    order of work; pallas keeps W on chip, in x's dtype.
  Differs: no feedback W_back from the output, which the paper has as an
    option; y is linear; every unit has the same leak a (1: none).
  Paper: Jaeger 2001, "The 'echo state' approach to analysing and training
    recurrent neural networks", GMD report 148, eq. 1 and 2 (equation
    numbers not checked; and in his Scholarpedia article,
    doi:10.4249/scholarpedia.2330); the leak as in
    Jaeger, Lukosevicius, Popovici, Siewert 2007, "Optimization and
    applications of echo state networks with leaky-integrator neurons", Neural
    Networks 20(3); the memory capacity of Jaeger 2002, "Short term memory in
    echo state networks", GMD report 152.
  """

  d_model: int
  num_units: int = 128
  spectral_radius: float = 0.9
  leak: float = 1.0
  density: float = 1.0
  input_scale: float = 1.0
  bias_scale: float = 0.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_units")
    for field in ("leak", "density"):
      if not 0 < getattr(self, field) <= 1:
        raise ValueError(
          f"EchoStateNetwork: {field} must be in (0, 1], got "
          f"{getattr(self, field)!r}"
        )
    for field in ("spectral_radius", "input_scale", "bias_scale"):
      if not getattr(self, field) >= 0:
        raise ValueError(
          f"EchoStateNetwork: {field} must be 0 or above, got "
          f"{getattr(self, field)!r}"
        )

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.num_units
    keys = jax.random.split(key, 5)
    w = jax.random.normal(keys[0], (n, n))
    w = jnp.where(jax.random.bernoulli(keys[1], self.density, (n, n)), w, 0)
    radius = reservoir.spectral_radius(w)
    scale = jnp.where(radius > 1e-6, self.spectral_radius / radius, 1)
    uniform = initializers.uniform
    return {
      "out": initializers.lecun_normal(keys[2], (d + n, d)),
      "out_b": jnp.zeros((d,)),
      "buffers": {
        "w_in": uniform(keys[3], (d, n), self.input_scale),
        "w": scale * w,
        "b": uniform(keys[4], (n,), self.bias_scale),
      },
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.num_units,), jnp.float32))

  def step(self, params, state, u):
    fixed = _fixed(params)
    state, x = Step(self.leak)(state, _drive(fixed, u), cast(fixed["w"]))
    return state, _read_out(params, u, x)

  def parallel(self, params, state, us, reset, mask, implementation):
    fixed = _fixed(params)
    state, xs = step_loop(
      Step(self.leak), state, _drive(fixed, us), fixed["w"], dtype=us.dtype,
      reset=reset, mask=mask, implementation=implementation,
    )  # fmt: skip
    return state, _read_out(params, us, xs)

  def states(self, params, us):
    """The reservoir after each of the inputs us [T, D]: [T, N]."""
    fixed, state = _fixed(params), self.initial_state(params)
    return step_loop(
      Step(self.leak), state, _drive(fixed, us), fixed["w"], dtype=us.dtype,
      reset=None, mask=None, implementation="scan",
    )[1]  # fmt: skip

  def fit(self, params, us, targets, *, penalty=1e-6, washout=0):
    """params with the read-out that is best in closed form.

    Args:
      params: as `init` made them.
      us: [B, T, D] inputs.
      targets: [B, T, D] wanted outputs.
      penalty: of ridge regression.
      washout: how many first steps of a sequence do not count.
    """
    states = jax.vmap(lambda u: self.states(params, u))(us)
    features = jnp.concatenate([us.astype(jnp.float32), states], axis=-1)
    out, out_b = reservoir.fit(features, targets, penalty, washout)
    return {**params, "out": out, "out_b": out_b}


class Step(NamedTuple):
  """The reservoir's step, after W_in u(n) + b."""

  leak: float

  def __call__(self, state, drive, w):
    new = jnp.tanh(drive + product(state.x, w))
    x = (1 - self.leak) * state.x + self.leak * new
    return State(x), x


def _fixed(params):
  return jax.lax.stop_gradient(params["buffers"])


def _drive(fixed, u):
  drive = dot(u, fixed["w_in"]).astype(jnp.float32)
  return drive + fixed["b"].astype(jnp.float32)


def _read_out(params, u, x):
  seen = jnp.concatenate([u, x.astype(u.dtype)], axis=-1)
  return dot(seen, params["out"]) + params["out_b"].astype(u.dtype)
