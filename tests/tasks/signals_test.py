"""Bits, signals, digits and series: layouts, distributions, references."""

import collections
import dataclasses
import functools
import itertools
import sys
import types
import warnings

import jax
import numpy as np
import pytest
import task_checks

from memzoo import tasks
from memzoo.tasks import (
  aeon,
  bernoulli,
  continual,
  digits,
  general_icl,
  mackey_glass,
  sampling,
)

# Tasks without an exact solution.
NO_ORACLE = {
  "bernoulli": dict(name="bernoulli_small", length=8),
  "gpicl": dict(name="gpicl_2_8", length=8),
  "mackey_glass": dict(name="mackey_glass_small", length=16),
  "digits": dict(name="digits_permuted", holdout=100),
  "continual": dict(
    name="continual_digits_permuted",
    parts=tuple(
      tasks.make("digits", permutation=i, holdout=100) for i in (0, 1)
    ),
    steps_per_task=6,
  ),
}


@pytest.mark.parametrize("case", NO_ORACLE)
def test_contract_without_oracle(case):
  task = tasks.make(**NO_ORACLE[case])
  batch = task.batch(3, 5, 8)
  task_checks.check_shapes(task, batch, 8)
  assert task_checks.same(batch, task.batch(3, 5, 8))
  for other in (
    task.batch(3, 6, 8),
    task.batch(4, 5, 8),
    task.batch(3, 5, 8, "test"),
    task.batch(3, 5, 8, "validation"),
  ):
    task_checks.check_shapes(task, other, 8)
    assert not task_checks.same(batch, other)
  again = tasks.make(**NO_ORACLE[case])
  assert task == again and hash(task) == hash(again)
  with pytest.raises(NotImplementedError, match="has no oracle"):
    task.oracle(batch)
  if isinstance(task, tasks.Generator):
    if task.num_train is None:
      traced = jax.jit(lambda seed, step: task.batch(seed, step, 8))
      assert task_checks.same(traced(np.uint32(3), np.int32(5)), batch)
    task = dataclasses.replace(task, num_test=12)
    first, second = task.eval_batches(8)
    task_checks.check_shapes(task, second, 8)
    rows = np.asarray(second.weights).reshape(8, -1).sum(1) > 0
    assert rows[:4].all() and not rows[4:].any()
    later = task.batch(0, 1, 8, "test")
    np.testing.assert_array_equal(later.inputs, second.inputs)
    assert not task_checks.same(first, second)


# Bernoulli: every configuration of change points, rates by quadrature.


def trees(first, size):
  """Partitions of a block by the PTW prior: (probability, segment starts)."""
  if size == 1:
    return [(1.0, (first,))]
  half = size // 2
  pairs = itertools.product(trees(first, half), trees(first + half, half))
  return [(0.5, (first,))] + [
    (0.5 * p * q, left + right) for (p, left), (q, right) in pairs
  ]


def configurations(prior, length, interval):
  """{segment starts: probability}, from the definitions of the priors."""
  table = collections.defaultdict(float)
  if prior == "ptw":
    size = 1
    while size < length:
      size *= 2
    for p, starts in trees(0, size):
      table[tuple(s for s in starts if s < length)] += p
    return table
  for cuts in itertools.product((False, True), repeat=length - 1):
    starts = (0, *(t + 1 for t, cut in enumerate(cuts) if cut))
    ends = (*starts[1:], length)
    p = 1.0
    for begin, end in zip(starts, ends):
      n, last = end - begin, end == length
      if prior == "static":
        p *= last
      elif prior == "regular":
        p *= (n <= interval if last else n == interval)  # fmt: skip
      elif prior == "uniform":  # P(L >= n) for the last, else P(L = n)
        many = max(interval - n + 1, 0) if last else (n <= interval)
        p *= many / interval
      elif prior == "geometric":
        p *= (1 - 1 / interval) ** (n - 1) * (1.0 if last else 1 / interval)
      else:  # Willems: stays with (i - 1/2) / i after i bits
        for i in range(1, n):
          p *= (i - 0.5) / i
        p *= 1.0 if last else 0.5 / n
    table[starts] += p
  return table


