"""Gated DeltaNet-H1 and -H2 (arXiv:2412.06464, section 3.4)."""

from flax import nnx
import jax
import model_checks
from model_checks import next_token_loss, no_dead_gradient
import pytest

from memzoo import models
from memzoo.models import hybrids

V = 7
TINY = dict(d_model=8, num_heads=2, attention_heads=2, window=4, mlp_width=5)
CASES = {
  "gated_delta_h1": (
    hybrids.gated_delta_h1(depth=4, **TINY),
    ["gated_delta", "window"] * 2,
  ),
  "gated_delta_h2": (
    hybrids.gated_delta_h2(depth=6, d_state=3, ssm_head_dim=4, **TINY),
    ["mamba2", "gated_delta", "window"] * 2,
  ),
}


def build(hybrid, vocab_size=V):
  return models.LanguageModel(
    hybrid.cells, hybrid.depth, vocab_size, **hybrid.options, rngs=nnx.Rngs(0)
  )


@pytest.mark.parametrize("name", CASES)
def test_the_order_is_the_papers(name):
  """A token passes the layers in this order: each has its own state, and the
  first of the stack is the first of the pattern."""
  hybrid, names = CASES[name]
  stack = nnx.eval_shape(lambda: build(hybrid)).encoder.stack
  assert [cell.name for cell in stack.cells] * stack.repeats == names
  assert stack.options.mlp == "swiglu" and stack.options.norm == "rms"
  assert all(block.mlp is not None for block in stack.blocks)


@pytest.mark.parametrize(
  "name",
  [pytest.param("gated_delta_h1", marks=pytest.mark.slow), "gated_delta_h2"],
)
def test_streaming_and_gradients(name):
  """Token by token, past the window, is the whole call; a gradient reaches
  every parameter, and all of it is finite."""
  model = build(CASES[name][0])
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, V)
  model_checks.streams(model, tokens)
  graph, params = nnx.split(model)
  loss = lambda p: next_token_loss(nnx.merge(graph, p), tokens)
  no_dead_gradient(jax.jit(jax.grad(loss))(params))


def test_published_sizes():
  """The larger one has the parameters that its name says."""
  hybrid = hybrids.gated_delta_h1(**hybrids.SIZES["1.3B"])
  model = nnx.eval_shape(lambda: build(hybrid, 32000))
  count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
  assert 1.28e9 < count < 1.34e9, count
  delta, near = hybrid.cells
  assert (delta.num_heads, delta.head_dim, delta.value_dim) == (9, 192, 384)
  assert (near.num_heads, near.width, near.capacity) == (18, 128, 2048)
  small = hybrids.gated_delta_h1(**hybrids.SIZES["0.4B"])
  assert small.cells[0].head_dim == 128


def test_wrong_sizes():
  with pytest.raises(ValueError, match="num_heads=5 must divide 3/4 of"):
    hybrids.gated_delta_h1(8, 2, num_heads=5)
  with pytest.raises(ValueError, match="h2: depth must be a .* of 3, got 4"):
    hybrids.gated_delta_h2(depth=4, d_state=3, ssm_head_dim=4, **TINY)
