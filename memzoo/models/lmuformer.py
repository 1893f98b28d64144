"""LMUFormer: convolutions, a Legendre memory, a channel mixer; also in spikes.

A patch embedding of convolutions (∗) with three taps, centred; blocks of a
Legendre memory (`ParallelLMU`, of one signal) and a channel mixer; a classifier
of the mean over the sequence:

  x ← BN(ReLU(W_i ∗ x)) , i = 1 … 4 ;  x ← x + W_5 ∗ x
  x ← x + BN(W LMU(x))
  x ← x + ReLU(BN(W_2 GELU(BN(W_1 x))))
  logits = mean_n W x_n

With `spiking`, what any map reads are spikes SN(x), the spikes of leaky
integrate-and-fire neurons (`memzoo.ops.integrate_and_fire`) on BN(x), one a
channel, whose time is that of the sequence:

  x ← SN(W_i ∗ x) , i = 1, 2, 3 ;  x ← W_4 ∗ x ;  x ← x + W_5 ∗ SN(x)
  s = SN(x) ;  u = SN(W_u s) ;  m_t = Ā m_{t−1} + B̄ u_t
  x ← x + BN(W SN(W_h [SN(m), s]))
  x ← x + W_2 SN(W_1 SN(x))
  logits = mean_n W SN(x_n)

The memory stays real: its coefficients are read through spikes. Neurons are the
state that the plain model has not outside its memory.

The unit is the token. Each convolution looks one token ahead, so that what is
known of token n can be told at token n + 5 (`DELAY`), and the ends of a
sequence are padded with zeros before every convolution. A call gives the
logits of the mean so far; `finish` gives those of the sequence that ends here,
`classify` those of whole sequences in one pass.

Batch norm (BN) uses its running averages, which `refresh` moves; in training
(`train=True`) the mean and variance of what the call brings.

Differs: maps start as this package's do. In the authors' code the memory's
convolution is cut off after 128 tokens, as long as their sequences; here it is
the recurrence, for any length. Their other spiking model (neurons behind every
batch norm, residuals in spikes) is not here.

Paper: Liu, Datta, Li, Beerel 2024, "LMUFormer: Low Complexity Yet Powerful
  Spiking Model With Legendre Memory Units", arXiv:2402.04882; order of layers,
  neurons and thresholds as in the authors' code (github.com/zeyuliu1037/
  LMUFormer, `lmu_rnn_conv1d` and `slmu_rnn_ms_conv1d`).
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.ssm.parallel_lmu import ParallelLMU
from memzoo.core import initializers
from memzoo.core.linear import dot
from memzoo.models import layers
from memzoo.models.encoder import check_size
from memzoo.models.model import Head
from memzoo.ops.attention import positions
from memzoo.ops.conv import conv
from memzoo.ops.integrate_and_fire import integrate_and_fire
from memzoo.ops.linear_recurrence import linear_recurrence
from memzoo.ops.state_space import state_space

TAPS = 3
DELAY = 5  # one token for each convolution


class Flow(NamedTuple):
  """Which steps of a call a layer sees, of every row."""

  there: jax.Array  # bool [B, T]
  reset: jax.Array | None  # bool [B, T], fresh before this step


class State(NamedTuple):
  """What the model holds between two tokens, of every row. Float32."""

  position: jax.Array  # int32 [B], tokens since the last reset
  embedding: Any  # windows [B, 2, ·] of the convolutions, potentials [B, D]
  blocks: Any  # per block, memory [B, 1, N] and potentials [B, ·]
  total: jax.Array  # [B, D], features of the tokens told of so far


class BatchNorm(nnx.Module):
  """Per channel, over the tokens that are there.

  Args:
    width: D.
    momentum: of the running averages, a share of the new one.
  """

  def __init__(self, width: int, momentum: float = 0.1):
    self.momentum = momentum
    self.scale = nnx.Param(jnp.ones((width,)))
    self.shift = nnx.Param(jnp.zeros((width,)))
    self.mean = layers.Buffer(jnp.zeros((width,)))
    self.variance = layers.Buffer(jnp.ones((width,)))

  def __call__(self, x, there, mode: str):
    """x [B, T, D], by the averages ('run'), or by x's own ('train'), which
    'refresh' also adds to the averages."""
    mean, variance = self.mean[...], self.variance[...]
    if mode != "run":
      count = jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)
      total = lambda x: jnp.sum(jnp.where(there[..., None], x, 0), (0, 1))
      own = total(x) / count
      square = total(jnp.square(x - own))
      if mode == "refresh":
        move = lambda old, new: old + self.momentum * (new - old)
        self.mean[...] = move(mean, own)
        self.variance[...] = move(variance, square / jnp.maximum(count - 1, 1))
      mean, variance = own, square / count
    scale = self.scale[...] * jax.lax.rsqrt(variance + 1e-5)
    return (x - mean) * scale + self.shift[...]


class Neurons(nnx.Module):
  """SN: x [B, T, D] to spikes, zero where there is no token.

  Args:
    width: D.
    threshold: of the neurons.
  """

  def __init__(self, width: int, threshold: float = 1.0):
    self.norm, self.threshold = BatchNorm(width), threshold

  def initial_state(self, batch: int):
    return jnp.zeros((batch, self.norm.scale.shape[0]), jnp.float32)

  def __call__(self, v, x, flow: Flow, mode: str):
    def row(v, x, there, reset):
      return integrate_and_fire(
        v, x, threshold=self.threshold, mask=there, reset=reset
      )

    x = self.norm(x, flow.there, mode)
    return jax.vmap(row)(v, x, flow.there, flow.reset)


class Linear(nnx.Module):
  """W x + b; a bias is optional."""

  def __init__(self, width: int, outputs: int, bias: bool = True, *, rngs):
    self.kernel = nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, outputs))
    )
    self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

  def __call__(self, x):
    y = dot(x, self.kernel[...])
    return y if self.bias is None else y + self.bias[...]


def window(state, x, flow: Flow):
  """The inputs before, at and after the token before this one: (state
  [B, 2, D], windows [B, T, 3, D]) of x [B, T, D]."""
  taps = jnp.eye(TAPS)[..., None] * jnp.ones(x.shape[2])

  def row(state, x, there, reset):
    one = lambda kernel: conv(state, x, kernel, mask=there, reset=reset)
    states, taken = jax.vmap(one, out_axes=(0, 1))(taps)
    return states[0], taken

  return jax.vmap(row)(state, x, flow.there, flow.reset)


class PatchEmbedding(nnx.Module):
  """Five convolutions, the last one on a residual.

  Args:
    width: of the inputs.
    outputs: D.
    spiking: as of `LMUFormer`.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, outputs: int, spiking: bool, *, rngs):
    self.spiking = spiking
    self.kernels = nnx.List(
      Linear(TAPS * n, outputs, False, rngs=rngs)
      for n in (width, *[outputs] * (DELAY - 1))
    )
    make = Neurons if spiking else BatchNorm
    self.acts = nnx.List(make(outputs) for _ in range(DELAY - 1))

  def initial_state(self, batch: int):
    widths = [k.kernel.shape[0] // TAPS for k in self.kernels]
    if self.spiking:
      widths.append(widths[-1])  # the residual, which is no spikes
    zero = lambda n: jnp.zeros((batch, TAPS - 1, n), jnp.float32)
    acts = self.acts if self.spiking else ()
    return tuple(map(zero, widths)), tuple(a.initial_state(batch) for a in acts)

  def __call__(self, state, x, ticks: Flow, flows, mode: str):
    """x [B, T, D] and what it holds; `ticks` are the steps of time, flows[l]
    those at which the first l convolutions tell of a token."""
    windows, acts, skip = [], [], x
    for n, kernel in enumerate(self.kernels):
      old, taken = window(state[0][n], x, ticks)
      windows.append(old)
      y = kernel(taken.reshape(*x.shape[:2], -1))
      flow, last = flows[n + 1], n == DELAY - 1
      if last:
        before = taken
        if self.spiking:
          old, before = window(state[0][DELAY], skip, ticks)
          windows.append(old)
        y = before[:, :, 1] + y
      elif not self.spiking:
        y = self.acts[n](jax.nn.relu(y), flow.there, mode)
      x = jnp.where(flow.there[..., None], y, 0)
      if self.spiking and not last:
        skip = x
        v, x = self.acts[n](state[1][n], x, flow, mode)
        acts.append(v)
    return (tuple(windows), tuple(acts)), x


class Block(nnx.Module):
  """A Legendre memory and a channel mixer, of real numbers.

  Args:
    width: D.
    order: N of the memory.
    theta: tokens of its window.
    hidden: of the mixer.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width, order, theta, hidden, *, rngs: nnx.Rngs):
    self.memory = layers.MemoryLayer(
      ParallelLMU(width, order=order, theta=theta), rngs=rngs
    )
    draw = lambda *shape: Linear(*shape, rngs=rngs)
    self.out, self.up = draw(width, width), draw(width, hidden)
    self.down = draw(hidden, width)
    self.norms = nnx.List(map(BatchNorm, (width, hidden, width)))

  def initial_state(self, batch: int):
    return self.memory.initial_state(batch)

  def __call__(self, state, x, flow: Flow, mode: str, form):
    bn = lambda n, x: self.norms[n](x, flow.there, mode)
    state, h = self.memory(
      state, x, reset=flow.reset, mask=flow.there, implementation=form
    )
    x = x + bn(0, self.out(h))
    h = jax.nn.gelu(bn(1, self.up(x)), approximate=False)
    return state, x + jax.nn.relu(bn(2, self.down(h)))


class SpikingBlock(nnx.Module):
  """The same in spikes; arguments as of `Block`."""

  def __init__(self, width, order, theta, hidden, *, rngs: nnx.Rngs):
    linear = dict(encode_activation="identity", activation="identity")
    self.memory = layers.MemoryLayer(
      ParallelLMU(width, order=order, theta=theta, **linear), rngs=rngs
    )
    draw = lambda *shape: Linear(*shape, rngs=rngs)
    self.out, self.norm = draw(width, width), BatchNorm(width)
    self.up, self.down = draw(width, hidden), draw(hidden, width)
    sizes = (width, 0.5), (1,), (order,), (width,), (width,), (hidden,)
    self.acts = nnx.List(Neurons(*size) for size in sizes)

  def initial_state(self, batch: int):
    return self.memory.initial_state(batch), tuple(
      act.initial_state(batch) for act in self.acts
    )

  def __call__(self, state, x, flow: Flow, mode: str, form):
    (memory, old), new = state, []

    def fire(x):
      n = len(new)
      v, s = self.acts[n](old[n], x, flow, mode)
      new.append(v)
      return s

    cell, params = self.memory.cell, self.memory.values
    transition, write, read = cell._space()

    def remember(m, u, there, reset):
      return state_space(
        m, u, transition=transition, write=write, read=read, mask=there,
        reset=reset, implementation=form,
      )  # fmt: skip

    s = fire(x)
    u = fire(cell._encode(params, s))
    m, ms = jax.vmap(remember)(memory.m, u, flow.there, flow.reset)
    ms = fire(ms[:, :, 0])[:, :, None]
    h = fire(cell._read_out(params, ms, s))
    x = x + self.norm(self.out(h), flow.there, mode)
    x = x + self.down(fire(self.up(fire(x))))
    return (memory._replace(m=m), tuple(new)), x


class LMUFormer(nnx.Module):
  """Sequences of floats to classes.

  >>> model = LMUFormer(128, 35, spiking=True, rngs=nnx.Rngs(0))
  >>> logits = model.classify(xs)  # float [B, T, 128] -> float32 [B, 35]
  >>> state, logits = model(None, xs)  # -> [B, T, 35], as far as is known

  Args:
    d_input: width of the inputs.
    num_classes: C.
    d_model: D.
    depth: blocks.
    order: N of the memories; None for D, or 2 D where they are read in spikes.
    theta: tokens of their windows.
    mlp_width: hidden width of the channel mixers; None for 4 D.
    spiking: neurons in front of every map.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on an option out of range.
  """

  def __init__(
    self, d_input: int, num_classes: int, *, d_model: int = 256,
    depth: int = 1, order: int | None = None, theta: float = 128.0,
    mlp_width: int | None = None, spiking: bool = False, rngs: nnx.Rngs,
  ):  # fmt: skip
    self.d_input = check_size("d_input", d_input)
    self.d_model = d = check_size("d_model", d_model)
    self.num_classes = check_size("num_classes", num_classes)
    self.spiking = spiking
    order = d * (2 if spiking else 1) if order is None else order
    hidden = 4 * d if mlp_width is None else check_size("mlp_width", mlp_width)
    self.embedding = PatchEmbedding(self.d_input, d, spiking, rngs=rngs)
    block = SpikingBlock if spiking else Block
    self.blocks = nnx.List(
      block(d, order, theta, hidden, rngs=rngs)
      for _ in range(check_size("depth", depth))
    )
    self.act = Neurons(d) if spiking else None
    self.head = Head(d, self.num_classes, rngs=rngs)

  def initial_state(self, batch: int) -> State:
    """The memory of `batch` rows before their first token."""
    batch = check_size("batch", batch)
    blocks = [block.initial_state(batch) for block in self.blocks]
    if self.spiking:
      blocks.append(self.act.initial_state(batch))
    return State(
      jnp.zeros((batch,), jnp.int32),
      self.embedding.initial_state(batch),
      tuple(blocks),
      jnp.zeros((batch, self.d_model), jnp.float32),
    )

  def __call__(
    self, state, inputs, *, reset=None, mask=None, implementation=None
  ):
    """(state, logits float32 [B, T, C]): of the mean over the tokens up to the
    one DELAY back; zero where there is none, and where there is no input.

    Args:
      state: as `initial_state` makes it, or None for that.
      inputs: float [B, T, d_input].
      reset: bool [B, T] or None. True: another sequence starts here; what was
        not told yet of the one before is not told.
      mask: bool [B, T] or None. False: no input here.
      implementation: a form of `ParallelLMU` but 'step', or None.

    Raises:
      ValueError: on arguments of wrong shape or dtype.
    """
    return self._run(state, inputs, reset, mask, implementation)

  def finish(self, state: State):
    """Logits float32 [B, C] of the sequences that end with their last token."""
    nothing = jnp.zeros((state.position.shape[0], 0, self.d_input))
    return self._run(state, nothing, None, None, None, end=True)[1][:, -1]

  def classify(self, inputs, *, mask=None, implementation=None, train=False):
    """Logits float32 [B, C] of whole sequences, `inputs` as in a call.

    Args:
      inputs: as in a call.
      mask: as in a call.
      implementation: as in a call.
      train: batch norm by the statistics of this call, not the averages.
    """
    mode = "train" if train else "run"
    return self._run(None, inputs, None, mask, implementation, mode, True)[1][
      :, -1
    ]

  def refresh(self, inputs, *, mask=None) -> None:
    """Moves the averages of batch norm, in place, towards those of inputs."""
    self._run(None, inputs, None, mask, None, "refresh", True)

  def _run(self, state, x, reset, mask, form, mode="run", end=False):
    shape, kind = jnp.shape(x), jnp.result_type(x)
    floats = jnp.issubdtype(kind, jnp.floating)
    known = len(shape) == 3 and shape[2] == self.d_input and floats
    if not known or not (end or shape[1]):
      raise ValueError(
        f"LMUFormer: inputs must be float [B, T, {self.d_input}], got {kind} "
        f"{shape}"
      )
    layers.check_flags("LMUFormer", shape[:2], reset, mask)
    there = jnp.ones(shape[:2], bool) if mask is None else mask
    fresh = state is None and reset is None
    state = self.initial_state(shape[0]) if state is None else state
    reset = jnp.zeros_like(there) if reset is None else reset & there
    x = jnp.where(there[..., None], x, 0).astype(jnp.float32)
    over = jnp.zeros((1, shape[1]), jnp.int32)
    if end:  # time goes on while the convolutions run out
      pad = lambda x, value: jnp.pad(
        x,
        ((0, 0), (0, DELAY), *[(0, 0)] * (x.ndim - 2)),
        constant_values=value,
      )
      x, there, reset = pad(x, 0), pad(there, True), pad(reset, False)
      over = jnp.concatenate([over, 1 + jnp.arange(DELAY)[None]], axis=1)
    place = jax.vmap(
      lambda count, reset, there: positions(
        count, len(there), reset=reset, mask=there
      )
    )(state.position, reset, there)
    ticks = Flow(there, None if fresh else reset)
    flows = [
      Flow(
        there & (place >= late) & (over <= late),
        None if fresh else there & (place == late),
      )
      for late in range(DELAY + 1)
    ]
    flow = flows[DELAY]
    embedding, x = self.embedding(state.embedding, x, ticks, flows, mode)
    blocks = []
    for block, old in zip(self.blocks, state.blocks):
      new, x = block(old, x, flow, mode, form)
      blocks.append(new)
    if self.spiking:
      v, x = self.act(state.blocks[-1], x, flow, mode)
      blocks.append(v)

    def add(total, x, there, reset):
      return linear_recurrence(
        total, x, decay=jnp.ones_like(total), mask=there, reset=reset
      )

    total, totals = jax.vmap(add)(state.total, x, flow.there, flow.reset)
    count = jnp.maximum(place - DELAY + 1, 1).astype(jnp.float32)
    logits = self.head(totals / count[..., None])
    logits = jnp.where(flow.there[..., None], logits, 0)
    return State(place[:, -1] + 1, embedding, tuple(blocks), total), logits
