"""Diagnostics, each against a case whose answer is known."""

import dataclasses
import itertools
import json
import math
import sys

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import diagnose, train
import memzoo
from memzoo import checkpoint, diagnostics, models, training
from memzoo.core import cell as cell_lib
from memzoo.diagnostics import figures, readout
from memzoo.ops.delta_rule import read, write as delta_write
from memzoo.ops.linear_attention import write as linear_write

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class DelayLine(cell_lib.Cell):
  """The last `slots` inputs, latest first: holds that many and no more."""

  d_model: int = 4
  slots: int = 3

  def init(self, key):
    return {}

  def initial_state(self, params, key=None):
    return jnp.zeros((self.slots, self.d_model))

  def step(self, params, state, x):
    return jnp.concatenate([x[None], state[:-1]]), state[-1]


@dataclasses.dataclass(frozen=True)
class Diagonal(cell_lib.Cell):
  """h ← a ⊙ h + x, and an integer, a flag and a random key that count."""

  d_model: int = 3

  def init(self, key):
    return {"a": jnp.asarray([0.5, 1.1, 0.9])}

  def initial_state(self, params, key=None):
    return jnp.zeros(3), jnp.int32(0), jnp.bool_(False), jax.random.key(1)

  def step(self, params, state, x):
    h, count, flag, key = state
    h = params["a"] * h + x
    return (h, count + 1, ~flag, jax.random.fold_in(key, 1)), h


@dataclasses.dataclass(frozen=True)
class Tanh(cell_lib.Cell):
  """h ← tanh(w h + x), a number."""

  d_model: int = 1

  def init(self, key):
    return {"w": jnp.float32(1.7)}

  def initial_state(self, params, key=None):
    return jnp.zeros(1)

  def step(self, params, state, x):
    h = jnp.tanh(params["w"] * state + x)
    return h, h


@dataclasses.dataclass(frozen=True)
class Total(cell_lib.Cell):
  """The sum of the inputs: order is lost."""

  d_model: int = 2

  def init(self, key):
    return {}

  def initial_state(self, params, key=None):
    return jnp.zeros(self.d_model)

  def step(self, params, state, x):
    return state + x, state + x


def lru(size=None):
  """An LRU, real and of one |λ| where `size` is given, without a direct
  path."""
  cell = memzoo.make("lru", d_model=3, d_state=4, r_min=0.3, r_max=0.95)
  params = jax.jit(cell.init)(KEY)
  params["d"] = 0 * params["d"]
  if size is not None:
    params["nu_log"] = jnp.full(4, math.log(-math.log(size)))
    params["theta_log"] = jnp.full(4, -30.0)
  return cell, params


def window(capacity=3):
  cell = memzoo.make("window", d_model=6, capacity=capacity)
  return cell, jax.jit(cell.init)(KEY)


def normal(*shape, seed=3):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


# Horizon.


def test_horizon_of_a_linear_recurrence_is_geometric():
  cell, params = lru(0.8)
  xs = jnp.repeat(normal(3, 1, 3), 9, axis=1)  # alike at every time
  for found in (
    diagnostics.horizon_by_gradient(cell, params, xs),
    diagnostics.horizon_by_perturbation(cell, params, xs),
  ):
    np.testing.assert_array_equal(found.lag, np.arange(9))
    ratio = found.effect / found.effect[0]
    np.testing.assert_allclose(ratio, 0.8 ** np.arange(9), rtol=1e-4)
    np.testing.assert_allclose(found.curve * 0.8, ratio, rtol=1e-4)
    assert found.horizon == 6  # 0.8⁴ > 1 / e > 0.8⁵, from lag 1