@functools.cache
def block(ones, zeros, beta):
  """The integral of rate^ones (1 - rate)^zeros over Beta(beta, beta)."""
  if beta == 0.5:  # rate = sin^2: the midpoint rule is exact
    angle = (np.arange(64) + 0.5) * np.pi / 128
    return np.mean(np.sin(angle) ** (2 * ones) * np.cos(angle) ** (2 * zeros))
  node, weight = np.polynomial.legendre.leggauss(16)
  rate = (node + 1) / 2
  return (weight / 2 * rate**ones * (1 - rate) ** zeros).sum()


def marginal(bits, table, beta):
  """Probability of the first bits of a sequence."""
  total = 0.0
  for starts, p in table.items():
    for begin, end in zip(starts, (*starts[1:], len(bits))):
      part = bits[begin:end]
      p = p * block(sum(part), len(part) - sum(part), beta)
    total += p
  return total


PRIORS = [
  ("static", 8, 1, 0.5),
  ("ptw", 8, 1, 0.5),
  ("ptw", 6, 1, 1.0),
  ("lin", 8, 1, 0.5),
  ("regular", 8, 3, 0.5),
  ("uniform", 8, 3, 0.5),
  ("geometric", 8, 4, 1.0),
]


class TestBernoulli:
  @pytest.mark.parametrize("prior, length, interval, beta", PRIORS)
  def test_predictor(self, prior, length, interval, beta):
    """Against the sum over all configurations and the integral over rates."""
    task = bernoulli.Bernoulli(
      length=length, prior=prior, interval=interval, beta=beta
    )
    table = configurations(prior, length, interval)
    assert sum(table.values()) == pytest.approx(1, abs=1e-12)
    bits = np.random.default_rng(0).integers(0, 2, (4, length))
    inputs = np.concatenate([np.full((4, 1), 2), bits[:, :-1]], axis=1)
    ones = np.ones((4, length), np.float32)
    batch = tasks.Batch(inputs.astype(np.int32), bits.astype(np.int32), ones)
    found = task.predictor(batch)
    assert found.dtype == np.float64 and found.shape == (4, length)
    expected = [
      [
        marginal([*row[:t], 1], table, beta) / marginal(row[:t], table, beta)
        for t in range(length)
      ]
      for row in bits.tolist()
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-10)

    # The regret of a coin: the difference of the two code lengths.
    coin = np.full((4, length, 2), np.log(0.5))
    code = [np.log2(marginal(row, table, beta)) for row in bits.tolist()]
    regret = task.regret(coin, batch)
    np.testing.assert_allclose(regret, np.add(code, length), atol=1e-9)
    exact = np.log(np.stack([1 - found, found], axis=2))
    np.testing.assert_allclose(task.regret(exact, batch), 0, atol=1e-12)
    # What a model gives to a third token is lost.
    third = np.full((4, length, 3), np.log(1 / 3))
    more = length * np.log2(3 / 2)
    np.testing.assert_allclose(task.regret(third, batch), regret + more)
    silent = batch._replace(weights=np.zeros_like(ones))
    assert not task.regret(coin, silent).any()
    with pytest.raises(ValueError, match=r"must have the shape \(4, \d\) and"):
      task.regret(coin[..., 0], batch)

  @pytest.mark.parametrize(
    "prior, interval, beta", [("ptw", 1, 0.5), ("uniform", 3, 1.0)]
  )
  def test_sequences(self, prior, interval, beta):
    """All sequences of five bits come as often as they should."""
    task = bernoulli.Bernoulli(
      length=5, prior=prior, interval=interval, beta=beta
    )
    rows = 8192
    batch = task.batch(0, 0, rows)
    inputs, bits = np.asarray(batch.inputs), np.asarray(batch.targets)
    assert (inputs[:, 0] == 2).all()
    np.testing.assert_array_equal(inputs[:, 1:], bits[:, :-1])
    assert np.asarray(batch.weights).all()
    table = configurations(prior, 5, interval)
    counts = np.bincount(bits @ (2 ** np.arange(5)), minlength=32)
    expected = rows * np.array(
      [
        marginal([code >> i & 1 for i in range(5)], table, beta)
        for code in range(32)
      ]
    )
    assert expected.sum() == pytest.approx(rows)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 31 + 5 * np.sqrt(62)

  def test_paper_presets(self):
    for prior in ("ptw", "lin", "regular", "uniform"):
      task = tasks.make(f"bernoulli_mbml_{prior}")
      assert (task.length, task.prior, task.beta) == (256, prior, 0.5)
    with pytest.raises(ValueError, match="unknown prior of Bernoulli: 'ptv'"):
      bernoulli.Bernoulli(prior="ptv")
    with pytest.raises(ValueError, match="beta must be 0.5 or 1; got 2"):
      bernoulli.Bernoulli(beta=2)


