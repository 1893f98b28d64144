"""Griffin and Hawk (arXiv:2402.19427, section 2)."""

from flax import nnx
import jax
import model_checks
from model_checks import next_token_loss, no_dead_gradient
import pytest

from memzoo import models
from memzoo.models import griffin

V = 7
TINY = dict(d_model=8, d_rnn=6, num_heads=2, window=4, gate_heads=2)
FAR, NEAR = "rg_lru", "window"


def build(hybrid, vocab_size=V):
  return models.LanguageModel(
    hybrid.cells, hybrid.depth, vocab_size, **hybrid.options, rngs=nnx.Rngs(0)
  )


@pytest.mark.parametrize(
  "hybrid, names",
  (
    (griffin.griffin(depth=6, **TINY), [FAR, FAR, NEAR] * 2),
    (griffin.griffin(depth=5, **TINY), [FAR, FAR, NEAR, FAR, FAR]),
    (griffin.hawk(8, 4), [FAR] * 4),
  ),
)
def test_the_order_is_the_papers(hybrid, names):
  """A token passes the layers in this order, a GeGLU of 3 D after each."""
  stack = nnx.eval_shape(lambda: build(hybrid)).encoder.stack
  assert [cell.name for cell in stack.cells] * stack.repeats == names
  assert stack.options.mlp == "geglu" and stack.options.norm == "rms"
  assert stack.options.mlp_width == 24


def test_streaming_and_gradients():
  """Token by token, past the window, is the whole call; a gradient reaches
  every parameter, and all of it is finite."""
  model = build(griffin.griffin(depth=3, mlp_width=5, **TINY))
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, V)
  model_checks.streams(model, tokens)
  graph, params = nnx.split(model)
  loss = lambda p: next_token_loss(nnx.merge(graph, p), tokens)
  no_dead_gradient(jax.jit(jax.grad(loss))(params))


def test_published_sizes():
  """Without their embeddings they have the parameters that their names say."""
  for name, size in (
    ("recurrentgemma-2B", 2e9),
    ("recurrentgemma-9B", 8e9),
    ("griffin-7B", 6.9e9),
  ):
    hybrid = griffin.griffin(**griffin.SIZES[name])
    model = nnx.eval_shape(lambda: build(hybrid).encoder.stack)  # noqa: B023
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert abs(count / size - 1) < 0.07, (name, count)
  far, _, near = hybrid.cells[:3]
  assert (far.width, near.width, near.groups, near.capacity) == (
    5632, 128, 1, 1024
  )  # fmt: skip


def test_wrong_sizes():
  with pytest.raises(ValueError, match="griffin: depth must be a positive"):
    griffin.griffin(depth=0, **TINY)
  with pytest.raises(ValueError, match="num_heads=4 must divide d_rnn=6"):
    griffin.hawk(8, 2, d_rnn=6, gate_heads=4)
