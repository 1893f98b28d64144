"""Kernels of other packages, as further forms of our ops.

A form is offered to everyone and serves where its package is installed and the
device fits; elsewhere it says why it does not.
"""

from functools import partial
import importlib.util

import jax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.kernels.interpret import interpreting

# Its name of each op by (delta rule, decay); the order of its gates.
_JLA = {
  (False, 1): ("simple_gla", ("g",)),
  (False, 2): ("gla", ("g",)),
  (True, 0): ("deltanet", ("beta",)),
  (True, 1): ("gated_deltanet", ("g", "beta")),
  (True, 2): ("kda", ("g", "beta")),
}


def jla(s, q, k, v, *, beta=None, log_decay=None, reset=None, mask=None,
        fresh=None):  # fmt: skip
  """jax-linear-attention's kernels for Hopper GPUs, for one sequence and head.

  Inside `memzoo.kernels.interpret()` its reference form takes their place, on
  any device.

  Args:
    s: float32 [K, V]. q, k: [T, K]. v: [T, V]. beta: [T] for the delta rule.
    log_decay: [T], [T, K] or None. reset: bool [T] or None.
    mask, fresh: None.

  Returns:
    (state [K, V], outputs [T, V]).

  Raises:
    NotImplementedError: where the package or a Hopper GPU is missing, or its
      kernels do not serve the call.
  """
  if importlib.util.find_spec("jla") is None:
    raise NotImplementedError("the package jax-linear-attention is missing")
  if not interpreting() and not _hopper():
    raise NotImplementedError(
      "jax-linear-attention's kernels run on Hopper GPUs"
    )
  if mask is not None or fresh is not None:
    raise NotImplementedError(
      "jax-linear-attention has no gaps and no learned fresh state"
    )
  decays = 0 if log_decay is None else log_decay.ndim
  if (beta is not None, decays) not in _JLA:
    raise NotImplementedError(
      "jax-linear-attention has no linear attention without decay"
    )
  kind, names = _JLA[beta is not None, decays]
  gates = {"g": log_decay, "beta": beta}
  gates = {name: gates[name] for name in names}
  segments = None
  if reset is not None:
    segments = jnp.cumsum(reset.astype(jnp.int32))
  call = partial(_call, kind, "reference" if interpreting() else "mosaic_gpu")
  (s,), (o,) = _scan(call, (s,), (q, k, v, gates), segments)
  return s, o


def tokamax():
  """tokamax's attention in Triton for NVIDIA GPUs, for one sequence and head.

  Inside `memzoo.kernels.interpret()` its XLA form takes its place, on any
  device.

  Returns:
    (q [T, K], k [S, K], v [S, V], visible bool [T, S], scale or None) ->
    [T, V]. Every query sees a key.

  Raises:
    NotImplementedError: where the package or a GPU is missing.
  """
  if importlib.util.find_spec("tokamax") is None:
    raise NotImplementedError("the package tokamax is missing")
  if not interpreting() and dispatch.current_platform() != "gpu":
    raise NotImplementedError("tokamax's attention in Triton is for GPUs")
  form = "xla" if interpreting() else "triton"

  def attend(q, k, v, visible, scale):
    from absl import flags
    from tokamax import dot_product_attention

    if not flags.FLAGS.is_parsed():  # It would take the program's arguments.
      flags.FLAGS.mark_as_parsed()
    return dot_product_attention(
      q[:, None], k[:, None], v[:, None], mask=visible[None], scale=scale,
      implementation=form,
    )[:, 0]  # fmt: skip

  return attend


def _hopper() -> bool:
  if dispatch.current_platform() != "gpu":
    return False
  kinds = {d.device_kind for d in jax.devices() if d.platform == "gpu"}
  return any(name in kind for kind in kinds for name in ("H100", "H200"))


def _call(kind, impl, states, tensors, segments):
  """On states [B, H, K, V], tensors [B, T, H, ...] and segments [B, T]."""
  from jla.ops import linear_attention

  (s,), (q, k, v, gates) = states, tensors
  options = {} if segments is None else dict(segment_ids=segments)
  o, s = linear_attention(
    kind, q, k, v, **gates, impl=impl, scale=1.0, initial_state=s,
    output_final_state=True, **options,
  )  # fmt: skip
  return (s,), (o,)


def _pull(call, states, tensors, segments):
  """The gradients of `call`; cotangents stand beside what they are of."""
  (states, d_states), (tensors, d_tensors) = states, tensors
  run = lambda s, x: call(s, x, segments)
  return jax.vjp(run, states, tensors)[1]((d_states, d_tensors))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(call, states, tensors, segments):
  return _mapped(call)(states, tensors, segments)


def _scan_fwd(call, states, tensors, segments):
  out = _mapped(call)(states, tensors, segments)
  return out, (states, tensors, segments)


def _scan_bwd(call, saved, cotangents):
  # Its forward runs again: what it keeps has no axes that `jax.vmap` knows.
  states, tensors, segments = saved
  d_states, d_tensors = cotangents
  d_states, d_tensors = _mapped(partial(_pull, call))(
    (states, d_states), (tensors, d_tensors), segments
  )
  return d_states, d_tensors, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _mapped(call, axes: int = 0):
  """`call`, of batch and heads, for arrays that lack some of these axes.

  Args:
    call: (states [B, H, ...], tensors [B, T, H, ...], segments [B, T] or None)
      -> (states, tensors).
    axes: how many of them the arrays have: the heads alone, or both. The
      first axis that `jax.vmap` maps becomes the heads, all others the batch.
  """
  tree = jax.tree.map

  def lift(states, tensors, segments):
    if axes == 0:
      states = tree(lambda x: x[None], states)
      tensors = tree(lambda x: x[:, None], tensors)
    if axes < 2:
      states, tensors, segments = tree(
        lambda x: x[None], (states, tensors, segments)
      )
    out = call(states, tensors, segments)
    if axes < 2:
      out = tree(lambda x: x[0], out)
    if axes == 0:
      out = tree(lambda x: x[0], out[0]), tree(lambda x: x[:, 0], out[1])
    return out

  mapped = custom_vmap(lift)

  @mapped.def_vmap
  def rule(size, in_batched, *args):
    if axes == 0 and args[2] is not None and in_batched[2]:
      raise NotImplementedError("jax-linear-attention's heads share resets")
    shared = args[2]
    states, tensors, segments = tree(
      lambda x, b: x if b else jnp.broadcast_to(x, (size,) + x.shape),
      list(args),
      list(in_batched),
    )
    if axes == 0:
      tensors = tree(lambda x: jnp.moveaxis(x, 0, 1), tensors)
      states, tensors = _mapped(call, 1)(states, tensors, shared)
      out = states, tree(lambda x: jnp.moveaxis(x, 1, 0), tensors)
    elif axes == 1:
      out = _mapped(call, 2)(states, tensors, segments)
    else:
      flat = tree(
        lambda x: x.reshape((-1,) + x.shape[2:]), (states, tensors, segments)
      )
      out = tree(
        lambda x: x.reshape((size, -1) + x.shape[1:]), _mapped(call, 2)(*flat)
      )
    return out, tree(lambda _: True, out)

  return mapped