class TestGeneralIcl:
  def batch(self, split="train", seed=0, **options):
    task = general_icl.GeneralIcl(length=80, **options)
    batch = task.batch(seed, 0, 16, split)
    return np.asarray(batch.inputs), np.asarray(batch.targets)

  def images(self):
    images, labels = digits.load()
    return (images - images[:1437].mean()) / images[:1437].std(), labels

  @pytest.mark.parametrize("split", ["train", "test"])
  def test_layout(self, split):
    """Rows are images of the split, relabelled by one permutation each."""
    inputs, targets = self.batch(split, transform="none")
    images, labels = self.images()
    place = range(1437) if split == "train" else range(1437, 1797)
    found = {images[i].tobytes(): i for i in place}
    for row, target in zip(inputs, targets):
      which = [found[np.ascontiguousarray(z).tobytes()] for z in row[:, :64]]
      assert len(set(which)) == 80
      pairs = set(zip(labels[which].tolist(), target.tolist()))
      assert len(pairs) == len({a for a, _ in pairs}) == 10
      assert len({b for _, b in pairs}) == 10
      assert not row[0, 64:].any()
      np.testing.assert_array_equal(row[1:, 64:], np.eye(10)[target[:-1]])

  def test_projection(self):
    """x = A z with A from N(0, 1/64), another for each row."""
    plain, labels = self.batch(transform="none")
    inputs, targets = self.batch(transform="projection")
    np.testing.assert_array_equal(targets, labels)
    images, _ = self.images()
    free = images[:1437].std(0) > 0.3  # pixels that determine their column
    matrices = []
    for z, x in zip(plain[..., :64], inputs[..., :64]):
      matrix, *_ = np.linalg.lstsq(z.astype(np.float64), x, rcond=1e-6)
      np.testing.assert_allclose(z @ matrix, x, atol=2e-4)
      matrices.append(matrix[free])
    entries = np.stack(matrices)
    assert np.abs(entries[0] - entries[1]).mean() > 0.05
    assert entries.var() == pytest.approx(1 / 64, rel=0.1)
    assert abs(entries.mean()) < 0.01

  def test_permutation_of_pixels(self):
    plain, _ = self.batch(transform="none")
    inputs, _ = self.batch(transform="permutation")
    assert not np.array_equal(plain, inputs)
    np.testing.assert_array_equal(
      np.sort(inputs[..., :64]), np.sort(plain[..., :64])
    )

  def test_number_of_tasks(self):
    """Two tasks come in the training split alone, whatever the seed."""

    images, labels = self.images()
    label = {z.tobytes(): d for z, d in zip(images, labels.tolist())}

    def seen(split, seed, **options):
      found = set()
      for row, target in zip(
        *self.batch(split, seed, transform="none", num_tasks=2, **options)
      ):
        keys = [np.ascontiguousarray(z).tobytes() for z in row[:, :64]]
        table = {label[key]: y for key, y in zip(keys, target.tolist())}
        found.add(tuple(sorted(table.items())))
      return found

    assert len(seen("train", 0)) == 2 and seen("train", 1) == seen("train", 0)
    assert len(seen("test", 0)) > 8
    assert len(seen("train", 0, unseen=True)) > 8


