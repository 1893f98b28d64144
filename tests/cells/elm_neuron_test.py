"""The ELM neuron against Spieler et al. 2023 (arXiv:2306.16922), section 2."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def paper(cell, params, xs):
  """Synapses, dendrite, memory and output, one step and one branch at a time;
  the tanh, the rectified w_s and the bounds of τ_m as in the authors' code."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  memory, inputs = cell.num_memory, cell.d_model
  logs = np.linspace(np.log(cell.tau_min), np.log(cell.tau_max), memory)
  tau = np.exp(logs)
  if cell.learn_tau:
    width = cell.tau_max - cell.tau_min
    tau = cell.tau_min + width / (1 + np.exp(-p["tau_m"]))
  kappa = np.exp(-cell.dt / tau)
  kappa_s = np.exp(-cell.dt / cell.tau_s)
  branches = [[n] for n in range(inputs)]
  if cell.num_branches is not None:
    stride = int(np.ceil(inputs / cell.num_branches))
    size = cell.branch_size or stride
    branches = [
      [i * stride + j for j in range(size)] for i in range(cell.num_branches)
    ]
  s = np.zeros((len(branches), len(branches[0])))
  w_s = np.maximum(p["w_s"], 0).reshape(s.shape)
  m, ys = np.zeros(memory), []
  for x in np.asarray(xs, np.float64):
    for i, branch in enumerate(branches):
      for j, n in enumerate(branch):
        s[i, j] = kappa_s * s[i, j] + (w_s[i, j] * x[n] if n < inputs else 0)
    seen = np.concatenate([s.sum(axis=1), kappa * m])
    layer = np.concatenate([p["in_s"], p["in_m"]])
    hidden = np.maximum(seen @ layer + p["in_b"], 0)
    delta = 1.7159 * np.tanh(2 / 3 * (hidden @ p["out"] + p["out_b"]))
    m = kappa * m + cell.lam * (1 - kappa) * delta
    ys.append(m @ p["y"] + p["y_b"])
  return (s.ravel(), m), np.stack(ys)


@pytest.mark.parametrize(
  "options",
  [
    {},
    dict(learn_tau=True, dt=0.5),
    dict(num_branches=3),
    dict(num_branches=2, branch_size=4, lam=2.0),
  ],
)
def test_paper_equation(options):
  cell = memzoo.tiny("elm_neuron", **options)
  params, xs = checks.drawn(cell), checks.inputs(cell, 9)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((tuple(state), ys), want) < checks.FORWARD, form


def test_routes():
  """Branches see neighbours, and overlap where they are wider than apart."""
  routes = lambda **options: memzoo.make(
    "elm_neuron", **options
  ).routes.tolist()
  assert routes(d_model=4) == [[0], [1], [2], [3]]
  assert routes(d_model=5, num_branches=2) == [[0, 1, 2], [3, 4, 5]]
  wide = routes(d_model=4, num_branches=2, branch_size=3)
  assert wide == [[0, 1, 2], [2, 3, 4]]


def test_learned_time_constants_start_where_the_fixed_ones_are():
  for tau_max in (50.0, 1000.0):
    cells = [
      memzoo.tiny("elm_neuron", learn_tau=learn, tau_max=tau_max)
      for learn in (False, True)
    ]
    params = cells[1].init(jax.random.key(0))
    xs = checks.inputs(cells[0], 9)
    ends = [memzoo.scan(c, params, None, xs)[0].m for c in cells]
    assert checks.relative(*ends) < 1e-3


def test_signature_behaviour():
  """A memory unit forgets by its own time constant, from one step to a
  thousand in one neuron, while the dendrite is silent; and a neuron learns
  to hold a bit while others pass."""
  cell = memzoo.make("elm_neuron", d_model=4, num_memory=7)
  params = cell.init(jax.random.key(0))
  params |= {k: 0 * params[k] for k in ("in_s", "in_m", "in_b", "out_b")}
  params["w_s"] = 0 * params["w_s"]
  start = cell.initial_state(params)._replace(m=jnp.ones(7))
  for steps in (1, 30, 1000):
    state, _ = memzoo.scan(cell, params, start, jnp.ones((steps, 4)))
    tau = 10.0 ** np.linspace(0, 3, 7)
    np.testing.assert_allclose(
      state.m, np.exp(-steps / tau), rtol=1e-3, atol=1e-30
    )

  cell = memzoo.make("elm_neuron", d_model=6, num_memory=8, tau_max=30.0)
  _, accuracy = checks.learn(cell, checks.marked_bit, 300, rate=1e-2)
  assert accuracy > 0.95, accuracy


def test_memory_is_bounded():
  """|m| <= 1.7159 λ, the tanh's scale, for any weights and inputs."""
  cell = memzoo.tiny("elm_neuron", lam=2.0)
  params, xs = checks.drawn(cell, 20.0), checks.inputs(cell, 300, 9.0)
  run = lambda xs: memzoo.scan(cell, params, None, xs)[0].m
  ends = np.abs(np.stack([run(xs[:n]) for n in (20, 300)]))
  assert 1.0 < ends.max() <= 1.7159 * 2.0 * (1 + 1e-5)


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(num_memory=0), "num_memory must be a positive integer"),
    (dict(lam=0.0), "lam must be above 0, got 0.0"),
    (dict(tau_max=1.0), "0 < tau_min < tau_max, got tau_min=1.0"),
    (dict(branch_size=2), "branch_size needs num_branches"),
    (dict(num_branches=5), "num_branches=5 leaves a branch without inputs"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="ELMNeuron: .*" + message):
    memzoo.make("elm_neuron", d_model=8, **options)