def test_horizon_leaves_out_the_direct_path():
  """Whatever D is, and without a state there is nothing else."""
  cell, params = lru(0.8)
  params["d"] = jnp.full(3, 100.0)
  found = diagnostics.horizon_by_gradient(cell, params, normal(3, 9, 3))
  np.testing.assert_allclose(found.curve[1:], 0.8 ** np.arange(8), rtol=1e-4)
  assert found.curve[0] > 10 and found.horizon == 6
  cell = memzoo.tiny("product_key")
  found = diagnostics.horizon_by_perturbation(
    cell, jax.jit(cell.init)(KEY), normal(2, 5, 6)
  )
  np.testing.assert_array_equal(found.curve, [1, 0, 0, 0, 0])
  assert found.horizon == 1


def test_gradient_horizon_is_the_impulse_response():
  """‖Re(C diag(λⁿ γ) B)‖, and D at lag 0, from the parameters."""
  cell, params = lru()
  params["d"] = jnp.ones(3)
  found = diagnostics.horizon_by_gradient(cell, params, normal(2, 7, 3))
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}
  eigenvalues = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
  b, c = p["b_re"] + 1j * p["b_im"], p["c_re"] + 1j * p["c_im"]
  for n, effect in enumerate(found.effect):
    response = b @ np.diag(np.exp(p["gamma_log"]) * eigenvalues**n) @ c
    response = response.real + (n == 0) * np.eye(3)
    np.testing.assert_allclose(effect, np.linalg.norm(response), rtol=1e-4)


@pytest.mark.parametrize(
  "measure",
  [diagnostics.horizon_by_gradient, diagnostics.horizon_by_perturbation],
)
def test_window_forgets_exactly(measure):
  cell, params = window(3)
  found = measure(cell, params, normal(2, 9, 6))
  assert (np.asarray(found.effect[:3]) > 1e-3).all()
  np.testing.assert_array_equal(found.effect[3:], 0)
  assert int(found.horizon) <= 3


def test_perturbation_effect_by_hand():
  cell, params = DelayLine(), {}
  xs = normal(2, 6, 4)  # y_T is x_{T−3}: that lag alone, by the other draw's
  found = diagnostics.horizon_by_perturbation(cell, params, xs)
  change = 2 * np.square(xs[0, 2] - xs[1, 2]).sum()
  want = math.sqrt(change / np.square(xs[:, 2]).sum())
  np.testing.assert_allclose(
    found.effect, want * (np.arange(6) == 3), rtol=1e-5
  )
  np.testing.assert_array_equal(found.curve, np.arange(6) == 3)
  assert int(found.horizon) == 4


# Read-outs, capacity, forgetting.


def test_ridge_finds_a_linear_map_and_equals_the_normal_equations():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1e-4, 1] + 3
  x[:, 4] = 7  # constant
  y = (x @ rng.normal(size=(5, 6)) + 2).reshape(60, 3, 2)
  found = readout.ridge(x, y, train=30, validation=10)
  np.testing.assert_allclose(found, y[40:], rtol=1e-6, atol=1e-6)

  # More features than rows: one of the strengths, solved the long way.
  x, y = rng.normal(size=(30, 40)), rng.normal(size=(30, 1, 2))
  found = readout.ridge(x, y, train=12, validation=9)[:, 0]
  mean, scale = x[:12].mean(0), x[:12].std(0)
  x, offset = (x - mean) / scale, y[:12, 0].mean(0)
  ways, errors = [], []
  for strength in readout.STRENGTHS:
    gram = x[:12].T @ x[:12] / 12 + strength * np.eye(40)
    w = np.linalg.solve(gram, x[:12].T @ (y[:12, 0] - offset) / 12)
    ways.append(x[21:] @ w + offset)
    errors.append(np.square(x[12:21] @ w + offset - y[12:21, 0]).mean())
  best = int(np.argmin(errors))
  np.testing.assert_allclose(found, ways[best], rtol=1e-4, atol=1e-4)


