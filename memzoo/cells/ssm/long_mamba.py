"""LongMamba: Mamba-2 that skips tokens, for texts longer than in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memzoo.cells.ssm import mamba2
from memzoo.core.registry import register


@register(
  "long_mamba",
  family="ssm",
  year=2025,
  paper="Ye et al. 2025, arXiv:2504.16053",
  write="selected decay and add, of the tokens above a threshold",
  evidence="silver",
  tiny=dict(d_model=6, head_dim=3, d_state=5, num_groups=2, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class LongMamba(mamba2.Mamba2):
  """LongMamba: heads that reach far back pass over unimportant tokens.

    a head is global where  ∏_{t≤L} Ā_t = exp(A Σ_{t≤L} Δ_t) > θ
    Ā'_t, B̄'_t = 1, 0  where Δ_t < g(S), else Ā_t, B̄_t      in global heads
    g(S):  ∏_{t≤S} Ā'_t ≈ ∏_{t≤L} Ā_t

  The rest is Mamba-2, trained at length L. No training follows: `calibrate`
  finds the global heads and their g(S) from sequences of length L. Δ_t, those
  above the share C of the largest cut to it, are sorted and stretched to S
  tokens; g(S) is where the sum of the largest passes the sum of all L. Local
  heads, and all before calibration, have g = 0: Mamba-2.

  State: h [H, N, P] and conv [W − 1, E + 2GN], float32, from zero.
  Params: those of Mamba-2; buffers: threshold [H] (g), zero at the start.
  Forms: step, scan, chunk and pallas as of Mamba-2.
  Differs: S is an argument of `calibrate`, where theirs is the prompt's length
    to the next thousand, looked up; what is generated after the prompt is
    filtered too, as a stream has no prompt. Mamba has channels with a decay
    for each state: `long_mamba1`.
  Paper: Ye, Xia, Fu, Dong, Hong, Yuan, Diao, Kautz, Molchanov, Lin 2025,
    "LongMamba: Enhancing Mamba's Long Context Capabilities via Training-Free
    Receptive Field Enlargement", arXiv:2504.16053, sections on global channels
    and token filtering; how g is found, and averaged over sequences, as in the
    authors' code (load_align_target.py). θ, C: their values for Mamba-2.
  """

  global_decay: float = 0.05
  clamp_top: float = 0.05

  def __post_init__(self):
    super().__post_init__()
    for field in ("global_decay", "clamp_top"):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(
          f"LongMamba: {field} must be in [0, 1], got {getattr(self, field)!r}"
        )

  def init(self, key) -> dict[str, Any]:
    threshold = jnp.zeros((self.num_heads,))
    return super().init(key) | {"buffers": {"threshold": threshold}}

  def _select(self, params, xbc, dt):
    chosen = super()._select(params, xbc, dt)
    threshold = jax.lax.stop_gradient(params["buffers"]["threshold"])
    keep = _step_size(params, dt) > threshold
    return chosen._replace(
      dx=jnp.where(keep[..., None], chosen.dx, 0),
      log_decay=jnp.where(keep, chosen.log_decay, 0),
    )

  def calibrate(self, params, xs, length: int) -> dict[str, Any]:
    """params with the thresholds for sequences of `length` inputs.

    Args:
      params: of a cell that was trained at length L.
      xs: [B, L, D], inputs of the cell.
      length: S; nothing is filtered where it is at most L.

    Raises:
      ValueError: on xs of another shape.
    """
    if jnp.ndim(xs) != 3 or xs.shape[2] != self.d_model:
      raise ValueError(
        f"LongMamba: xs must be [B, L, {self.d_model}], got {jnp.shape(xs)}"
      )
    a = jnp.exp(params["a_log"].astype(jnp.float32))
    threshold = thresholds(
      _step_size(params, self._project(params, xs)[2]),
      lambda dt: jnp.exp(-a * dt.sum(axis=0)),
      length,
      global_decay=self.global_decay,
      clamp_top=self.clamp_top,
    )
    return params | {"buffers": {"threshold": threshold}}


def thresholds(dt, reach, length: int, *, global_decay, clamp_top):
  """g(S) of each head, float32 [H], zero in local heads.

  Args:
    dt: Δ of sequences of the trained length, [B, L, H].
    reach: Δ [L, H], in any order -> ∏ Ā [H].
    length: S.
    global_decay: θ.
    clamp_top: C; 0 cuts nothing.
  """
  count = dt.shape[1]
  if length <= count:
    return jnp.zeros(dt.shape[2:])

  def align(dt):
    dt = jnp.sort(dt, axis=0)[::-1]
    dt = jnp.minimum(dt, dt[max(1, int(count * clamp_top)) - 1])
    rows, place = (jnp.arange(n, dtype=jnp.float32) for n in (count, length))
    place = (place + 0.5) * (count / length) - 0.5
    longer = jax.vmap(lambda x: jnp.interp(place, rows, x), 1, 1)(dt)
    kept = jnp.argmax(jnp.cumsum(longer, axis=0) > dt.sum(axis=0), axis=0) + 1
    kept = jnp.minimum(kept, length - 1)
    return reach(dt), jnp.take_along_axis(longer, kept[None], axis=0)[0]

  reached, level = (x.mean(axis=0) for x in jax.vmap(align)(dt))
  return jnp.where(reached > global_decay, level, 0.0)


def _step_size(params, dt):
  """Δ of Mamba-2, float32 [..., H]."""
  dt = dt.astype(jnp.float32) + params["dt_bias"].astype(jnp.float32)
  return jax.nn.softplus(dt)
