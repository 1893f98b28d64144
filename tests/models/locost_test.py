"""LOCOST (arXiv:2401.17919, section 3) and the decoder of T5."""

import functools

from checks import FORWARD, relative
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memzoo import models
from memzoo.models.locost import BiSSM, Locost, bucket, two_way_convolution

V = 9
TINY = dict(
  d_model=6, depth=2, d_state=4, num_heads=2, mlp_width=5, capacity=7,
  buckets=4, furthest=5,
)  # fmt: skip


def shaken(model, scale=0.1):
  r = np.random.default_rng(3)
  noise = lambda x: jnp.asarray(x + scale * r.normal(size=x.shape), jnp.float32)
  return jax.tree.map(noise, model)


@functools.cache
def tiny():
  return shaken(Locost(V, **TINY, rngs=nnx.Rngs(0)))


def values(module):
  return jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(module)))


call = jax.jit(lambda model, state, tokens, mask=None: model(
  state, tokens, mask=mask
))  # fmt: skip
read = jax.jit(lambda model, document, mask=None: model.read(document, mask))


def test_two_way_convolution():
  r = np.random.default_rng(0)
  for length in (1, 2, 7):
    x, f, b = r.normal(size=(3, length, 2))
    want = np.zeros((length, 2))
    for t in range(length):
      for s in range(length):
        want[t] += f[t - s] * x[s] if s <= t else 0
        want[t] += b[s - t] * x[s] if s >= t else 0
    got = two_way_convolution(*(jnp.float32(y) for y in (x, f, b)))
    assert relative(got, want) < FORWARD
  with pytest.raises(ValueError, match=r"backward must be floating \[7, 2\]"):
    two_way_convolution(x, f, b[1:])


def gelu(z):
  return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def rms(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def mlp(p, x):
  gate, up = np.split(rms(x, p["norm"]["scale"]) @ p["inner"]["up"], 2, -1)
  return x + (gelu(gate) * up) @ p["inner"]["down"]


def ssm(p, u):
  """The state spaces as recurrences, channel by channel: with A's pair
  conjugate, h ← exp(ΔA) h + (exp(ΔA) − 1) / A B k, and 2 Re C h is read."""
  k, q = u @ p["k"] + p["k_bias"], u @ p["q"] + p["q_bias"]
  a = -np.exp(p["a_log"]) + 1j * p["a_im"]
  decay = np.exp(np.exp(p["dt_log"])[:, None] * a)
  write = (decay - 1) / a * (p["b_re"] + 1j * p["b_im"])
  c = p["c_re"] + 1j * p["c_im"]
  y = p["d"] * k
  for way, order in enumerate((range(len(u)), reversed(range(len(u))))):
    h = np.zeros_like(a)
    for t in order:
      h = decay * h + write * k[t][:, None]
      y[t] += 2 * np.sum(c[way] * h, axis=1).real
  return (q * y) @ p["out"] + p["out_bias"]


def test_encoder_mixer_is_two_recurrences():
  layer = shaken(BiSSM(3, 6, rngs=nnx.Rngs(0)))
  u = np.random.default_rng(1).normal(size=(11, 3))
  got = jax.jit(lambda u: layer(u, jnp.ones((1, 11), bool)))(
    jnp.float32(u)[None]
  )
  assert relative(got[0], ssm(values(layer), u)) < FORWARD


def attention(p, x, y, heads, bias):
  """x [T, D] to y [S, D]; bias [T, S, H], −inf where nothing is visible."""
  cut = lambda z: z.reshape(len(z), heads, -1)
  q, k, v = cut(x @ p["q"]), cut(y @ p["k"]), cut(y @ p["v"])
  w = np.exp(np.einsum("thk,shk->tsh", q, k) + bias)
  w /= w.sum(1, keepdims=True)
  return np.einsum("tsh,shk->thk", w, v).reshape(len(x), -1) @ p["out"]


def t5_bucket(n, buckets, furthest):
  exact = buckets // 2
  if n < exact:
    return max(n, 0)
  far = np.log(n / exact) / np.log(furthest / exact) * (buckets - exact)
  return min(exact + int(far), buckets - 1)


def test_bucket():
  got = bucket(jnp.arange(-3, 200), 32, 128)
  want = [t5_bucket(n, 32, 128) for n in range(-3, 200)]
  assert np.mean(got == np.array(want)) > 0.99  # rounding at the borders
  assert np.abs(got - np.array(want)).max() <= 1


def layers(p):
  """The parts of each layer, of lists as they come as dicts by place."""
  rows = lambda x: [x[n] for n in sorted(x)] if isinstance(x, dict) else x
  return [rows(row) for row in rows(p)]


def oracle(model, document, text):
  p, heads = values(model), model.num_heads
  x = p["embedding"][document]
  for first, second in layers(p["encoder"]):
    x = mlp(second, x + ssm(first["inner"], rms(x, first["norm"]["scale"])))
  memory = rms(x, p["encoder_norm"]["scale"])
  x, length = p["embedding"][text], len(text)
  bias = np.full((length, length, heads), -np.inf)
  for t in range(length):
    for s in range(t + 1):
      bias[t, s] = p["bias"][t5_bucket(t - s, model.buckets, model.furthest)]
  for listen, look, last in layers(p["decoder"]):
    u = rms(x, listen["norm"]["scale"])
    x = x + attention(listen["inner"], u, u, heads, bias)
    u = rms(x, look["norm"]["scale"])
    x = mlp(last, x + attention(look["inner"], u, memory, heads, 0.0))
  return rms(x, p["decoder_norm"]["scale"]) @ p["head"]["kernel"]


def draw(shape, seed):
  return jax.random.randint(jax.random.key(seed), shape, 0, V)


def test_paper_equation():
  document, text = draw((1, 8), 1), draw((1, 6), 2)
  _, logits = call(tiny(), read(tiny(), document), text)
  want = oracle(tiny(), np.asarray(document)[0], np.asarray(text)[0])
  assert relative(logits[0], want) < FORWARD


def test_streams_the_text_with_gaps_and_padding():
  """Token by token is the whole call; a gap is no token, in the document as in
  the text, and what stands there is not read."""
  model, document, text = tiny(), draw((2, 8), 1), draw((2, 7), 2)
  there = jnp.array([[0, 0, 1, 1, 1, 0, 1, 1], [1] * 8], bool)
  mask = jnp.array([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 0]], bool)
  begin = read(model, jnp.where(there, document, -5), there)
  end, whole = call(model, begin, jnp.where(mask, text, 99), mask)
  state, rows = begin, []
  for t in range(7):
    state, row = call(model, state, text[:, t : t + 1], mask[:, t : t + 1])
    rows.append(row[:, 0])
  assert relative(jnp.stack(rows, 1), whole) < FORWARD
  assert relative(state, end) < FORWARD
  np.testing.assert_array_equal(np.any(whole, -1), mask)
  for row in range(2):
    alone = read(model, document[row : row + 1, there[row]])
    _, logits = call(model, alone, text[row : row + 1, mask[row]])
    assert relative(whole[row][mask[row]], logits[0]) < FORWARD
  _, nothing = call(model, model.initial_state(2), text)
  assert np.isfinite(nothing).all()


