"""Every registered memory, by every form, against every property.

The definition is a Python loop over `cell.step`: no input where the mask is
False, a fresh state where `reset` is True. The step form is held to it, and
every other form to the step form: values, final state, gradients.

One jitted function per (cell, form) serves all properties: a batch of cases
that differ in data alone.
"""

import json
import pathlib

from checks import FORWARD, GRADIENT, half, is_float, relative, single
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels
from memzoo.core import registry

pytestmark = pytest.mark.nans  # one case holds infinities in a dead segment

T = 67  # odd, past one chunk of 64
CUT, SPLIT, DEAD = 37, 41, 10

PLAIN, MIXED, LEFT, RIGHT, RESET, FRESH, PREFIX, HEAD, INFINITE = range(9)
CASES = 9

FORMS = [
  (name, form)
  for name in memzoo.names()
  for form in memzoo.describe(name).forms
]
OTHERS = [(name, form) for name, form in FORMS if form != "step"]


def tiers(cases):
  """Kernels, which are slow in an interpreter, in the slow tier but for one."""
  late = lambda name, form: form == "pallas" and name != "lstm"
  return [
    pytest.param(*case, marks=pytest.mark.slow) if late(*case) else case
    for case in cases
  ]


def draw(spec, key, length, dtype=None):
  def leaf(s, k):
    if jnp.issubdtype(s.dtype, jnp.floating):
      return jax.random.normal(k, (length, *s.shape), s.dtype)
    return jax.random.randint(k, (length, *s.shape), 0, 5, s.dtype)

  leaves, tree = jax.tree.flatten(spec)
  return tree.unflatten(
    [leaf(s, k) for s, k in zip(leaves, jax.random.split(key, len(leaves)))]
  )


def resets(cell, form):
  """Whether a form serves `reset`."""
  return cell.resettable and form not in cell.convolutions


