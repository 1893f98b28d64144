"""LMUFormer (arXiv:2402.04882) against its layers, plain and in spikes."""

import functools

from checks import FORWARD, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
import model_checks
from model_checks import call, no_dead_gradient
import numpy as np
import optax
import pytest
import scipy.signal
import scipy.special

from memzoo.models.layers import Buffer
from memzoo.models.lmuformer import DELAY, LMUFormer

TINY = dict(d_input=3, num_classes=4, d_model=5, theta=6.0, mlp_width=7)


@functools.cache
def tiny(spiking=False, depth=1):
  """Nothing at its starting value; neurons that do fire."""
  model = LMUFormer(**TINY, depth=depth, spiking=spiking, rngs=nnx.Rngs(0))
  r = np.random.default_rng(3)
  noise = lambda x: jnp.asarray(x + 0.2 * r.normal(size=x.shape), jnp.float32)
  graph, params, buffers = nnx.split(model, nnx.Param, Buffer)
  params = jax.tree.map(noise, params)
  buffers = jax.tree.map(lambda x: jnp.abs(noise(x)), buffers)
  names = ("shift", "scale") if spiking else ("encode_bias",)
  lift = lambda path, x: x + 1.0 if path[-2].key in names else x
  params = jax.tree_util.tree_map_with_path(lift, params)
  if not spiking:
    return nnx.merge(graph, params, buffers)

  @jax.jit
  def settle(buffers):
    def once(buffers, _):
      model = nnx.merge(graph, params, buffers)
      model.refresh(inputs(60, 4, 9))
      return nnx.state(model, Buffer), None

    return jax.lax.scan(once, buffers, length=40)[0]

  return nnx.merge(graph, params, settle(buffers))


def inputs(length, rows=1, seed=1):
  r = np.random.default_rng(seed)
  return jnp.asarray(r.normal(size=(rows, length, 3)), jnp.float32)


finish = jax.jit(lambda model, state: model.finish(state))
classify = jax.jit(lambda model, xs, **given: model.classify(xs, **given))


def lif(xs, threshold=1.0):
  """Spikes of neurons with τ = 2: xs [T, N]."""
  v, out = np.zeros(xs.shape[1]), []
  for x in xs:
    v = v + (x - v) / 2
    s = (v >= threshold).astype(float)
    v = v * (1 - s)
    out.append(s)
  return np.stack(out)


def bn(p, x):
  return (x - p["mean"]) / np.sqrt(p["variance"] + 1e-5) * p["scale"] + p[
    "shift"
  ]


def sn(p, x, threshold=1.0):
  return lif(bn(p["norm"], x), threshold)


def linear(p, x):
  return x @ p["kernel"] + p.get("bias", 0.0)


def conv(p, x):
  """Three taps, centred, zeros around."""
  padded = np.pad(x, ((1, 1), (0, 0)))
  taps = p["kernel"].reshape(3, x.shape[1], -1)
  return np.stack([np.einsum("ki,kio->o", padded[t : t + 3], taps)
                   for t in range(len(x))])  # fmt: skip


def legendre(us, order, theta):
  """m_t = Ā m_{t−1} + B̄ u_t, discretised by another's hand."""
  q = np.arange(order)
  i, j = np.meshgrid(q, q, indexing="ij")
  r = (2 * q + 1)[:, None] / theta
  a = r * np.where(i < j, -1, (-1.0) ** (i - j + 1))
  b = r * (-1.0) ** q[:, None]
  a, b, *_ = scipy.signal.cont2discrete(
    (a, b, np.ones((1, order)), np.zeros((1, 1))), 1.0, "zoh"
  )
  m, out = np.zeros(order), []
  for u in us:
    m = a @ m + b[:, 0] * u
    out.append(m)
  return np.stack(out)


def relu(x):
  return np.maximum(x, 0)


def gelu(x):
  return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def values(model):
  take = lambda x: x if isinstance(x, dict) else np.asarray(x, np.float64)
  p = jax.tree.map(take, nnx.to_pure_dict(nnx.state(model)))
  rows = lambda x: [x[n] for n in sorted(x)] if isinstance(x, dict) else x
  return p, rows


