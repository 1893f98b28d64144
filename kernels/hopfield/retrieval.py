"""`hopfield` as a kernel: the forward, and a backward with its own derivative.

No array of N · M scores exists: of a query, one log-sum-exp is kept, and the
backward computes the scores again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.kernels import interpreting
from memzoo.kernels.hopfield import block
from memzoo.ops import arguments, separation as separations
from memzoo.ops.hopfield import check

SEPARATIONS = ("softmax", "softmax1")
DTYPES = {
  "tpu": ("float32", "bfloat16"),
  "gpu": ("float32", "bfloat16", "float16"),
}


def hopfield(
  patterns: jax.Array,
  query: jax.Array,
  *,
  values: jax.Array | None = None,
  beta: float | jax.Array | None = None,
  steps: int = 1,
  separation: str = "softmax",
  mask: jax.Array | None = None,
  causal: bool = False,
  block_queries: int | None = None,
  block_patterns: int | None = None,
  platform: str | None = None,
  interpret: bool | None = None,
) -> jax.Array:
  """What the patterns answer to a query, as `memzoo.ops.hopfield` does.

  Every update is one pass over the patterns. Reverse-mode derivatives of first
  order only, for patterns, query, values and beta.

  Args:
    patterns: X [M, K].
    query: ξ [..., K].
    values: [M, V]; the patterns by default.
    beta: β, the inverse temperature, which may be traced; K^−½ by default.
    steps: how many updates, at least 1.
    separation: 'softmax' or 'softmax1'.
    mask: bool [M]; False: the pattern is not there. Its row may hold any
      finite numbers.
    causal: query i sees the patterns j <= i; for a query [N, K].
    block_queries: of a block: a power of two >= 16 on GPU, a multiple of 128
      on TPU. By default what fits.
    block_patterns: as block_queries.
    platform: 'tpu' or 'gpu': whose kernel; the one that forms are chosen for
      by default.
    interpret: whether Pallas' interpreter runs it, on any platform; by default
      inside `memzoo.kernels.interpret()` only.

  Returns:
    [..., V] in the query's dtype. Where no pattern is seen it is zero.

  Raises:
    ValueError: on wrong shapes or dtypes, or an unknown separation.
    NotImplementedError: on what the kernel does not serve, with the reason.
  """
  check("hopfield kernel", patterns, query, values, mask)
  if steps < 1:
    raise ValueError(f"hopfield kernel: steps must be at least 1, got {steps}")
  if causal and query.ndim != 2:
    arguments.fail("hopfield kernel", "a causal query", "[N, K]", query)
  beta = patterns.shape[1] ** -0.5 if beta is None else beta
  if jnp.ndim(beta):
    arguments.fail("hopfield kernel", "beta", "a scalar", beta)
  separations.get(separation)
  if separation not in SEPARATIONS:
    raise NotImplementedError(
      f"the kernel has no {separation!r}, which needs all scores of a query at "
      f"once; it has {', '.join(SEPARATIONS)}"
    )
  interpret = interpreting() if interpret is None else interpret
  plan = block.Plan(
    separation == "softmax1", causal, block_queries, block_patterns,
    _platform(platform, interpret), interpret,
  )  # fmt: skip
  if query.dtype.name not in DTYPES[plan.platform]:
    raise NotImplementedError(
      f"the {plan.platform} kernel takes {', '.join(DTYPES[plan.platform])}, "
      f"got {query.dtype.name}"
    )
  width = patterns.shape[1] if values is None else values.shape[1]
  _driver(plan).check(patterns.shape[1], width, query.dtype)
  beta = jnp.asarray(beta, jnp.float32).reshape(1, 1)
  flags = None if mask is None else mask.astype(jnp.float32)[None]
  patterns = patterns.astype(query.dtype)
  values = patterns if values is None else values.astype(query.dtype)
  state = query.reshape(-1, query.shape[-1])
  if not state.shape[0] or not values.size:
    return jnp.zeros(query.shape[:-1] + values.shape[1:], query.dtype)
  retrieve = partial(_retrieve, plan, beta)
  if steps > 1:
    update = lambda state, _: (retrieve(state, patterns, patterns, flags), None)
    state, _ = jax.lax.scan(update, state, length=steps - 1)
  answer = retrieve(state, patterns, values, flags)
  return answer.reshape(query.shape[:-1] + values.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _retrieve(plan, beta, q, x, v, flags):
  """One pass: [1, 1], [N, K], [M, K], [M, V], [1, M] or None -> [N, V]."""
  return _driver(plan).forward(plan, beta, q, x, v, flags)[0]


def _retrieve_fwd(plan, beta, q, x, v, flags):
  o, norm = _driver(plan).forward(plan, beta, q, x, v, flags)
  return o, (beta, q, x, v, flags, o, norm)


def _retrieve_bwd(plan, saved, g):
  beta, q, x, v, flags, o, norm = saved
  driver, single = _driver(plan), jnp.float32
  delta = jnp.sum(g.astype(single) * o.astype(single), axis=1)
  u = driver.backward_query(plan, beta, q, x, v, flags, g, norm, delta)
  dx, dv = driver.backward_patterns(plan, beta, q, x, v, flags, g, norm, delta)
  dbeta = jnp.sum(q.astype(single) * u).reshape(1, 1)
  dq = (beta * u).astype(q.dtype)
  return dbeta, dq, dx, dv, None if flags is None else jnp.zeros_like(flags)


_retrieve.defvjp(_retrieve_fwd, _retrieve_bwd)


def _platform(name, interpret):
  name = dispatch.current_platform() if name is None else name
  if name in ("tpu", "gpu"):
    return name
  if name != "cpu":
    raise ValueError(
      f"hopfield kernel: unknown platform {name!r}: expected 'gpu' or 'tpu'"
    )
  if not interpret:
    raise NotImplementedError(
      "the kernel is for TPU and GPU; on CPU it runs only inside "
      "memzoo.kernels.interpret()"
    )
  return "tpu"


def _driver(plan):
  # Imported when asked for: a process needs one of the two at most.
  if plan.platform == "gpu":
    from memzoo.kernels.hopfield import pallas_gpu as driver
  else:
    from memzoo.kernels.hopfield import pallas_tpu as driver
  return driver