class Subject:
  """A tiny cell with perturbed parameters, a warm state, and its cases; with
  `reset` False, cases without resets."""

  def __init__(self, name, reset=True, **options):
    self.cell = cell = memzoo.tiny(name, **options)
    self.resets = reset and cell.resettable
    keys = jax.random.split(jax.random.key(7), 6)
    params = cell.init(keys[0])
    noise = iter(jax.random.split(keys[1], len(jax.tree.leaves(params))))

    def perturb(path, x):
      k = next(noise)
      if "buffers" in jax.tree_util.keystr(path):
        return x
      return x + 0.1 * jax.random.normal(k, x.shape, x.dtype)

    self.params = jax.tree_util.tree_map_with_path(perturb, params)
    self.initial = cell.initial_state(self.params, keys[2])
    self.one = jax.jit(cell.step)
    self.state = self.initial
    for x in self.rows(draw(cell.x_spec, keys[3], 3)):
      self.state, _ = self.one(self.params, self.state, x)
    xs = draw(cell.x_spec, keys[4], T)
    rng = np.random.default_rng(5)
    self.cases = self.make_cases(xs, rng)
    self.ran = {}

  def rows(self, xs):
    length = jax.tree.leaves(xs)[0].shape[0]
    return [jax.tree.map(lambda x: x[t], xs) for t in range(length)]

  def make_cases(self, xs, rng):
    reset = np.zeros((CASES, T), bool)
    mask = np.ones((CASES, T), bool)
    weight = np.ones((CASES, T), np.float32)
    weight_state = np.ones((CASES,), np.float32)
    reset[MIXED] = rng.random(T) < 0.1
    mask[MIXED] = rng.random(T) < 0.8
    mask[LEFT, :9] = False
    mask[RIGHT, -9:] = False
    if self.resets:
      reset[RESET, SPLIT] = reset[INFINITE, SPLIT] = True
    else:
      reset[:] = False
    weight[RESET, :SPLIT] = 0
    mask[FRESH, T - SPLIT :] = False
    weight[PREFIX, CUT:] = weight_state[PREFIX] = 0
    mask[HEAD, CUT:] = False
    weight[INFINITE, :64] = 0
    weight_state[INFINITE] = 0
    batch = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], CASES, 0), xs)
    for x in jax.tree.leaves(batch):
      x[FRESH] = np.roll(x[FRESH], -SPLIT, axis=0)
      if np.issubdtype(x.dtype, np.floating):
        x[INFINITE, DEAD] = np.inf
    state = jax.tree.map(lambda s: jnp.repeat(s[None], CASES, 0), self.state)
    state = jax.tree.map(lambda s, i: s.at[FRESH].set(i), state, self.initial)
    return dict(
      state=state, xs=batch, reset=reset, mask=mask, weight=weight,
      weight_state=weight_state,
    )  # fmt: skip

  def run(self, form):
    """All cases by one form: {state, ys, grads of params, state, xs}."""
    if form in self.ran:
      return self.ran[form]
    cell = self.cell

    def loss(diff, rest, case):
      params, state, xs = merge(diff, rest)
      reset = case["reset"] if self.resets else None
      new, ys = memzoo.scan(
        cell, params, state, xs, reset=reset, mask=case["mask"],
        implementation=form,
      )  # fmt: skip
      total = 0.0
      for n, y in enumerate(jax.tree.leaves(ys)):
        w = case["weight"].reshape((T,) + (1,) * (y.ndim - 1))
        wave = jnp.cos(jnp.arange(y.size, dtype=jnp.float32) * 0.7 + n)
        y = jnp.where(w > 0, y, 0.0)  # what is not asked may be infinite
        total += jnp.sum(y * w * wave.reshape(y.shape))
      for n, s in enumerate(jax.tree.leaves(new)):
        if is_float(s):
          s = jnp.where(case["weight_state"] > 0, s, jnp.zeros_like(s))
          wave = jnp.sin(jnp.arange(s.size, dtype=jnp.float32) * 0.9 + n)
          s = jnp.real(s) + 0.5 * jnp.imag(s)
          total += jnp.sum(s * wave.reshape(s.shape))
      return total, (new, ys)

    def one(state, xs, case):
      diff, rest = part((self.params, state, xs))
      (_, (new, ys)), grads = jax.value_and_grad(loss, has_aux=True)(
        diff, rest, case
      )
      return new, ys, grads

    case = {k: v for k, v in self.cases.items() if k not in ("state", "xs")}
    self.fn = jax.jit(jax.vmap(one))
    with kernels.interpret(form == "pallas"):
      state, ys, grads = self.fn(self.cases["state"], self.cases["xs"], case)
    count = len(jax.tree.leaves(self.params))
    leaves, _ = jax.tree.flatten(
      (self.params, self.state, jax.tree.map(lambda x: x[0], self.cases["xs"]))
    )
    names = ["params"] * count
    names += ["state"] * len(jax.tree.leaves(self.state))
    names += ["xs"] * (len(leaves) - len(names))
    where = [n for n, leaf in zip(names, leaves) if is_float(leaf)]
    by = {"params": [], "state": [], "xs": []}
    for n, g in zip(where, grads):
      by[n].append(np.asarray(g))
    # A second call, from where case HEAD stopped, does the rest.
    tail = dict(case, mask=np.ones_like(case["mask"]))
    tail["mask"][:, :CUT] = False
    resumed = jax.tree.map(lambda s: jnp.repeat(s[HEAD][None], CASES, 0), state)
    rest_state, rest_ys, _ = self.fn(resumed, self.cases["xs"], tail)
    out = dict(
      state=jax.device_get(state), ys=jax.device_get(ys), grads=by,
      resumed=jax.tree.map(lambda s: np.asarray(s[PLAIN]), rest_state),
      resumed_ys=jax.tree.map(lambda y: np.asarray(y[PLAIN]), rest_ys),
    )  # fmt: skip
    self.ran[form] = out
    return out

  def loop(self, case):
    """The definition, in Python: one `step` per input that is there."""
    c = self.cases
    state = jax.tree.map(lambda s: s[case], c["state"])
    nothing = jax.tree.map(
      lambda s: np.zeros(s.shape, s.dtype), self.cell.y_spec
    )
    ys = []
    xs = self.rows(jax.tree.map(lambda x: x[case], c["xs"]))
    for t, x in enumerate(xs):
      y = nothing
      if c["mask"][case, t]:
        if c["reset"][case, t]:
          state = self.cell.initial_state(self.params)
        state, y = self.one(self.params, state, x)
      ys.append(jax.device_get(y))
    return jax.device_get(state), jax.tree.map(lambda *v: np.stack(v), *ys)


