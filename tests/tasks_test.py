"""Tasks: the contract, the published distributions, and the real data."""

import dataclasses
import itertools
import random

import jax
import numpy as np
import pytest
from task_checks import check_shapes, same, score

from memzoo import tasks
from memzoo.tasks import cache, mnist1d, sampling, tfds as tfds_tasks
from memzoo.tasks.task import register

# One preset, or a tiny variant of it, for each generated task.
GENERATED = {
  "mqar": dict(name="mqar_small"),
  "mqar_finite": dict(
    name="mqar_zoology_fig2_64_4", vocab_size=128, num_train=37, num_test=20
  ),
  "selective_copying": dict(name="selective_copying_small"),
  "induction": dict(name="induction_small"),
  "mixture": dict(
    name="mqar_based",
    train=(
      tasks.Mqar(vocab_size=32, length=16, pairs=2, num_train=48),
      tasks.Mqar(vocab_size=32, length=24, pairs=4, num_train=16),
    ),
    test=(
      tasks.Mqar(vocab_size=32, length=16, pairs=4, num_test=10),
      tasks.Mqar(vocab_size=32, length=24, pairs=6, num_test=10),
    ),
  ),
}


def generated(case) -> tasks.Task:
  return tasks.make(**GENERATED[case])


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
  """All data of this file is made anew, in a folder of its own."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("memzoo")
    patch.setenv("MEMZOO_CACHE", str(folder))
    yield folder


@pytest.fixture
def text_file(tmp_path):
  """A file of 2,000 bytes in which no five bytes come twice."""
  path = tmp_path / "text.bin"
  values = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)
  path.write_bytes(values.tobytes())
  return path


class TestGenerated:
  @pytest.mark.parametrize("case", GENERATED)
  def test_contract(self, case):
    task = generated(case)
    batch = task.batch(3, 5, 8)
    check_shapes(task, batch, 8)
    assert score(task, batch, task.oracle(batch)) == 1.0
    assert same(batch, task.batch(3, 5, 8))
    assert not same(batch, task.batch(3, 6, 8))
    assert not same(batch, task.batch(4, 5, 8))
    assert not same(batch, task.batch(3, 5, 8, "validation"))
    assert not same(batch, task.batch(3, 5, 8, "test"))
    assert task == generated(case) and hash(task) == hash(generated(case))

  @pytest.mark.parametrize("case", GENERATED)
  def test_eval_is_fixed_and_padded(self, case):
    task = generated(case)
    if case != "mixture":
      task = dataclasses.replace(task, num_test=20)
    first, again = (list(task.eval_batches(8)) for _ in range(2))
    assert all(map(same, first, again)) and len(first) == len(again)
    for batch in first:
      check_shapes(task, batch, 8)
      assert score(task, batch, task.oracle(batch)) == 1.0
    assert not same(first[0], next(iter(task.eval_batches(8, "validation"))))
    rows = [(np.asarray(b.weights).sum(1) > 0).sum() for b in first]
    assert sum(rows) == 20
    if case != "mixture":
      whole = next(
        iter(dataclasses.replace(task, num_test=24).eval_batches(24))
      )
      parts = np.concatenate([np.asarray(b.inputs) for b in first])
      np.testing.assert_array_equal(parts, whole.inputs)

  @pytest.mark.parametrize("case", ["mqar", "mqar_finite", "induction"])
  def test_jit_in_step(self, case):
    task = generated(case)
    traced = jax.jit(lambda seed, step: task.batch(seed, step, 8))
    for step in (0, 7, 11):
      assert same(traced(np.uint32(3), np.int32(step)), task.batch(3, step, 8))

  @pytest.mark.parametrize("case", GENERATED)
  def test_chance(self, case):
    """A guess that is uniform among the possible answers scores `chance`."""
    task = generated(case)
    if case != "mixture":
      task = dataclasses.replace(task, num_train=None)
    batch = task.batch(0, 0, 512)
    answers = np.unique(
      np.asarray(batch.targets)[np.asarray(batch.weights) > 0]
    )
    assert len(answers) == round(1 / task.chance)
    rng = np.random.default_rng(0)
    guess = rng.choice(answers, np.asarray(batch.targets).shape)
    asked = float(np.asarray(batch.weights).sum())
    error = abs(score(task, batch, guess) - task.chance)
    assert error < 4 * np.sqrt(task.chance / asked)

  def test_batch_size_does_not_change_the_stream(self):
    task = generated("mqar")
    large = task.batch(1, 1, 16).inputs
    small = [task.batch(1, step, 8).inputs for step in (2, 3)]
    np.testing.assert_array_equal(large, np.concatenate(small))

  def test_finite_epochs(self):
    """Each epoch holds every row once, in an order of its own."""
    task = generated("mqar_finite")
    batches = [np.asarray(task.batch(0, step, 8).inputs) for step in range(14)]
    rows = [row.tobytes() for row in np.concatenate(batches)]
    epochs = [rows[i : i + 37] for i in (0, 37, 74)]
    assert len(set(epochs[0])) == 37
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


class TestSampling:
  @pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
  def test_epoch_order_is_a_permutation(self, count):
    key = sampling.stream(0, "test")
    size = 2 * count + 3
    order = sampling.epoch_order_jit(
      key, np.uint32(4), np.uint32(0), size, count
    )
    order = np.asarray(order)
    for epoch in (order[:count], order[count : 2 * count]):
      np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    if count > 7:
      assert (order[:count] != order[count : 2 * count]).mean() > 0.9
      later = sampling.epoch_order_jit(
        key, np.uint32(5), np.uint32(2), count, count
      )
      np.testing.assert_array_equal(
        later[: count - 2], order[count + 2 : 2 * count]
      )

  def test_epoch_order_is_uniform(self):
    """Over many epochs, each example comes equally often at each place."""
    count, epochs = 10, 3000
    order = sampling.epoch_order_jit(
      sampling.stream(0, "uniform"),
      np.uint32(0),
      np.uint32(0),
      count * epochs,
      count,
    )
    table = np.zeros((count, count))
    for place, example in enumerate(np.asarray(order)):
      table[place % count, example] += 1
    expected = epochs / count
    chi2 = ((table - expected) ** 2 / expected).sum()
    degrees = (count - 1) ** 2
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)

  def test_distinct_is_uniform_without_replacement(self):
    word = jax.random.bits(sampling.stream(0, "distinct"), (6000, 3), np.uint32)
    draw = jax.jit(jax.vmap(lambda word: sampling.distinct(word, 5, 9)))
    drawn = np.asarray(draw(word))
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    expected = set(itertools.permutations(range(5, 9), 3))
    assert {tuple(row) for row in found} == expected
    chi2 = ((counts - 250) ** 2 / 250).sum()
    assert chi2 < 23 + 5 * np.sqrt(2 * 23)

  def test_default_generator_does_not_matter(self):
    task = generated("induction")
    expected = task.batch(0, 0, 4)
    with jax.default_prng_impl("rbg"):
      jax.clear_caches()
      assert same(task.batch(0, 0, 4), expected)


class TestMqar:
  def test_layout(self):
    task = tasks.make("mqar_zoology_fig2_64_4", vocab_size=128)
    inputs, targets, weights = (np.asarray(x) for x in task.batch(0, 0, 64)[:3])
    for row, target, weight in zip(inputs, targets, weights):
      keys, values = row[0:8:2], row[1:8:2]
      assert len(set(keys)) == len(set(values)) == 4
      assert keys.min() >= 1 and keys.max() < 64 <= values.min()
      asked = np.flatnonzero(weight)
      assert len(asked) == 4 and asked.min() >= 8 and not (asked % 2).any()
      assert sorted(row[asked]) == sorted(keys)
      assert not np.delete(row, [*range(8), *asked]).any()
      table = dict(zip(keys, values))
      assert [table[key] for key in row[asked]] == list(target[asked])

  def test_noise_fills_every_gap(self):
    quiet = tasks.make("mqar_small", random_non_queries=False)
    noisy = tasks.make("mqar_small")
    a, b = (np.asarray(t.batch(0, 0, 256).inputs) for t in (quiet, noisy))
    np.testing.assert_array_equal(a[a > 0], b[a > 0])
    noise = b[a == 0]
    counts = np.bincount(noise, minlength=256)
    expected = len(noise) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(510)

  @pytest.mark.parametrize("power_a", [0.01, 1.0])
  def test_gap_distribution(self, power_a):
    """Gaps of the first and of the second key against the closed form."""
    task = tasks.make(
      "mqar",
      length=32,
      pairs=4,
      vocab_size=64,
      power_a=power_a,
      random_non_queries=False,
      num_train=None,
    )
    rows = 8192
    inputs = np.asarray(task.batch(0, 0, rows).inputs)
    slots = np.arange(1, 13, dtype=np.float64)
    p = slots ** (power_a - 1)
    p /= p.sum()
    second = np.array(
      [
        sum(p[i] * p[j] / (1 - p[i]) for i in range(12) if i != j)
        for j in range(12)
      ]
    )
    for which, expected in enumerate((p, second)):
      key = inputs[:, 2 * which, None]
      gaps = (inputs[:, 8::2] == key).argmax(1)
      counts = np.bincount(gaps, minlength=12)
      chi2 = ((counts - rows * expected) ** 2 / (rows * expected)).sum()
      assert chi2 < 11 + 5 * np.sqrt(22)

  def test_based_mixture(self):
    task = tasks.make("mqar_based")
    assert [(t.length, t.pairs, t.num_train) for t in task.train] == [
      (64, 4, 100_000),
      (128, 8, 20_000),
      (256, 16, 20_000),
      (256, 32, 20_000),
      (256, 64, 20_000),
    ]
    assert [(t.length, t.pairs, t.num_test) for t in task.test] == [
      (64, 4, 1000),
      (64, 8, 1000),
      (64, 16, 1000),
      (128, 32, 1000),
      (256, 64, 1000),
      (512, 128, 1000),
      (1024, 256, 1000),
    ]
    assert task.length == 1024 and task.vocab_size == 8192

  def test_mixture_takes_components_by_size(self):
    task = generated("mixture")
    for epoch in range(2):
      steps = range(8 * epoch, 8 * epoch + 8)
      batches = [task.batch(0, step, 8) for step in steps]
      lengths = [batch.inputs.shape[1] for batch in batches]
      assert sorted(lengths) == [16] * 6 + [24] * 2
      rows = [np.asarray(b.inputs) for b in batches if b.inputs.shape[1] == 16]
      assert len(np.unique(np.concatenate(rows), axis=0)) == 48


class TestCopyingAndInduction:
  def test_selective_copying_layout(self):
    task = tasks.make("selective_copying_small")
    inputs, targets, weights = (
      np.asarray(x) for x in task.batch(0, 0, 512)[:3]
    )
    assert inputs.shape == (512, 72) and task.length == 72
    assert (inputs[:, 64:] == 15).all() and (weights[:, 64:] == 1).all()
    assert not weights[:, :64].any()
    assert ((inputs[:, :64] > 0).sum(1) == 8).all()
    assert inputs[:, :64].max() == 14
    places = np.bincount(np.nonzero(inputs[:, :64])[1], minlength=64)
    assert ((places - 64) ** 2 / 64).sum() < 63 + 5 * np.sqrt(126)
    assert tasks.make("selective_copying_mamba").length == 4096 + 16

  def test_induction_layout(self):
    task = tasks.make("induction_small", length=16)
    inputs, _, weights = (np.asarray(x) for x in task.batch(0, 0, 2048)[:3])
    assert ((inputs == 15).sum(1) == 2).all() and (inputs[:, -1] == 15).all()
    assert (weights.sum(0) == [0] * 15 + [2048]).all()
    places = np.bincount((inputs == 15).argmax(1), minlength=16)
    assert not places[13:].any()
    expected = 2048 / 13
    assert ((places[:13] - expected) ** 2 / expected).sum() < 12 + 5 * np.sqrt(
      24
    )


class TestMnist1d:
  def test_data(self):
    task = tasks.make("mnist1d")
    batch = task.batch(0, 0, 128)
    check_shapes(task, batch, 128)
    assert batch.inputs.shape == (128, 40, 1)
    splits = {s: list(task.eval_batches(500, s)) for s in ("train", "test")}
    assert [len(splits[s]) for s in ("train", "test")] == [8, 2]
    every = [b for batches in splits.values() for b in batches]
    inputs = np.concatenate([b.inputs for b in every])
    assert abs(inputs.mean()) < 1e-5 and abs(inputs.std() - 1) < 1e-5
    targets = np.concatenate([b.targets for b in every])
    np.testing.assert_array_equal(np.bincount(targets), [500] * 10)
    train = np.bincount(np.concatenate([b.targets for b in splits["train"]]))
    assert 380 < train.min() and train.max() < 420

  def test_equals_the_package(self):
    from mnist1d.data import get_dataset_args, make_dataset

    random.seed(7)
    numpy_state = np.random.get_state()[1].copy()
    python_state = random.getstate()
    mnist1d._load.cache_clear()
    (cache.cache_dir() / "mnist1d.npz").unlink(missing_ok=True)
    batches = list(tasks.make("mnist1d").eval_batches(1000))
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state
    expected = make_dataset(get_dataset_args())
    np.testing.assert_array_equal(
      batches[0].inputs[:, :, 0], expected["x_test"].astype(np.float32)
    )
    np.testing.assert_array_equal(batches[0].targets, expected["y_test"])

  def test_shuffled_is_a_fixed_permutation(self):
    plain, shuffled = (
      tasks.make(name).batch(2, 3, 64)
      for name in ("mnist1d", "mnist1d_shuffled")
    )
    order = np.random.RandomState(42).permutation(40)
    np.testing.assert_array_equal(shuffled.inputs, plain.inputs[:, order])
    np.testing.assert_array_equal(shuffled.targets, plain.targets)

  def test_epochs_and_holdout(self):
    task = tasks.make("mnist1d", holdout=500)
    assert [task.size(s) for s in tasks.SPLITS] == [3500, 500, 1000]

    def rows(batches):
      return [row.tobytes() for batch in batches for row in batch.inputs]

    epoch = rows(task.batch(0, step, 100) for step in range(35))
    again = rows(task.batch(0, step, 100) for step in range(35, 70))
    assert len(set(epoch)) == 3500
    assert set(epoch) == set(again) and epoch != again
    held = rows(task.eval_batches(125, "validation"))
    assert len(set(held)) == 500 and not set(held) & set(epoch)
    assert set(held) == set(
      rows(task.batch(9, s, 125, "validation") for s in range(4))
    )
    assert same(task.batch(0, 40, 100), task.batch(0, 40, 100))
    assert not same(task.batch(0, 40, 100), task.batch(1, 40, 100))
    tail = rows([tasks.make("mnist1d").read("train", np.arange(3500, 4000))])
    assert 20 < len(set(held) & set(tail)) < 120
    straddling = rows([task.batch(0, 0, 3600)])
    assert straddling[:3500] == epoch and straddling[3500:] == again[:100]

  def test_last_batch_is_padded(self):
    batches = list(tasks.make("mnist1d").eval_batches(300))
    assert [b.inputs.shape for b in batches] == [(300, 40, 1)] * 4
    assert [int(b.weights.sum()) for b in batches] == [300, 300, 300, 100]
    assert not batches[-1].weights[100:].any()

  def test_missing_package(self, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mnist1d", None)
    with pytest.raises(ImportError, match="mnist1d: pip install mnist1d"):
      mnist1d._generate()

  def test_needs_a_holdout_for_validation(self):
    with pytest.raises(ValueError, match="'validation'; set holdout="):
      tasks.make("mnist1d").batch(0, 0, 4, "validation")
    with pytest.raises(ValueError, match="holdout must be below the 4000"):
      tasks.make("mnist1d", holdout=4000).batch(0, 0, 4)

  @pytest.mark.parametrize(
    "damage", ["empty", "truncated", "garbage", "foreign"]
  )
  def test_damaged_cache_is_made_anew(self, damage, tmp_path, monkeypatch):
    expected = tasks.make("mnist1d").batch(0, 0, 16)
    good = mnist1d._load(cache.cache_dir() / "mnist1d.npz")
    monkeypatch.setattr(mnist1d, "_generate", lambda: dict(good))
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path))
    path = tmp_path / "mnist1d.npz"
    np.savez(path, **good)
    whole = path.read_bytes()
    if damage == "foreign":
      np.savez(path, x=np.zeros(3))
    else:
      path.write_bytes(
        {
          "empty": b"",
          "truncated": whole[: len(whole) // 2],
          "garbage": b"\x00garbage" * 100,
        }[damage]
      )
    assert same(tasks.make("mnist1d").batch(0, 0, 16), expected)
    assert mnist1d._read(path) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["mnist1d.npz"]

  def test_unwritable_cache(self, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setattr(mnist1d, "_generate", lambda: {"x": np.zeros(1)})
    monkeypatch.setenv("MEMZOO_CACHE", str(blocked))
    with pytest.raises(OSError, match="set MEMZOO_CACHE to a folder"):
      tasks.make("mnist1d").batch(0, 0, 4)


class TestText:
  def test_rows_continue(self, text_file):
    """Row b reads on where it stopped; epochs start with a reset."""
    task = tasks.make("text", path=text_file, length=16)
    data = np.frombuffer(text_file.read_bytes(), np.uint8)[:1800].astype(
      np.int32
    )
    assert task.streams
    lane = 1800 // 3
    chunks = (lane - 16) // 16
    for epoch in range(2):
      batches = [task.batch(0, epoch * chunks + c, 3) for c in range(chunks)]
      check_shapes(task, batches[0], 3)
      inputs = np.concatenate([b.inputs for b in batches], axis=1)
      targets = np.concatenate([b.targets for b in batches], axis=1)
      np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
      resets = np.concatenate([b.reset for b in batches], axis=1)
      assert resets[:, 0].all() and not resets[:, 1:].any()
      for row in range(3):
        own = data[row * lane : (row + 1) * lane]
        starts = [
          s
          for s in range(lane - 8)
          if (own[s : s + 9] == inputs[row, :9]).all()
        ]
        assert len(starts) == 1
        stop = starts[0] + inputs.shape[1]
        np.testing.assert_array_equal(own[starts[0] : stop], inputs[row])
        assert own[stop] == targets[row, -1]
    assert same(task.batch(0, 5, 3), task.batch(0, 5, 3))
    assert not same(task.batch(0, 5, 3), task.batch(1, 5, 3))
    assert not same(task.batch(0, 0, 3), task.batch(0, chunks, 3))

  @pytest.mark.parametrize("lane", [17, 18, 31, 32, 33, 48, 49])
  def test_short_lanes(self, lane, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(range(2 * lane)))
    task = tasks.make("text", path=path, length=16, splits=(1, 0, 0))
    for seed, step in itertools.product(range(4), range(4)):
      batch = task.batch(seed, step, 2)
      assert (np.diff(batch.inputs, axis=1) == 1).all()
      np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
      assert batch.inputs[0].min() >= 0 and batch.targets[0].max() < lane
      assert batch.inputs[1].min() >= lane and batch.targets[1].max() < 2 * lane

  def test_windows_stay_in_their_split(self, tmp_path):
    path = tmp_path / "three"
    path.write_bytes(b"a" * 100 + b"b" * 50 + b"c" * 50)
    task = tasks.make(
      "text", path=path, length=9, mode="window", splits=(0.5, 0.25, 0.25)
    )
    assert not task.streams
    for split, letter in zip(tasks.SPLITS, b"abc"):
      batch = task.batch(0, 0, 64, split)
      check_shapes(task, batch, 64)
      assert batch.reset is None
      assert (batch.inputs == letter).all() and (batch.targets == letter).all()

  def test_windows_are_uniform(self, tmp_path):
    path = tmp_path / "ramp"
    path.write_bytes(bytes(range(20)))
    task = tasks.make(
      "text", path=path, length=10, mode="window", splits=(1, 0, 0)
    )
    batch = task.batch(0, 0, 4000)
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    counts = np.bincount(batch.inputs[:, 0])
    assert len(counts) == 10
    assert ((counts - 400) ** 2 / 400).sum() < 9 + 5 * np.sqrt(18)
    assert same(task.batch(0, 3, 8), task.batch(0, 3, 8))
    assert not same(task.batch(0, 3, 8), task.batch(0, 4, 8))
    assert not same(task.batch(0, 3, 8), task.batch(1, 3, 8))

  @pytest.mark.parametrize("mode", ["stream", "window"])
  @pytest.mark.parametrize("rows", [1, 3, 7])
  @pytest.mark.parametrize("size", [24, 61, 64])
  def test_eval_asks_for_every_byte_once(self, mode, rows, size, tmp_path):
    path = tmp_path / "ramp"
    path.write_bytes(bytes(range(size)))
    task = tasks.make(
      "text", path=path, length=7, mode=mode, splits=(0, 0.5, 0.5)
    )
    for split, low in (("validation", 0), ("test", size // 2)):
      batches = list(task.eval_batches(rows, split))
      assert len({b.inputs.shape for b in batches}) == 1
      asked = np.concatenate([b.targets[b.weights > 0] for b in batches])
      expected = range(low + 1, low + size - size // 2 if low else size // 2)
      assert sorted(asked) == list(expected)
      for batch in batches:
        count = batch.weights > 0
        np.testing.assert_array_equal(
          batch.targets[count], batch.inputs[count] + 1
        )
      if mode == "stream":
        assert batches[0].reset[:, 0].all()
        assert not any(b.reset.any() for b in batches[1:])

  def test_changed_file_is_read_anew(self, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 64)
    task = tasks.make("text", path=path, length=4)
    assert (task.batch(0, 0, 1).inputs == ord("a")).all()
    path.write_bytes(b"b" * 80)
    assert (task.batch(0, 0, 1).inputs == ord("b")).all()


class TestTfds:
  @pytest.fixture(autouse=True)
  def fresh(self):
    yield
    for function in ("_builder", "_source", "_pair", "_pipeline", "_texts"):
      getattr(tfds_tasks, function).cache_clear()

  @pytest.fixture
  def tfds(self):
    pytest.importorskip("grain")
    return pytest.importorskip("tensorflow_datasets")

  def test_image_as_pixels(self, tfds, tmp_path):
    with tfds.testing.mock_data(num_examples=13):
      task = tasks.make(
        "tfds", dataset="mnist", data_dir=str(tmp_path), holdout=3
      )
      assert (task.kind, task.length, task.d_input) == (
        "classification",
        784,
        1,
      )
      assert task.num_outputs == 10 and task.vocab_size is None
      assert [task.size(s) for s in tasks.SPLITS] == [10, 3, 13]
      batch = task.batch(0, 0, 4)
      check_shapes(task, batch, 4)
      assert 0 <= batch.inputs.min() and 0.9 < batch.inputs.max() <= 1
      assert same(batch, task.batch(0, 0, 4))
      weights = [b.weights.sum() for b in task.eval_batches(5)]
      assert weights == [5, 5, 3]

  def test_mocked_texts(self, tfds, tmp_path):
    with tfds.testing.mock_data(num_examples=6):
      text = tasks.make(
        "tfds", dataset="tiny_shakespeare", data_dir=str(tmp_path), length=8
      )
      assert text.kind == "tokens" and text.streams
      check_shapes(text, text.batch(0, 0, 2), 2)
      reviews = tasks.make(
        "tfds", dataset="imdb_reviews", data_dir=str(tmp_path), length=20
      )
      assert reviews.kind == "classification" and reviews.num_outputs == 2
      batch = reviews.batch(0, 0, 4)
      check_shapes(reviews, batch, 4)
      assert (batch.mask == (batch.inputs > 0)).all()

  def test_errors(self, tfds, tmp_path):
    with pytest.raises(
      ValueError, match="unknown TFDS data set: 'mnits'; did you mean 'mnist'"
    ):
      tasks.make("tfds", dataset="mnits")
    with tfds.testing.mock_data(num_examples=4):
      options = dict(data_dir=str(tmp_path))
      with pytest.raises(ValueError, match="no class label 'digit'"):
        tasks.make("tfds", dataset="mnist", label="digit", **options).batch(
          0, 0, 2
        )
      with pytest.raises(ValueError, match="length is for texts"):
        tasks.make("tfds", dataset="mnist", length=10, **options)
      with pytest.raises(ValueError, match="mode is for texts"):
        tasks.make("tfds", dataset="mnist", mode="stream", **options)
      with pytest.raises(ValueError, match="holdout is for classification"):
        tasks.make("tfds", dataset="tiny_shakespeare", holdout=2, **options)
      with pytest.raises(ValueError, match="no text feature 'body'"):
        tasks.make(
          "tfds", dataset="tiny_shakespeare", feature="body", **options
        )

  @pytest.mark.parametrize("package", ["grain", "tensorflow_datasets"])
  def test_missing_package(self, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
      ImportError, match=rf"{package}.*pip install memzoo\[data\]"
    ):
      tasks.make("tfds", dataset="mnist")

  def test_own_builder(self, tfds, tmp_path):
    """Real array_record files of a builder of our own, read and read again."""
    # TFDS needs it to prepare a data set, without saying so to pip.
    pytest.importorskip("importlib_resources")
    documents = ["first", "", "the second", "last one"]

    class MemzooTiny(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(
            {
              "signal": tfds.features.Tensor(shape=(5, 2), dtype=np.float32),
              "text": tfds.features.Text(),
              "label": tfds.features.ClassLabel(num_classes=4),
            }
          ),
          description="Four documents.",
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for i, text in enumerate(documents):
          yield (
            str(i),
            {
              "signal": np.full((5, 2), i, np.float32),
              "text": text,
              "label": i,
            },
          )

    data_dir = str(tmp_path)
    task = tasks.TfdsClassification(
      dataset="memzoo_tiny", data_dir=data_dir, feature="signal", label="label"
    )
    assert (task.length, task.d_input, task.num_outputs) == (5, 2, 4)
    batch = task.batch(0, 0, 4)
    assert sorted(batch.targets) == [0, 1, 2, 3]
    assert (batch.inputs == batch.targets[:, None, None]).all()
    with pytest.raises(ValueError, match="no examples in the split"):
      task.batch(0, 0, 2, "validation")
    with pytest.raises(
      ValueError, match="cannot read the split 'test'; it has train"
    ):
      task.batch(0, 0, 2, "test")

    class Sequential:
      """Stands for files in a format without random access."""

      data_dir = "old"

      def download_and_prepare(self):
        pass

      def as_data_source(self, split):
        raise NotImplementedError

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tfds_tasks, "_builder", lambda *_: Sequential())
      with pytest.raises(RuntimeError, match="'old' was prepared in a format"):
        tfds_tasks._source("memzoo_tiny", data_dir, "all")

    text = tasks.TfdsText(
      dataset="memzoo_tiny", data_dir=data_dir, length=6, test="train"
    )
    data, starts = text.contents("train")
    pieces = [p.tobytes().decode() for p in np.split(data, starts[1:])]
    assert sorted(pieces) == sorted(d for d in documents if d)
    batches = list(text.eval_batches(1))
    resets = np.concatenate([b.reset for b in batches], axis=1)[0]
    weights = np.concatenate([b.weights for b in batches], axis=1)[0]
    np.testing.assert_array_equal(np.flatnonzero(resets), starts)
    asked = sorted({*range(1, len(data))} - {*starts.tolist()})
    np.testing.assert_array_equal(np.flatnonzero(weights) + 1, asked)

    (made,) = cache.cache_dir().glob("tfds-memzoo_tiny-*.bin")
    whole = made.read_bytes()
    made.write_bytes(whole[:3])
    tfds_tasks._texts.cache_clear()
    assert text.contents("train")[0].tobytes() == whole


def bad_text(tmp_path, content=b"x" * 40, **options):
  path = tmp_path / "file"
  path.write_bytes(content)
  return tasks.make("text", path=path, **options)


BAD = {
    'task': (lambda p: tasks.make('mqar_smal'), "unknown task: 'mqar_smal'; did you mean 'mqar_small'"),
    'option': (
        lambda p: tasks.make('mqar_small', lenght=64),
        "unknown option of task 'mqar_small': 'lenght'; did you mean 'length'",
    ),
    'required': (lambda p: tasks.make('text'), "task 'text' needs the option path"),
    'type': (lambda p: tasks.make('mqar', length='64'), "length must be an integer, 1 or more; got '64'"),
    'odd length': (lambda p: tasks.make('mqar', length=63), 'length must be even and at least 4'),
    'pairs': (lambda p: tasks.make('mqar', pairs=17), r'at least 4 \* pairs = 68; got 64'),
    'vocabulary': (lambda p: tasks.make('mqar', vocab_size=64), 'vocab_size must be above length = 64'),
    'num_train': (lambda p: tasks.make('mqar', num_train=0), 'num_train must be an integer, 1 to'),
    'context': (lambda p: tasks.make('selective_copying_small', context=7), 'context must be an integer, 8 or more'),
    'induction': (lambda p: tasks.make('induction', length=3), 'length must be an integer, 4 or more'),
    'seed': (lambda p: tasks.make('induction_small').batch(-1, 0, 4), 'Induction: seed must be an integer, 0 to'),
    'step': (lambda p: tasks.make('induction_small').batch(0, -1, 4), 'step must be an integer, 0 or more; got -1'),
    'batch': (lambda p: tasks.make('induction_small').batch(0, 0, 0), 'batch_size must be an integer, 1 or more'),
    'split': (
        lambda p: tasks.make('induction_small').batch(0, 0, 4, 'valid'),
        "unknown split of Induction: 'valid'; did you mean 'validation'",
    ),
    'eval split': (lambda p: tasks.make('mnist1d').eval_batches(4, 'tset'), "'tset'; did you mean 'test'"),
    'holdout': (lambda p: tasks.make('mnist1d', holdout=-1), 'Mnist1d: holdout must be an integer, 0 or more'),
    'mixture': (
        lambda p: tasks.Mixture(train=(tasks.Mqar(),), test=(tasks.Mqar(),)),
        'a train component has no num_train',
    ),
    'missing file': (lambda p: tasks.make('text', path=p / 'none'), "there is no file '.*none'"),
    'folder': (lambda p: tasks.make('text', path=p), 'is not a file'),
    'empty file': (lambda p: bad_text(p, b''), 'is empty; length 256 needs at least 257 bytes'),
    'short file': (lambda p: bad_text(p), 'has 40 bytes; length 256 needs at least 257 bytes'),
    'short split': (
        lambda p: bad_text(p, length=4).batch(0, 0, 2, 'test'),
        'the test split has 2 bytes; 2 rows of length 4 need 10',
    ),
    'mode': (lambda p: bad_text(p, mode='steam'), "unknown mode of Text: 'steam'; did you mean 'stream'"),
    'shares': (lambda p: bad_text(p, splits=(0.9, 0.2, 0)), 'three shares of at least 0 and 1 in sum'),
    'registered': (lambda p: register('mqar', tasks.Mqar), "task 'mqar' is registered already"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
  call, message = BAD[case]
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    call(tmp_path)


def test_no_oracle_for_real_data():
  with pytest.raises(NotImplementedError, match="Mnist1d has no oracle"):
    tasks.make("mnist1d").oracle(None)


def test_every_preset_is_a_value():
  options = {"text": {"path": __file__}, "tfds": None}
  for name in tasks.names():
    if options.get(name, {}) is None:
      continue
    task, again = (tasks.make(name, **options.get(name, {})) for _ in range(2))
    assert task == again and hash(task) == hash(again)
    assert isinstance(task, tasks.Task) and repr(task)