def test_information_of_a_symmetric_channel():
  """Fano's bound is exact where all errors are alike."""
  for size, accuracy in itertools.product((2, 5), (0.6, 0.9, 1.0)):
    joint = np.full((size, size), (1 - accuracy) / (size - 1) / size)
    np.fill_diagonal(joint, accuracy / size)
    kept = joint[joint > 0]
    mutual = (kept * np.log2(kept * size * size)).sum()
    np.testing.assert_allclose(
      readout.information(accuracy, size), mutual, atol=1e-9
    )
  np.testing.assert_array_equal(readout.information([0.25, 0.1], 4), 0)


def test_a_delay_line_holds_as_many_tokens_as_it_has_slots():
  found = diagnostics.tokens_held(
    DelayLine(), {}, KEY, lengths=(1, 3, 6), vocab_size=4, train=200, test=400
  )
  np.testing.assert_array_equal(found.length, [1, 3, 6])
  np.testing.assert_allclose(found.tokens[:2], [1, 3], rtol=1e-12)
  np.testing.assert_allclose(found.bits[:2], [2, 6], rtol=1e-9)
  assert found.state_size == 12
  np.testing.assert_allclose(found.bits_per_float, found.bits / 12)
  np.testing.assert_array_equal(found.accuracy[2, :3], 1)
  # Five standard deviations of guessing.
  np.testing.assert_allclose(found.accuracy[2, 3:], 0.25, atol=0.11)
  np.testing.assert_allclose(found.tokens[2], 3, atol=0.3)
  assert np.isnan(found.accuracy[0, 1:]).all()


def test_a_sum_loses_the_order():
  """Two tokens of two: known where they agree, a guess where they differ."""
  found = diagnostics.tokens_held(
    Total(), {}, KEY, lengths=(1, 2), vocabulary=jnp.eye(2), train=200, test=800
  )
  np.testing.assert_array_equal(found.accuracy[0, 0], 1)
  np.testing.assert_allclose(found.accuracy[1].mean(), 0.75, atol=0.05)


def test_forgetting_of_a_window_is_a_step():
  cell, params = window(3)
  found = diagnostics.forgetting(
    cell, params, KEY, lags=(0, 1, 2, 3, 5), before=2, vocab_size=4,
    train=200, test=400,
  )  # fmt: skip
  np.testing.assert_array_equal(found.accuracy[:3], 1)
  np.testing.assert_allclose(found.cosine[:3], 1, atol=1e-3)
  np.testing.assert_allclose(found.accuracy[3:], 0.25, atol=0.11)
  np.testing.assert_allclose(found.recovery, (found.accuracy * 4 - 1) / 3)
  assert (np.abs(found.cosine[3:]) < 0.3).all()
  assert found.horizon == 3


# Interference.


def delta(s, item):
  return delta_write(s, *item, jnp.float32(1))


def linear(s, item):
  return linear_write(s, *item)


def measure_op(write, *arguments):
  return jax.jit(lambda *rest: diagnostics.interference_of(write, read, *rest))(
    *arguments
  )


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("write", [linear, delta])
def test_orthogonal_keys_do_not_interfere(write):
  keys = jnp.asarray(np.linalg.qr(np.asarray(normal(5, 5)))[0])
  found = measure_op(write, jnp.zeros((5, 3)), (keys, normal(5, 3)), keys)
  np.testing.assert_allclose(found.relative, np.eye(5), atol=1e-5)
  assert max(found.retroactive, found.proactive, *found.lost) < 1e-5


