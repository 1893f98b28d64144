"""MemMamba: layers of Mamba that take notes, and read them when they forget.

Layer l at token t, with u the norm of its input x and z the output of its
Mamba one token before:

  if I_token(u_t) > τ_1:  s_t = N u_t ,  S_t = Insert(S_{t−1}, s_t)   (8), (9)
  c  = Attention(u_t, S_{t−1}) if I_state(z_{t−1}) > τ_2, else 0         (10)
  c' = Attention(u_t, [S_t of the last g layers]) if l mod p = 0         (11)
  x̄ = x_t + α c + α' c'                                                  (12)
  z_t = Mamba(norm(x̄)) ,  x ← x̄ + z_t
  Attention(u, S) = softmax(W_q u · W_s S / √R) W_v S                    (42)

S is a pool of at most k notes of R numbers: a new one takes the place of the
oldest ('fifo'), or of the least important, if that is less so than itself
('priority'). Logits are those of tied embeddings, after a norm.

The unit is the token. Whether a layer reads hangs on its own last output, so
that tokens go through all layers one after the other, in training too; a token
costs O(L (D² + k R)).

Differs: the scores are open in the paper; here they are I(u) = σ(w·u + b), as
N, learned and linear, and each decision passes the gradient of its score
straight through. Open too, and chosen here: the thresholds; that layers score,
note and ask with the norm of their input; that z is Mamba's output. The query
is (6)'s x, for (10)'s h needs what it is to find, and values are W_v s, for
(42) has W_v x where section A.3.3 has W_v s. Of the fusions the weighted one
alone, the paper's best, with scalars that start at 1. Notes are of one token:
the pooling of windows, of which the appendix has bounds, is not built, nor are
the measures of fidelity.

Paper: Wang, Chen, Yan, Lu, Sun 2025, "MemMamba: Rethinking Memory Patterns in
  State Space Model", arXiv:2510.03279, section 4, eq. 5 to 12, sections A.3.3
  and A.4.1 (eq. 42 and 43), A.5 (fusion) and A.6 (24 layers, 50 notes of 64).
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.ssm.mamba import Mamba
from memzoo.core import initializers
from memzoo.core.linear import dot
from memzoo.models import layers
from memzoo.models.block import Norm
from memzoo.models.encoder import check_size

REPLACEMENTS = ("fifo", "priority")


class Notes(NamedTuple):
  """The pool of a layer, of one row."""

  s: jax.Array  # [K, R] float32
  importance: jax.Array  # [K] float32, 0: no note
  count: jax.Array  # int32 [], taken since the last reset


class LayerState(NamedTuple):
  """What a layer holds between two tokens."""

  mamba: Any
  z: jax.Array  # [D] float32
  notes: Notes


class Read(nnx.Module):
  """Attention of a token to notes, times a learned scalar.

  Args:
    width: D.
    rank: R.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, rank: int, *, rngs: nnx.Rngs):
    draw = lambda *shape: nnx.Param(
      initializers.lecun_normal(rngs.params(), shape)
    )
    self.q, self.k = draw(width, rank), draw(rank, rank)
    self.v = draw(rank, width)
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, u, s, there):
    """u [D], notes [N, R] of which bool [N] are there: [D]."""
    scores = dot(s, self.k[...]) @ dot(u, self.q[...])
    scores = jnp.where(there, scores * s.shape[1] ** -0.5, -1e30)
    weights = jnp.where(there, jax.nn.softmax(scores), 0)
    return self.scale[...] * dot(weights @ s, self.v[...])


