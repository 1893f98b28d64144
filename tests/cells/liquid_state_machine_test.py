"""The liquid state machine against Maass et al. 2002, section 3 and appendix B
(doi:10.1162/089976602760407955)."""

import checks
import jax
import numpy as np
import pytest

import memzoo
from memzoo import kernels

NAME = "liquid_state_machine"


def paper(cell, params, us):
  """One neuron and one synapse at a time, by potentials in millivolts: a
  membrane of 30 ms and 1 MΩ at 13.5 nA, a threshold of 15 mV, synapses of 3 ms
  (excitatory) and 6 ms (inhibitory), rests of 3 and 2 ms, a read-out that sees
  spikes through 30 ms; the n-th spike of a synapse gives A u_n R_n, by the
  intervals Δ between spikes (Markram et al. 1998)."""
  uses = {(0, 0): (0.5, 1100, 50), (0, 1): (0.05, 125, 1200),
          (1, 0): (0.25, 700, 20), (1, 1): (0.32, 144, 60)}  # fmt: skip
  f64 = lambda tree: {k: np.asarray(v, np.float64) for k, v in tree.items()}
  b = f64(params["buffers"])
  out, out_b = (np.asarray(params[k], np.float64) for k in ("out", "out_b"))
  n, dt = cell.num_neurons, cell.dt
  v, rest = b["reset"].copy(), np.zeros(n)
  current, r, fired = np.zeros((n, n)), np.zeros(n), np.zeros(n)
  kind = b["inhibitory"].astype(int)
  last, ys, spikes = {}, [], []
  for t, u in enumerate(np.asarray(us, np.float64)):
    injected = u @ b["w_in"]
    new = np.zeros(n)
    for j in range(n):  # the synapses from j
      current[j] *= np.exp(-dt / (6.0 if kind[j] else 3.0))
      for i in range(n) if fired[j] else ():
        use, d, f = uses[kind[j], kind[i]]
        u_n, r_n = use, 1.0
        if (j, i) in last:
          before, u_n, r_n = last[j, i]
          gap = (t - before) * dt
          r_n = 1 + (r_n - u_n * r_n - 1) * np.exp(-gap / d)
          u_n = use + u_n * (1 - use) * np.exp(-gap / f)
        last[j, i] = t, u_n, r_n
        current[j, i] += b["w"][j, i] * u_n * r_n
    for i in range(n):
      if rest[i] > 0:
        rest[i] -= 1
        v[i] = b["reset"][i]
        continue
      kappa = np.exp(-dt / 30.0)
      total = 13.5 + current[:, i].sum() + injected[i]
      v[i] = kappa * v[i] + (1 - kappa) * total
      if v[i] > 15.0:
        new[i], v[i] = 1.0, b["reset"][i]
        rest[i] = round((2.0 if b["inhibitory"][i] else 3.0) / dt)
    fired = new
    spikes.append(new)
    r = np.exp(-dt / 30.0) * r + new
    ys.append(r @ out + out_b)
  return (v - b["reset"], r), np.stack(ys), np.stack(spikes)


@pytest.mark.parametrize("dt", [1.0, 4.0])
def test_paper_equation(dt):
  cell = memzoo.tiny(NAME, dt=dt)
  params = cell.init(jax.random.key(0))
  params["out_b"] += 0.5
  us = 4 * checks.inputs(cell, 40)
  (v, r), want, spikes = paper(cell, params, us)
  assert spikes.sum() > 20 and spikes.any(axis=0).sum() >= 7
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative(ys, want) < checks.FORWARD, form
    assert checks.relative((state.v, state.r), (v, r)) < 1e-4, form


def test_the_liquid_is_drawn_as_in_the_paper():
  """A fifth inhibits; chances fall with the distance; strengths have a mean
  and a deviation that are equal; nobody feeds itself."""
  cell = memzoo.make(NAME, d_model=20, grid=(10, 10, 10))
  fixed = jax.jit(cell.init)(jax.random.key(0))["buffers"]
  w, kind = np.asarray(fixed["w"]), np.asarray(fixed["inhibitory"])
  assert kind.sum() == 200 and not np.diag(w).any()
  place = np.indices((10, 10, 10)).reshape(3, -1).T
  distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
  both = (kind[:, None] == 0) & (kind[None] == 0)
  for far, chance in ((1.0, 0.3 * np.exp(-0.25)), (2.0, 0.3 * np.exp(-1.0))):
    near = w[both & (np.abs(distance - far) < 1e-6)]
    assert abs(np.mean(near != 0) / chance - 1) < 0.15
  for a, b, mean in ((0, 0, 30), (0, 1, 60), (1, 0, -19), (1, 1, -19)):
    part = w[(kind[:, None] == a) & (kind[None] == b)]
    part = part[part != 0]
    assert abs(part.mean() / mean - 1) < 0.25, (a, b, part.mean())
    assert abs(part.std() / abs(mean) - 1) < 0.35, (a, b, part.std())
  w_in = np.asarray(fixed["w_in"])[:, kind == 0]
  assert abs(np.mean(w_in != 0) - 0.3) < 0.02
  assert abs(w_in[w_in != 0].mean() / 18 - 1) < 0.1


def test_signature_behaviour():
  """The separation property: what the liquid holds is further apart the more
  two inputs differed, also some time after; and a memoryless read-out of it,
  in closed form, names the input of the step before, which the current input
  does not tell."""
  cell = memzoo.make(NAME, d_model=4, dt=8.0)
  params = cell.init(jax.random.key(0))
  r = np.random.default_rng(0)
  states = jax.jit(jax.vmap(lambda u: cell.states(params, u)))
  first = r.normal(size=(30, 20, 4)).astype(np.float32)
  other = r.normal(size=(30, 20, 4)).astype(np.float32)
  rest = r.normal(size=(30, 2, 4)).astype(np.float32)
  apart = []
  for share in (0.0, 0.1, 0.5, 1.0):
    mixed = np.concatenate([(1 - share) * first + share * other, rest], axis=1)
    base = np.concatenate([first, rest], axis=1)
    apart.append(np.linalg.norm(states(mixed) - states(base), axis=-1)[:, -1])
  apart = np.mean(apart, axis=1)
  assert apart[0] == 0 and np.all(np.diff(apart) > 0), apart

  bits = r.integers(0, 2, (160, 60))
  us = np.zeros((160, 60, 4), np.float32)
  us[..., 0], us[..., 1] = bits, 1 - bits
  want = np.zeros((160, 60, 4), np.float32)
  want[..., 0] = np.roll(bits, 1, axis=1)
  fitted = cell.fit(params, us[:120], want[:120], washout=5, penalty=0.1)
  run = jax.jit(jax.vmap(lambda u: memzoo.scan(cell, fitted, None, u)[1]))
  named = np.asarray(run(us[120:]))[:, 5:, 0] > 0.5
  accuracy = np.mean(named == want[120:, 5:, 0])
  assert accuracy > 0.85, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(grid=(3, 3)), r"grid must be three positive integers, got \(3, 3\)"),
    (dict(grid=(3, 3, 0)), "grid must be three positive integers"),
    (dict(dt=0.0), "dt must be above 0, got 0.0"),
    (dict(reach=-1.0), "reach must be above 0, got -1.0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LiquidStateMachine: " + message):
    memzoo.make(NAME, d_model=4, **options)