def test_interference_of_skew_keys():
  """|k_i·k_j| times what is written: v_j, or v_j less what k_j held."""
  keys, values = unit(normal(4, 6)), normal(4, 3, seed=4)
  overlap = np.abs(keys @ keys.T)
  found = measure_op(linear, jnp.zeros((6, 3)), (keys, values), keys)
  size = np.linalg.norm(values, axis=-1)
  np.testing.assert_allclose(found.change, overlap * size, rtol=1e-4, atol=1e-5)
  own = [np.linalg.norm(values[: i + 1].T @ (keys @ keys[i])[: i + 1])
         for i in range(4)]  # fmt: skip
  relative = overlap * size / np.asarray(own)[:, None]
  np.testing.assert_allclose(found.relative, relative, rtol=1e-4)
  later = np.triu_indices(4, 1)
  np.testing.assert_allclose(
    found.retroactive, relative[later].mean(), rtol=1e-4
  )
  np.testing.assert_allclose(
    found.proactive, relative.T[later].mean(), rtol=1e-4
  )

  s, change = np.zeros((6, 3)), np.zeros((4, 4))
  for j in range(4):
    new = np.asarray(values[j]) - np.asarray(keys[j]) @ s
    change[:, j] = overlap[:, j] * np.linalg.norm(new)
    s = s + np.outer(keys[j], new)
  found = measure_op(delta, jnp.zeros((6, 3)), (keys, values), keys)
  np.testing.assert_allclose(found.change, change, rtol=1e-4, atol=1e-5)

  # Once the errors are corrected, the delta rule writes nothing.
  fitted = jnp.asarray(np.linalg.pinv(np.asarray(keys)) @ np.asarray(values))
  found = measure_op(delta, fitted, (keys, values), keys)
  np.testing.assert_allclose(found.relative, 0, atol=1e-5)


def test_interference_of_a_cell_is_that_of_its_steps():
  cell = memzoo.tiny("gru")
  params = jax.jit(cell.init)(KEY)
  items, queries = normal(3, 6), normal(3, 6, seed=4)
  found = diagnostics.interference(cell, params, items, queries)
  step = jax.jit(cell.step)
  state = cell.initial_state(params)
  reads = [[step(params, state, q)[1] for q in queries]]
  for x in items:
    state, _ = step(params, state, x)
    reads.append([step(params, state, q)[1] for q in queries])
  reads = np.asarray(reads)  # [J + 1, I, D]
  change = np.linalg.norm(np.diff(reads, axis=0), axis=-1).T
  np.testing.assert_allclose(found.change, change, rtol=1e-4, atol=1e-6)
  first = reads[[1, 2, 3], [0, 1, 2]]
  lost = np.linalg.norm(reads[-1] - first, axis=-1)
  lost = lost / np.linalg.norm(first, axis=-1)
  np.testing.assert_allclose(found.lost, lost, rtol=1e-4, atol=1e-6)


# Statistics, exponents, writes.


