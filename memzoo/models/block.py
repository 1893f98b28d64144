"""A block: a memory and an MLP on a residual stream."""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import cell as cell_lib, dispatch, initializers
from memzoo.core.linear import dot
from memzoo.models.bidirectional import BothWays
from memzoo.models.layers import MemoryLayer, check_cell
from memzoo.ops import norm
from memzoo.ops.conv import conv, empty as empty_conv

NORMS = ("rms", "layer", "none")
MLPS = {
  "gelu": jax.nn.gelu,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "geglu": jax.nn.gelu,
  "swiglu": jax.nn.silu,
}
GATED = ("geglu", "swiglu")


@dataclasses.dataclass(frozen=True)
class BlockOptions:
  """What a block has beside its memory. A value.

  Attributes:
    mlp: 'gelu', 'relu', 'silu', or gated 'geglu', 'swiglu'.
    mlp_width: hidden width of the MLP; None for 4 D (gated: 8 D / 3), 0 for a
      block without one: a mixer only. A `Stack` also takes a tuple, one width
      for each cell of its list.
    dropout: rate on what each branch adds to the residual.
    norm: 'rms' or 'layer', before each branch; 'none' for signals, whose
      amplitude a norm would take away.
    conv_size: taps of a causal short convolution in front of the memory; 0
      for none.
    remat: recompute the block in the backward pass instead of keeping its
      activations.
    bidirectional: read the whole sequence from both ends (the cell `s5`): not
      for streams, nor for models that predict their own inputs.

  Raises:
    ValueError: on a value out of range, with the accepted ones.
  """

  mlp: str = "gelu"
  mlp_width: int | tuple[int | None, ...] | None = None
  dropout: float = 0.0
  norm: str = "rms"
  conv_size: int = 0
  remat: bool = False
  bidirectional: bool = False

  def __post_init__(self):
    for field, known in (("mlp", MLPS), ("norm", NORMS)):
      if getattr(self, field) not in known:
        raise ValueError(
          f"Block: unknown {field} {getattr(self, field)!r}; "
          + dispatch.nearest(getattr(self, field), known)
        )
    if isinstance(self.mlp_width, list):  # out of JSON
      object.__setattr__(self, "mlp_width", tuple(self.mlp_width))
    widths = self.mlp_width
    widths = widths if isinstance(widths, tuple) else (widths,)
    sizes = [("mlp_width", n) for n in widths if n is not None]
    for field, value in (*sizes, ("conv_size", self.conv_size)):
      if type(value) is not int or value < 0:
        raise ValueError(
          f"Block: {field} must be an integer, 0 or more, got {value!r}"
        )
    if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
      raise ValueError(
        f"Block: dropout must be a rate in [0, 1), got {self.dropout!r}"
      )


class Norm(nnx.Module):
  """RMS norm or layer norm with a learned scale (and bias), or neither."""

  def __init__(self, width: int, kind: str):
    self.scale = nnx.Param(jnp.ones((width,))) if kind != "none" else None
    self.bias = nnx.Param(jnp.zeros((width,))) if kind == "layer" else None

  def __call__(self, x):
    if self.scale is None:
      return x
    if self.bias is None:
      return norm.rms_norm(x, self.scale[...])
    return norm.layer_norm(x, self.scale[...], self.bias[...])


class MLP(nnx.Module):
  """Two matrices and a nonlinearity between; `kind` is one of `MLPS`."""

  def __init__(self, width: int, hidden: int, kind: str, *, rngs: nnx.Rngs):
    self.kind = kind
    columns = 2 * hidden if kind in GATED else hidden
    self.up = nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, columns))
    )
    self.down = nnx.Param(
      initializers.lecun_normal(rngs.params(), (hidden, width))
    )

  def __call__(self, x):
    h = dot(x, self.up[...])
    if self.kind in GATED:
      gate, h = jnp.split(h, 2, axis=-1)
      h = MLPS[self.kind](gate) * h
    else:
      h = MLPS[self.kind](h)
    return dot(h, self.down[...])


class BlockState(NamedTuple):
  conv: Any  # [B, W − 1, D] float32, or () where there is no convolution
  memory: Any  # the cell's, with a leading axis B


class Block(nnx.Module):
  """Norm, memory, residual, norm, MLP, residual.

    x ← x + dropout(memory(conv(norm(x))))
    x ← x + dropout(MLP(norm(x)))

  Args:
    cell: takes and gives [D].
    options: None for the defaults.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on a cell whose input or output is not float [D].
  """

  def __init__(
    self,
    cell: cell_lib.Cell,
    options: BlockOptions | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    check_cell("Block", cell)
    self.options = options = options or BlockOptions()
    width, taps = cell.d_model, options.conv_size
    self.memory_norm = Norm(width, options.norm)
    kernel = lambda: nnx.Param(
      initializers.uniform(rngs.params(), (taps, width), taps**-0.5)
    )
    self.conv = kernel() if taps else None
    layer = BothWays if options.bidirectional else MemoryLayer
    self.memory = layer(cell, rngs=rngs)
    hidden = options.mlp_width
    if hidden is None:
      hidden = 8 * width // 3 if options.mlp in GATED else 4 * width
    self.mlp_norm = Norm(width, options.norm) if hidden else None
    self.mlp = MLP(width, hidden, options.mlp, rngs=rngs) if hidden else None

  def initial_state(
    self, batch: int, key: jax.Array | None = None
  ) -> BlockState:
    """The memory of `batch` rows before their first input."""
    window = ()
    if self.conv is not None:
      empty = empty_conv(self.conv[...])
      window = jnp.broadcast_to(empty, (batch, *empty.shape))
    return BlockState(window, self.memory.initial_state(batch, key))

  def __call__(
    self, state, x, *, reset=None, mask=None, key=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """The block over x [B, T, D].

    Args:
      state: as `initial_state` makes it.
      x: [B, T, D].
      reset: bool [B, T] or None.
      mask: bool [B, T] or None.
      key: for dropout; None is deterministic.
      implementation: a form of the cell, or None.
      reports: also return what the cell reports.

    Returns:
      (state, x [B, T, D]), or (state, x, {name: [B, T, ...]}).
    """
    keys = (None, None) if key is None else jax.random.split(key)
    window, u = self._memory_input(state, x, reset, mask)
    memory, y, *rest = self.memory(
      state.memory, u, reset=reset, mask=mask, implementation=implementation,
      reports=reports,
    )  # fmt: skip
    x = x + dropout(y, self.options.dropout, keys[0])
    if self.mlp is not None:
      y = self.mlp(self.mlp_norm(x))
      x = x + dropout(y, self.options.dropout, keys[1])
    return BlockState(window, memory), x, *rest

  def refresh(self, state, x, *, reset=None, mask=None) -> None:
    """Sets the memory's buffers from the inputs that x brings to it."""
    u = self._memory_input(state, x, reset, mask)[1]
    if mask is not None:
      u = jnp.where(mask[..., None], u, 0)
    self.memory.refresh(u)

  def _memory_input(self, state, x, reset, mask):
    u = self.memory_norm(x)
    if self.conv is None:
      return (), u
    kernel = self.conv[...]

    def row(window, u, reset, mask):
      return conv(window, u, kernel, reset=reset, mask=mask)

    return jax.vmap(row)(state.conv, u, reset, mask)


def dropout(x, rate: float, key: jax.Array | None):
  """x with a share `rate` of its entries at zero and the others scaled up by
  1 / (1 − rate); x itself where there is no key."""
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0)
