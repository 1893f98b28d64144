"""Bad input gets one clear error: what it is about, what it got, what it takes."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import memzoo
from memzoo import models, ops, parallel, tasks, training
from memzoo.ops import features

CELL = memzoo.tiny("gru")
PARAMS = CELL.init(jax.random.key(0))
XS = jnp.zeros((5, 6))


def scan(xs=XS, **kwargs):
  return memzoo.scan(CELL, PARAMS, None, xs, **kwargs)


def lm(*cells, **kwargs):
  kwargs = {"vocab_size": 7, "depth": None, **kwargs}
  return models.LanguageModel(
    list(cells or (CELL,)), rngs=nnx.Rngs(0), **kwargs
  )


def full_attention():
  return memzoo.tiny("window", capacity=4, sinks=0, sliding=False)


def prompt(n):
  return jnp.zeros((1, n), jnp.int32)


# (what is done, the error's type, what it says)
TABLE = {
  "unknown cell": (
    lambda: memzoo.make("gated_dleta", d_model=4),
    ValueError,
    "unknown memory 'gated_dleta': did you mean 'gated_delta'",
  ),
  "unknown cell to describe": (
    lambda: memzoo.describe("grru"),
    ValueError,
    "'gru'",
  ),
  "unknown family": (
    lambda: memzoo.names("matrx"),
    ValueError,
    "unknown family 'matrx': did you mean 'matrix'",
  ),
  "unknown option": (
    lambda: memzoo.make("gru", d_modl=4),
    TypeError,
    "no option 'd_modl': did you mean 'd_model'",
  ),
  "missing option": (
    lambda: memzoo.make("gru"),
    TypeError,
    "needs the option.*d_model",
  ),
  "option of another type": (
    lambda: memzoo.make("gru", d_model="64"),
    TypeError,
    "'d_model' takes int, got '64'",
  ),
  "width of zero": (
    lambda: memzoo.make("gru", d_model=0),
    ValueError,
    "GRU: d_model must be a positive integer, got 0",
  ),
  "no heads": (
    lambda: memzoo.make("gated_delta", d_model=4, num_heads=0),
    ValueError,
    "num_heads must be a positive integer",
  ),
  "fractional head": (
    lambda: memzoo.make("gated_delta", d_model=4, head_dim=3, expand_v=0.5),
    ValueError,
    "expand_v=0.5 times head_dim=3",
  ),
  "unknown feature map": (
    lambda: memzoo.make("linear_attention", d_model=4, feature_map="elo"),
    ValueError,
    "unknown feature map 'elo': did you mean 'elu'",
  ),
  "config of no cell": (
    lambda: memzoo.from_config({"name": "gru"}),
    ValueError,
    "no cell config",
  ),
  "config of an unknown cell": (
    lambda: memzoo.from_config({"cell": "gruu", "d_model": 3}),
    ValueError,
    "did you mean 'gru'",
  ),
  "batch given to scan": (
    lambda: scan(XS[None]),
    ValueError,
    r"got \(1, 5, 6\); a cell takes one sequence: batch it with jax.vmap",
  ),
  "wrong width": (
    lambda: scan(XS[:, :4]),
    ValueError,
    r"xs must be \[T, 6\], got \(5, 4\)",
  ),
  "integers for floats": (
    lambda: scan(XS.astype(int)),
    ValueError,
    "xs must be of a dtype like float32, got int",
  ),
  "reset of floats": (
    lambda: scan(reset=jnp.zeros(5)),
    ValueError,
    r"reset must be bool \[5\], got float32",
  ),
  "mask too short": (
    lambda: scan(mask=jnp.ones(4, bool)),
    ValueError,
    r"mask must be bool \[5\], got bool \(4,\)",
  ),
  "unknown form": (
    lambda: scan(implementation="chnk"),
    ValueError,
    "unknown implementation 'chnk' for gru: did you mean 'chunk'",
  ),
  "form that the cell lacks": (
    lambda: scan(implementation="chunk"),
    NotImplementedError,
    "gru has no 'chunk' form; it has: pallas, scan, step",
  ),
  "longer than unbounded attention holds": (
    lambda: memzoo.scan(
      full_attention(),
      full_attention().init(jax.random.key(0)),
      None,
      jnp.zeros((5, 6)),
    ),
    ValueError,
    "got 5 inputs, holds at most 4",
  ),
  "op of the wrong rank": (
    lambda: ops.linear_attention(*[jnp.zeros((1, 2, 3, 4))] * 4),
    ValueError,
    "use memzoo.ops.batched",
  ),
  "op of unequal lengths": (
    lambda: ops.linear_attention(
      jnp.zeros((3, 2)), jnp.zeros((4, 3)), jnp.zeros((5, 3)), jnp.zeros((4, 2))
    ),
    ValueError,
    r"linear_attention: k must be floating \[4, 3\], got float32 \(5, 3\)",
  ),
  "half-precision state": (
    lambda: ops.linear_attention(
      jnp.zeros((3, 2), jnp.bfloat16),
      jnp.zeros((4, 3)),
      jnp.zeros((4, 3)),
      jnp.zeros((4, 2)),
    ),
    ValueError,
    "s must be float32",
  ),
  "chunk of no power of two": (
    lambda: ops.linear_attention(
      jnp.zeros((3, 2)),
      jnp.zeros((4, 3)),
      jnp.zeros((4, 3)),
      jnp.zeros((4, 2)),
      chunk_size=48,
    ),
    ValueError,
    "chunk_size must be a power of two, got 48",
  ),
  "unknown feature function": (
    lambda: features.get("sofmax"),
    ValueError,
    "unknown feature map",
  ),
  "unknown platform": (
    lambda: memzoo.platform("tpv").__enter__(),
    ValueError,
    "unknown platform 'tpv'",
  ),
  "unknown task": (lambda: tasks.make("mqar_smal"), ValueError, "mqar_small"),
  "unknown task option": (
    lambda: tasks.make("mqar_small", lenght=3),
    ValueError,
    "length",
  ),
  "text file that is missing": (
    lambda: tasks.make("text", path="/nonexistent/book.txt"),
    (ValueError, OSError),
    "book.txt",
  ),
  "empty stack": (
    lambda: models.LanguageModel([], None, 3, rngs=nnx.Rngs(0)),
    ValueError,
    "got no cell",
  ),
  "stack of two widths": (
    lambda: lm(CELL, memzoo.make("gru", d_model=8)),
    ValueError,
    "one d_model, got gru: 6, gru: 8",
  ),
  "depth that is no multiple": (
    lambda: lm(CELL, memzoo.tiny("lstm"), depth=3),
    ValueError,
    "multiple of the 2",
  ),
  "unknown block option": (lambda: lm(dropuot=0.1), TypeError, "dropuot"),
  "dropout of two": (
    lambda: lm(dropout=2.0),
    ValueError,
    "dropout must be a rate",
  ),
  "floats for tokens": (
    lambda: lm()(None, jnp.zeros((1, 4))),
    ValueError,
    r"integer tokens \[B, T\], got float32",
  ),
  "prompt and steps beyond the capacity": (
    lambda: models.generate(lm(full_attention()), None, prompt(3), 9),
    ValueError,
    "at most 4",
  ),
  "temperature below zero": (
    lambda: models.generate(
      lm(), None, prompt(3), 2, jax.random.key(0), temperature=-1.0
    ),
    ValueError,
    "temperature",
  ),
  "top_k of zero": (
    lambda: models.generate(
      lm(), None, prompt(3), 2, jax.random.key(0), top_k=0
    ),
    ValueError,
    "top_k",
  ),
  "mesh of nonsense": (
    lambda: parallel.make_mesh("data=4"),
    ValueError,
    "data=4",
  ),
  "mesh larger than the machine": (
    lambda: parallel.make_mesh("data:4096"),
    ValueError,
    "4096",
  ),
  "training of no steps": (
    lambda: training.Config(steps=0),
    ValueError,
    "steps must be at least 1",
  ),
  "rate below zero": (
    lambda: training.Config(learning_rate=-1.0),
    ValueError,
    "learning_rate must be positive",
  ),
  "workdir inside a file": (
    lambda: training.open_workdir(__file__ + "/runs"),
    OSError,
    "bad_input_test.py",
  ),
}


@pytest.mark.parametrize("case", TABLE)
def test_one_clear_error(case):
  act, kind, message = TABLE[case]
  with pytest.raises(kind, match=message) as caught:
    act()
  assert len(str(caught.value).splitlines()) <= 2, "one sentence"


def test_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    CELL.d_model = 3