def test_ranks():
  rank = diagnostics.effective_rank
  np.testing.assert_allclose(rank(np.diag([2.0, 2, 2, 0])), 3)
  np.testing.assert_allclose(rank(np.diag([2.0, 1, 1])), 2**1.5)
  np.testing.assert_allclose(rank(np.zeros((2, 3, 4))), [0, 0])
  np.testing.assert_allclose(rank(np.ones((3, 5)) * 1j), 1)
  ratio = diagnostics.participation_ratio
  cross = np.asarray([[1, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])
  np.testing.assert_allclose(ratio(cross + 5), (1 + 4) ** 2 / (1 + 16))
  np.testing.assert_allclose(ratio(np.full((6, 3), 0.1)), 0)


def test_statistics_of_a_delay_line_and_of_a_vector():
  xs = jnp.stack([jnp.eye(4)] * 3)
  found = diagnostics.state_statistics(DelayLine(), {}, xs)
  count = np.minimum(np.arange(5), 3)
  np.testing.assert_allclose(found.norm["state"], np.sqrt(count))
  np.testing.assert_allclose(found.rank["state"], count, rtol=1e-6)
  assert found.largest == {"state": 3}
  cell = Diagonal()
  xs = normal(4, 2, 3)
  found = diagnostics.state_statistics(cell, cell.init(KEY), xs)
  assert list(found.rank) == ["0"], "integers and keys have none"
  want = [0, diagnostics.participation_ratio(xs[:, 0])]
  np.testing.assert_allclose(found.rank["0"][:2], want, rtol=1e-5)


def test_exponents_of_linear_systems():
  cell = Diagonal()
  found = diagnostics.lyapunov(
    cell, cell.init(KEY), normal(2, 60, 3), burn_in=40
  )
  np.testing.assert_allclose(
    found.exponents, np.log([1.1, 0.9, 0.5]), atol=1e-3
  )
  np.testing.assert_allclose(found.spread, 0, atol=1e-5)
  assert found.running.shape == (20, 3)
  cell, params = lru()
  found = diagnostics.lyapunov(cell, params, normal(1, 120, 3), burn_in=80)
  size = -np.exp(np.asarray(params["nu_log"]))
  want = np.sort(np.repeat(size, 2))[::-1]  # a complex number is two
  np.testing.assert_allclose(found.exponents, want, atol=0.02)
  cell = Total()  # adds: the identity on differences
  found = diagnostics.lyapunov(cell, {}, normal(2, 5, 2))
  np.testing.assert_allclose(found.exponents, 0, atol=1e-6)
  found = diagnostics.lyapunov(DelayLine(), {}, normal(1, 30, 4), count=2)
  assert (np.asarray(found.exponents) < -4).all()  # erased every three steps


def test_exponent_along_a_driven_trajectory():
  cell, params = Tanh(), {"w": jnp.float32(1.7)}
  xs = normal(1, 50, 1)
  found = diagnostics.lyapunov(cell, params, xs)
  h, logs = 0.0, []
  for x in np.asarray(xs[0, :, 0], np.float64):
    h = np.tanh(1.7 * h + x)
    logs.append(np.log(1.7 * (1 - h * h)))
  np.testing.assert_allclose(found.exponents, [np.mean(logs)], rtol=1e-3)
  running = np.cumsum(logs) / np.arange(1, 51)
  np.testing.assert_allclose(found.running[:, 0], running, rtol=1e-3, atol=1e-4)


def test_write_map_of_a_ring():
  cell, params = window(4)
  found = diagnostics.write_map(cell, params, normal(2, 9, 6))
  for name in ("ring/k", "ring/v"):
    assert found.difference[name].shape == (2, 9, 1, 4, 6)
    np.testing.assert_allclose(found.changed[name], 1 / 4)
    slot = np.abs(found.difference[name]).sum((2, 4)).argmax(-1)
    np.testing.assert_array_equal(slot, [np.arange(9) % 4] * 2)
    np.testing.assert_allclose(
      found.norm[name],
      np.linalg.norm(found.difference[name], axis=(-2, -1))[..., 0],
    )
  np.testing.assert_array_equal(found.difference["ring/count"], 1)
  cell, params = lru()
  found = diagnostics.write_map(cell, params, normal(1, 4, 3))
  np.testing.assert_array_equal(found.changed["h"], 1)
  assert np.iscomplexobj(found.difference["h"])


# Every cell.

CORES = {
  "horizon": ("_jacobians", "_changes"),
  "lyapunov": ("_logs",),
  "interference": ("_cell",),
}


def plain_params(cell):
  """Positive numbers in the shapes of the parameters: nothing to compile."""
  rng = np.random.default_rng(0)

  def leaf(spec):
    if jnp.issubdtype(spec.dtype, jnp.floating):
      return jnp.asarray(rng.uniform(0.1, 0.5, spec.shape), spec.dtype)
    return jnp.zeros(spec.shape, spec.dtype)

  return jax.tree.map(leaf, jax.eval_shape(cell.init, KEY))


def measures(cell, params):
  """{name: a small call of the diagnostic}: those of states, and all."""
  xs = diagnostics.draw(cell, KEY, 3, 6)
  row = jax.tree.map(lambda x: x[0], xs)
  sizes = dict(vocab_size=4, train=24, test=8)
  d = diagnostics
  states = {
    "state_statistics": lambda: d.state_statistics(cell, params, xs),
    "write_map": lambda: d.write_map(cell, params, xs),
    "interference": lambda: d.interference(cell, params, row),
    "lyapunov": lambda: d.lyapunov(cell, params, xs, count=3, burn_in=1),
    "tokens_held": lambda: d.tokens_held(
      cell, params, KEY, lengths=(1, 4), **sizes
    ),
    "forgetting": lambda: d.forgetting(
      cell, params, KEY, lags=(0, 1), before=2, **sizes
    ),
  }
  horizons = {
    "gradient": lambda: d.horizon_by_gradient(cell, params, xs),
    "perturbation": lambda: d.horizon_by_perturbation(cell, params, xs),
  }
  return states, {**states, **horizons}


def check_finite(result):
  if isinstance(result, diagnostics.TokensHeld):
    there = np.arange(result.accuracy.shape[1]) < result.length[:, None]
    assert np.isfinite(result.accuracy[there]).all()
    assert result.tokens.shape == result.bits.shape == result.length.shape
    result = result._replace(accuracy=0)
  for x in jax.tree.leaves(result):
    assert np.isfinite(x).all()


def supported(cell, name):
  return cell.differentiable or name not in ("gradient", "lyapunov")


@pytest.mark.parametrize("name", memzoo.names())
def test_every_cell(name, monkeypatch):
  """The diagnostics of states run on every cell, and the others trace."""
  cell = memzoo.tiny(name)
  params = plain_params(cell)
  states, every = measures(cell, params)
  if not jax.tree.leaves(cell.initial_state(params)):
    for call in states.values():
      with pytest.raises(ValueError, match=f"{name}.*no state"):
        call()
    return
  found = states["state_statistics"]()
  check_finite(found)
  assert {len(x) for x in (*found.norm.values(), *found.rank.values())} == {7}
  for leaf, ranks in found.rank.items():
    assert (ranks <= found.largest[leaf] + 1e-6).all()
  found = states["write_map"]()
  check_finite(found)
  floats = sum(
    x[0, 0].size * (2 if np.iscomplexobj(x) else 1)
    for name, x in found.difference.items()
  )
  assert floats >= memzoo.state_size(cell)
  for leaf, share in found.changed.items():
    assert share.shape == (3, 6) and (share >= 0).all() and (share <= 1).all()
    moved = found.difference[leaf].reshape(3, 6, -1)
    np.testing.assert_allclose(
      found.norm[leaf], np.linalg.norm(moved, axis=-1), rtol=1e-5
    )

  # What is compiled elsewhere is traced here, under strict promotion.
  shapes = {}
  for module, functions in CORES.items():
    module = sys.modules[f"memzoo.diagnostics.{module}"]
    for function in functions:
      core = getattr(module, function)

      def trace(*args, core=core, function=function):
        out = jax.eval_shape(lambda *rest: core(args[0], *rest), *args[1:])
        shapes[function] = jax.tree.map(lambda x: x.shape, out)
        return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), out)

      monkeypatch.setattr(module, function, trace)
  for measure in ("gradient", "perturbation", "interference", "lyapunov"):
    if supported(cell, measure):
      every[measure]()
  assert shapes["_changes"] == (6,) and shapes["_cell"].change == (6, 6)
  if cell.differentiable:
    assert shapes["_jacobians"] == (6,)
    assert shapes["_logs"] == (3, 6, min(3, memzoo.state_size(cell)))


