"""Hopfield layer with learned stored patterns."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memzoo.core import cell
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm, separation
from memzoo.ops.hopfield import hopfield


@register(
  "hopfield_lookup",
  family="hopfield",
  year=2020,
  paper="Ramsauer et al. 2020, arXiv:2008.02217",
  write="by gradient",
  evidence="silver",
  tiny=dict(
    d_model=6,
    num_patterns=5,
    num_heads=2,
    head_dim=3,
    steps=2,
    separate_targets=True,
  ),  # fmt: skip
)
@dataclasses.dataclass(frozen=True)
class HopfieldLookup(cell.Cell):
  """Look-up in learned patterns: the HopfieldLayer of the paper.

    Q = LN(R) W_Q + b_Q ,  K = LN(Y) W_K + b_K ,  V = LN(Z) W_V + b_V
    ξ ← softmax(β ξ Kᵀ) K                steps − 1 times, from ξ = Q     (3)
    y = softmax(β ξ Kᵀ) V W_O + b_O      by heads                       (10)

  R are the inputs (state patterns), Y the stored patterns, which are learned,
  and Z the targets: Y itself, or patterns of their own (`separate_targets`).
  With `connected`, V = (LN(Z) W_K + b_K) W_V + b_V, as the paper writes it.

  State: (), what is remembered is in the parameters.
  Params: patterns [M, D], targets [M, D] (separate_targets); q, k, v: w
    [D, H K] ([H K, H K] for v where connected) and b [H K]; out: w [H K, D]
    and b [D]; norm_state, norm_stored, norm_target: scale and bias [D] of the
    layer norms that are on.
  Forms: step O(D H K + steps H M K) a token, and O(M D H K) for the
    projections of the patterns; chunk makes these once for a sequence.
  Differs: widths of input and output are one (d_model), that of the values is
    K; the authors' code lets them differ, and can leave projections out. Its
    update stops per head where the weights of all queries of a batch move by
    no more than a threshold; here per query, where the query moves by no more
    than `tolerance` (0, the default: never), so that tokens do not touch each
    other. `steps` counts all updates: update_steps_max + 1 of the code. No
    dropout. Other separations than softmax, by name.
  Paper: Ramsauer, Schäfl, Lehner, Seidl, Widrich, Adler, Gruber, Holzleitner,
    Pavlović, Sandve, Greiff, Kreil, Kopp, Klambauer, Brandstetter, Hochreiter
    2020, "Hopfield Networks is All You Need", arXiv:2008.02217, eq. 3 and 10
    and section 3 (Hopfield layer); defaults and initial values of
    github.com/ml-jku/hopfield-layers.
  """

  d_model: int
  num_patterns: int = 32
  num_heads: int = 1
  head_dim: int | None = None
  beta: float | None = None
  steps: int = 1
  separation: str = "softmax"
  tolerance: float = 0.0
  separate_targets: bool = False
  connected: bool = False
  norm_state: bool = True
  norm_stored: bool = True
  norm_target: bool = True

  op: ClassVar[str] = "hopfield"
  implementations: ClassVar[tuple[str, ...]] = ("chunk",)

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_patterns", "num_heads", "steps"
    )
    if self.head_dim is None:
      arguments.check_divides(self, "num_heads", "d_model")
    else:
      arguments.check_positive(self, "head_dim")
    separation.get(self.separation)
    if self.beta is not None and not self.beta > 0:
      raise ValueError(
        f"HopfieldLookup: beta must be above 0, got {self.beta!r}"
      )
    if not self.tolerance >= 0:
      raise ValueError(
        f"HopfieldLookup: tolerance must be 0 or more, got {self.tolerance!r}"
      )

  @property
  def width(self) -> int:
    """K of every head."""
    return self.head_dim or self.d_model // self.num_heads

  def init(self, key) -> dict[str, Any]:
    d, total = self.d_model, self.num_heads * self.width
    shapes = {
      "q": (d, total),
      "k": (d, total),
      "v": (total if self.connected else d, total),
      "out": (total, d),
      "patterns": (self.num_patterns, d),
    }
    if self.separate_targets:
      shapes["targets"] = (self.num_patterns, d)
    keys = jax.random.split(key, len(shapes))
    params = {
      name: 0.02 * jax.random.normal(k, shape)
      for k, (name, shape) in zip(keys, shapes.items())
    }
    for name in ("q", "k", "v", "out"):
      bias = jnp.zeros((shapes[name][1],))
      params[name] = {"w": params[name], "b": bias}
    for name in ("norm_state", "norm_stored", "norm_target"):
      if getattr(self, name):
        params[name] = {"scale": jnp.ones((d,)), "bias": jnp.zeros((d,))}
    return params

  def initial_state(self, params, key=None):
    return ()

  def step(self, params, state, x):
    return state, self._look_up(params, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    # Nothing passes from token to token: `scan` has zeroed what is masked.
    return state, self._look_up(params, xs)

  def _look_up(self, params, x):
    """x [..., D] -> [..., D]."""
    stored = params["patterns"].astype(x.dtype)
    target = params.get("targets", params["patterns"]).astype(x.dtype)
    q = _linear(params["q"], _norm(params, "norm_state", x))
    k = _linear(params["k"], _norm(params, "norm_stored", stored))
    v = _norm(params, "norm_target", target)
    if self.connected:
      v = _linear(params["k"], v)
    v = _linear(params["v"], v)
    q, k, v = (
      u.reshape(u.shape[:-1] + (self.num_heads, self.width)) for u in (q, k, v)
    )
    one = partial(
      hopfield, beta=self.beta, steps=self.steps, separation=self.separation,
      tolerance=self.tolerance,
    )  # fmt: skip
    heads = jax.vmap(
      lambda k, q, v: one(k, q, values=v), in_axes=(1, -2, 1), out_axes=-2
    )
    o = heads(k, q, v)
    return _linear(params["out"], o.reshape(o.shape[:-2] + (-1,)))


def _linear(params, x):
  return dot(x, params["w"]) + params["b"].astype(x.dtype)


def _norm(params, name, x):
  return norm.layer_norm(x, **params[name]) if name in params else x