class Layer(nnx.Module):
  """One layer; options are of `MemMamba`, `across` whether it reads others.

  Args:
    width: D.
    d_state: of Mamba.
    rank: R.
    across: whether it reads the notes of the layers below.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width, d_state, rank, across, *, rngs: nnx.Rngs):
    self.input_norm, self.norm = Norm(width, "rms"), Norm(width, "rms")
    self.mamba = layers.MemoryLayer(Mamba(width, d_state=d_state), rngs=rngs)
    self.note = nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, rank))
    )
    self.scores = nnx.Param(
      initializers.lecun_normal(rngs.params(), (2, width), width)
    )
    self.bias = nnx.Param(jnp.zeros((2,)))
    self.read = Read(width, rank, rngs=rngs)
    self.across = Read(width, rank, rngs=rngs) if across else None

  def initial_state(self, capacity: int) -> LayerState:
    cell, (width, rank) = self.mamba.cell, self.note.shape
    zero = lambda *shape: jnp.zeros(shape, jnp.float32)
    notes = Notes(zero(capacity, rank), zero(capacity), jnp.int32(0))
    mamba = cell.initial_state(self.mamba.values)
    return LayerState(mamba, zero(width), notes)

  def __call__(self, state: LayerState, x, below, options):
    """(state, x, noted, has read) of one token x [D]; `below` are the pools
    that it may read."""
    u = self.input_norm(x)
    forgets, reads = _decide(self._score(1, state.z), options.read_threshold)
    old = state.notes
    notes, noted = self._take(old, u, options)
    out = x + forgets * self.read(u, old.s, old.importance > 0)
    if self.across is not None:
      s, importance = (
        jnp.concatenate([getattr(n, what) for n in below])
        for what in ("s", "importance")
      )
      out += self.across(u, s, importance > 0)
    mamba, z = self.mamba.cell.step(
      self.mamba.values, state.mamba, self.norm(out)
    )
    reads &= old.count > 0
    return LayerState(mamba, z, notes), out + z, noted, reads

  def _score(self, which: int, u):
    return jax.nn.sigmoid(u @ self.scores[...][which] + self.bias[...][which])

  def _take(self, notes: Notes, u, options):
    """The pool after token u, and whether it was noted."""
    importance = self._score(0, u)
    through, noted = _decide(importance, options.note_threshold)
    importance = jax.lax.stop_gradient(importance)
    size = len(notes.importance)
    slot = notes.count % size
    if options.replacement == "priority":
      slot = jnp.argmin(notes.importance)
      noted &= importance > notes.importance[slot]
    here = noted & (jnp.arange(size) == slot)
    s = through * dot(u, self.note[...])
    return Notes(
      jnp.where(here[:, None], s, notes.s),
      jnp.where(here, importance, notes.importance),
      notes.count + noted.astype(jnp.int32),
    ), noted


class Options(NamedTuple):
  note_threshold: float
  read_threshold: float
  replacement: str


class MemMamba(nnx.Module):
  """Tokens to logits.

  >>> model = MemMamba(256, d_model=64, depth=4, rngs=nnx.Rngs(0))
  >>> state, logits = model(None, tokens)  # int [B, T] -> float32 [B, T, V]

  Args:
    vocab_size: V.
    d_model: D.
    depth: L.
    d_state: states of a channel of Mamba.
    capacity: k, notes of a layer's pool.
    rank: R, numbers of a note.
    every: p, of which layer l, from 1, reads the notes of others if l mod p
      = 0.
    layers_below: g, of whose notes it reads.
    note_threshold: τ_1 of a score in (0, 1).
    read_threshold: τ_2 of a score in (0, 1).
    replacement: one of `REPLACEMENTS`.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on an option out of range.
  """

  def __init__(
    self, vocab_size: int, *, d_model: int = 256, depth: int = 24,
    d_state: int = 16, capacity: int = 50, rank: int = 64, every: int = 4,
    layers_below: int = 4, note_threshold: float = 0.5,
    read_threshold: float = 0.5, replacement: str = "fifo", rngs: nnx.Rngs,
  ):  # fmt: skip
    sizes = dict(
      vocab_size=vocab_size, d_model=d_model, depth=depth, d_state=d_state,
      capacity=capacity, rank=rank, every=every, layers_below=layers_below,
    )  # fmt: skip
    for name, value in sizes.items():
      check_size(name, value)
    if replacement not in REPLACEMENTS:
      raise ValueError(
        f"MemMamba: replacement must be one of {REPLACEMENTS}, got "
        f"{replacement!r}"
      )
    self.capacity, self.layers_below = capacity, layers_below
    self.options = Options(note_threshold, read_threshold, replacement)
    self.embedding = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (vocab_size, d_model))
    )
    # The first layer has none below it.
    self.layers = nnx.List(
      Layer(d_model, d_state, rank, n > 1 and n % every == 0, rngs=rngs)
      for n in range(1, depth + 1)
    )
    self.norm = Norm(d_model, "rms")

  def initial_state(self, batch: int) -> tuple[LayerState, ...]:
    """The memory of `batch` rows before their first token."""
    check_size("batch", batch)
    rows = lambda x: jnp.broadcast_to(x, (batch, *x.shape))
    return jax.tree.map(rows, self._fresh())

  def __call__(
    self, state, inputs, *, reset=None, mask=None, reports: bool = False
  ):
    """(state, logits float32 [B, T, V]), zero where there is no token.

    Args:
      state: as `initial_state` makes it, or None for that.
      inputs: int [B, T].
      reset: bool [B, T] or None. True: fresh before this token.
      mask: bool [B, T] or None. False: no token here.
      reports: also return the shares of tokens, over layers, that were noted
        and that read notes: {'noted': [], 'read': []}.

    Raises:
      ValueError: on arguments of wrong shape or dtype.
    """
    shape, kind = jnp.shape(inputs), jnp.result_type(inputs)
    if len(shape) != 2 or not jnp.issubdtype(kind, jnp.integer):
      raise ValueError(
        f"MemMamba: inputs must be int [B, T], got {kind} {shape}"
      )
    layers.check_flags("MemMamba", shape, reset, mask)
    there = jnp.ones(shape, bool) if mask is None else mask
    fresh = jnp.zeros(shape, bool) if reset is None else reset & there
    state = self.initial_state(shape[0]) if state is None else state
    start, table = self._fresh(), self.embedding[...]
    x = jnp.take(table, jnp.where(there, inputs, 0), axis=0)
    choose = lambda flag, a, b: jax.tree.map(
      lambda a, b: jnp.where(flag, a, b), a, b
    )

    def row(state, x, fresh, there):
      new, x, did = self._token(choose(fresh, start, state), x)
      return choose(there, new, state), x, jnp.where(there, did, 0)

    def step(state, inputs):
      state, *out = jax.vmap(row)(state, *inputs)
      return state, out

    by_time = lambda x: jnp.swapaxes(x, 0, 1)
    state, (x, did) = jax.lax.scan(
      step, state, tuple(map(by_time, (x, fresh, there)))
    )
    logits = dot(self.norm(by_time(x)), table.T)
    logits = jnp.where(there[..., None], logits, 0)
    if not reports:
      return state, logits
    count = jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)
    noted, read = jnp.sum(did, axis=(0, 1)) / count
    return state, logits, {"noted": noted, "read": read}

  def _fresh(self):
    return tuple(layer.initial_state(self.capacity) for layer in self.layers)

  def _token(self, states, x):
    """One token of one row: (states, x, shares of layers that noted, read)."""
    new, did = [], []
    for layer, old in zip(self.layers, states):
      below = [s.notes for s in new[-self.layers_below :]]
      state, x, *done = layer(old, x, below, self.options)
      new.append(state)
      did.append(jnp.stack(done))
    return tuple(new), x, jnp.mean(jnp.stack(did), axis=0)


def _decide(score, threshold):
  """Whether score > threshold: as a number that passes the score's gradient,
  and as bool."""
  yes = score > threshold
  return jax.lax.stop_gradient(yes.astype(score.dtype) - score) + score, yes
