"""Token Turing machine."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.cells import encoder
from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import cell_scan
from memzoo.ops import arguments


class State(NamedTuple):
  memory: jax.Array  # [M, D] float32


class Inputs(NamedTuple):
  """What an input brings whatever the memory holds, for `_recur`."""

  read: jax.Array  # [..., 1, D] the input with its read location
  read_logits: jax.Array  # [..., 1, R]
  write: jax.Array  # [..., 1, D] the same with its write location
  write_logits: jax.Array  # [..., 1, M]
  reset: jax.Array | None = None
  mask: jax.Array | None = None


@register(
  "token_turing_machine",
  family="slot", year=2022,
  paper="Ryoo et al. 2022, arXiv:2211.09119",
  write="summarise memory, output and input",
  evidence="silver",
  tiny=dict(
    d_model=6, memory_size=5, process_size=3, num_heads=2, mlp_dim=7,
    summary_dim=5,
  ),
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class TokenTuringMachine(cell.Cell):
  """Token Turing machine: m tokens, summarised anew at each input.

    Z_t     = S_r([M_t || I_t])            read r tokens
    O_t     = Process(Z_t)                 a transformer encoder
    M_{t+1} = S_m([M_t || O_t || I_t])     what is not selected is forgotten
    y_t     = W_o mean(O_t) + b_o
    S_k(V)  = softmax(α(V))ᵀ V over the tokens of V, with α(V) = MLP(LN(V))
              [·, k] ('mlp') or V qᵀ / sqrt(d), q [k, d] learned ('query')

  Before each S a location embedding is added: one for each place in the memory
  and among the outputs, and for the input.

  State: memory [M, D] float32, from zero.
  Params: read, write: {location [M + 1 (+ R), D] of memory, input and outputs,
    and queries [k, D], or norm_scale, norm_bias [D], w1 [D, B], b1 [B],
    w2 [B, k]}; of the encoder location [R, D], layer_0 …, norm_scale,
    norm_bias [D]; of the head out_w [D, D], out_b [D].
  Forms: step and scan O((M + R)(R + M + B) D + L R D²) a token, in order; scan
    hoists the input's share of both summaries, and keeps the memories alone
    for the backward, which takes each step again; pallas, on a TPU, keeps the
    params and the memory on chip.
  Differs: one input token a step (the paper's are the tokens of a frame), and
    y_t is read from the mean of the r outputs (the paper's head is the task's).
    No MLP-Mixer, no dropout; q, k, v and α's last layer have no biases.
  Paper: Ryoo, Gopalakrishnan, Kahatapitiya, Xiao, Rao, Stone, Lu, Ibarz,
    Arnab 2022, "Token Turing Machines", arXiv:2211.09119, section 3; layers as
    in the authors' code (scenic, projects/token_turing).
  """

  d_model: int
  memory_size: int = 64
  process_size: int = 8
  summary: str = "mlp"
  summary_dim: int = 64
  num_layers: int = 1
  num_heads: int = 4
  mlp_dim: int = 128

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "memory_size", "process_size", "summary_dim",
      "num_layers", "num_heads", "mlp_dim",
    )  # fmt: skip
    arguments.check_divides(self, "num_heads", "d_model")
    if self.summary not in ("mlp", "query"):
      want = f"must be 'mlp' or 'query', got {self.summary!r}"
      raise ValueError(f"TokenTuringMachine: summary {want}")

  def init(self, key) -> dict[str, Any]:
    d, m, r = self.d_model, self.memory_size, self.process_size
    keys = jax.random.split(key, 4 + self.num_layers)
    return {
      "read": self._init_summary(keys[0], m + 1, r),
      "write": self._init_summary(keys[1], m + 1 + r, m),
      "location": 0.02 * jax.random.normal(keys[2], (r, d)),
      **{
        f"layer_{n}": encoder.init_layer(k, d, self.mlp_dim)
        for n, k in enumerate(keys[4:])
      },
      **encoder.init_norm((d,)),
      "out_w": initializers.glorot_uniform(keys[3], (d, d)),
      "out_b": jnp.zeros((d,)),
    }

  def _init_summary(self, key, places, k):
    d, (key, key_s) = self.d_model, jax.random.split(key)
    params = {"location": 0.02 * jax.random.normal(key, (places, d))}
    if self.summary == "query":
      return params | {"queries": jax.random.normal(key_s, (k, d))}
    mlp = encoder.init_mlp(key_s, d, self.summary_dim, k)
    return params | encoder.init_norm((d,)) | mlp

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.memory_size, self.d_model), jnp.float32))

  def step(self, params, state, x):
    constants = encoder.plain(params)
    state, y = self._recur(state, self._project(constants, x), constants)
    return state, y[0].astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    constants = encoder.plain(params)
    inputs = self._project(constants, xs)
    if implementation == "pallas":
      state, ys = cell_scan(
        self._recur, state, inputs, constants, reset=reset, mask=mask
      )
      return state, ys[:, 0].astype(xs.dtype)
    # A step makes many times the floats of its memory: to keep them for the
    # backward takes longer than to compute them again.
    step = jax.checkpoint(
      lambda s, i: self._recur(s, i, constants), prevent_cse=False
    )
    inputs = inputs._replace(reset=reset, mask=mask)
    state, ys = arguments.scan_steps(step, state, inputs, None)
    return state, ys[:, 0].astype(xs.dtype)

  def _project(self, constants, x) -> Inputs:
    out, m = [], self.memory_size
    for p in (constants["read"], constants["write"]):
      token = x[..., None, :] + p["location"][0, m : m + 1].astype(x.dtype)
      out += [token, self._logits(p, token)]
    return Inputs(*(z.astype(jnp.float32) for z in out))

  def _recur(self, state, inputs: Inputs, p):
    """One step, in what a kernel has: y [1, D]."""
    m, read, write = self.memory_size, p["read"], p["write"]
    held = state.memory + read["location"][0, :m]
    z = self._summarise(read, held, inputs.read, inputs.read_logits)
    o, location = self._process(p, z), write["location"][0]
    new = [state.memory + location[:m], o + location[m + 1 :]]
    memory = self._summarise(
      write, jnp.concatenate(new), inputs.write, inputs.write_logits
    )
    y = jnp.mean(o, axis=0, keepdims=True)
    return State(memory), encoder.affine(y, p["out_w"], p["out_b"])

  def _summarise(self, p, tokens, token, logits):
    """S_k of tokens [N, D] and one more [1, D], with its logits: [k, D]."""
    many = self._logits(p, tokens)
    top = jnp.maximum(jnp.max(many, axis=0, keepdims=True), logits)
    top = jax.lax.stop_gradient(top)
    many, one = jnp.exp(many - top), jnp.exp(logits - top)
    total = jnp.sum(many, axis=0, keepdims=True) + one
    mix = functools.partial(jnp.einsum, "nk,nd->kd")
    return mix(many / total, tokens) + mix(one / total, token)

  def _logits(self, p, tokens):
    """tokens [..., D] -> [..., k], before the softmax over tokens."""
    if self.summary == "query":
      return encoder.dot(tokens, p["queries"].T) / math.sqrt(self.d_model)
    h = encoder.hidden(encoder.layer_norm(tokens, p), p)
    return encoder.dot(h, p["w2"])

  def _process(self, p, z):
    """Z [R, D] -> O [R, D]."""
    z = z + p["location"][0]
    for n in range(self.num_layers):
      z = encoder.layer(z, p[f"layer_{n}"], self.num_heads)
    return encoder.layer_norm(z, p)
