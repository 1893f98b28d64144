"""Griffin and Hawk: gated linear recurrences, and local attention.

Griffin's residual blocks are two with the recurrence RG-LRU and one with
multi-query attention to the last tokens, from the bottom up and over again,
wherever the depth cuts that off; Hawk's all have the recurrence. Every mixer
is followed by a gated MLP (GeGLU, of width 3 D), with RMS norms before both.
RecurrentGemma is a Griffin whose gates' matrices are block-diagonal.

>>> hybrid = griffin.griffin(**griffin.SIZES["griffin-7B"])
>>> model = models.LanguageModel(hybrid.cells, hybrid.depth, 256000,
...                              **hybrid.options, rngs=nnx.Rngs(0))

Differs: attention turns all channels of a head by its position, where the
authors' code turns the first half; the maps of attention and of the MLP have
no bias, which the code gives them. RecurrentGemma's embeddings times sqrt(D)
and its soft cap on logits are not here: from its checkpoints the recurrent
blocks alone are read (`memzoo.convert`).

Paper: De et al. 2024, "Griffin: Mixing Gated Linear Recurrences with Local
  Attention for Efficient Language Models", arXiv:2402.19427, section 2 and
  figure 2. Sizes as in the authors' code (google-deepmind/recurrentgemma).
"""

from memzoo.cells.kv.window import Window
from memzoo.cells.ssm.rg_lru import RGLRU
from memzoo.models.hybrids import Hybrid

# Published sizes, of `griffin`; the vocabulary has 256000 tokens, and
# embeddings are tied.
SIZES = {
  "griffin-7B": dict(
    d_model=4096, depth=32, d_rnn=5632, num_heads=32, window=1024,
    gate_heads=32,
  ),
  "recurrentgemma-2B": dict(
    d_model=2560, depth=26, d_rnn=2560, num_heads=10, window=2048,
    gate_heads=10, whole_first=True,
  ),
  "recurrentgemma-9B": dict(
    d_model=4096, depth=38, d_rnn=4096, num_heads=16, window=2048,
    gate_heads=16, whole_first=True,
  ),
}  # fmt: skip


def griffin(
  d_model: int,
  depth: int,
  *,
  d_rnn: int | None = None,
  num_heads: int = 1,
  window: int = 1024,
  mlp_width: int | None = None,
  gate_heads: int = 1,
  whole_first: bool = False,
) -> Hybrid:
  """Griffin: recurrence, recurrence, local attention.

  Args:
    d_model: D.
    depth: number of blocks; 3 or more for attention to be among them.
    d_rnn: channels of the recurrence; None for D. The paper's are about
      4 D / 3.
    num_heads: of attention, whose keys and values all heads share.
    window: the tokens that attention reads, the present one among them.
    mlp_width: hidden width of the MLP; None for 3 D.
    gate_heads: blocks of the matrices of the recurrence's gates.
    whole_first: as of `RGLRU`.

  Raises:
    ValueError: on sizes that do not divide, and a depth below 1.
  """
  near = Window(
    d_model=d_model, num_heads=num_heads, num_kv_heads=1, capacity=window
  )
  far = _recurrence(d_model, d_rnn, gate_heads, whole_first)
  return _hybrid("griffin", (far, far, near), depth, mlp_width)


def hawk(
  d_model: int,
  depth: int,
  *,
  d_rnn: int | None = None,
  mlp_width: int | None = None,
  gate_heads: int = 1,
  whole_first: bool = False,
) -> Hybrid:
  """Hawk: the recurrence alone; arguments as of `griffin`."""
  far = _recurrence(d_model, d_rnn, gate_heads, whole_first)
  return _hybrid("hawk", (far,), depth, mlp_width)


def _recurrence(d_model, d_rnn, gate_heads, whole_first) -> RGLRU:
  return RGLRU(
    d_model=d_model, d_rnn=d_rnn, num_heads=gate_heads, whole_first=whole_first
  )


def _hybrid(who, pattern, depth, mlp_width) -> Hybrid:
  if type(depth) is not int or depth < 1:
    raise ValueError(f"{who}: depth must be a positive integer, got {depth!r}")
  cells = (pattern * depth)[:depth]
  if depth % len(pattern) == 0:
    cells = pattern
  width = 3 * pattern[0].d_model if mlp_width is None else mlp_width
  options = dict(mlp="geglu", mlp_width=width, norm="rms")
  return Hybrid(cells, depth, options)
