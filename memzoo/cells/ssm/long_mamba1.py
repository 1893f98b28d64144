"""LongMamba of the first Mamba: channels that skip tokens in long texts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memzoo.cells.ssm import mamba
from memzoo.cells.ssm.long_mamba import thresholds
from memzoo.core.registry import register
from memzoo.ops.conv import conv, empty as conv_empty


@register(
  "long_mamba1",
  family="ssm",
  year=2025,
  paper="Ye et al. 2025, arXiv:2504.16053",
  write="selected decay and add, of the tokens above a threshold",
  evidence="silver",
  tiny=dict(d_model=6, d_state=5, expand=1.5, conv_size=3, dt_rank=2),
)
@dataclasses.dataclass(frozen=True)
class LongMamba1(mamba.Mamba):
  """LongMamba in Mamba: channels that reach far pass over unimportant tokens.

    channel e is global where  ∏_{t≤L} mean_n exp(Δ_{t,e} A_{e,n}) > θ
    Ā'_t, B̄'_t = 1, 0  where Δ_{t,e} < g_e(S), else Ā_t, B̄_t  in global ones
    g(S):  ∏_{t≤S} Ā'_t ≈ ∏_{t≤L} Ā_t

  The rest is Mamba, trained at length L. A channel has one Δ for its N states,
  each of which decays by itself, so that all of them pass over the token, and
  their mean decides whether the channel is global. No training follows:
  `calibrate` finds the global channels and their g(S) from sequences of length
  L, as `long_mamba` does; before it, g = 0: Mamba.

  State: h [E, N] float32 and conv [W − 1, E] float32, from zero.
  Params: those of Mamba; buffers: threshold [E] (g), zero at the start.
  Forms: step, scan and chunk as of Mamba.
  Differs: as `long_mamba` does. The paper speaks of one decay per channel; the
    mean over the states is its authors' code's.
  Paper: Ye, Xia, Fu, Dong, Hong, Yuan, Diao, Kautz, Molchanov, Lin 2025,
    "LongMamba: Enhancing Mamba's Long Context Capabilities via Training-Free
    Receptive Field Enlargement", arXiv:2504.16053, sections on global channels
    and token filtering (equation numbers not checked); mean, θ and no cut of
    the largest Δ as the authors' code had them for Mamba
    (GATECH-EIC/LongMamba, commit 53eeae8, my_evaluation.py).
  """

  global_decay: float = 1e-30
  clamp_top: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    for field in ("global_decay", "clamp_top"):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(
          f"LongMamba1: {field} must be in [0, 1], got {getattr(self, field)!r}"
        )

  def init(self, key) -> dict[str, Any]:
    threshold = jnp.zeros((self.d_inner,))
    return super().init(key) | {"buffers": {"threshold": threshold}}

  def _select(self, params, x):
    chosen = super()._select(params, x)
    threshold = jax.lax.stop_gradient(params["buffers"]["threshold"])
    keep = chosen.dt > threshold.astype(jnp.float32)
    return chosen._replace(dt=jnp.where(keep, chosen.dt, 0))

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
        f"LongMamba1: xs must be [B, L, {self.d_model}], got {jnp.shape(xs)}"
      )
    start = conv_empty(params["conv"])
    rates = jnp.exp(params["a_log"].astype(jnp.float32)).T

    def step_size(xs):
      x, _ = self._project(params, xs)
      x = conv(start, x, params["conv"], params["conv_bias"])[1]
      return mamba.Mamba._select(self, params, x).dt

    def reach(dt):
      add = lambda decay, rate: (decay + jnp.exp(-dt * rate), None)
      decay = jax.lax.scan(add, jnp.zeros_like(dt), rates)[0] / self.d_state
      return jnp.exp(jnp.sum(jnp.log(decay), axis=0))

    threshold = thresholds(
      jax.vmap(step_size)(xs), reach, length,
      global_decay=self.global_decay, clamp_top=self.clamp_top,
    )  # fmt: skip
    return params | {"buffers": {"threshold": threshold}}