def test_learns_and_generates():
  """What stands behind the mark, anywhere in the document: the encoder brings
  neighbours together, the decoder finds the place."""
  mark, length = V - 1, 12
  model = Locost(
    V, d_model=16, depth=1, d_state=4, num_heads=2, mlp_width=16, capacity=4,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  graph, params = nnx.split(model, nnx.Param)
  optimizer = optax.adam(1e-2)

  def batch(key, rows):
    k_text, k_place = jax.random.split(key)
    document = jax.random.randint(k_text, (rows, length), 1, mark)
    place = jax.random.randint(k_place, (rows,), 0, length - 1)
    index = jnp.arange(rows)
    return document.at[index, place].set(mark), document[index, place + 1]

  def loss(params, key):
    model = nnx.merge(graph, params)
    document, target = batch(key, 32)
    start = jnp.zeros((32, 1), jnp.int32)
    _, logits = model(model.read(document), start)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits[:, 0], target
    ).mean()

  def step(carry, key):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  @jax.jit
  def train(params):
    keys = jax.random.split(jax.random.key(1), 500)
    carry, losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return carry[0], losses

  params, losses = train(nnx.to_pure_dict(params))
  assert losses[-20:].mean() < 0.3 * losses[0], losses[::50]
  model = nnx.merge(graph, params)
  document, target = batch(jax.random.key(2), 64)
  out = models.generate(
    model, read(model, document), jnp.zeros((64, 1), jnp.int32), 1,
    temperature=0,
  )  # fmt: skip
  assert np.mean(out[:, 0] == target) > 0.8


def test_gradients_are_finite_and_reach_all():
  graph, params = nnx.split(tiny(), nnx.Param)
  document, text = draw((1, 5), 1), draw((1, 4), 2)

  @jax.jit
  @jax.grad
  def grad(params):
    model = nnx.merge(graph, params)
    logits = model(model.read(document), text)[1]
    return jnp.sum(jnp.sin(logits))

  grads = grad(nnx.to_pure_dict(params))
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def test_wrong_arguments():
  make = lambda **o: Locost(V, **{**TINY, **o}, rngs=nnx.Rngs(0))
  for match, options in (
    ("even d_state", dict(d_state=3)),
    ("num_heads=4 must divide d_model=6", dict(num_heads=4)),
    ("buckets must be even", dict(buckets=3)),
    ("capacity must be an integer, 1", dict(capacity=0)),
  ):
    with pytest.raises(ValueError, match=match):
      make(**options)
  state = read(tiny(), draw((1, 5), 1))
  with pytest.raises(ValueError, match="got 8 inputs, holds at most 7"):
    tiny()(state, draw((1, 8), 1))
  with pytest.raises(ValueError, match=r"document must be integer tokens"):
    tiny().read(jnp.ones((1, 3)))
  with pytest.raises(ValueError, match=r"mask must be bool \[1, 3\]"):
    tiny()(state, draw((1, 3), 1), mask=jnp.ones((1, 2), bool))
