"""Times linear attention and delta rules of packages for PyTorch on a GPU.

`experiments.bench_device` starts this by the interpreter that has them and
waits for it; it imports no JAX. Jobs come as JSON lines from the standard
input, and rows go out after `MARK`. Peers: flash-linear-attention (package
fla-core, Triton) and FlashQLA (flash-qla), which has the gated delta rule.

A form is held against the step loop in float32, in PyTorch, on a short
sequence, forward and backward, and not timed where it is off by more than four
times what rounding its arguments costs.
"""

from collections.abc import Callable
import importlib
import json
import math
import statistics
import sys
from typing import Any

MARK = "bench-rows "
LEAST, MOST = 5, 200  # rounds
SYNC, CACHE = 0.02, 256e6  # as in `experiments.bench_device`
SINGLE = 1e-4
FLA, QLA = "flash-linear-attention", "FlashQLA"
# By (op, decay): the module and function of each package. All take q, k, v
# [B, T, H, ·], gates by name (g, beta), scale, initial_state [B, H, K, V] and
# output_final_state, and return (outputs, state).
PEERS = {
  FLA: {
    ("linear_attention", "none"): ("fla.ops.linear_attn", "chunk_linear_attn"),
    ("linear_attention", "scalar"): ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("linear_attention", "channel"): ("fla.ops.gla", "chunk_gla"),
    ("delta_rule", "none"): ("fla.ops.delta_rule", "chunk_delta_rule"),
    ("delta_rule", "scalar"): (
      "fla.ops.gated_delta_rule", "chunk_gated_delta_rule",
    ),
    ("delta_rule", "channel"): ("fla.ops.kda", "chunk_kda"),
  },
  QLA: {("delta_rule", "scalar"): ("flash_qla", "chunk_gated_delta_rule")},
}  # fmt: skip


def peer(name: str, case: dict[str, Any]) -> Callable[..., Any]:
  """A package's function of `inputs`: -> [outputs, state].

  Raises:
    ImportError: where the package is missing.
  """
  module, function = PEERS[name][case["op"], case["decay"]]
  fn = getattr(importlib.import_module(module), function)
  # Theirs divides by a sum of keys unless told not to.
  more = {"normalize": False} if function == "chunk_linear_attn" else {}

  def call(s, q, k, v, *gates):
    named = dict(zip(gate_names(case), gates))
    outputs, state = fn(
      q, k, v, **named, scale=1.0, initial_state=s, output_final_state=True,
      **more,
    )  # fmt: skip
    return [outputs, state]

  return call


def gate_names(case: dict[str, Any]) -> list[str]:
  """What gates a case has, in their order in `inputs`."""
  names = ["g"] if case["decay"] != "none" else []
  return names + (["beta"] if case["op"] == "delta_rule" else [])


def inputs(torch, case, generator, device):
  """Random float32 (s, q, k, v, *gates), as `bench_kernels.inputs` has them."""
  b, t, h, k = (case[n] for n in ("batch", "length", "heads", "key"))
  v = case["value"] or k
  options = dict(device=device, generator=generator)
  normal = lambda *s: torch.randn(*s, **options)
  uniform = lambda low, high, *s: low + (high - low) * torch.rand(*s, **options)
  unit = lambda *s: torch.nn.functional.normalize(normal(*s), dim=-1)
  tensors = [normal(b, h, k, v), unit(b, t, h, k), unit(b, t, h, k)]
  tensors.append(normal(b, t, h, v))
  for gate in gate_names(case):
    if gate == "beta":
      tensors.append(uniform(0.1, 0.9, b, t, h))
    else:
      channels = (k,) if case["decay"] == "channel" else ()
      tensors.append(-uniform(0.001, 0.1, b, t, h, *channels))
  return tensors


def lowered(torch, case, tensors):
  """Rounded to the case's dtype, but for the state and log-decays."""
  kept = {0} | {4 + i for i, n in enumerate(gate_names(case)) if n == "g"}
  dtype = getattr(torch, case["dtype"])
  return [x if i in kept else x.to(dtype) for i, x in enumerate(tensors)]


def step_loop(torch, case, s, q, k, v, *gates):
  """The recurrence of `memzoo.ops`, one step after the other: [outputs,
  state]."""
  named, outs = dict(zip(gate_names(case), gates)), []
  for t in range(q.shape[1]):
    if "g" in named:
      g = named["g"][:, t].exp()
      s = s * g.reshape(g.shape + (1,) * (4 - g.ndim))
    value = v[:, t]
    if "beta" in named:
      error = value - torch.einsum("bhk,bhkv->bhv", k[:, t], s)
      value = named["beta"][:, t, :, None] * error
    s = s + k[:, t, :, :, None] * value[:, :, None]
    outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
  return [torch.stack(outs, 1), s]


def both(torch, call, tensors, cotangents):
  """([outputs, state], gradients by all tensors)."""
  tensors = [x.detach().requires_grad_() for x in tensors]
  outs = call(*tensors)
  cotangents = [c.to(y.dtype) for c, y in zip(cotangents, outs)]
  return outs, torch.autograd.grad(outs, tensors, cotangents)


