"""The adapter to Flax Linen."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from memzoo.core import cell as cell_lib
from memzoo.models import layers


class MemoryLayer(nn.Module):
  """A cell over a batch, as a Linen module: twin of `models.MemoryLayer`.

  Its leaves are in the collection 'params' by their path names ('w',
  'inner/w'), the untrained ones in the collection 'buffers'.

  >>> layer = MemoryLayer(memzoo.make('gru', d_model=64))
  >>> variables = layer.init(jax.random.key(0), None, xs)
  >>> state, ys = layer.apply(variables, state, xs, reset=reset)

  Attributes:
    cell: the memory, any of the contract.
  """

  cell: cell_lib.Cell

  @nn.nowrap
  def initial_state(self, variables, batch: int, key: jax.Array | None = None):
    """The memory of `batch` rows before their first input: leaves [B, ...].

    Args:
      variables: as `init` made them.
      batch: B.
      key: for stochastic memories alone; each row draws its own.
    """
    params = self._tree(
      lambda name, buffer, _: variables[_collection(buffer)][name]
    )
    return layers.initial_state(self.cell, params, batch, key)

  @nn.compact
  def __call__(
    self, state, xs, *, reset=None, mask=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """`memzoo.scan` of each row; as `models.MemoryLayer` does."""
    params = self._params()
    return layers.scan_rows(
      self.cell, params, state, xs, reset=reset, mask=mask,
      implementation=implementation, reports=reports,
    )  # fmt: skip

  @nn.compact
  def refresh(self, xs) -> None:
    """Sets the buffers to what the cell makes of the inputs xs [B, T, D].

    >>> _, new = layer.apply(variables, xs, method='refresh',
    ...                      mutable=['buffers'])
    """
    params = self.cell.refresh(self._params(), xs)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
      if layers.is_buffer(path):
        self.put_variable(_collection(True), _name(path), value)

  def _params(self):
    """The cell's parameters, made where the module is being initialised."""
    made = {}
    if self.is_initializing():
      params = self.cell.init(self.make_rng("params"))
      made = {
        _name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      }

    def leaf(name, buffer, spec):
      # Where nothing is initialised, Linen asks for the shape alone.
      start = lambda _=None: made.get(name, jnp.zeros(spec.shape, spec.dtype))
      if buffer:
        return self.variable(_collection(True), name, start).value
      return self.param(name, start)

    return self._tree(leaf)

  def _tree(self, leaf):
    """The tree of `cell.init`, leaves `leaf(name, is it a buffer, spec)`."""
    spec = jax.eval_shape(self.cell.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
      lambda path, x: leaf(_name(path), layers.is_buffer(path), x), spec
    )


def _collection(buffer: bool) -> str:
  return "buffers" if buffer else "params"


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