class TestDelay:
  def test_signal(self):
    """Band-limited, white, begins near 0, and as large as 1."""
    task = tasks.make("delay_small", outputs=3)
    batch = task.batch(0, 0, 256)
    signal = np.asarray(batch.inputs)[..., 0].astype(np.float64)
    power = (np.abs(np.fft.rfft(signal)) ** 2).mean(0)
    assert power[0] < 1e-8 and power[9:].max() < 1e-8
    np.testing.assert_allclose(power[1:9] / power[1:9].mean(), 1, atol=0.35)
    np.testing.assert_allclose(np.abs(signal).max(1), 1, atol=1e-6)
    assert (np.abs(signal).argmin(1) == 0).all()
    targets, weights = np.asarray(batch.targets), np.asarray(batch.weights)
    assert task.delays == (0, 8, 16)
    assert np.square(signal).mean() == pytest.approx(task.chance, rel=0.1)
    for t in range(64):
      assert (weights[:, t] == float(t >= 16)).all()
      for i, s in enumerate((0, 8, 16)):
        expected = batch.inputs[:, t - s, 0] if t >= s else np.zeros(256)
        np.testing.assert_array_equal(targets[:, t, i], expected)

  def test_published_constants(self):
    for steps, length in ((25, 62), (100, 250), (1600, 4000)):
      task = tasks.make(f"delay_lmu_{steps}")
      assert (task.delay, task.length, task.num_train) == (steps, length, 100)
    assert task.delays == (0, 400, 800, 1200, 1600)
    with pytest.raises(ValueError, match="frequency must be between"):
      tasks.make("delay_small", frequency=9)


class TestAdding:
  def test_lstm(self):
    """Row by row, from the text of the paper."""
    task = tasks.make("adding_lstm_100", steps=24)
    rows = 4096
    batch = task.batch(0, 0, rows)
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    lengths = np.asarray(batch.mask).sum(1)
    np.testing.assert_array_equal(batch.mask, np.arange(26) < lengths[:, None])
    assert sorted(set(lengths)) == [24, 25, 26]
    marks = np.zeros(24)
    for (x, marker), target, n in zip(inputs.swapaxes(1, 2), targets, lengths):
      assert marker[0] == marker[n - 1] == -1
      assert not x[n:].any() and not marker[n:].any()
      marked = np.flatnonzero(marker == 1)
      assert len(marked) in (1, 2)
      # A single mark: the other fell on the first step.
      assert marked.max() < 12 and (len(marked) == 1 or marked.min() < 10)
      assert target[0] == pytest.approx(0.5 + x[marked].sum() / 4, abs=1e-6)
      marks[marked] += 1
      marks[0] += len(marked) == 1
    assert -1 <= inputs[..., 0].min() < -0.99 < 0.99 < inputs[..., 0].max() < 1
    # First: uniform in 0..9. Second: uniform among the other 11 of 0..11.
    expected = np.zeros(24)
    for a in range(10):
      expected[a] += 0.1
      for b in set(range(12)) - {a}:
        expected[b] += 0.1 / 11
    error = np.abs(marks / rows - expected)
    assert (error < 5 * np.sqrt(expected / rows) + 1e-12).all()
    assert targets.var() == pytest.approx(task.chance, rel=0.1)

  def test_halves(self):
    task = tasks.make("adding_small", steps=16)
    rows = 4096
    batch = task.batch(0, 0, rows)
    x, marker = np.moveaxis(np.asarray(batch.inputs), 2, 0)
    assert batch.mask is None and set(np.unique(marker)) == {0.0, 1.0}
    assert (marker[:, :8].sum(1) == 1).all()
    assert (marker[:, 8:].sum(1) == 1).all()
    counts = marker.sum(0)
    assert ((counts - rows / 8) ** 2 / (rows / 8)).sum() < 14 + 5 * np.sqrt(28)
    assert 0 <= x.min() < 0.01 and 0.99 < x.max() < 1
    targets = np.asarray(batch.targets)
    np.testing.assert_allclose(targets[:, 0], (x * marker).sum(1), rtol=1e-6)
    assert ((targets - 1) ** 2).mean() == pytest.approx(task.chance, rel=0.1)

  def test_published_constants(self):
    assert tasks.make("adding_lstm_500").length == 550
    task = tasks.make("adding_urnn_750")
    assert (task.length, task.num_train, task.num_test) == (750, 10**5, 10**4)


