"""Hybrids: patterns of memories that papers found to be better together.

  H1:  Gated DeltaNet, sliding-window attention
  H2:  Mamba2, Gated DeltaNet, sliding-window attention

from the bottom up and over again, each followed by an MLP, as in Llama: RMS
norm in front, SwiGLU, no positions but the rotary ones inside attention. The
recurrent layers hold what is far, in a state of fixed size; attention compares
what is near exactly.

>>> hybrid = hybrids.gated_delta_h1(d_model=1536, depth=12)
>>> model = models.LanguageModel(hybrid.cells, hybrid.depth, 32000,
...                              **hybrid.options, rngs=nnx.Rngs(0))

Differs: maps and gates start as the cells do. β has no bias, and the sizes
of H2 beside its order are not in the authors' code: here they are H1's, Mamba2
with its own defaults. Figure 1 is read as having an MLP after every mixer.

Paper: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2
  with Delta Rule", arXiv:2412.06464, section 3.4, figure 1 and table S.2 (the
  order of H2); window of section 4; widths and heads as in the authors' code
  (NVlabs/GatedDeltaNet).
"""

from typing import Any, NamedTuple

from memzoo.cells.kv.window import Window
from memzoo.cells.matrix.gated_delta import GatedDelta
from memzoo.cells.ssm.mamba2 import Mamba2
from memzoo.core.cell import Cell

# Published sizes, for `gated_delta_h1`; the vocabulary has 32000 tokens, and
# embeddings are tied.
SIZES = {
  "0.4B": dict(d_model=1536, depth=12, attention_heads=12, mlp_width=6144),
  "1.3B": dict(d_model=2304, depth=18, attention_heads=18, mlp_width=6144),
}


class Hybrid(NamedTuple):
  """What a model of `memzoo.models` takes.

  Attributes:
    cells: the pattern, bottom first.
    depth: number of blocks.
    options: of `BlockOptions`.
  """

  cells: tuple[Cell, ...]
  depth: int
  options: dict[str, Any]


def gated_delta_h1(
  d_model: int,
  depth: int,
  *,
  num_heads: int = 9,
  attention_heads: int = 12,
  window: int = 2048,
  mlp_width: int | None = None,
) -> Hybrid:
  """Gated DeltaNet-H1.

  Args:
    d_model: D.
    depth: number of blocks, a multiple of 2.
    num_heads: of Gated DeltaNet, whose keys have 3 D / 4 channels in all, and
      whose values have twice as many.
    attention_heads: of attention.
    window: the tokens that attention reads, the present one among them.
    mlp_width: hidden width of the MLP; None for 8 D / 3.

  Raises:
    ValueError: on sizes that do not divide, and a depth that is no multiple of
      the pattern's length.
  """
  delta = _delta(d_model, num_heads)
  near = Window(d_model=d_model, num_heads=attention_heads, capacity=window)
  return _hybrid("gated_delta_h1", (delta, near), depth, mlp_width)


def gated_delta_h2(
  d_model: int,
  depth: int,
  *,
  num_heads: int = 9,
  attention_heads: int = 12,
  window: int = 2048,
  mlp_width: int | None = None,
  d_state: int = 128,
  ssm_head_dim: int = 64,
) -> Hybrid:
  """Gated DeltaNet-H2.

  Args:
    d_model: D.
    depth: number of blocks, a multiple of 3.
    num_heads: as in `gated_delta_h1`.
    attention_heads: of attention.
    window: as there.
    mlp_width: as there.
    d_state: N of Mamba2.
    ssm_head_dim: P of Mamba2.

  Raises:
    ValueError: as there.
  """
  ssm = Mamba2(d_model=d_model, d_state=d_state, head_dim=ssm_head_dim)
  delta = _delta(d_model, num_heads)
  near = Window(d_model=d_model, num_heads=attention_heads, capacity=window)
  return _hybrid("gated_delta_h2", (ssm, delta, near), depth, mlp_width)


def _delta(d_model: int, heads: int) -> GatedDelta:
  if heads < 1 or 3 * d_model % (4 * heads):
    raise ValueError(
      f"hybrids: num_heads={heads} must divide 3/4 of d_model={d_model}, the "
      "channels of its keys"
    )
  width = 3 * d_model // (4 * heads)
  return GatedDelta(
    d_model=d_model, num_heads=heads, head_dim=width, expand_v=2.0
  )


def _hybrid(name, cells, depth, mlp_width) -> Hybrid:
  if type(depth) is not int or depth < 1 or depth % len(cells):
    raise ValueError(
      f"{name}: depth must be a positive multiple of {len(cells)}, got {depth}"
    )
  options = dict(mlp="swiglu", mlp_width=mlp_width, norm="rms")
  return Hybrid(cells, depth, options)