@pytest.mark.slow
@pytest.mark.parametrize("name", memzoo.names())
def test_every_diagnostic_of_every_cell(name):
  cell = memzoo.tiny(name)
  params = jax.jit(cell.init)(KEY)
  states, every = measures(cell, params)
  held = bool(jax.tree.leaves(cell.initial_state(params)))
  for measure, call in every.items():
    if supported(cell, measure) and (held or measure not in states):
      check_finite(call())


# Errors.

LRU, PARAMS = lru()
XS = normal(2, 4, 3)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: diagnostics.horizon_by_gradient(LRU, PARAMS, XS[0]), r"\[B, T, 3\], got \(4, 3\)"),
    (lambda: diagnostics.horizon_by_perturbation(LRU, PARAMS, XS[:1]), "2 draws or more.*got 1"),
    (lambda: diagnostics.trajectory(LRU, PARAMS, (XS, XS)), "inputs are PyTree"),
    (lambda: diagnostics.trajectory(LRU, PARAMS, XS[:, :0]), "no inputs"),
    (lambda: diagnostics.lyapunov(LRU, PARAMS, XS, burn_in=4), "burn_in=4 leaves none of 4"),
    (lambda: diagnostics.lyapunov(LRU, PARAMS, XS, count=0), "count must be an integer, 1 or more, got 0"),
    (lambda: diagnostics.interference(LRU, PARAMS, XS[0], XS[0, :2]), "4 items and 2 queries"),
    (lambda: diagnostics.tokens_held(LRU, PARAMS, KEY, lengths=(4, 2)), "must increase"),
    (lambda: diagnostics.tokens_held(LRU, PARAMS, KEY, lengths=(0, 2)), "got 0"),
    (lambda: diagnostics.tokens_held(LRU, PARAMS, KEY, vocab_size=1), "vocab_size must be an integer, 2 or more"),
    (lambda: diagnostics.forgetting(LRU, PARAMS, KEY, lags=()), "must increase"),
    (lambda: diagnostics.forgetting(LRU, PARAMS, KEY, vocabulary=XS), r"\[T, 3\], got"),
    (lambda: diagnostics.tokens_held(full(), {}, KEY, state=jnp.zeros(3), lengths=(1, 9)), "9 inputs, holds at most 5"),
    (lambda: figures.write_map(diagnostics.write_map(LRU, PARAMS, XS), "c"), "no leaf 'c'; the state has h"),
  ],
)  # fmt: skip
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def full():
  return memzoo.make("window", d_model=6, capacity=5, sliding=False)