def part(tree):
  """The float leaves of a tree, and the rest with its structure."""
  leaves, structure = jax.tree.flatten(tree)
  floats = [x for x in leaves if is_float(x)]
  rest = [None if is_float(x) else x for x in leaves]
  return floats, (rest, structure)


def merge(floats, rest):
  rest, structure = rest
  floats = iter(floats)
  return structure.unflatten([next(floats) if x is None else x for x in rest])


_SUBJECTS = {}
_MEASURED = {}


@pytest.fixture
def subject(request, name):
  form = request.node.callspec.params.get("form")
  reset = form not in memzoo.describe(name).cls.convolutions
  if (name, reset) not in _SUBJECTS:
    _SUBJECTS[name, reset] = Subject(name, reset)
  return _SUBJECTS[name, reset]


@pytest.fixture(scope="module", autouse=True)
def record(request):
  yield
  if request.config.getoption("--record"):
    path = pathlib.Path(registry.__file__).parent / "measured.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for name, forms in _MEASURED.items():
      entry = table.setdefault(name, {})
      before = entry.get("tolerance", {})
      known = memzoo.describe(name).forms
      entry["tolerance"] = {
        form: value
        for form, value in {**before, **forms}.items()
        if form in known
      }
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def at(tree, case):
  return jax.tree.map(lambda x: np.asarray(x)[case], tree)


@pytest.mark.parametrize("name", memzoo.names())
def test_cell_is_a_value(name):
  cell = memzoo.tiny(name)
  again = memzoo.from_config(json.loads(json.dumps(memzoo.to_config(cell))))
  assert cell == again and hash(cell) == hash(again)
  assert repr(cell) == repr(again)
  assert memzoo.tiny(name, d_model=cell.d_model) == cell
  # A static argument of jit, and the parameters' keys are theirs alone.
  assert jax.jit(lambda c: c.d_model, static_argnums=0)(cell) == cell.d_model
  for leaf in jax.tree.leaves(cell.init(jax.random.key(0))):
    assert leaf.dtype in (jnp.float32, jnp.int32), "parameters are real"


@pytest.mark.parametrize("name", memzoo.names())
def test_step_form_is_the_definition(name, subject):
  run = subject.run("step")
  for case in (MIXED, LEFT, RIGHT):
    state, ys = subject.loop(case)
    assert relative(at(run["ys"], case), ys) <= FORWARD
    assert relative(at(run["state"], case), state) <= FORWARD


