"""PredRNN against Wang et al. 2021 (arXiv:2103.09504), section 3."""

import functools

from checks import FORWARD, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
from model_checks import call, shaken
import numpy as np
import optax
import pytest

from memzoo.models.predrnn import PredRNN, reverse_schedule

FRAME = (4, 6, 1)


@functools.cache
def tiny():
  model = PredRNN(FRAME, hidden=3, depth=2, size=3, patch=2, rngs=nnx.Rngs(0))
  return shaken(model, 0.2)


def frames(length, rows=1, seed=1):
  r = np.random.default_rng(seed)
  return jnp.asarray(r.normal(size=(rows, length, *FRAME)), jnp.float32)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def conv(x, kernel):
  """x [H, W, I] ∗ kernel [F, F, I, O], place by place."""
  height, width, _ = x.shape
  half = kernel.shape[0] // 2
  padded = np.pad(x, ((half, half), (half, half), (0, 0)))
  out = np.zeros((height, width, kernel.shape[3]))
  for i in range(height):
    for j in range(width):
      patch = padded[i : i + kernel.shape[0], j : j + kernel.shape[1]]
      out[i, j] = np.tensordot(patch, kernel, 3)
  return out


def oracle(model, xs, given):
  """Predictions and the mean overlap of one row."""
  p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))
  n, depth = model.hidden, model.depth
  small = FRAME[0] // 2, FRAME[1] // 2
  hs = [np.zeros((*small, n)) for _ in range(depth)]
  cs = [np.zeros((*small, n)) for _ in range(depth)]
  m, out, overlaps = np.zeros((*small, n)), [], []
  for t, x in enumerate(xs):
    x = x if given[t] else out[-1]
    # 2 × 2 patches become channels.
    x = np.concatenate(
      [x[i::2, j::2] for i in range(2) for j in range(2)], axis=-1
    )
    for layer in range(depth):
      k = p["layers"][layer]
      x_all, h_all, m_all = (
        conv(x, k["x"]),
        conv(hs[layer], k["h"]),
        conv(m, k["m"]),
      )
      gates = lambda z, at: z[..., at * n : (at + 1) * n]
      i = sigmoid(gates(x_all, 0) + gates(h_all, 0))
      f = sigmoid(gates(x_all, 1) + gates(h_all, 1) + 1)
      g = np.tanh(gates(x_all, 2) + gates(h_all, 2))
      i2 = sigmoid(gates(x_all, 3) + gates(m_all, 0))
      f2 = sigmoid(gates(x_all, 4) + gates(m_all, 1) + 1)
      g2 = np.tanh(gates(x_all, 5) + gates(m_all, 2))
      cs[layer] = f * cs[layer] + i * g
      m = f2 * m + i2 * g2  # goes on to the layer above, then to the next frame
      both = np.concatenate([cs[layer], m], axis=-1)
      o = sigmoid(gates(x_all, 6) + gates(h_all, 3) + conv(both, k["o"]))
      x = hs[layer] = o * np.tanh(conv(both, k["out"]))
      for channel in range(n):
        a = conv(i * g, p["adapter"])[..., channel]
        b = conv(i2 * g2, p["adapter"])[..., channel]
        cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        overlaps.append(abs(cosine))
    y = conv(x, p["out"])
    frame = np.zeros(FRAME)
    for index in range(4):
      frame[index // 2 :: 2, index % 2 :: 2, 0] = y[..., index]
    out.append(frame)
  return np.stack(out), np.mean(overlaps)


@pytest.mark.parametrize("pattern", ["xxxxx", "xx.x."])
def test_paper_equation(pattern):
  """With all frames given, and with own predictions for some."""
  given = np.array([c == "x" for c in pattern])
  xs = frames(5)
  want, overlap = oracle(tiny(), np.float64(xs[0]), given)
  _, got, reports = call(tiny(), None, xs, given=given[None], reports=True)
  assert relative(got[0], want) < FORWARD
  np.testing.assert_allclose(reports["overlap"], overlap, rtol=1e-4)


MASK = np.array([[0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1]], bool)
RESET = np.array([[0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0]], bool)


def test_streams_frame_by_frame_under_resets_and_gaps():
  model, xs = tiny(), frames(7, 2)
  dirty = jnp.where(MASK[:, :, None, None, None], xs, 1e9)
  end, whole = call(model, None, dirty, mask=MASK, reset=RESET)
  state, parts = model.initial_state(2), []
  for t in range(7):
    column = lambda x, t=t: x[:, t : t + 1]
    state, y = call(
      model, state, column(xs), mask=column(MASK), reset=column(RESET)
    )
    parts.append(y[:, 0])
  assert relative(jnp.stack(parts, 1), whole) < FORWARD
  assert relative(state, end) < FORWARD
  np.testing.assert_array_equal(np.any(whole, (2, 3, 4)), MASK)
  # A gap is no frame, and a reset is a fresh start (at a gap it is not seen).
  alone = call(model, None, xs[:1, jnp.array([3, 5, 6])])[1]
  assert relative(whole[:1, jnp.array([3, 5, 6])], alone) < FORWARD
  alone = call(model, None, xs[1:, jnp.array([0, 1, 3, 4])])[1]
  assert relative(whole[1:, jnp.array([0, 1, 3, 4])], alone) < FORWARD


def test_causal_and_gradients():
  """Exactly: nothing of later frames nor through a reset; and every parameter
  has a finite gradient, of the loss with the overlap in it."""
  model, xs = tiny(), frames(6)
  graph, params = nnx.split(model, nnx.Param)
  reset = jnp.arange(6)[None] == 2

  @jax.jit
  def run(params, xs):
    def loss(params, xs):
      _, ys, reports = nnx.merge(graph, params)(
        None, xs, reset=reset, reports=True
      )
      return wave(ys[:, 2:5]) + reports["overlap"]

    def late(xs):
      return wave(nnx.merge(graph, params)(None, xs, reset=reset)[1][:, 2:5])

    return jax.grad(loss)(params, xs), jax.grad(late)(xs)

  grads, g = run(params, xs)
  for path, p in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(p).all() and np.abs(p).max() > 0, path
  seen = np.any(g[0], axis=(1, 2, 3))
  np.testing.assert_array_equal(seen, [False, False, True, True, True, False])


def test_memory_zigzags():
  """What the top layer writes into M reaches the bottom layer at the next
  frame: with H and C of all layers cut, the state still tells of the past."""
  model, xs = tiny(), frames(2)
  state, _ = call(model, None, xs[:, :1])
  zero = lambda many: jax.tree.map(jnp.zeros_like, many)
  cut = state._replace(h=zero(state.h), c=zero(state.c))
  fresh = model.initial_state(1)
  _, kept = call(model, cut, xs[:, 1:])
  _, new = call(model, fresh, xs[:, 1:])
  assert relative(kept, new) > 0.01
  _, gone = call(model, cut._replace(m=fresh.m), xs[:, 1:])
  assert relative(gone, new) == 0


def test_reverse_schedule():
  """0.5 → 1 over the context, 0.5 → 0 after it; the first is always given."""
  share = lambda step: np.mean(
    reverse_schedule(
      jax.random.key(0), step, 4000, 3, 6, first=100, second=200, alpha=50.0
    ),
    axis=0,
  )
  for step, context, later in (
    (0, 0.5, 0.5), (150, 1 - 0.5 * np.exp(-1), 0.25), (200, 1, 0), (900, 1, 0),
  ):  # fmt: skip
    got = share(step)
    assert got[0] == 1
    np.testing.assert_allclose(got[1:3], context, atol=0.03)
    np.testing.assert_allclose(got[3:], later, atol=0.03)
  with pytest.raises(ValueError, match="1 <= context <= length"):
    reverse_schedule(jax.random.key(0), 0, 2, 7, 6)


def blobs(key, rows, length, size=6):
  """A blob that moves by one place a frame, around the edges."""
  start, way = jax.random.randint(key, (2, rows, 1, 2), 0, 12)
  turn = jnp.array([[0, 1], [1, 0], [0, -1], [-1, 0]])[way[..., 0] % 4]
  at = (start + turn * jnp.arange(length)[:, None]) % size
  line = jnp.arange(size)
  away = lambda x: (line - x[..., None] + size // 2) % size - size // 2
  near = lambda x: jnp.exp(-0.7 * jnp.square(away(x).astype(jnp.float32)))
  image = near(at[..., 0])[..., :, None] * near(at[..., 1])[..., None, :]
  return image[..., None]


def test_learns_a_moving_blob():
  """Better by far than to repeat the last frame, also two frames ahead with
  its own prediction for a frame; trained with reverse scheduled sampling and
  the overlap in the loss, which falls."""
  model = PredRNN((6, 6, 1), hidden=6, depth=2, size=3, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model, nnx.Param)
  optimizer = optax.adam(2e-2)
  steps = 100

  def loss(params, key, step):
    xs = blobs(key, 8, 6)
    given = reverse_schedule(
      key, step, 8, 4, 5, first=steps // 4, second=steps // 2, alpha=20.0
    )
    _, ys, reports = nnx.merge(graph, params)(
      None, xs[:, :-1], given=given, reports=True
    )
    error = jnp.mean(jnp.square(ys - xs[:, 1:]))
    return error + 0.01 * reports["overlap"], reports["overlap"]

  def step(carry, inputs):
    params, state = carry
    (_, overlap), grads = jax.value_and_grad(loss, has_aux=True)(
      params, *inputs
    )
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), overlap

  @jax.jit
  def train(params):
    inputs = jax.random.split(jax.random.key(1), steps), jnp.arange(steps)
    carry, overlaps = jax.lax.scan(
      step, (params, optimizer.init(params)), inputs
    )
    return carry[0], overlaps

  params, overlaps = train(nnx.to_pure_dict(params))
  xs = blobs(jax.random.key(2), 32, 6)
  given = jnp.arange(5)[None].repeat(32, 0) < 4
  _, ys = call(nnx.merge(graph, params), None, xs[:, :-1], given=given)
  error = lambda a, b: float(jnp.mean(jnp.square(a - b)))
  for t in (3, 4):
    assert error(ys[:, t], xs[:, t + 1]) < 0.3 * error(
      xs[:, t], xs[:, t + 1]
    ), t
  assert overlaps[-10:].mean() < overlaps[:10].mean()


def test_wrong_arguments():
  make = lambda **o: PredRNN(**{"frame": FRAME, "rngs": nnx.Rngs(0), **o})
  with pytest.raises(ValueError, match="patch=4 must divide a frame of 4 × 6"):
    make(patch=4)
  with pytest.raises(ValueError, match="size must be odd, got 4"):
    make(size=4)
  flags = jnp.zeros((1, 2), bool)
  for match, wrong, given in (
    (r"float \[B, T, 4, 6, 1\], got float32 \(1, 2", frames(2)[..., :1, :], {}),
    ("given: mask must be bool", frames(2), dict(given=flags[:, 1:])),
    (r"reset must be bool \[1, 2\]", frames(2), dict(reset=flags[:, 1:])),
  ):
    with pytest.raises(ValueError, match=match):
      tiny()(None, wrong, **given)