def plain(model, x):
  """Features [N, D] of one sequence [N, d_input]."""
  p, rows = values(model)
  convs, norms = rows(p["embedding"]["kernels"]), rows(p["embedding"]["acts"])
  for kernel, norm in zip(convs[:4], norms):
    x = bn(norm, relu(conv(kernel, x)))
  x = x + conv(convs[4], x)
  for block in rows(p["blocks"]):
    memory, norms = block["memory"]["params"], rows(block["norms"])
    u = relu(x @ memory["encode"] + memory["encode_bias"])[:, 0]
    m = legendre(u, len(memory["memory"]), TINY["theta"])
    h = relu(m @ memory["memory"] + x @ memory["input"] + memory["bias"])
    x = x + bn(norms[0], linear(block["out"], h))
    h = gelu(bn(norms[1], linear(block["up"], x)))
    x = x + relu(bn(norms[2], linear(block["down"], h)))
  return x, linear(p["head"], x)


def spikes(model, x):
  p, rows = values(model)
  convs, acts = rows(p["embedding"]["kernels"]), rows(p["embedding"]["acts"])
  for kernel, act in zip(convs[:3], acts):
    x = sn(act, conv(kernel, x))
  x = conv(convs[3], x)
  x = x + conv(convs[4], sn(acts[3], x))
  fired = []
  for block in rows(p["blocks"]):
    memory, acts = block["memory"]["params"], rows(block["acts"])
    s = sn(acts[0], x, 0.5)
    u = sn(acts[1], s @ memory["encode"] + memory["encode_bias"])
    m = sn(acts[2], legendre(u[:, 0], len(memory["memory"]), TINY["theta"]))
    h = m @ memory["memory"] + s @ memory["input"] + memory["bias"]
    h = sn(acts[3], h)
    x = x + bn(block["norm"], linear(block["out"], h))
    up = sn(acts[5], linear(block["up"], sn(acts[4], x)))
    x = x + linear(block["down"], up)
    fired += [s, u, m, h, up]
  rates = [np.mean(s) for s in fired]
  assert min(rates) > 0.05 and max(rates) < 0.95, rates
  s = sn(p["act"], x)
  return s, linear(p["head"], s)


@pytest.mark.parametrize("spiking", [False, True])
def test_paper_equation(spiking):
  """Logits so far as they come, and those of the whole sequence."""
  model, xs = tiny(spiking, 2), inputs(13)
  _, logits = (spikes if spiking else plain)(model, np.float64(xs[0]))
  mean = np.cumsum(logits, 0) / np.arange(1, 14)[:, None]
  assert relative(classify(model, xs)[0], mean[-1]) < FORWARD
  state, known = call(model, None, xs)
  assert not np.any(known[:, :DELAY])
  assert relative(known[0, DELAY:], mean[:-DELAY]) < FORWARD
  assert relative(finish(model, state)[0], mean[-1]) < FORWARD


MASK = np.ones((3, 15), bool)
MASK[0, :2] = MASK[0, 7] = MASK[1, 9] = MASK[1, 14] = False
RESET = np.zeros((3, 15), bool)
RESET[0, 8] = RESET[1, 3] = RESET[1, 11] = True


@pytest.mark.parametrize("spiking", [False, True])
def test_streams_under_resets_and_gaps(spiking):
  """Token by token and at once; a reset drops what was not told."""
  model, xs = tiny(spiking), inputs(15, 3)
  given = dict(mask=MASK, reset=RESET)
  dirty = jnp.where(MASK[..., None], xs, 1e9)
  end, whole = model_checks.streams(model, dirty, prompt=False, **given)
  # The last sequence of each row alone; that of row 1 has three tokens, of
  # which `finish` alone tells.
  last = MASK & (np.arange(15) >= np.array([[8], [11], [0]]))
  alone = call(model, None, xs, mask=last, reset=RESET & False)[1]
  assert relative(jnp.where(last[..., None], whole, 0), alone) < FORWARD
  want = classify(model, xs, mask=last)
  assert relative(finish(model, end), want) < FORWARD


def test_looks_ahead_no_further_than_its_delay():
  """Exactly: the logits of token n + DELAY tell of n, and of nothing later."""
  model, xs = tiny(), inputs(12)
  state, end = call(model, None, xs)
  other = xs.at[:, 9:].set(5.0)
  np.testing.assert_array_equal(end[:, :9], call(model, None, other)[1][:, :9])
  assert np.any(end[:, 9] != call(model, None, other)[1][:, 9])
  shapes = [s.shape for s in jax.tree.leaves(state)]
  assert (1, 1, 5) in shapes and max(map(np.prod, shapes)) <= 2 * 5


@pytest.mark.parametrize("spiking", [False, True])
def test_gradients_are_finite_and_none_dead(spiking):
  model, xs = tiny(spiking), inputs(9, 2)
  graph, params, buffers = nnx.split(model, nnx.Param, Buffer)
  mask = jnp.ones((2, 9), bool).at[1, 6:].set(False)

  @jax.jit
  @jax.grad
  def grad(params):
    model = nnx.merge(graph, params, buffers)
    return wave(model.classify(xs, mask=mask))

  grads = nnx.to_pure_dict(grad(params))
  no_dead_gradient(grads)