@pytest.mark.parametrize("name,form", tiers(OTHERS))
def test_form_equals_step(name, form, subject):
  want, got = subject.run("step"), subject.run(form)
  forward = gradient = 0.0
  for case in (PLAIN, MIXED, LEFT, RIGHT, RESET):
    forward = max(
      forward,
      relative(at(got["ys"], case), at(want["ys"], case)),
      relative(at(got["state"], case), at(want["state"], case)),
    )
    for kind in ("params", "state", "xs"):
      gradient = max(
        gradient,
        relative(at(got["grads"][kind], case), at(want["grads"][kind], case)),
      )
  assert forward <= FORWARD, forward
  assert gradient <= GRADIENT, gradient
  _MEASURED.setdefault(name, {})[form] = dict(
    forward=float(f"{forward:.1e}"), gradient=float(f"{gradient:.1e}")
  )


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_gradients_are_alive(name, form, subject):
  if not subject.cell.differentiable:
    pytest.skip("declared not differentiable")
  grads = subject.run(form)["grads"]
  for kind, leaves in grads.items():
    for g in leaves:
      assert np.isfinite(g[:INFINITE]).all(), kind
  paths = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(subject.params)
    if is_float(leaf)
  ]
  for path, g in zip(paths, grads["params"], strict=True):
    if "buffers" not in path:
      assert np.abs(g[MIXED]).max() > 0, f"{path} gets no gradient"
  assert (
    np.abs(np.concatenate([g[PLAIN].ravel() for g in grads["xs"]])).max() > 0
  )


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_cut_anywhere(name, form, subject):
  run = subject.run(form)
  assert relative(run["resumed"], at(run["state"], PLAIN)) <= FORWARD
  whole = jax.tree.map(lambda y: y[PLAIN, CUT:], run["ys"])
  rest = jax.tree.map(lambda y: y[CUT:], run["resumed_ys"])
  assert relative(rest, whole) <= FORWARD


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_reset_is_a_fresh_start(name, form, subject):
  if not resets(subject.cell, form):
    pytest.skip("declared not resettable")
  run = subject.run(form)
  after = jax.tree.map(lambda y: y[RESET, SPLIT:], run["ys"])
  fresh = jax.tree.map(lambda y: y[FRESH, : T - SPLIT], run["ys"])
  assert relative(after, fresh) <= FORWARD
  assert relative(at(run["state"], RESET), at(run["state"], FRESH)) <= FORWARD
  for g in run["grads"]["state"]:
    assert not np.any(g[RESET]), "a gradient crosses the reset"
  for g in run["grads"]["xs"]:
    assert not np.any(g[RESET, :SPLIT]), "a gradient crosses the reset"


@pytest.mark.parametrize(
  "name,form",
  [(n, f) for n, f in OTHERS if f in memzoo.describe(n).cls.convolutions],
)
def test_convolutions_refuse_a_reset(name, form):
  cell = memzoo.tiny(name)

  def run(form):
    xs = draw(cell.x_spec, jax.random.key(0), 3)
    params, reset = cell.init(jax.random.key(1)), jnp.zeros(3, bool)
    return memzoo.scan(cell, params, None, xs, reset=reset, implementation=form)

  with pytest.raises(NotImplementedError, match="cannot reset"):
    jax.eval_shape(lambda: run(form))
  jax.eval_shape(lambda: run(None))  # another form serves it


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_mask_is_absence(name, form, subject):
  run = subject.run(form)
  for case in (MIXED, LEFT, RIGHT):
    absent = ~subject.cases["mask"][case]
    for y in jax.tree.leaves(run["ys"]):
      assert not np.any(y[case][absent]), "an output where there is no input"
    for g in run["grads"]["xs"]:
      assert not np.any(g[case][absent])
    state, ys = subject.loop(case)
    assert relative(at(run["state"], case), state) <= FORWARD
    assert relative(at(run["ys"], case), ys) <= FORWARD


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_causal(name, form, subject):
  if not subject.cell.causal:
    pytest.skip("declared not causal")
  rounding = FORWARD if form in subject.cell.convolutions else 0
  for g in subject.run(form)["grads"]["xs"]:
    leak = np.abs(g[PREFIX, CUT:]).max()
    bound = rounding * np.abs(g[PREFIX]).max()
    assert leak <= bound, "an output depends on a later input"


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_infinity_in_a_dead_segment(name, form, subject):
  """It never crosses a chunk boundary that holds a reset, nor reaches the
  gradients of later segments."""
  if not resets(subject.cell, form):
    pytest.skip("declared not resettable")
  run = subject.run(form)
  for y in jax.tree.leaves(run["ys"]):
    assert np.isfinite(y[INFINITE, 64:]).all()
  for s in jax.tree.leaves(run["state"]):
    if np.issubdtype(s.dtype, np.inexact):
      assert np.isfinite(s[INFINITE]).all()
  for g in run["grads"]["xs"]:
    assert np.isfinite(g[INFINITE, SPLIT:]).all()
    assert not np.any(np.nan_to_num(g[INFINITE, :SPLIT]))


