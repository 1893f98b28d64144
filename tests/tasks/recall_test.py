"""Tasks of recall and copying, against what their docstrings say."""

import collections
import itertools

import jax
import numpy as np
import pytest
import task_checks

from memzoo import tasks
from memzoo.tasks import (
  associative_retrieval,  # noqa: F401
  compositional_mqar,
  forgetting_mqar,
  induction,  # noqa: F401
  mad_compression,  # noqa: F401
  mad_fuzzy_recall,  # noqa: F401
  mad_memorization,  # noqa: F401
  mad_recall,  # noqa: F401
  mad_selective_copying,  # noqa: F401
  mqar,  # noqa: F401
  ntm,  # noqa: F401
  state_capacity,  # noqa: F401
)

TINY_MQAR = dict(vocab_size=48, length=32)
ENDLESS = dict(num_train=None, next_token=False)
CASES = {
  "forgetting_mqar": dict(
    name="forgetting_mqar", num_train=None, pairs=4, updates=3, **TINY_MQAR
  ),
  "compositional_mqar": dict(
    name="compositional_mqar", num_train=None, pairs=4, **TINY_MQAR
  ),
  "remember": dict(name="armt_remember_5_1", num_train=None, key_size=2),
  "rewrite": dict(name="armt_rewrite_10_1", num_train=29, symbols=4),
  "rewrite_small": dict(name="rewrite_small", value_size=2, pairs=6),
  "mad_in_context_recall": dict(
    name="mad_in_context_recall", seq_len=24, **ENDLESS
  ),
  "mad_noisy_in_context_recall": dict(
    name="mad_noisy_in_context_recall", seq_len=24, **ENDLESS
  ),
  "mad_fuzzy_in_context_recall": dict(
    name="mad_fuzzy_in_context_recall", seq_len=40, vocab_size=10, **ENDLESS
  ),
  "mad_selective_copying": dict(
    name="mad_selective_copying", length=24, data=5, num_train=None
  ),
  "mad_compression": dict(name="mad_compression", seq_len=8, num_train=None),
  "mad_memorization": dict(
    name="mad_memorization", vocab_size=32, length=16, num_train=None
  ),
  "ntm_copy": dict(name="ntm_copy_small"),
  "ntm_repeat_copy": dict(name="ntm_repeat_copy_small"),
  "ntm_associative_recall": dict(name="ntm_associative_recall_small"),
  "ntm_priority_sort": dict(name="ntm_priority_sort_small"),
  # As many steps in a piece as in a row: the oracle sees it whole.
  "induction_stream": dict(name="induction_stream_small", length=32, piece=32),
  "memory_copy": dict(name="memory_copy_small", tokens=8),
}
test_contract = task_checks.contract_test(CASES)


def arrays(batch):
  return [None if x is None else np.asarray(x) for x in batch]


def uniform(counts):
  """Whether counts are compatible with equal probabilities."""
  counts = np.asarray(counts, np.float64)
  expected, free = counts.mean(), counts.size - 1
  chi2 = ((counts - expected) ** 2 / expected).sum()
  return chi2 < free + 5 * np.sqrt(2 * free)


def share(hits, p, what):
  """Whether hits [n] of probability p each are as many as they should be."""
  n = np.size(hits)
  assert abs(np.mean(hits) - p) < 4.5 * np.sqrt(p * (1 - p) / n), what