def test_no_gradient_is_said():
  @dataclasses.dataclass(frozen=True)
  class Hard(Total):
    differentiable = False

  for measure in (diagnostics.horizon_by_gradient, diagnostics.lyapunov):
    with pytest.raises(ValueError, match="Hard.*no gradient"):
      measure(Hard(), {}, normal(2, 4, 2))


# Figures and the program.


def arguments(**given):
  """The flags of the program, small."""
  values = flags.FlagValues()
  diagnose.define(values)
  small = dict(length=8, batch=2, train=24, test=8, vocab_size=4, d_model=3,
               items=4)  # fmt: skip
  values(["", *(f"--{name}={x}" for name, x in {**small, **given}.items())])
  return values


DRAWN = {
  "horizon_by_gradient", "horizon_by_perturbation", "tokens_held", "lyapunov",
  "forgetting", "interference", "state_statistics", "write_map",
}  # fmt: skip


def test_figures(monkeypatch):
  pyplot = "matplotlib.pyplot" in sys.modules
  from matplotlib.figure import Figure

  values = arguments(cell="lru", cell_options="d_state=4")
  cell, params, xs, words = diagnose.subject(values)
  table = diagnose.measure(cell, params, xs, words, values)
  assert set(table) == DRAWN
  public = {
    name for name, x in vars(figures).items()
    if callable(x) and name[0] != "_" and x.__module__ == figures.__name__
  }  # fmt: skip
  assert public == {draw.__name__ for draw, _ in table.values()}
  shared = ("horizon_by_gradient", "tokens_held", "forgetting", "lyapunov")
  for name, (draw, result) in table.items():
    check_finite(result)
    if name in shared:
      result = {"one": result, "two": result}
    figure = draw(result)
    assert isinstance(figure, Figure)
    for axis in figure.axes:
      if axis.get_label() != "<colorbar>":
        assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title()
        assert axis.has_data()
  assert ("matplotlib.pyplot" in sys.modules) == pyplot, "pyplot was imported"
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"pip install memzoo\[plot\]"):
    draw(result)