@pytest.mark.parametrize("name,form", tiers(FORMS))
def test_one_sequence_few_tokens_and_half_precision(name, form, subject):
  """Without vmap; T = 1 and T = 7; bfloat16 in, bfloat16 out, the state's
  dtypes unmoved and the error that of rounding."""
  cell, params = subject.cell, subject.params

  @jax.jit
  def several(params, state, xs):
    run = lambda p, x: memzoo.scan(cell, p, state, x, implementation=form)
    few = jax.tree.map(lambda x: x[:7], xs)
    one = jax.tree.map(lambda x: x[:1], xs)
    rounded = single(half(few))
    return dict(
      whole=run(params, xs), few=run(params, few), one=run(params, one),
      half=run(params, half(few)), rounded=run(single(half(params)), rounded),
    )  # fmt: skip

  xs = jax.tree.map(lambda x: x[PLAIN], subject.cases["xs"])
  with kernels.interpret(form == "pallas"):
    out = jax.device_get(several(params, subject.state, xs))
  batched = subject.run("step")
  assert relative(out["whole"][1], at(batched["ys"], PLAIN)) <= FORWARD
  assert relative(out["whole"][0], at(batched["state"], PLAIN)) <= FORWARD
  for n, key in ((7, "few"), (1, "one")):
    ys = jax.tree.map(lambda y: y[PLAIN, :n], batched["ys"])
    assert relative(out[key][1], ys) <= FORWARD
  spec = jax.tree.map(lambda s: (s.shape, s.dtype), subject.state)
  for run in out.values():
    assert jax.tree.map(lambda s: (s.shape, s.dtype), run[0]) == spec
  for y, s in zip(
    jax.tree.leaves(out["half"][1]), jax.tree.leaves(cell.y_spec)
  ):
    if jnp.issubdtype(s.dtype, jnp.floating):
      assert y.dtype == jnp.bfloat16, y.dtype
  unit = 2.0**-8
  error = relative(single(out["half"][1]), out["few"][1])
  rounding = relative(out["rounded"][1], out["few"][1])
  assert error <= 4 * max(rounding, unit), (error, rounding)


@pytest.mark.parametrize("name", memzoo.names())
def test_jit_changes_nothing(name, subject):
  cell, params = subject.cell, subject.params
  xs = jax.tree.map(lambda x: jnp.asarray(x[PLAIN, :3]), subject.cases["xs"])
  form = [f for f in ("step", *cell.implementations) if f != "pallas"][-1]
  run = lambda p, s, x: memzoo.scan(cell, p, s, x, implementation=form)
  with jax.disable_jit():
    eager = run(params, subject.state, xs)
  assert relative(eager, jax.jit(run)(params, subject.state, xs)) <= FORWARD


# Options that change how every form computes; the equations they are held to
# are in the tests of the cell.
VARIANTS = [
  ("atlas", dict(optimizer="gradient")),
  ("atlas", dict(activation="geglu", objective="dot")),
  ("gru", dict(num_heads=2)),
  ("gru", dict(num_heads=3, reset_after=True)),
  ("lstm", dict(num_heads=2)),
]


@pytest.mark.slow
@pytest.mark.parametrize("name,options", VARIANTS)
def test_options_too(name, options, monkeypatch):
  """Every property above, of a cell with other options than its tiny form."""
  monkeypatch.setitem(_MEASURED, name, {})  # what is recorded is the tiny form
  subject = Subject(name, **options)
  assert subject.cell != memzoo.tiny(name)
  test_step_form_is_the_definition(name, subject)
  for form in ("step", *subject.cell.implementations):
    if form != "step":
      test_form_equals_step(name, form, subject)
    for check in (
      test_gradients_are_alive,
      test_cut_anywhere,
      test_reset_is_a_fresh_start,
      test_mask_is_absence,
      test_causal,
      test_infinity_in_a_dead_segment,
      test_one_sequence_few_tokens_and_half_precision,
    ):
      check(name, form, subject)