class TestMqarVariants:
  def test_forgetting_layout(self):
    task = tasks.make(
      "forgetting_mqar",
      pairs=4,
      updates=2,
      random_non_queries=False,
      num_train=None,
      **TINY_MQAR,
    )
    inputs, targets, weights = arrays(task.batch(0, 0, 1024))[:3]
    changed, fresh = np.zeros(4), np.zeros(24)
    for row, target, weight in zip(inputs, targets, weights):
      keys, values = list(row[:12:2]), list(row[1:12:2])
      assert len(set(keys[:4])) == len(set(values[:4])) == 4
      assert min(keys) >= 1 and max(keys) < 24 <= min(values)
      table = dict(zip(keys[:4], values[:4]))
      assert len(set(keys[4:])) == 2
      for key, value in zip(keys[4:], values[4:]):
        assert table[key] != value
        changed[keys.index(key)] += 1
        fresh[value - 24] += 1
        table[key] = value
      asked = np.flatnonzero(weight)
      assert asked.min() >= 12 and not (asked % 2).any()
      assert sorted(row[asked]) == sorted(keys[:4])
      assert [table[key] for key in row[asked]] == list(target[asked])
      assert not np.delete(row, [*range(12), *asked]).any()
    assert uniform(changed) and uniform(fresh)

  def test_forgetting_in_a_mixture(self):
    """One oracle serves components with different numbers of pairs."""
    parts = tuple(
      forgetting_mqar.ForgettingMqar(
        pairs=pairs, updates=2, num_train=8, num_test=12, **TINY_MQAR
      )
      for pairs in (2, 4)
    )
    mixture = tasks.Mixture(train=parts, test=parts)
    for batch in mixture.eval_batches(8):
      assert task_checks.score(mixture, batch, mixture.oracle(batch)) == 1.0

  def test_compositional_layout(self):
    task = tasks.make(
      "compositional_mqar",
      vocab_size=30,
      length=28,
      random_non_queries=False,
      num_train=None,
    )
    inputs, targets, weights = arrays(task.batch(0, 0, 2048))[:3]
    neighbours = []
    for row, target, weight in zip(inputs, targets, weights):
      a, b, v = (row[i:12:3] for i in range(3))
      assert set(zip(a, b)) == set(itertools.product(set(a), set(b)))
      assert len(set(a)) == len(set(b)) == 2 and len(set(v)) == 4
      assert a.min() >= 1 and a.max() < 10 <= b.min()
      assert b.max() < 20 <= v.min()
      neighbours.append(a[0] == a[1])
      table = dict(zip(zip(a, b), v))
      asked = np.flatnonzero(weight)
      assert len(asked) == 4 and not ((asked - 12) % 3 != 1).any()
      pairs = list(zip(row[asked - 1], row[asked]))
      assert sorted(pairs) == sorted(table)
      assert [table[pair] for pair in pairs] == list(target[asked])
      assert not np.delete(row, [*range(12), *asked, *asked - 1]).any()
    share(neighbours, 1 / 3, "order of the pairs")

  def test_gaps(self):
    """The first slot is taken by the first key with its closed probability."""
    for name, first, step in (
      ("forgetting_mqar", 16, 2),
      ("compositional_mqar", 12, 3),
    ):
      options = dict(pairs=4, random_non_queries=False, num_train=None)
      task = tasks.make(name, length=40, vocab_size=60, **options)
      inputs = arrays(task.batch(0, 0, 2048))[0]
      slots = inputs[:, first::step][:, : (40 - first) // step]
      p = np.arange(1, slots.shape[1] + 1) ** (0.01 - 1)
      hits = slots[:, 0] == inputs[:, 0]
      if step == 3:
        hits &= inputs[:, first + 1] == inputs[:, 1]
      # Of the four draws, the first is that of the first pair.
      share(hits, p[0] / p.sum(), name)

  def test_published_sets(self):
    sizes = [(64, 4), (128, 9), (256, 16), (256, 25), (256, 36)]
    asked = [
      (64, 4),
      (64, 9),
      (128, 16),
      (256, 36),
      (512, 64),
      (1024, 144),
      (2048, 256),
    ]
    for name, kind, noise in (
      ("forgetting_mqar_zoology", forgetting_mqar.ForgettingMqar, True),
      (
        "compositional_mqar_zoology",
        compositional_mqar.CompositionalMqar,
        True,
      ),
      (
        "compositional_mqar_zoology_random_false",
        compositional_mqar.CompositionalMqar,
        False,
      ),
    ):
      task = tasks.make(name)
      assert [(t.length, t.pairs) for t in task.train] == sizes
      assert [t.num_train for t in task.train] == [100_000] + [20_000] * 4
      assert [(t.length, t.pairs) for t in task.test] == asked
      for part in (*task.train, *task.test):
        assert type(part) is kind and part.vocab_size == 8192
        assert part.random_non_queries == noise and part.power_a == 0.01
    assert task.length == 2048
    based, more, quiet = (
      tasks.make(name)
      for name in ("mqar_based", "mqar_based_2048", "mqar_zoology_random_false")
    )
    assert more.train == based.train and more.test[:-1] == based.test
    assert (more.test[-1].length, more.test[-1].pairs) == (2048, 512)
    for a, b in zip(
      (*based.train, *based.test), (*quiet.train, *quiet.test), strict=True
    ):
      assert (a.length, a.pairs, a.num_train) == (
        b.length,
        b.pairs,
        b.num_train,
      )
      assert a.random_non_queries and not b.random_non_queries
    basic = tasks.make("mqar_zoology_basic")
    assert (basic.vocab_size, basic.length, basic.pairs) == (256, 64, 4)


class TestAssociativeRetrieval:
  @pytest.mark.parametrize("rewrite", [False, True])
  def test_layout(self, rewrite):
    name = "rewrite_small" if rewrite else "remember_small"
    task = tasks.make(name, pairs=5, symbols=3, key_size=2, value_size=2)
    assert task.segment == 6 and task.length == 36
    inputs, targets, weights, reset, mask = arrays(task.batch(1, 2, 2048))
    assert reset is None and mask is None
    places, ranks = np.zeros(5), collections.defaultdict(collections.Counter)
    repeats = 0
    for row, target, weight in zip(inputs, targets, weights):
      segments = row.reshape(6, 6)
      keys = [tuple(s[:2]) for s in segments]
      values = [tuple(s[3:5]) for s in segments]
      assert (segments[:5, 2] == 3).all() and segments[5, 2] == 4
      assert (segments[:, 5] == 5).all()
      assert segments[:, [0, 1, 3, 4]].max() < 3
      latest = dict(zip(keys[:5], values[:5]))
      repeats += len(latest) < 5
      assert list(np.flatnonzero(weight)) == [32, 33]
      assert tuple(target[32:34]) == latest[keys[5]] == values[5]
      places[keys.index(keys[5])] += 1
      ranks[len(latest)][sorted(latest).index(keys[5])] += 1
    if rewrite:
      assert repeats > 1000
      for unique, counts in ranks.items():
        if counts.total() > 200:
          assert uniform([counts[i] for i in range(unique)])
    else:
      assert repeats == 0 and uniform(places)

  def test_rewrite_draws_keys_with_replacement(self):
    task = tasks.make("rewrite_small", pairs=2, symbols=4)
    inputs = arrays(task.batch(0, 0, 2048))[0]
    share(inputs[:, 0] == inputs[:, 4], 1 / 4, "equal keys")

  def test_number_of_pairs_varies_in_training_alone(self):
    task = tasks.make("armt_remember_5_1", num_train=None)
    inputs, targets, weights, reset, mask = arrays(task.batch(0, 0, 1024))
    assert reset is None
    n = (inputs == 17).argmax(1) // 4
    assert uniform(np.bincount(n, minlength=6)[1:])
    asked = weights.argmax(1)
    np.testing.assert_array_equal(asked, n * 4 + 1)
    np.testing.assert_array_equal(mask, np.arange(24) < (n[:, None] + 1) * 4)
    assert not inputs[~mask].any() and not weights[~mask].any()
    rows = np.arange(1024)
    assert (targets[rows, asked] == inputs[rows, asked + 1]).all()
    for split in ("validation", "test"):
      batch = task.batch(0, 0, 64, split)
      assert batch.mask is None
      assert (arrays(batch)[0] == 17).argmax(1).tolist() == [21] * 64

  def test_curriculum(self):
    stages = [n for n in tasks.names() if n.startswith("armt_remember_")]
    assert sorted((t.pairs, t.key_size) for t in map(tasks.make, stages)) == [
      (1, 1),
      (2, 1),
      (3, 1),
      (5, 1),
      (10, 1),
      (20, 2),
      (40, 2),
      (50, 2),
      (50, 3),
      (200, 3),
    ]
    stages = [n for n in tasks.names() if n.startswith("armt_rewrite_")]
    stages = [tasks.make(n) for n in stages]
    assert sorted(t.pairs for t in stages) == [1, 2, 3, 5, 10, 20, 40, 50]
    assert all(t.rewrite and t.key_size == 1 for t in stages)
    assert tasks.make("armt_rewrite_50_1", pairs=500).length == 501 * 4


class TestMadRecall:
  @pytest.mark.parametrize("noisy", [False, True])
  def test_layout(self, noisy):
    noise = 8 if noisy else 0
    task = tasks.make(
      "mad_in_context_recall_small",
      vocab_size=11 + noise,
      noise_vocab=noise,
      frac_noise=0.4 * noisy,
      seq_len=16,
    )
    assert (task.num_keys, task.num_values, task.length) == (5, 6, 15)
    inputs, targets, weights = arrays(task.batch(0, 0, 2048))[:3]
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    last = collections.defaultdict(collections.Counter)
    noises, values = 0, np.zeros(6)
    for row, target, weight in zip(inputs, targets, weights):
      table, asked = {}, []
      for at in range(0, 14, 2):
        key, value = row[at : at + 2]
        if key >= 11:
          assert value >= 11
          noises += 1
          continue
        assert key < 5 <= value < 11
        if key in table:
          asked.append(at)
        else:
          values[value - 5] += 1
        assert table.setdefault(key, value) == value
      assert row[14] in table and target[14] == table[row[14]]
      assert list(np.flatnonzero(weight)) == [*asked, 14]
      last[len(table)][sorted(table).index(row[14])] += 1
    assert uniform(values)
    for size, counts in last.items():
      if size > 1 and counts.total() > 200:
        assert uniform([counts[i] for i in range(size)])
    # One of the seven pairs is a key for certain.
    if noisy:
      share(np.arange(2048 * 6) < noises, 0.4, "noise")
    else:
      assert noises == 0

  def test_next_token(self):
    """In the training split alone, every next token is asked."""
    for name in ("mad_in_context_recall", "mad_fuzzy_in_context_recall"):
      task = tasks.make(name, seq_len=24, num_train=None)
      inputs, targets, weights = arrays(task.batch(0, 0, 4))[:3]
      assert weights.all()
      np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
      test = task.batch(0, 0, 4, "test")
      assert task_checks.score(task, test, task.oracle(test)) == 1.0
      assert 0 < np.asarray(test.weights).mean() < 1

  def test_variations(self):
    recall = "mad_in_context_recall"
    for name in (recall, f"mad_fuzzy{recall[3:]}", f"mad_noisy{recall[3:]}"):
      noisy = "noisy" in name
      base = tasks.make(name)
      assert (base.vocab_size, base.seq_len) == (32 if noisy else 16, 128)
      assert (base.num_train, base.num_test) == (12_800, 1280)
      assert base.next_token
      for vocab in (48, 80, 144) if noisy else (32, 64, 128):
        assert tasks.make(f"{name}_vocab_{vocab}").vocab_size == vocab
      for length in (256, 512, 1024):
        assert tasks.make(f"{name}_length_{length}").seq_len == length
      for train in (6400, 3200, 1600, 800):
        assert tasks.make(f"{name}_train_{train}").num_train == train
    assert (base.noise_vocab, base.frac_noise) == (16, 0.2)
    for noise in (40, 60, 80):
      task = tasks.make(f"{name}_noise_{noise}")
      assert task.frac_noise == noise / 100 and task.noise_vocab == 16


def fuzzy_pairs(row, keys, padding):
  """The pairs of a row, (key, value) tuples, parsed token by token."""
  pairs, inside = [], False
  for token in row[row != padding]:
    if token < keys and not inside:
      pairs.append(([], []))
    inside = token < keys
    pairs[-1][0 if inside else 1].append(int(token))
  return [(tuple(key), tuple(value)) for key, value in pairs]


def fuzzy_row(rng, task, sizes):
  """A row of the process in the docstring, as a list of pairs and flags."""

  def draw(low, high, sizes):
    return tuple(rng.permutation(np.arange(low, high))[: rng.choice(sizes)])

  vocab, keys = task.vocab_size, task.num_keys
  longest = task.key_size + task.value_size
  value_sizes = np.arange(1, task.value_size + 1)
  probe = draw(0, keys, sizes), draw(keys, vocab - 1, value_sizes)
  end = task.seq_len - len(probe[0]) - len(probe[1]) - longest
  place = rng.integers(end - longest + 1)
  pairs, table, total, asked = [], dict([probe]), 0, 0
  while total < end:
    seen = {key for key, _ in pairs}
    key = draw(0, keys, sizes)
    if total >= place and probe[0] not in seen:
      key = probe[0]
    value = table.setdefault(key, draw(keys, vocab - 1, value_sizes))
    asked += len(value) * (key in seen)
    pairs.append((key, value))
    total += len(key) + len(value)
  return pairs, asked + len(probe[1])


class TestMadFuzzyRecall:
  @pytest.mark.parametrize("split", ["train", "test"])
  def test_layout_and_distribution(self, split):
    task = tasks.make(
      "mad_fuzzy_in_context_recall",
      vocab_size=8,
      seq_len=30,
      key_size=2,
      **ENDLESS,
    )
    assert task.num_keys == 3 and task.length == 30
    inputs, targets, weights = arrays(task.batch(0, 0, 1024, split))[:3]
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    found = collections.Counter()
    for row, target, weight in zip(inputs, targets, weights):
      whole = np.append(row, target[-1])
      *pairs, probe = fuzzy_pairs(whole, 3, 7)
      padding = 31 - sum(len(k) + len(v) for k, v in (*pairs, probe))
      assert (row[:padding] == 7).all() and (row[padding:] < 7).all()
      table, at, asked = {}, padding, []
      for key, value in pairs:
        sizes = (1, 2) if split == "train" else (2,)
        assert len(key) in sizes and len(set(key)) == len(key)
        assert len(value) in (1, 2, 3) and len(set(value)) == len(value)
        at += len(key)
        if key in table:
          asked += range(at - 1, at - 1 + len(value))
        assert table.setdefault(key, value) == value
        at += len(value)
      assert table[probe[0]] == probe[1]
      asked += range(30 - len(probe[1]), 30)
      assert list(np.flatnonzero(weight)) == asked
      end = 30 - 5 - len(probe[0]) - len(probe[1])
      total = 31 - padding - len(probe[0]) - len(probe[1])
      assert total - sum(map(len, pairs[-1])) < end <= total
      found[len(pairs), len(asked) // 3] += 1
    rng = np.random.default_rng(0)
    expected = collections.Counter()
    for _ in range(1024):
      sizes = [1, 2] if split == "train" else [2]
      pairs, asked = fuzzy_row(rng, task, sizes)
      expected[len(pairs), asked // 3] += 1
    common = [c for c in expected if expected[c] + found[c] > 20]
    a, b = (np.array([x[c] for c in common]) for x in (found, expected))
    chi2, free = ((a - b) ** 2 / (a + b)).sum(), len(common)
    assert free > 5 and chi2 < free + 5 * np.sqrt(2 * free)


class TestOtherMad:
  def test_selective_copying(self):
    task = tasks.make("mad_selective_copying_small", length=20, data=4)
    inputs, targets, weights = arrays(task.batch(0, 0, 2048))[:3]
    assert (inputs[:, 15] == 15).all() and (inputs[:, 16:] == 14).all()
    assert (weights == (np.arange(20) >= 16)).all()
    context = inputs[:, :15]
    assert context.max() <= 14 and (context[:, -1] < 14).all()
    for row, target in zip(context, targets):
      assert list(row[row < 14]) == list(target[16:])
    assert uniform(np.bincount(targets[:, 16:].ravel(), minlength=14))
    # Each of 11 blanks stands before any of the 4 data tokens alike.
    blanks = (context < 14).argmax(1)
    expected = [0.75**11, 11 * 0.25 * 0.75**10]
    for count, p in enumerate(expected):
      share(blanks == count, p, "blanks in front")

  def test_compression(self):
    task = tasks.make("mad_compression", seq_len=5, num_train=None)
    inputs, targets, weights = arrays(task.batch(0, 0, 64))[:3]
    assert inputs.shape == (64, 8) and (inputs[:, 4:] == 15).all()
    assert inputs[:, :4].max() < 15
    np.testing.assert_array_equal(inputs[:, :4], targets[:, 4:])
    assert (weights == (np.arange(8) >= 4)).all()

  def test_memorization_is_one_table(self):
    task = tasks.make("mad_memorization", num_train=None)
    table = {}
    for seed, split in itertools.product((0, 1), tasks.SPLITS):
      inputs, targets, weights = arrays(task.batch(seed, 0, 128, split))[:3]
      assert (inputs[:, 1::2] == 255).all()
      assert (weights == np.arange(32) % 2).all()
      for key, value in zip(inputs[:, ::2].ravel(), targets[:, 1::2].ravel()):
        assert table.setdefault(key, value) == value
    assert sorted(table) == list(range(127))
    values = list(table.values())
    assert len(set(values)) == 127
    assert 127 <= min(values) and max(values) <= 254
    assert values != sorted(values)

  def test_variations(self):
    for name, length in (
      ("mad_selective_copying", "length"),
      ("mad_compression", "seq_len"),
    ):
      base = tasks.make(name)
      assert base.vocab_size == 16 and base.num_train == 12_800
      assert base.num_test == 1280
      for vocab in (32, 64, 128):
        assert tasks.make(f"{name}_vocab_{vocab}").vocab_size == vocab
      for train in (6400, 3200, 1600, 800):
        assert tasks.make(f"{name}_train_{train}").num_train == train
      steps = (512, 1024) if length == "length" else (64, 128, 256)
      for step in steps:
        assert getattr(tasks.make(f"{name}_length_{step}"), length) == step
    copying = tasks.make("mad_selective_copying")
    assert (copying.length, copying.data) == (256, 16)
    for data in (32, 64, 96):
      assert tasks.make(f"mad_selective_copying_copy_{data}").data == data
    assert tasks.make("mad_compression").seq_len == 32
    base = tasks.make("mad_memorization")
    assert (base.vocab_size, base.length, base.num_train) == (256, 32, 256)
    for vocab in (512, 1024, 2048, 4096, 8192):
      assert tasks.make(f"mad_memorization_vocab_{vocab}").vocab_size == vocab


class TestNtm:
  def test_copy(self):
    task = tasks.make("ntm_copy_small", min_length=2, max_length=5)
    inputs, targets, weights, reset, mask = arrays(task.batch(0, 0, 1024))
    assert inputs.shape == (1024, 11, 5) and targets.shape == (1024, 11, 4)
    assert reset is None
    lengths = []
    for x, y, w, m in zip(inputs, targets, weights, mask):
      (n,) = np.flatnonzero(x[:, 4])
      lengths.append(n)
      assert x[n, 4] == 1 and not x[n:, :4].any() and not x[n + 1 :].any()
      np.testing.assert_array_equal(y[n + 1 : 2 * n + 1], x[:n, :4])
      np.testing.assert_array_equal(w, (np.arange(11) > n) & m)
      np.testing.assert_array_equal(m, np.arange(11) <= 2 * n)
      assert not y[~(w > 0)].any()
    counts = np.bincount(lengths)
    assert len(counts) == 6 and not counts[:2].any() and uniform(counts[2:])
    codes = inputs[:, 0, :4] @ 2 ** np.arange(4)
    assert uniform(np.bincount(codes.astype(int), minlength=16))
    assert tasks.make("ntm_copy").length == 41
    assert tasks.make("ntm_copy", min_length=120, max_length=120).length == 241

  def test_repeat_copy(self):
    task = tasks.make("ntm_repeat_copy_small", max_length=3)
    inputs, targets, weights, _, mask = arrays(task.batch(0, 0, 1024))
    assert inputs.shape == targets.shape == (1024, 17, 5)
    scale = (np.arange(1, 5) - 2.5) / np.arange(1, 5).std()
    drawn = np.zeros((3, 4))
    for x, y, w, m in zip(inputs, targets, weights, mask):
      (n,) = np.flatnonzero(x[:, 4])
      r = int(abs(x[n, 4] - scale).argmin()) + 1
      assert abs(x[n, 4] - scale[r - 1]) < 1e-6
      drawn[n - 1, r - 1] += 1
      asked = list(np.flatnonzero(w))
      assert asked == list(range(n + 1, n + 2 + n * r))
      copies = np.concatenate([x[:n, :4]] * r)
      np.testing.assert_array_equal(y[asked[:-1], :4], copies)
      assert list(np.flatnonzero(y[:, 4])) == [asked[-1]]
      assert not x[n + 1 :].any() and not y[asked[-1], :4].any()
      np.testing.assert_array_equal(m, np.arange(17) < n + 2 + n * r)
    assert uniform(drawn)
    paper = tasks.make("ntm_repeat_copy")
    assert (paper.length, paper.d_input, paper.num_outputs) == (112, 9, 9)

  def test_associative_recall(self):
    task = tasks.make(
      "ntm_associative_recall_small", bits=2, item_length=2, min_items=3
    )
    inputs, targets, weights, _, mask = arrays(task.batch(0, 0, 1024))
    assert inputs.shape == (1024, 18, 4)
    seen = collections.Counter()
    for x, y, w, m in zip(inputs, targets, weights, mask):
      first, second = np.flatnonzero(x[:, 3])
      assert second == first + 3 and first % 3 == 0
      n = first // 3
      assert list(np.flatnonzero(x[:, 2])) == list(range(0, first, 3))
      items = [x[3 * i + 1 : 3 * i + 3, :2].tolist() for i in range(n)]
      query = x[first + 1 : first + 3, :2].tolist()
      assert query in items[:-1]
      seen[n, items.index(query)] += items.count(query) == 1
      answer = items[items.index(query) + 1]
      assert list(np.flatnonzero(w)) == [second + 1, second + 2]
      assert y[second + 1 : second + 3].tolist() == answer
      assert not x[second, :2].any() and not x[second + 1 :].any()
      np.testing.assert_array_equal(m, np.arange(18) < second + 3)
    assert uniform([seen[3, i] for i in range(2)])
    assert uniform([seen[4, i] for i in range(3)])
    paper = tasks.make("ntm_associative_recall")
    assert (paper.d_input, paper.num_outputs, paper.length) == (8, 6, 32)

  def test_priority_sort(self):
    task = tasks.make("ntm_priority_sort_small")
    inputs, targets, weights = arrays(task.batch(0, 0, 512))[:3]
    assert inputs.shape == (512, 14, 5) and not inputs[:, 8:].any()
    assert (weights == (np.arange(14) >= 8)).all()
    for x, y in zip(inputs, targets):
      ranked = sorted(x[:8].tolist(), key=lambda v: -v[4])
      assert y[8:].tolist() == [v[:4] for v in ranked[:6]]
    priority = inputs[:, :8, 4].ravel()
    assert -1 <= priority.min() and priority.max() < 1
    assert uniform(np.histogram(priority, 16, (-1, 1))[0])
    paper = tasks.make("ntm_priority_sort")
    assert (paper.length, paper.items, paper.keep) == (36, 20, 16)


class TestInductionStream:
  def test_rows(self):
    """Pieces joined are rows of `Induction`; any row crosses any piece."""
    task = tasks.make("induction_stream_small", length=16, piece=4)
    batches = [arrays(task.batch(5, step, 1024)) for step in range(4)]
    inputs, targets, weights, reset = (
      np.concatenate([b[i] for b in batches], axis=1) for i in range(4)
    )
    assert (reset == (np.arange(16) == 0)).all()
    assert (weights == (np.arange(16) == 15)).all()
    triggers = inputs == 15
    assert (triggers.sum(1) == 2).all() and triggers[:, -1].all()
    place = triggers.argmax(1)
    assert uniform(np.bincount(place, minlength=13)) and place.max() == 12
    answer = inputs[np.arange(1024), place + 1]
    np.testing.assert_array_equal(targets[:, -1], answer)
    assert uniform(np.bincount(inputs[~triggers], minlength=15))
    # The next group of rows, and the same rows by smaller batches.
    after = np.asarray(task.batch(5, 4, 1024).inputs)
    assert (after != inputs[:, :4]).mean() > 0.5
    halves = [np.asarray(task.batch(5, step, 512).inputs) for step in (2, 6)]
    np.testing.assert_array_equal(np.concatenate(halves), inputs[:, 8:12])

  def test_million_steps(self):
    task = tasks.make("induction_mamba_stream")
    assert (task.length, task.pieces, task.streams) == (2**20, 256, True)
    first, last, group = (task.batch(0, step, 2) for step in (0, 255, 256))
    for batch in (first, last, group):
      assert batch.inputs.shape == (2, 4096)
    assert np.asarray(last.weights)[:, -1].all()
    assert np.asarray(last.weights).sum() == 2
    assert not np.asarray(first.weights).any()
    assert np.asarray(first.reset)[:, 0].all()
    assert not np.asarray(last.reset).any()
    assert np.asarray(group.reset).sum() == 2

  def test_evaluation(self):
    task = tasks.make("induction_stream_small", length=16, piece=4, num_test=3)
    first, again = (list(task.eval_batches(2)) for _ in range(2))
    assert len(first) == 8 and all(map(task_checks.same, first, again))
    parts = [arrays(batch) for batch in first]
    assert sum(p[2].sum() for p in parts) == 3
    for rows in (parts[:4], parts[4:]):
      whole = tasks.Batch(
        *(np.concatenate([p[i] for p in rows], axis=1) for i in range(4))
      )
      assert task_checks.score(task, whole, task.oracle(whole)) == 1.0
    with pytest.raises(ValueError, match="whole rows of 16 steps; got 4"):
      task.oracle(first[0])

  def test_jit_in_step(self):
    task = tasks.make("induction_stream_small", length=16, piece=4)
    traced = jax.jit(lambda seed, step: task.batch(seed, step, 4))
    for step in (0, 3, 6):
      batch = traced(np.uint32(3), np.int32(step))
      assert task_checks.same(batch, task.batch(3, step, 4))


def test_memory_copy_layout():
  task = tasks.make("memory_copy_small", tokens=4)
  inputs, targets, weights = arrays(task.batch(0, 0, 256))[:3]
  assert inputs.shape == (256, 8) and (inputs[:, 4] == 8).all()
  assert (weights == (np.arange(8) >= 4)).all()
  np.testing.assert_array_equal(targets[:, 4:], inputs[:, :4])
  np.testing.assert_array_equal(targets[:, 4:7], inputs[:, 5:])
  assert uniform(np.bincount(inputs[:, :4].ravel(), minlength=8))


BAD = (
  ("forgetting_mqar", dict(updates=9), "updates must be an integer, 1 to 8"),
  ("forgetting_mqar", dict(length=38), "at least 4 . pairs . 2 . updates = 40"),
  ("forgetting_mqar", dict(vocab_size=64), "vocab_size must be above length"),
  ("compositional_mqar", dict(pairs=5), "pairs must be a square"),
  ("compositional_mqar", dict(length=22), "at least 6 . pairs = 24; got 22"),
  ("compositional_mqar", dict(vocab_size=64), "vocab_size must be above"),
  ("remember_small", dict(pairs=17), "pairs must be .* = 16 or less"),
  ("remember_small", dict(key_size=6), "must be 2 .. 20 or less"),
  ("mad_in_context_recall", dict(seq_len=15), "seq_len must be even; got 15"),
  ("mad_in_context_recall", dict(noise_vocab=15), "noise_vocab . 2 = 17"),
  ("mad_in_context_recall", dict(frac_noise=0.1), "needs noise_vocab; got 0"),
  ("mad_noisy_in_context_recall", dict(frac_noise=1), "must be in .0, 1.; got"),
  ("mad_fuzzy_in_context_recall", dict(seq_len=17), "seq_len .* 18 or more"),
  ("mad_fuzzy_in_context_recall", dict(vocab_size=6), "vocab_size .* 7 or"),
  ("mad_selective_copying", dict(data=128), "length .* 258 or more; got 256"),
  ("mad_compression", dict(seq_len=1), "seq_len .* 2 or more; got 1"),
  ("mad_memorization", dict(length=31), "length must be even; got 31"),
  ("ntm_copy", dict(min_length=21), "max_length .* 21 or more; got 20"),
  ("ntm_copy", dict(bits=33), "bits .* 1 to 32; got 33"),
  ("ntm_repeat_copy", dict(norm_repeats=5), "norm_repeats must be even; got 5"),
  ("ntm_associative_recall", dict(min_items=1), "min_items .* 2 or more; got"),
  ("ntm_priority_sort", dict(keep=21), "keep .* 1 to 20; got 21"),
  ("induction_mamba_stream", dict(piece=4095), "piece must divide length"),
  ("memory_copy_64", dict(tokens=0), "tokens .* 1 or more; got 0"),
)


@pytest.mark.parametrize("name, options, message", BAD)
def test_bad_options(name, options, message):
  with pytest.raises(ValueError, match=message):
    tasks.make(name, **options)