class TestMackeyGlass:
  def test_against_a_queue(self):
    """The difference equation in float64, with a queue for the delay."""
    task = mackey_glass.MackeyGlass(length=40, tau=17, ahead=15)
    key = sampling.stream(0, "test")
    inputs, targets, weights = jax.jit(task.example)(key)
    (word,) = sampling.words(key, 170)
    history = collections.deque(1.1 + 0.2 * (np.asarray(word) / 2**32))
    assert min(history) < 1.12 and max(history) > 1.28
    x, series = 1.2, []
    for _ in range(155):
      for _ in range(10):
        old = history.popleft()
        history.append(x)
        x += 0.1 * (0.2 * old / (1 + old**10) - 0.1 * x)
      series.append(np.tanh(x - 1) + 0.066)
    np.testing.assert_allclose(inputs[:, 0], series[100:140], atol=2e-4)
    np.testing.assert_allclose(targets[:, 0], series[115:155], atol=2e-4)
    assert np.asarray(weights).all()

  def test_centred(self):
    task = tasks.make("mackey_glass_small", length=16, num_test=128)
    targets = np.asarray(next(task.eval_batches(128)).targets)
    assert np.abs(targets).max() < 0.7
    assert task.chance == pytest.approx(targets.var(), rel=1e-4)
    task = tasks.make("mackey_glass_lmu")
    assert (task.length, task.tau, task.ahead) == (5000, 17, 15)
    inputs = jax.jit(dataclasses.replace(task, length=2000).example)
    inputs = np.asarray(inputs(sampling.stream(1, "test"))[0])
    assert abs(inputs.mean()) < 0.02 and 0.15 < inputs.std() < 0.3


