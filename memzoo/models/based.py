"""The stack of Based: linear attention for the long range, a small window of
softmax attention for the short one.

Of every five layers of the authors' language models one is linear attention
(the cell `based`), the next sliding-window attention with rotary positions
(the cell `window`), and three are gated short convolutions; all have a SwiGLU
MLP of width 2 D and RMS norms. The two widths, `feature_dim` and `window`, set
the size of the state and with it what the stack recalls.

>>> model = LanguageModel(based.cells(256, num_heads=4), 8, 50257,
...                       mlp="swiglu", mlp_width=512, conv_size=3,
...                       rngs=nnx.Rngs(0))

Differs: the gated convolutions are no layers here; a short convolution in
front of every memory (`conv_size` of the block) stands in their place.

Paper: Arora et al. 2024, arXiv:2402.18668, section 4; sizes and order of
layers as in the authors' configurations (github.com/HazyResearch/based).
"""

from memzoo.cells.kv.window import Window
from memzoo.cells.matrix.based import Based


def cells(
  d_model: int,
  *,
  num_heads: int = 16,
  feature_dim: int = 16,
  window: int = 64,
) -> tuple[Based, Window]:
  """The pattern (linear attention, window), for `Stack` and the models on it.

  Args:
    d_model: D, a multiple of `num_heads`; D / num_heads must be even.
    num_heads: of both.
    feature_dim: width of the linear attention's queries and keys.
    window: how many tokens the softmax attention sees, the present one among
      them (the paper's tensor-core size is 64, its language models have 128
      and 256).

  Raises:
    ValueError: on a size out of range.
  """
  return (
    Based(d_model, num_heads=num_heads, feature_dim=feature_dim),
    Window(d_model, num_heads=num_heads, capacity=window),
  )