def test_program(tmp_path):
  """Numbers as JSON without NaN, and a picture for each diagnostic."""
  values = arguments(
    cell="lru", cell_options="d_state=4", workdir=tmp_path / "new"
  )
  diagnose.run(values)
  found = json.loads((tmp_path / "new/diagnose.json").read_text())
  assert found["cell"]["cell"] == "lru" and found["state_size"] == 8
  assert found["tokens_held"]["length"] == [1, 2, 4, 8]
  assert len(found["horizon_by_gradient"]["curve"]) == 8
  assert found["tokens_held"]["accuracy"][0][1:] == [None] * 7
  for name in DRAWN:
    assert found[name]
    picture = (tmp_path / f"new/{name}.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5_000
  assert any("tokens held" in line for line in diagnose.summary(found))
  for wrong, message in (
    (dict(cell="lru"), "--workdir is needed"),
    (dict(workdir=tmp_path), "one of --cell and --checkpoint"),
    (dict(checkpoint=tmp_path, workdir=tmp_path), "no run.flags"),
  ):
    with pytest.raises(ValueError, match=message):
      diagnose.run(arguments(**wrong))


@dataclasses.dataclass(frozen=True)
class Through(Total):
  """Gives what it gets."""

  def step(self, params, state, x):
    return state + x, x


def test_inputs_of_a_layer():
  """x₁ = x₀ + norm(x₀) reaches the second memory normed and convolved."""
  model = models.LanguageModel(
    Through(4), 3, 5, mlp_width=0, conv_size=1, rngs=nnx.Rngs(0)
  )
  tokens = np.asarray([[1, 2, 0, 4], [3, 3, 1, 0]], np.int32)
  cell, params, xs = diagnose.memory_inputs(model, tokens, 1)
  assert cell == Through(4) and params == {}
  rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
  taps = np.asarray(model.encoder.stack.blocks[0].conv[...])[:, 0]
  x = np.asarray(model.encoder.embedding[...])[tokens]
  x = x + rms(x) * taps[0]
  np.testing.assert_allclose(xs, rms(x) * taps[1], rtol=1e-3)
  with pytest.raises(ValueError, match="the model has 0 to 2: 3"):
    diagnose.memory_inputs(model, tokens, 3)


@pytest.mark.slow
def test_program_on_a_checkpoint(tmp_path):
  """The trained parameters of the layer asked for, and what reaches it."""
  values = flags.FlagValues()
  train.define(values)
  given = dict(
    cell="gru", task="mqar_small", d_model=4, depth=2, seed=3,
    task_options="num_test=4", model_options="mlp_width=0", workdir=tmp_path,
  )  # fmt: skip
  values(["", *(f"--{name}={x}" for name, x in given.items())])
  task, model = train.build(values)
  trained = jax.tree.map(lambda x: 2 * x + 1, checkpoint.variables(model))
  train.RunFlags(values).start(0)
  saved = checkpoint.Checkpoints(tmp_path, 1, {})
  saved.save(1, trained, {"step": jnp.ones(())}, {"best": None})
  saved.close()

  where = dict(checkpoint=tmp_path, workdir=tmp_path / "out")
  cell, params, xs, words = diagnose.subject(arguments(layer=1, **where))
  assert cell == memzoo.make("gru", d_model=4)
  drawn = model.encoder.stack.blocks[0].memory.values
  for name, x in params.items():
    np.testing.assert_allclose(x, 2 * drawn[name][1] + 1, rtol=1e-6)
  assert xs.shape == (2, 8, 4) and words.shape == (4, 4)
  training.load(tmp_path, model)
  inputs = task.batch(0, 0, 64, "test").inputs
  rows = diagnose.memory_inputs(model, inputs, 1)[2]
  np.testing.assert_array_equal(xs, rows[:2, :8])
  assert all((rows == word).all(-1).any() for word in words)
  with pytest.raises(ValueError, match="0 to 1: 2"):
    diagnose.subject(arguments(layer=2, **where))
