"""Samba: Mamba for what is far, sliding-window attention for what is near.

From the bottom up and over again,

  x ← x + Mamba(norm(x)) ,  x ← x + SwiGLU(norm(x))
  x ← x + SWA(norm(x))   ,  x ← x + SwiGLU(norm(x))

with RMS norms, and rotary positions in the attention alone. Mamba carries the
text in a state of fixed size, the attention reads the last `window` tokens
exactly, so that memory and time per token are constant at any length. The
layers are the cells `mamba` and `window`; what the paper compares are other
arrangements of the same layers:

  samba           Mamba, MLP, SWA, MLP
  mamba_swa_mlp   Mamba, SWA, MLP
  mamba_mlp       Mamba, MLP
  swa_mlp         SWA, MLP (Mistral)
  mamba           Mamba

>>> made = samba.samba(d_model=1536, depth=12, attention_heads=12)
>>> model = models.LanguageModel(made.cells, made.depth, 32000,
...                              **made.options, rngs=nnx.Rngs(0))

Differs: maps start as the cells do; the authors divide those that end a
residual branch by the square root of their number.

Paper: Ren, Liu, Lu, Shen, Liang, Chen 2024, "Samba: Simple Hybrid State Space
  Models for Efficient Unlimited Context Language Modeling", arXiv:2406.07522,
  section 2.1, eq. 1 and 2 and figure 2 (arrangements), section 4 (other
  recurrences, no positions), tables 9 and 10 (sizes); order and norms as in the
  authors' code (github.com/microsoft/Samba).
"""

from memzoo.cells.kv.window import Window
from memzoo.cells.ssm.mamba import Mamba
from memzoo.core import dispatch
from memzoo.core.cell import Cell
from memzoo.models.hybrids import Hybrid

# Which layers, bottom first, and whether an MLP follows.
PATTERNS = {
  "samba": (("recurrent", True), ("attention", True)),
  "mamba_swa_mlp": (("recurrent", False), ("attention", True)),
  "mamba_mlp": (("recurrent", True),),
  "swa_mlp": (("attention", True),),
  "mamba": (("recurrent", False),),
}

# Published sizes, for `samba`: their vocabularies are 32000, 32000, 50304 and
# 32064 tokens; embeddings are tied.
SIZES = {
  "421M": dict(d_model=1536, depth=12, attention_heads=12, mlp_width=4096),
  "1.3B": dict(d_model=2304, depth=18, attention_heads=18, mlp_width=6144),
  "1.7B": dict(
    d_model=2048, depth=24, attention_heads=32, kv_heads=4, mlp_width=8196
  ),
  "3.8B": dict(
    d_model=2816, depth=32, attention_heads=11, kv_heads=1, mlp_width=9984
  ),
}


def samba(
  d_model: int,
  depth: int,
  *,
  pattern: str = "samba",
  attention_heads: int = 12,
  kv_heads: int | None = None,
  window: int = 2048,
  rotary: bool = True,
  mlp_width: int | None = None,
  recurrent: Cell | None = None,
) -> Hybrid:
  """Samba, or one of the arrangements that it was chosen from.

  Args:
    d_model: D.
    depth: number of mixers, Mamba's and attention's together, a multiple of
      the pattern's. The paper's N counts the MLPs too: 2 · depth for Samba.
    pattern: one of `PATTERNS`.
    attention_heads: of attention.
    kv_heads: of its keys and values; None for as many.
    window: the tokens that attention reads, the present one among them.
    rotary: whether attention has positions (Samba-NoPE has none).
    mlp_width: hidden width of the MLP; None for 8 D / 3.
    recurrent: in Mamba's place, as the paper tried GLA and RetNet; None for
      Mamba, with E = 2 D, 16 states a channel and R = D / 16.

  Raises:
    ValueError: on an unknown pattern, on sizes that do not divide, and on a
      depth that is no multiple of the pattern's length.
  """
  if pattern not in PATTERNS:
    raise ValueError(
      f"samba: unknown pattern {pattern!r}; "
      + dispatch.nearest(str(pattern), PATTERNS)
    )
  layers = PATTERNS[pattern]
  if type(depth) is not int or depth < 1 or depth % len(layers):
    raise ValueError(
      f"samba: depth must be a positive multiple of {len(layers)}, got {depth}"
    )
  near = Window(
    d_model=d_model, num_heads=attention_heads, num_kv_heads=kv_heads,
    capacity=window, rotary=rotary,
  )  # fmt: skip
  cells = {"recurrent": recurrent or Mamba(d_model), "attention": near}
  widths = tuple(mlp_width if has_mlp else 0 for _, has_mlp in layers)
  options = dict(
    mlp="swiglu",
    mlp_width=widths[0] if len(set(widths)) == 1 else widths,
    norm="rms",
  )
  return Hybrid(tuple(cells[kind] for kind, _ in layers), depth, options)