def relative(a, b) -> float:
  """The largest ‖a − b‖ / ‖b‖, as `experiments.timing.relative` has it."""
  a, b = ([x.detach().double() for x in xs] for xs in (a, b))
  floor = 1e-6 * max(float(y.norm()) for y in b)
  off = [
    float((x - y).norm()) / (max(float(y.norm()), floor) or 1.0)
    for x, y in zip(a, b)
  ]
  return math.nan if any(map(math.isnan, off)) else max(off)


def parity(torch, case, calls, generator, device):
  """Form -> errors and bounds as `bench_device.Parity.errors` has them."""
  exact = inputs(torch, case, generator, device)
  low = lowered(torch, case, exact)
  loop = lambda *x: step_loop(torch, case, *x)
  specs = [exact[3], exact[0]]
  cotangents = [
    torch.randn(x.shape, device=device, generator=generator) for x in specs
  ]
  want = both(torch, loop, [x.float() for x in low], cotangents)
  base = both(torch, loop, exact, cotangents)
  bounds = [SINGLE, SINGLE]
  if case["dtype"] != "float32":
    bounds = [4 * relative(a, b) + 2**-8 for a, b in zip(base, want)]
  found = {}
  for name, call in calls.items():
    try:
      got = both(torch, call, low, cotangents)
      errors = [relative(a, b) for a, b in zip(got, want)]
    except Exception as error:  # One that refuses.
      found[name] = {"error": short(error)}
      continue
    found[name] = {
      "values": errors[0], "values_bound": bounds[0],
      "gradients": errors[1], "gradients_bound": bounds[1],
    }  # fmt: skip
  return found


def measure(torch, job: dict[str, Any]) -> list[dict[str, Any]]:
  """A row a form and direction."""
  case, options, small = job["case"], job["options"], job["parity"]
  generator = torch.Generator("cuda").manual_seed(options["seed"])
  calls, rows = {}, []
  for name, has in PEERS.items():
    if (case["op"], case["decay"]) not in has:
      continue
    try:
      calls[name] = peer(name, case)
    except ImportError as error:
      rows.append({"form": name, "error": short(error)})
  if not calls:
    return rows
  checked = parity(torch, small, calls, generator, "cuda")
  sets = []
  size = 0.0
  while len(sets) < 2 or (size < CACHE and len(sets) < 8):
    tensors = lowered(torch, case, inputs(torch, case, generator, "cuda"))
    outs = [
      torch.randn(tensors[3].shape, device="cuda", generator=generator),
      torch.randn(tensors[0].shape, device="cuda", generator=generator),
    ]
    outs[0] = outs[0].to(tensors[3].dtype)
    sets.append((tensors, outs))
    size += sum(x.nbytes for x in (*tensors, *outs))
  about = {"torch": torch.__version__}
  for name, call in calls.items():
    for direction in job["directions"]:
      facts = {"form": name, "direction": direction, "parity": checked[name]}
      why = failure(checked[name])
      try:
        facts |= (
          {"error": why}
          if why
          else times(torch, call, sets, direction, options["seconds"])
        )
      except Exception as error:  # One that does not fit.
        facts["error"] = short(error)
      rows.append(facts | about)
  torch.cuda.empty_cache()
  return rows


def failure(found: dict[str, Any]) -> str:
  """As `bench_device.failure`."""
  if "error" in found:
    return found["error"]
  over = [
    f"{part} {found[part]:.1e} (bound {found[part + '_bound']:.1e})"
    for part in ("values", "gradients")
    if not found[part] <= found[part + "_bound"]
  ]
  return f"FAILED parity: {', '.join(over)}" if over else ""


def times(torch, call, sets, direction: str, seconds: float):
  """What a row says of time, by device events around many calls."""
  if direction == "forward":

    def run(index):
      with torch.no_grad():
        return call(*sets[index % len(sets)][0])
  else:
    run = lambda index: both(torch, call, *sets[index % len(sets)])

  def taken(number):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for index in range(number):
      run(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / number

  for _ in range(3):  # Triton compiles and tunes.
    once = taken(1)
  number = max(1, min(64, round(1e3 * SYNC / max(once, 1e-3))))
  count = math.ceil(1e3 * seconds / max(once * number, 1e-3))
  rounds = [taken(number) for _ in range(max(LEAST, min(count, MOST)))]
  return {
    "rounds": len(rounds),
    "calls": number,
    "median_ms": statistics.median(rounds),
    "min_ms": min(rounds),
    "max_ms": max(rounds),
  }


def short(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"[:200]


def main() -> None:
  for line in sys.stdin:
    job = json.loads(line)
    try:
      torch = importlib.import_module("torch")
      if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
      rows = measure(torch, job)
    except Exception as error:  # One job, one answer.
      rows = [{"form": "", "error": short(error)}]
    print(MARK + json.dumps(rows), flush=True)


if __name__ == "__main__":
  main()
