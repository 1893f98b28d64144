"""Token Turing machine."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm


class State(NamedTuple):
  memory: jax.Array  # [M, D] float32


class Inputs(NamedTuple):
  """What an input brings whatever the memory holds, for `_recur`."""

  read: jax.Array  # [..., D] the input with its read location
  read_logits: jax.Array  # [..., R]
  write: jax.Array  # [..., D] the same with its write location
  write_logits: jax.Array  # [..., M]
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
    hoists the input's share of both summaries.
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

  implementations: ClassVar[tuple[str, ...]] = ("scan",)

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
      **{f"layer_{n}": self._init_layer(k) for n, k in enumerate(keys[4:])},
      **_init_norm((d,)),
      "out_w": initializers.glorot_uniform(keys[3], (d, d)),
      "out_b": jnp.zeros((d,)),
    }

  def _init_summary(self, key, places, k):
    d, (key, key_s) = self.d_model, jax.random.split(key)
    params = {"location": 0.02 * jax.random.normal(key, (places, d))}
    if self.summary == "query":
      return params | {"queries": jax.random.normal(key_s, (k, d))}
    return params | _init_norm((d,)) | _init_mlp(key_s, d, self.summary_dim, k)

  def _init_layer(self, key):
    d, (key, *keys) = self.d_model, jax.random.split(key, 5)
    maps = [initializers.glorot_uniform(k, (d, d)) for k in keys]
    return {
      "qkv": jnp.concatenate(maps[:3], axis=1),
      "out_w": maps[3],
      "out_b": jnp.zeros((2, d)),  # of the attention, of the MLP
      **(_init_norm((2, d)) | _init_mlp(key, d, self.mlp_dim, d)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.memory_size, self.d_model), jnp.float32))

  def step(self, params, state, x):
    state, y = self._recur(params, state, self._project(params, x))
    return state, y.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    inputs = self._project(params, xs)._replace(reset=reset, mask=mask)
    step = lambda s, i: self._recur(params, s, i)
    state, ys = arguments.scan_steps(step, state, inputs, None)
    return state, ys.astype(xs.dtype)

  def _project(self, params, x) -> Inputs:
    out = []
    for p in (params["read"], params["write"]):
      token = x + p["location"][self.memory_size].astype(x.dtype)
      out += [token, self._logits(p, token)]
    return Inputs(*(z.astype(jnp.float32) for z in out))

  def _recur(self, params, state, inputs: Inputs):
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    m, read, write = self.memory_size, params["read"], params["write"]
    held = state.memory + read["location"][:m]
    z = self._summarise(read, held, inputs.read, inputs.read_logits)
    o = self._process(params, z)
    new = jnp.concatenate([state.memory, o])
    new += jnp.concatenate([write["location"][:m], write["location"][m + 1 :]])
    memory = self._summarise(write, new, inputs.write, inputs.write_logits)
    return State(memory), _affine(o.mean(0), params["out_w"], params["out_b"])

  def _summarise(self, p, tokens, token, logits):
    """S_k of tokens [N, D] and one more, with its logits [k]: [k, D]."""
    logits = jnp.concatenate([self._logits(p, tokens), logits[None]])
    tokens = jnp.concatenate([tokens, token[None]])
    return jax.nn.softmax(logits, axis=0).T @ tokens

  def _logits(self, p, tokens):
    """tokens [..., D] -> [..., k], before the softmax over tokens."""
    if self.summary == "query":
      return dot(tokens, p["queries"].T) / math.sqrt(self.d_model)
    h = norm.layer_norm(tokens, p["norm_scale"], p["norm_bias"], 1e-6)
    return dot(_hidden(h, p), p["w2"])

  def _process(self, params, z):
    """Z [R, D] -> O [R, D]."""
    z = z + params["location"]
    for p in (params[f"layer_{n}"] for n in range(self.num_layers)):
      scale, bias, out_b = p["norm_scale"], p["norm_bias"], p["out_b"]
      h = norm.layer_norm(z, scale[0], bias[0], eps=1e-6)
      z = z + _affine(self._attend(h, p), p["out_w"], out_b[0])
      h = _hidden(norm.layer_norm(z, scale[1], bias[1], eps=1e-6), p)
      z = z + _affine(h, p["w2"], out_b[1])
    return norm.layer_norm(z, params["norm_scale"], params["norm_bias"], 1e-6)

  def _attend(self, h, p):
    qkv = dot(h, p["qkv"]).reshape(h.shape[0], 3, self.num_heads, -1)
    q, k, v = jnp.moveaxis(qkv, 1, 0)
    scores = jnp.einsum("qhc,khc->hqk", q, k) / math.sqrt(q.shape[-1])
    out = jnp.einsum("hqk,khc->qhc", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(h.shape)


def _init_norm(shape):
  return {"norm_scale": jnp.ones(shape), "norm_bias": jnp.zeros(shape)}


def _init_mlp(key, width, hidden, out):
  keys, weights = jax.random.split(key), initializers.glorot_uniform
  w1, w2 = weights(keys[0], (width, hidden)), weights(keys[1], (hidden, out))
  return {"w1": w1, "b1": jnp.zeros((hidden,)), "w2": w2}


def _hidden(x, p):
  return jax.nn.gelu(_affine(x, p["w1"], p["b1"]))


def _affine(x, w, b):
  return dot(x, w) + b.astype(x.dtype)
