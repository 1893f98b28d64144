"""S5 in both directions: every place of a sequence sees all of it.

  x→_k = Λ̄ x→_{k−1} + B̄ u_k ,  x←_k = Λ̄ x←_{k+1} + B̄ u_k
  y_k  = 2 Re(C̃_1 x→_k + C̃_2 x←_k) + D ⊙ u_k

Both ways share Λ̄, B̄ and D; C̃ has twice the columns, and u_k is in both
states. A layer that reads a whole sequence at once and keeps nothing: it goes
into models by their option `bidirectional=True`.

A reset starts a new sequence, which neither way looks across; inputs under the
mask are absent from both.

Paper: Smith, Warrington, Linderman 2022, "Simplified State Space Layers for
  Sequence Modeling", arXiv:2208.04933; the equations as in the authors' code
  (lindermanlab/S5, s5/ssm.py, `bidirectional`), where both states are joined
  and read by the joined C̃_1 and C̃_2.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.ssm.s5 import S5, drive, read_out
from memzoo.core.cell import reset_from_segment_ids, where
from memzoo.models import layers
from memzoo.ops.linear_recurrence import linear_recurrence


def init_both_ways(cell: S5, key):
  """Parameters of `both_ways`: those of the cell, with c_re, c_im [N, D], rows
  of C̃_1 and then of C̃_2, drawn one like the other."""
  key, other = jax.random.split(key)
  params, second = cell.init(key), cell.init(other)
  both = {k: jnp.concatenate([params[k], second[k]]) for k in ("c_re", "c_im")}
  return params | both


def both_ways(
  cell: S5, params, xs, *, reset=None, mask=None, implementation=None
):
  """The layer over one sequence: xs [T, D] -> ys [T, D], zero where masked.

  Args:
    cell: the state space.
    params: as `init_both_ways` makes them.
    xs: [T, D].
    reset: bool [T] or None; True: another sequence starts here.
    mask: bool [T] or None; False: there is no input here.
    implementation: a form of `linear_recurrence`, or None.
  """
  if mask is not None:
    xs = where(mask, xs, jnp.zeros_like(xs))
    reset = None if reset is None else reset & mask
  decay, factor = cell.discretize(params)
  writes = factor * drive(params, xs)
  run = functools.partial(
    linear_recurrence, jnp.zeros_like(decay), decay=decay,
    implementation=implementation,
  )  # fmt: skip
  forward = run(writes, reset=reset, mask=mask)[1]
  back, ends = None if mask is None else mask[::-1], None
  if reset is not None:  # seen from behind, a sequence starts where it ends
    ends = reset_from_segment_ids(jnp.cumsum(reset)[::-1], back)
  backward = run(writes[::-1], reset=ends, mask=back)[1][::-1]
  ys = read_out(params, jnp.concatenate([forward, backward], axis=-1), xs)
  return ys if mask is None else where(mask, ys, jnp.zeros_like(ys))


class BothWays(layers.MemoryLayer):
  """`both_ways` in the place of a `MemoryLayer`; its memory is empty.

  Args:
    cell: the state space.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on another cell than S5.
  """

  def __init__(self, cell: S5, *, rngs: nnx.Rngs):
    if not isinstance(cell, S5):
      raise ValueError(
        "bidirectional: the cell must be 's5', got "
        + repr(layers.name_of(cell))
      )
    self.cell = cell
    self.params = layers.variables(init_both_ways(cell, rngs.params()))

  def initial_state(self, batch: int, key: jax.Array | None = None):
    del batch, key
    return ()

  def __call__(
    self, state, xs, *, reset=None, mask=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """((), ys [B, T, D]), or ((), ys, {}); arguments are `MemoryLayer`'s, but
    that `implementation` is a form of `linear_recurrence`."""
    del state
    layers.check_flags("BothWays", xs.shape[:2], reset, mask)

    def row(xs, reset, mask):
      return both_ways(
        self.cell, self.values, xs, reset=reset, mask=mask,
        implementation=implementation,
      )  # fmt: skip

    ys = jax.vmap(row)(xs, reset, mask)
    return ((), ys, {}) if reports else ((), ys)

  def refresh(self, xs) -> None:
    del xs