def test_batch_norm_of_what_is_there():
  """In training by the call's own statistics, without gaps; the averages move
  a tenth of the way."""
  model, xs = tiny(), inputs(8, 3)
  norm = model.blocks[0].norms[0]
  mask = np.arange(8) < np.array([[8], [5], [6]])
  x = np.random.default_rng(0).normal(2.0, 3.0, (3, 8, 5))
  own = x[mask]
  want = (x - own.mean(0)) / np.sqrt(own.var(0) + 1e-5)
  want = want * np.float64(norm.scale[...]) + np.float64(norm.shift[...])
  got = norm(jnp.float32(x), mask, "train")
  assert relative(got[mask], want[mask]) < FORWARD

  @jax.jit
  def refresh(model):
    model.refresh(xs, mask=mask)
    return nnx.state(model, Buffer)

  first = lambda m: m["embedding"]["acts"][0]
  before = first(nnx.to_pure_dict(nnx.state(model, Buffer)))
  after = first(nnx.to_pure_dict(refresh(model)))
  kernel = values(model)[0]["embedding"]["kernels"][0]
  rows = [np.float64(x[m]) for x, m in zip(xs, mask)]
  seen = np.concatenate([relu(conv(kernel, row)) for row in rows])
  move = lambda old, new: old + 0.1 * (new - old)
  assert relative(after["mean"], move(before["mean"], seen.mean(0))) < FORWARD
  want = move(before["variance"], seen.var(0, ddof=1))
  assert relative(after["variance"], want) < FORWARD


@pytest.mark.parametrize("spiking", [False, True])
def test_learns_from_the_start_of_a_sequence(spiking):
  """Which of two ramps began a noisy sequence; batch norm in training, its
  averages when used, and a stream that ends with `finish`."""
  model = LMUFormer(
    2, 2, d_model=8, theta=24.0, mlp_width=16, spiking=spiking,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  graph, params, buffers = nnx.split(model, nnx.Param, Buffer)
  optimizer = optax.adam(1e-2)

  def batch(key):
    k_class, k_noise = jax.random.split(key)
    label = jax.random.bernoulli(k_class, shape=(32,)).astype(jnp.int32)
    time = jnp.arange(20, dtype=jnp.float32)
    ramp = jnp.where(time < 4, time - 1.5, 0.0)
    sign = 2.0 * label.astype(jnp.float32) - 1
    xs = 0.5 * jax.random.normal(k_noise, (32, 20, 2))
    return xs.at[..., 0].add(sign[:, None] * ramp), label

  def loss(params, buffers, key):
    xs, label = batch(key)
    logits = nnx.merge(graph, params, buffers).classify(xs, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

  def step(carry, key):
    params, buffers, state = carry
    grads = jax.grad(loss)(params, buffers, key)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
    model = nnx.merge(graph, params, buffers)
    model.refresh(batch(key)[0])
    return (params, nnx.state(model, Buffer), state), None

  @jax.jit
  def train(params, buffers):
    carry = params, buffers, optimizer.init(params)
    keys = jax.random.split(jax.random.key(1), 120)
    return jax.lax.scan(step, carry, keys)[0][:2]

  model = nnx.merge(graph, *train(params, buffers))
  xs, label = batch(jax.random.key(2))
  state, _ = call(model, None, xs[:, :11])
  state, _ = call(model, state, xs[:, 11:])
  right = jnp.argmax(finish(model, state), -1) == label
  assert np.mean(right) > 0.9


def test_wrong_arguments():
  make = lambda **o: LMUFormer(**{**TINY, **o}, rngs=nnx.Rngs(0))
  for match, options in (
    ("depth must be an integer, 1", dict(depth=0)),
    ("mlp_width must be an integer", dict(mlp_width=0)),
    ("order must be a positive integer, got 0", dict(order=0)),
    ("theta must be above 0", dict(theta=0.0)),
  ):
    with pytest.raises(ValueError, match=match):
      make(**options)
  with pytest.raises(
    ValueError, match=r"float \[B, T, 3\], got float32 \(1, 4"
  ):
    tiny()(None, inputs(4)[..., :2])
  with pytest.raises(ValueError, match=r"mask must be bool \[1, 4\]"):
    tiny().classify(inputs(4), mask=jnp.ones((1, 3), bool))
