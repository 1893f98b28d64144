"""SkiM against Li et al. 2022 (arXiv:2201.10800), section 2 and figure 1."""

import functools

from checks import FORWARD, GRADIENT, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
from model_checks import call, no_dead_gradient, shaken, train
import numpy as np
import pytest

from memzoo.models.skim import MEMORIES, SkiM


def build(memory="hc", segment=4, depth=3):
  model = SkiM(
    3, 5, 2, depth=depth, segment=segment, memory=memory, rngs=nnx.Rngs(0)
  )
  return shaken(model, 0.2)


def inputs(length, rows=1):
  r = np.random.default_rng(1)
  return jnp.asarray(r.normal(size=(rows, length, 3)), jnp.float32)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def lstm(p, state, x):
  h, c = state
  i, f, g, o = np.split(x @ p["x"] + h @ p["h"] + p["b"], 4)
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
  h = sigmoid(o) * np.tanh(c)
  y = h @ p["out"] + p["out_bias"]
  y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * p["scale"] + p["shift"]
  return (h, c), y


def oracle(model, xs):
  """Layer by layer, segment by segment: figure 1, left to right."""
  p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))
  size, zero = model.segment, np.zeros(model.hidden)
  parts = [xs[s : s + size] for s in range(0, len(xs), size)]
  starts = [(zero, zero)] * len(parts)
  for layer in range(model.depth):
    ends = []
    for s, part in enumerate(parts):
      state, out = starts[s], []
      for x in part:
        state, y = lstm(p["seg"][layer], state, x)
        out.append(x + y)
      parts[s] = np.stack(out)
      ends.append(state)
    if layer == model.depth - 1:
      break
    starts, carried = [(zero, zero)], [(zero, zero)] * 2
    for end in ends[:-1]:
      new = [zero, zero]
      for j, kind in enumerate("hc"):
        if model.memory == "id":
          new[j] = end[j]
        elif kind in model.memory:
          carried[j], y = lstm(p["mem"][layer][kind], carried[j], end[j])
          new[j] = end[j] + y
      starts.append(tuple(new))
  x = np.concatenate(parts)
  x = np.where(x > 0, x, p["slope"] * x)
  return x @ p["out"] + p["out_bias"]


@pytest.mark.parametrize("memory", MEMORIES)
def test_paper_equation(memory):
  """Three segments and a half."""
  model, xs = build(memory), inputs(14)
  want = oracle(model, np.float64(xs[0]))
  for form in ("step", "segment"):
    ys = call(model, None, xs, implementation=form)[1]
    assert relative(ys[0], want) < FORWARD, form


MASK = np.ones((3, 13), bool)
MASK[0, :2], MASK[1, 5], MASK[2] = False, False, False
RESET = np.zeros((3, 13), bool)
RESET[0, [5, 6]] = RESET[1, 9] = RESET[2, 3] = True


def test_forms_agree_under_resets_and_gaps():
  """Values, state, which goes on from the middle of a segment, and gradients."""
  model, xs = build(), inputs(13, 3)
  begin, _ = call(model, None, inputs(6, 3)[:, ::-1])
  graph, params = nnx.split(model, nnx.Param)

  @functools.partial(jax.jit, static_argnames="form")
  def run(params, begin, xs, form):
    def loss(params, begin, xs):
      state, ys = nnx.merge(graph, params)(
        begin, xs, reset=RESET, mask=MASK, implementation=form, max_resets=2
      )
      floats = jax.tree.leaves((state.segment, state.memory))
      return wave(ys, *floats), (state, ys)

    return jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(
      params, begin, xs
    )

  grads, got = run(params, begin, xs, "segment")
  want_grads, want = run(params, begin, xs, "step")
  assert relative(got, want) < FORWARD
  floats = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == "f4"]
  assert relative(floats(grads), floats(want_grads)) < GRADIENT
  no_dead_gradient(grads[0])
  assert relative(jax.tree.map(lambda s: s[2], got[0]),
                  jax.tree.map(lambda s: s[2], begin)) == 0  # fmt: skip
  assert np.array_equal(np.any(got[1], -1), MASK)
  # A reset is a fresh start, and rows with more resets than said are NaN.
  alone = call(model, None, xs[1:2, 9:])[1]
  assert relative(got[1][1:2, 9:], alone) < FORWARD


@pytest.mark.nans
def test_more_resets_than_said():
  reset = jnp.ones((1, 9), bool)
  ys = call(build(), None, inputs(9), reset=reset, max_resets=1)[1]
  assert np.isfinite(ys[0, :4]).all() and np.isnan(ys[0, 5:]).all()


@pytest.mark.parametrize("form", ["step", "segment"])
def test_streams_cut_anywhere(form):
  model, xs = build(), inputs(13, 2)
  end, whole = call(model, None, xs, implementation=form)
  for cuts in ((4, 8), (3, 9), (1, 2, 12)):
    state, parts = None, []
    for first, last in zip((0, *cuts), (*cuts, 13)):
      state, ys = call(model, state, xs[:, first:last], implementation=form)
      parts.append(ys)
    assert relative(jnp.concatenate(parts, 1), whole) < FORWARD
    assert relative(state, end) < FORWARD


def test_causal_and_the_memory_skips_segments():
  """Exactly: nothing of later inputs; with one layer nothing of earlier
  segments, with two their ends."""
  xs = inputs(14)

  def seen(model):
    def late(xs):
      return wave(call(model, None, xs)[1][:, 9:11])

    return np.any(jax.grad(late)(xs)[0], axis=-1)

  np.testing.assert_array_equal(
    seen(build(depth=1)), [8 <= t <= 10 for t in range(14)]
  )
  np.testing.assert_array_equal(
    seen(build(depth=2)), [t <= 10 for t in range(14)]
  )


def test_learns_across_segments():
  """The sign of the first input, in all segments after its own."""
  model = SkiM(8, 8, 1, depth=2, segment=4, rngs=nnx.Rngs(0))

  def loss(model, key):
    xs = 0.5 * jax.random.normal(key, (32, 16, 8)).at[:, :, 4:].set(0.0)
    first = jnp.sign(xs[:, 0, 0])
    ys = model(None, xs.at[:, 0, 4].set(first))[1][:, 4:, 0]
    return jnp.mean(jnp.square(ys - first[:, None]))

  _, losses = train(model, loss, 400)
  assert losses[-20:].mean() < 0.15, losses[::40]


def test_wrong_arguments():
  with pytest.raises(ValueError, match="unknown memory 'ch'"):
    SkiM(2, 3, 1, memory="ch", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="segment must be an integer, 1"):
    SkiM(2, 3, 1, segment=0, rngs=nnx.Rngs(0))
  model, xs = build(), inputs(5)
  flags = jnp.zeros((1, 5), bool)
  for match, wrong, given in (
    (r"float \[B, T, 3\], got float32 \(1, 5, 2\)", xs[..., :2], {}),
    (r"mask must be bool \[1, 5\]", xs, dict(mask=flags[:, 1:])),
    ("unknown form 'scan'", xs, dict(implementation="scan")),
    ("needs max_resets", xs, dict(reset=flags, implementation="segment")),
  ):
    with pytest.raises(ValueError, match=match):
      model(None, wrong, **given)