class TestDigits:
  def rows(self, task, split):
    batches = list(task.eval_batches(256, split))
    kept = np.concatenate([batch.weights for batch in batches]) > 0
    inputs = np.concatenate([batch.inputs for batch in batches])[kept]
    return inputs, np.concatenate([batch.targets for batch in batches])[kept]

  def test_splits(self):
    """All images once, cut as scikit-learn cuts them without shuffling."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
      images, labels, test_size=0.2, shuffle=False
    )
    for split, x, y in (
      ("train", parts[0], parts[2]), ("test", parts[1], parts[3]),
    ):  # fmt: skip
      inputs, targets = self.rows(tasks.make("digits"), split)
      np.testing.assert_array_equal(inputs[..., 0] * 16, x)
      np.testing.assert_array_equal(targets, y)
      rows, _ = self.rows(tasks.make("digits", width=8), split)
      np.testing.assert_array_equal(
        rows.reshape(-1, 8, 8), inputs.reshape(-1, 8, 8)
      )

  def test_permuted(self):
    plain, _ = self.rows(tasks.make("digits"), "test")
    inputs, _ = self.rows(tasks.make("digits_permuted"), "test")
    order = np.random.RandomState(42).permutation(64)
    assert sorted(order) == list(range(64)) and (order != np.arange(64)).any()
    np.testing.assert_array_equal(inputs, plain[:, order])

  def test_classes(self):
    task = tasks.make("digits", classes=(7, 2), holdout=30)
    assert task.chance == 0.5 and task.size("validation") == 30
    total = 0
    for split in tasks.SPLITS:
      _, targets = self.rows(task, split)
      assert set(targets) == {2, 7} and len(targets) == task.size(split)
      total += len(targets)
    assert total == np.isin(digits.load()[1], (2, 7)).sum()

  def test_bad_input(self, monkeypatch):
    for options, message in (
      (dict(width=3), "width must be a divisor of 64; got 3"),
      (dict(classes=(1, 1)), "classes must be distinct digits"),
      (dict(classes=(10,)), "classes must be an integer, 0 to 9; got 10"),
    ):
      with pytest.raises(ValueError, match=message):
        tasks.make("digits", **options)
    with pytest.raises(ValueError, match="no examples in the split 'valid"):
      tasks.make("digits").batch(0, 0, 4, "validation")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
      digits.load.__wrapped__()


class TestAeon:
  @pytest.fixture
  def fake(self, monkeypatch):
    """A package with two tiny data sets: one of equal lengths, one ragged."""
    rng = np.random.default_rng(0)
    equal = {
      "train": (rng.normal(5, 2, (6, 1, 4)), np.array(list("121212"))),
      "test": (rng.normal(5, 2, (3, 1, 4)), np.array(list("221"))),
    }
    lengths = {"train": (3, 5, 2), "test": (7, 1)}
    ragged = {
      split: ([rng.normal(size=(2, n)) for n in lengths[split]], names)
      for split, names in (
        ("train", np.array(["b", "a", "b"])),
        ("test", np.array(["a", "b"])),
      )  # fmt: skip
    }
    module = types.ModuleType("aeon")
    module.datasets = types.SimpleNamespace(
      load_unit_test=lambda split: equal[split],
      load_japanese_vowels=lambda split: ragged[split],
    )
    monkeypatch.setitem(sys.modules, "aeon", module)
    aeon._load.cache_clear()
    yield equal, ragged
    aeon._load.cache_clear()

  def test_equal_lengths(self, fake):
    task = tasks.make("aeon_unit_test", holdout=2)
    assert (task.length, task.d_input, task.num_outputs) == (4, 1, 2)
    assert [task.size(split) for split in tasks.SPLITS] == [4, 2, 3]
    task_checks.check_shapes(task, task.batch(0, 0, 8), 8)
    assert task_checks.same(task.batch(0, 3, 8), task.batch(0, 3, 8))
    (batch,) = task.eval_batches(3)
    train = fake[0]["train"][0]
    expected = (fake[0]["test"][0] - train.mean()) / train.std()
    np.testing.assert_allclose(batch.inputs[..., 0], expected[:, 0], atol=1e-6)
    np.testing.assert_array_equal(batch.targets, [1, 1, 0])
    assert batch.mask is None and batch.weights.all()

  def test_ragged_lengths(self, fake):
    task = tasks.make("aeon_japanese_vowels")
    assert (task.length, task.d_input, task.num_outputs) == (7, 2, 2)
    (train,) = task.eval_batches(3, "train")
    task_checks.check_shapes(task, train, 3)
    np.testing.assert_array_equal(train.mask.sum(1), [3, 5, 2])
    np.testing.assert_array_equal(train.targets, [1, 0, 1])
    assert not train.inputs[~train.mask].any()
    steps = train.inputs[train.mask].astype(np.float64)
    np.testing.assert_allclose(steps.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(steps.std(0), 1, atol=1e-6)
    (test,) = task.eval_batches(2)
    np.testing.assert_array_equal(test.mask.sum(1), [7, 1])

  def test_absent(self, monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon", None)
    aeon._load.cache_clear()
    with pytest.raises(ImportError, match="aeon_gunpoint .* pip install aeon"):
      tasks.make("aeon_gunpoint").batch(0, 0, 4)
    with pytest.raises(ValueError, match="did you mean 'gunpoint'"):
      aeon.Aeon(dataset="gun_point")

  @pytest.mark.parametrize(
    "dataset, counts, shape, classes",
    [
      ("acsf1", (100, 100), (1460, 1), 10),
      ("arrow_head", (36, 175), (251, 1), 3),
      ("basic_motions", (40, 40), (100, 6), 4),
      ("gunpoint", (50, 150), (150, 1), 2),
      ("italy_power_demand", (67, 1029), (24, 1), 2),
      ("japanese_vowels", (270, 370), (29, 12), 9),
      ("osuleaf", (200, 242), (427, 1), 6),
      ("pickup_gesture_wiimote_z", (50, 50), (361, 1), 10),
      ("unit_test", (20, 22), (24, 1), 2),
    ],
  )
  def test_real(self, dataset, counts, shape, classes):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      pytest.importorskip("aeon")
      task = tasks.make(f"aeon_{dataset}")
      assert (task.size("train"), task.size("test")) == counts
    assert (task.length, task.d_input, task.num_outputs) == (*shape, classes)
    batch = task.batch(0, 0, 8)
    task_checks.check_shapes(task, batch, 8)
    assert (batch.mask is None) == (
      dataset not in ("japanese_vowels", "pickup_gesture_wiimote_z")
    )


class TestContinual:
  def test_schedule(self):
    """Sub-tasks in order, then the last for ever."""
    task = tasks.make("continual_digits_split")
    assert task.num_tasks == 5 and task.length == 8 and task.d_input == 8
    assert [part.classes for part in task.parts] == [
      (0, 1), (2, 3), (4, 5), (6, 7), (8, 9),
    ]  # fmt: skip
    task = dataclasses.replace(task, parts=task.parts[:3:2], steps_per_task=3)
    for step in range(8):
      which = min(step // 3, 1)
      assert task.task_at(step) == which
      targets = task.batch(0, step, 16).targets
      assert set(targets) == ({4, 5} if which else {0, 1})
    alone = dataclasses.replace(task, only=1)
    assert alone.task_at(0) == alone.task_at(99) == 1
    # The first steps of a sub-task, whatever came before.
    assert task_checks.same(alone.batch(0, 1, 16), task.batch(0, 4, 16))

  def test_one_pass(self):
    """A hundred batches of ten: a thousand images, none of them twice."""
    task = tasks.make("continual_digits_permuted")
    assert task.num_tasks == 20 and task.steps_per_task == 100
    inputs = [task.batch(0, step, 10).inputs for step in range(100, 200)]
    rows = {row.tobytes() for row in np.concatenate(inputs)}
    distinct = {row.tobytes() for row in digits.load()[0][:1437]}
    assert len(rows) >= 1000 - (1437 - len(distinct))
    # Another order in each sub-task.
    first = [task.batch(0, step, 10).targets for step in (0, 100, 200)]
    assert len({targets.tobytes() for targets in first}) == 3

  def test_evaluation(self):
    task = tasks.make("continual_digits_permuted")
    images, labels = digits.load()
    for which in (0, 7):
      alone = dataclasses.replace(task, only=which)
      (batch,) = alone.eval_batches(360)
      order = np.random.RandomState(which).permutation(64)
      np.testing.assert_array_equal(
        batch.inputs.reshape(360, 64), images[1437:, order]
      )
      np.testing.assert_array_equal(batch.targets, labels[1437:])
    whole = list(tasks.make("continual_digits_split").eval_batches(64))
    kept = [batch.targets[batch.weights > 0] for batch in whole]
    expected = sorted(labels[1437:].tolist(), key=lambda d: d // 2)
    found = np.concatenate(kept)
    np.testing.assert_array_equal(found // 2, np.array(expected) // 2)

  def test_bad_input(self):
    parts = (tasks.make("digits"), tasks.make("digits", width=8))
    for options, message in (
      (dict(parts=parts), "Continual: parts differ in d_input"),
      (dict(parts=()), "parts needs one sub-task at least"),
      (dict(only=5), "only must be an integer, 0 to 4; got 5"),
    ):
      with pytest.raises(ValueError, match=message):
        tasks.make("continual_digits_split", **options)

  def test_metrics(self):
    """Against sums worked out by hand."""
    accuracy = np.array([[0.9, 0.3, 0.2], [0.6, 0.8, 0.4], [0.5, 0.7, 1.0]])
    untrained = np.array([0.1, 0.2, 0.1])
    # (0.5 + 0.7 + 1.0) / 3; (-0.4 + -0.1) / 2; (0.1 + 0.3) / 2.
    assert continual.average_accuracy(accuracy) == pytest.approx(2.2 / 3)
    assert continual.backward_transfer(accuracy) == pytest.approx(-0.25)
    assert continual.forward_transfer(accuracy, untrained) == pytest.approx(0.2)
    assert continual.average_accuracy([[0.5]]) == 0.5
    with pytest.raises(ValueError, match="2 x 2 or more; got the shape"):
      continual.backward_transfer([[0.5]])
    with pytest.raises(ValueError, match=r"must have the shape \(3,\)"):
      continual.forward_transfer(accuracy, untrained[:2])
