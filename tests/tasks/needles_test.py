"""Needles, variables, counted words; stories and stories in long texts."""

import collections
import math
import re
import uuid

import numpy as np
import pytest
import task_checks

from memzoo import tasks
from memzoo.tasks import (
  babi,
  babi_world,
  babilong,
  haystack,
  needles,  # noqa: F401  Registers its presets.
  text_rows,
  variable_tracking,  # noqa: F401
  word_counting,  # noqa: F401
)
from memzoo.tasks.text_rows import Draws

CASES = {
  "single": dict(name="ruler_niah_single_small"),
  "single_1": dict(name="ruler_niah_single_1", length=700),
  "single_3": dict(name="ruler_niah_single_3", length=900),
  "multikey": dict(name="ruler_niah_multikey_small"),
  "multikey_2": dict(name="ruler_niah_multikey_2", length=700),
  "multikey_3": dict(name="ruler_niah_multikey_3", length=900),
  "multivalue": dict(name="ruler_niah_multivalue", length=1100),
  "multiquery": dict(name="ruler_niah_multiquery", length=1300),
  "multiquery_small": dict(name="ruler_niah_multiquery_small", num_train=20),
  "vt": dict(name="ruler_vt", length=1200, num_chains=2),
  "vt_small": dict(name="ruler_vt_small"),
  "cwe": dict(name="ruler_cwe", length=3000, freq_common=6, freq_uncommon=1),
  "cwe_small": dict(name="ruler_cwe_small"),
  "fwe": dict(name="ruler_fwe", length=2000),
  "fwe_small": dict(name="ruler_fwe_small"),
  "babi_bytes": dict(name="babi_qa5_small", tokens="bytes", length=400),
  "babi_finite": dict(name="babi_qa1", num_train=20),
  "babilong_bytes": dict(name="babilong_qa3", length=700),
  **{f"babi_{q}": dict(name=f"babi_qa{q}_small") for q in range(1, 6)},
  **{f"babilong_{q}": dict(name=f"babilong_qa{q}_small") for q in range(1, 6)},
}
BABI = range(1, 6)

test_contract = task_checks.contract_test(CASES)


def texts(batch, vocabulary=()):
  """The text of each row, without what fills it up."""
  rows = [row[mask] for row, mask in zip(batch.inputs, batch.mask)]
  if vocabulary:
    return [" ".join(vocabulary[i] for i in row) for row in rows]
  return [bytes(row.astype(np.uint8)).decode() for row in rows]


def asked(batch, row):
  """The symbols that are asked for in a row, as text."""
  symbols = batch.targets[row][batch.weights[row] > 0]
  return bytes(symbols.astype(np.uint8)).decode()


class TestRows:
  @pytest.mark.parametrize("case", CASES)
  def test_layout(self, case):
    """Targets are the next symbols, the answer ends the row, zeros follow."""
    batch = tasks.make(**CASES[case]).batch(1, 2, 8)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    size = batch.mask.sum(1)
    steps = np.arange(batch.inputs.shape[1])
    np.testing.assert_array_equal(batch.mask, steps < size[:, None])
    assert not batch.inputs[~batch.mask].any()
    assert set(np.unique(batch.weights)) == {0.0, 1.0}
    for weights, n in zip(batch.weights, size):
      assert np.flatnonzero(weights)[-1] == n - 2

  @pytest.mark.parametrize("case", CASES)
  def test_oracle_does_not_read_the_answer(self, case):
    task = tasks.make(**CASES[case])
    batch = task.batch(0, 0, 4)
    blind = np.array(batch.inputs)
    # A digit, or a word that is no mark: neither ends a question.
    blind[:, 1:][batch.weights[:, :-1] > 0] = (
      ord("7") if task.vocab_size == 256 else 10
    )
    assert not np.array_equal(blind, batch.inputs)
    assert (
      task_checks.score(task, batch, task.oracle(batch._replace(inputs=blind)))
      == 1.0
    )

  @pytest.mark.parametrize("case", ["multikey", "babi_2", "babilong_1"])
  def test_eval_is_fixed_and_padded(self, case):
    task = tasks.make(**CASES[case], num_test=20)
    first, again = (list(task.eval_batches(8)) for _ in range(2))
    assert all(map(task_checks.same, first, again)) and len(first) == 3
    rows = np.concatenate([b.weights.max(1) for b in first])
    np.testing.assert_array_equal(rows, np.arange(24) < 20)
    (whole,) = tasks.make(**CASES[case], num_test=24).eval_batches(24)
    np.testing.assert_array_equal(
      whole.inputs, np.concatenate([b.inputs for b in first])
    )
    other = next(iter(task.eval_batches(8, "validation")))
    assert not task_checks.same(first[0], other)

  def test_batch_size_does_not_change_the_stream(self):
    task = tasks.make("babi_qa2_small")
    parts = [task.batch(1, step, 4).inputs for step in (2, 3)]
    np.testing.assert_array_equal(
      task.batch(1, 1, 8).inputs, np.concatenate(parts)
    )

  def test_finite_epochs(self):
    task = tasks.make("ruler_niah_multikey_small", num_train=21)
    rows = np.concatenate([task.batch(5, s, 7).inputs for s in range(6)])
    rows = [row.tobytes() for row in rows]
    assert len(set(rows[:21])) == 21 and set(rows[:21]) == set(rows[21:])
    assert rows[:21] != rows[21:]

  def test_random_numbers_stay(self):
    """Known numbers, so that no version of NumPy changes the data."""
    draws = Draws(1, 2, 3)
    words = np.random.Philox(np.random.SeedSequence((1, 2, 3))).random_raw(64)
    assert [draws.below(1000) for _ in range(64)] == [
      int(w) % 1000 for w in words[::-1]
    ]
    draws = Draws(1, 2, 2**40)
    assert [draws.below(10**6) for _ in range(4)] == [
      657233,
      801254,
      389608,
      432277,
    ]
    pairs = collections.Counter(tuple(draws.sample(4, 2)) for _ in range(6000))
    assert len(pairs) == 12 and all(400 < n < 600 for n in pairs.values())
    assert sorted(draws.shuffled("memory")) == sorted("memory")

  @pytest.mark.parametrize(
    "answers", [("ab", "ab"), ("ab", "cb", "d"), ("abc", "x")]
  )
  def test_guess(self, answers):
    """Every answer against every other, symbol by symbol."""
    right = sum(x == y for a in answers for b in answers for x, y in zip(a, b))
    asked = sum(len(a) for a in answers) * len(answers)
    assert text_rows.guess(answers) == pytest.approx(right / asked)


# Written down from RULER's scripts/synthetic.yaml.
YAML = {
  "single_1": ("noise", "words", "numbers", 1, 1, 1),
  "single_2": ("text", "words", "numbers", 1, 1, 1),
  "single_3": ("text", "words", "uuids", 1, 1, 1),
  "multikey_1": ("text", "words", "numbers", 4, 1, 1),
  "multikey_2": ("needles", "words", "numbers", 1, 1, 1),
  "multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
  "multivalue": ("text", "words", "numbers", 1, 4, 1),
  "multiquery": ("text", "words", "numbers", 4, 1, 4),
}
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


def context(text):
  return text[text.index("\n") + 1 : text.index("\nWhat ")]


class TestNeedles:
  @pytest.mark.parametrize("name", YAML)
  def test_against_a_reading_of_the_text(self, name):
    """What is asked for is what the needles of the asked keys say."""
    where, keys, values, num_keys, num_values, num_queries = YAML[name]
    task = tasks.make(f"ruler_niah_{name}")
    assert (task.haystack, task.type_key, task.type_value) == (
      where,
      keys,
      values,
    )
    counts = (task.num_keys, task.num_values, task.num_queries)
    assert counts == (num_keys, num_values, num_queries)
    assert (task.length, task.num_test, task.digits) == (4096, 500, 7)
    batch = task.batch(7, 3, 3)
    for row, text in enumerate(texts(batch)):
      assert text.endswith(asked(batch, row)) or num_values * num_queries > 1
      found = NEEDLE.findall(context(text))
      queries = re.search(r"\nWhat .*? for (.*?) mentioned", text)[1]
      queries = re.sub(", and ", ", ", queries).split(", ")
      answer = [v for query in queries for _, k, v in found if k == query]
      assert asked(batch, row) == "".join(answer)
      assert len(answer) == num_values * num_queries == len(set(answer))
      assert {kind for kind, *_ in found} == {values}
      if where != "needles":
        assert len(found) == num_keys * num_values
        assert len({k for _, k, _ in found}) == num_keys
      else:
        assert len(found) > 25
      for _, key, value in found:
        for kind, word in ((keys, key), (values, value)):
          if kind == "uuids":
            assert str(uuid.UUID(word)) == word and uuid.UUID(word).version == 4
          elif kind == "numbers":
            assert re.fullmatch("[1-9][0-9]{6}", word)
          else:
            assert re.fullmatch("[a-z]+-[a-z]+", word)

  def test_wording(self):
    """The row of a single needle, word by word."""
    text = texts(tasks.make("ruler_niah_single_1", length=700).batch(0, 0, 1))[
      0
    ]
    _, key, value = NEEDLE.search(text).groups()
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    rest = text.replace(
      f"One of the special magic numbers for {key} is: {value}.\n", ""
    )
    lines = rest.split("\n")
    assert lines[0] == (
      "A special magic number is hidden within the following text. Make sure to"
      " memorize it. I will quiz you about the number afterwards."
    )
    assert lines[1:-1] == [noise] * 3
    assert lines[-1] == (
      f"What is the special magic number for {key} mentioned in the provided text?"
      f" The special magic number for {key} mentioned in the provided text is {value}"
    )

  def test_wording_of_many(self):
    text = texts(tasks.make("ruler_niah_multiquery").batch(0, 0, 1))[0]
    assert text.startswith("Some special magic numbers are hidden within")
    query = text[
      text.index("\nWhat are all the special magic numbers for ") + 44 :
    ]
    query, answer = (
      query[: query.index(" mentioned")],
      text[text.rindex(" are ") + 5 :],
    )
    assert re.fullmatch(r"\S+, \S+, \S+, and \S+", query)
    assert (
      f"The special magic numbers for {query} mentioned in the provided text are {answer}"
      in text
    )
    assert re.fullmatch(r"\d{7}(, \d{7}){3}", answer)

  @pytest.mark.parametrize("depth", [0, 28, 50, 100])
  def test_one_needle_at_the_asked_depth(self, depth):
    task = tasks.make("ruler_niah_single_2", depths=(depth,), length=3000)
    for text in texts(task.batch(0, 0, 3)):
      assert len(NEEDLE.findall(text)) == 1
      sentences = re.split(r"(?<=\.) ", context(text))
      (place,) = (i for i, s in enumerate(sentences) if NEEDLE.fullmatch(s))
      assert len(sentences) > 20
      assert place == math.floor((len(sentences) - 1) * depth / 100)

  def test_depths_of_ruler(self):
    """Forty depths from 0 to 100 %, in a text; each about equally often."""
    assert len(set(haystack.DEPTHS)) == 40
    assert haystack.DEPTHS == tuple(round(100 * i / 39) for i in range(40))
    # With a hundred sentences and more, the place tells the depth.
    task = tasks.make("ruler_niah_single_2", length=12_000)
    seen = collections.Counter()
    for text in texts(task.batch(0, 0, 300)):
      sentences = re.split(r"(?<=\.) ", context(text))
      (place,) = (i for i, s in enumerate(sentences) if NEEDLE.fullmatch(s))
      (depth,) = (
        d for d in haystack.DEPTHS if (len(sentences) - 1) * d // 100 == place
      )
      seen[depth] += 1
    assert len(seen) > 35 and max(seen.values()) < 20

  def test_haystack_of_needles_does_not_repeat_the_needle(self):
    """Among few keys and values, those of the answer come once all the same."""
    task = tasks.make("ruler_niah_multikey_2", type_key="nouns", digits=3)
    batch = task.batch(0, 0, 40)
    for row, text in enumerate(texts(batch)):
      found = NEEDLE.findall(context(text))
      key = re.search(r"\nWhat .*? for (\w+) mentioned", text)[1]
      assert [k for _, k, _ in found].count(key) == 1
      assert [v for *_, v in found].count(asked(batch, row)) == 1
      assert len({k for _, k, _ in found}) < len(found)

  def test_places_in_noise_are_uniform(self):
    task = tasks.make("ruler_niah_single_1", length=900)
    places = collections.Counter()
    for text in texts(task.batch(0, 0, 1000)):
      lines = context(text).split("\n")
      places[
        len(lines) - 1, [bool(NEEDLE.fullmatch(s)) for s in lines].index(True)
      ] += 1
    groups = max(n for n, _ in places)
    counts = [places[groups, i] for i in range(groups + 1)]
    # Before any group of noise, never after the last.
    assert counts[-1] == 0 and min(counts[:-1]) > 0.6 * max(counts[:-1])

  def test_small_rows_say_different_things(self):
    task = tasks.make("ruler_niah_multikey_small")
    batch = task.batch(0, 0, 500)
    assert task.length <= 256
    answers = [asked(batch, row) for row in range(500)]
    assert len(set(answers)) > 350
    firsts = collections.Counter(answer[0] for answer in answers)
    assert sorted(firsts) == list("123456789") and max(firsts.values()) < 90
    for text, answer in zip(texts(batch), answers):
      found = dict(re.findall(r"The value of (\w+) is (\d{3})\.", text))
      query = text[text.rindex(" of ") + 4 : text.rindex(" is ")]
      assert len(found) == 4 and found[query] == answer

  @pytest.mark.parametrize("kind", ["numbers", "uuids"])
  def test_chance(self, kind):
    """Another row's value, put in the place of the value."""
    task = tasks.make(
      "ruler_niah_single_small", type_value=kind, length=256, digits=2
    )
    batch = task.batch(0, 0, 3000)
    value = [asked(batch, row) for row in range(3000)]
    right = [x == y for a, b in zip(value, value[1:]) for x, y in zip(a, b)]
    assert np.mean(right) == pytest.approx(task.chance, abs=0.012)

  def test_text_of_a_file(self, prose):
    path, sentences = prose
    whole = " ".join(sentences)
    task = tasks.make("ruler_niah_multivalue", path=path, length=2500)
    starts = set()
    for text in texts(task.batch(0, 0, 20)):
      assert len(NEEDLE.findall(text)) == 4
      rest = re.sub(NEEDLE, "", context(text))
      rest = re.sub(" +", " ", rest).strip()
      assert rest in f"{whole} {whole}" and len(rest) > 1000
      starts.add(rest[:40])
    assert len(starts) > 5

  @pytest.mark.parametrize("bad, message", [
    (dict(haystack="essay"), "unknown haystack of Needles: 'essay'"),
    (dict(length=300), "Needles: length must be at least 462 bytes for 1 needles"),
    (dict(num_values=0), "num_values must be an integer, 1 or more; got 0"),
    (dict(digits=1, num_keys=5), "5 distinct values of type 'numbers' need 10 candidates; there are 9"),
    (dict(depths=(50, 101)), "a depth must be an integer, 0 to 100; got 101"),
    (dict(depths=50), "depths must be percents in a tuple; got 50"),
    (dict(depths=(50,), num_keys=2), "2 needles need as many depths; got 1"),
    (dict(path=__file__), "path is for haystack 'text'; got 'noise'"),
    (dict(haystack="text", path="/nowhere/at/all"), "there is no file '/nowhere/at/all'"),
    (dict(wording="long"), "unknown wording of Needles: 'long'"),
  ])  # fmt: skip
  def test_bad_input(self, bad, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      tasks.make("ruler_niah_single_1", **bad)


@pytest.fixture
def prose(tmp_path):
  """A file of prose in lines, and its sentences; no two of them are alike."""
  rng = np.random.default_rng(0)
  sentences = []
  for i in range(60):
    words = [
      "".join(rng.choice(list("bcdfmnst"), 4)) for _ in range(10 + i % 5)
    ]
    sentences.append(f"Nr{i} " + " ".join(words) + ".?!"[i % 3])
  path = tmp_path / "prose.txt"
  path.write_text(
    "\n".join(
      s if i % 2 else s.replace(" ", "\n  ", 3) for i, s in enumerate(sentences)
    )
  )
  return path, sentences


class TestFiles:
  def test_sentences_follow_each_other(self, prose):
    """From a random place on, one after the other, round and round."""
    path, sentences = prose
    size, firsts = len(path.read_bytes()), set()
    for i in range(60):
      read = haystack.from_file(Draws(i), str(path))
      read = [next(read).decode() for _ in range(150)]
      # The place lies in the sentence before, or before the first of all.
      before = path.read_bytes().split(b"Nr")
      at = Draws(i).below(size)
      begin = [sum(len(b) + 2 for b in before[: n + 1]) - 2 for n in range(60)]
      first = sum(b < at for b in begin) % 60
      assert read == (sentences * 4)[first : first + 150]
      firsts.add(first)
    assert len(firsts) > 25

  def test_long_file(self, tmp_path):
    """Sentences across the borders of what is read at a time stay whole."""
    path = tmp_path / "long.txt"
    said = [f"Sentence number {i} of the very long file." for i in range(9000)]
    path.write_text(" ".join(said))
    read = haystack.from_file(Draws(3), str(path))
    read = [next(read).decode() for _ in range(18_000)]
    first = said.index(read[0])
    assert read == (said * 3)[first : first + 18_000]

  def test_short_sentences_are_passed_over(self, tmp_path):
    path = tmp_path / "file"
    path.write_text("One two. This sentence has five words. Three. ")
    read = haystack.from_file(Draws(0), str(path), 4)
    assert {next(read) for _ in range(5)} == {b"This sentence has five words."}
    with pytest.raises(ValueError, match="no sentence of at least 6 words"):
      next(haystack.from_file(Draws(0), str(path), 6))

  def test_empty_file(self, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="Needles: '.*file' is empty"):
      tasks.make("ruler_niah_single_2", path=path)
    with pytest.raises(ValueError, match="BabiLong: .* is not a file"):
      tasks.make("babilong_qa1", path=tmp_path)

  def test_changed_file_is_read_anew(self, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"Old words come first. " * 9)
    assert (
      next(haystack.from_file(Draws(0), str(path))) == b"Old words come first."
    )
    path.write_bytes(b"New words come later. " * 10)
    assert (
      next(haystack.from_file(Draws(0), str(path))) == b"New words come later."
    )

  def test_generated_text(self):
    read = haystack.generated(Draws(0))
    sentences = [next(read).decode() for _ in range(2000)]
    assert len(set(sentences)) > 1950 and max(map(len, sentences)) <= 128
    seen = {w for s in sentences for w in re.findall("[a-z]+|[.,]", s.lower())}
    assert seen == set(haystack.words())
    assert all(re.fullmatch(r"[A-Z][a-z ,]+\.", s) for s in sentences)
    assert all(len(s.split()) >= 10 for s in sentences)
    # Nothing that a story tells of can be read out of it.
    named = {
      *babi_world.answers(1),
      *babi_world.answers(5),
      "daniel",
      "john",
      "sandra",
    }
    assert not seen & {word.lower() for word in named}


class TestVariables:
  @pytest.mark.parametrize("where", ["noise", "text"])
  def test_against_a_closure(self, where):
    """All variables that reach the value, whatever the order of reading."""
    task = tasks.make("ruler_vt", num_chains=3, haystack=where, length=2500)
    batch = task.batch(0, 0, 20)
    for row, text in enumerate(texts(batch)):
      value = re.search(r"assigned the value (\d+)", text)[1]
      said = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
      assert len(said) == 15 and len({a for a, _ in said}) == 15
      reached = {value}
      for _ in said:
        reached |= {a for a, b in said if b in reached}
      answer = text[text.rindex(": ") + 2 :].split()
      assert set(answer) == reached - {value} and len(answer) == 5
      assert asked(batch, row) == "".join(answer)
      assert all(re.fullmatch("[A-Z]{5}", name) for name in answer)
      # A variable is assigned before it is read; so chains are in order.
      known = set()
      for a, b in said:
        assert b.isdigit() or b in known
        known.add(a)
      assert len({b for _, b in said if b.isdigit()}) == 3

  def test_wording(self):
    text = texts(tasks.make("ruler_vt").batch(0, 0, 1))[0]
    value = re.search(r"VAR [A-Z]{5} = (\d{5})\n", text)[1]
    intro, rest = text.split("\n\n")
    assert (
      intro
      == "Memorize and track the chain(s) of variable assignment hidden in the following text."
    )
    answer = " ".join(re.findall(r"VAR ([A-Z]+) =", rest))
    assert rest.endswith(
      f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer:"
      " According to the chain(s) of variable assignment in the text above, 5 variables are assigned"
      f" the value {value}, they are: {answer}"
    )

  @pytest.mark.parametrize("bad, message", [
    (dict(length=500), "VariableTracking: length must be at least"),
    (dict(letters=1, num_chains=6), "30 variables of 1 letters"),
    (dict(digits=1, num_chains=10), "10 values of 1 digits"),
    (dict(haystack="needles"), "unknown haystack of VariableTracking"),
    (dict(num_hops=0), "num_hops must be an integer, 1 or more"),
  ])  # fmt: skip
  def test_bad_input(self, bad, message):
    with pytest.raises(ValueError, match=message):
      tasks.make("ruler_vt", **bad)


class TestCountedWords:
  @pytest.mark.parametrize("name, common, others", [
    ("ruler_cwe", 30, 3), ("ruler_cwe_short", 6, 1), ("ruler_cwe_small", 4, 1),
  ])  # fmt: skip
  def test_common_words(self, name, common, others):
    batch = tasks.make(name).batch(0, 0, 6)
    for row, text in enumerate(texts(batch)):
      if name == "ruler_cwe_small":
        listed, answer = text.split("\nMost: ")
        said, answer = listed.split(), answer.split()
      else:
        intro, listed, answer = text.split("\n")
        assert intro.startswith("Below is a numbered list of words. In these")
        listed = re.findall(r"(\d+)\. (\S+)", listed)
        said = [word for _, word in listed]
        assert [int(n) for n, _ in listed] == list(range(1, len(said) + 1))
        question, answer = answer.split(" in the list are: ")
        assert question == (
          "Question: What are the 10 most common words in the above list? Answer: The top 10 words"
          " that appear most often"
        )
        answer = re.findall(r"(\d+)\. (\S+)", answer)
        assert [int(n) for n, _ in answer] == list(range(1, 11))
        answer = [word for _, word in answer]
      counts = collections.Counter(said)
      assert {counts.pop(word) for word in answer} == {common}
      assert set(counts.values()) == {others}
      assert [said.index(w) for w in answer] == sorted(
        said.index(w) for w in answer
      )
      assert asked(batch, row) == "".join(answer)
      # As many as fit: another of the shortest words would be too much.
      assert len(text) > batch.inputs.shape[1] - 35 * others

  @pytest.mark.parametrize("length", [1500, 4096])
  def test_frequent_words(self, length):
    """Counts of some N by the zeta law, and no larger N would fit."""
    task = tasks.make("ruler_fwe", length=length)
    law = [6 / math.pi**2 / k**2 for k in range(1, length // 50 + 1)]
    batch = task.batch(0, 0, 4)
    for row, text in enumerate(texts(batch)):
      listed = text[text.index("coded words. ") + 13 : text.index("\nQuestion")]
      counts = collections.Counter(listed.split())
      answer = text[text.rindex("are:") + 5 :].split()
      assert [w for w, _ in counts.most_common(4)] == ["...", *answer]
      assert asked(batch, row) == "".join(answer)
      assert all(re.fullmatch(r"[a-z]{6}|\.\.\.", word) for word in counts)
      found = sorted(counts.values(), reverse=True)
      (n,) = {
        n
        for n in range(2000)
        if [int(n * p) for p in law if n * p >= 1] == found
        and [int((n + 1) * p) for p in law if (n + 1) * p >= 1] != found
      }
      more = [int((n + 1) * p) - int(n * p) for p in law]
      assert (
        len(text) + sum(m * (4 if i == 0 else 7) for i, m in enumerate(more))
        > length
      )
      assert len(text) <= length

  @pytest.mark.parametrize("bad, message", [
    (dict(name="ruler_cwe", length=999), "CommonWords: length must be at least"),
    (dict(name="ruler_cwe", freq_common=3), "freq_common must be an integer, 4 or more; got 3"),
    (dict(name="ruler_fwe", length=500), "length 500 is too short for ranks 2 to 5 to differ"),
    (dict(name="ruler_fwe", alpha=1.0), "alpha must be above 1; got 1.0"),
    (dict(name="ruler_fwe", letters=1), "81 words need more than 1 letters"),
  ])  # fmt: skip
  def test_bad_input(self, bad, message):
    with pytest.raises(ValueError, match=message):
      tasks.make(**bad)


PLACES = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}


class Reader:
  """Reads a story forwards, keeps what must be true, and checks that it can."""

  def __init__(self):
    self.at, self.lies, self.holder, self.trail = {}, {}, {}, {}
    self.gifts = []

  def place(self, thing):
    """Where a thing must be; None if it may be anywhere."""
    holder = self.holder.get(thing)
    return self.at.get(holder) if holder else self.lies.get(thing)

  def meet(self, one, other):
    """Two people, or a person and a thing's place, are together."""
    assert not one or not other or one == other
    return one or other

  def fact(self, fact):
    words = fact.rstrip(".").removesuffix(" there").split()
    who, rest = words[0], " ".join(words[1:])
    if match := re.fullmatch(
      r"(?:moved|journeyed|travelled|went|went back) to the (\w+)", rest
    ):
      assert match[1] in PLACES and self.at.get(who) != match[1]
      self.at[who] = match[1]
    elif match := re.fullmatch(
      r"(?:got|grabbed|took|picked up) the (\w+)", rest
    ):
      assert not self.holder.get(match[1])
      where = self.meet(self.at.get(who), self.lies.get(match[1]))
      self.holder[match[1]] = who
      if where:
        self.at[who] = where
    elif match := re.fullmatch(
      r"(?:dropped|left|discarded|put down) the (\w+)", rest
    ):
      assert self.holder[match[1]] == who
      self.holder[match[1]], self.lies[match[1]] = None, self.at.get(who)
    elif match := re.fullmatch(
      r"(?:gave|handed|passed) the (\w+) to (\w+)", rest
    ):
      thing, to = match.groups()
      assert self.holder[thing] == who != to
      where = self.meet(self.at.get(who), self.at.get(to))
      if where:
        self.at[who] = self.at[to] = where
      self.holder[thing] = to
      self.gifts.append((who, thing, to))
    else:
      raise AssertionError(fact)
    for thing in ("apple", "football", "milk"):
      place, trail = self.place(thing), self.trail.setdefault(thing, [])
      if place and trail[-1:] != [place]:
        trail.append(place)

  def answer(self, question):
    words = question.rstrip("?").split()
    if words[:2] == ["Where", "was"]:
      came = [
        (a, b) for a, b in zip(self.trail[words[3]], self.trail[words[3]][1:])
      ]
      return [a for a, b in came if b == words[-1]][-1]
    if words[:3] == ["Where", "is", "the"]:
      return self.place(words[3])
    if words[0] == "Where":
      return self.at[words[2]]
    # The last gift of which the question says nothing wrong.
    for who, thing, to in reversed(self.gifts):
      forms = {
        f"What did {who} give to {to}?": thing,
        f"Who gave the {thing} to {to}?": who,
        f"Who did {who} give the {thing} to?": to,
        f"Who gave the {thing}?": who,
        f"Who received the {thing}?": to,
      }
      if question in forms:
        return forms[question]
    raise AssertionError(question)


def on_a_map(story):
  """All answers to question 4 that some map with the facts gives."""
  step = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
  at = {}
  facts = [
    re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", f).groups()
    for f in story.facts
  ]
  (middle,) = {facts[0][0], facts[0][2]} & {facts[1][0], facts[1][2]}
  at[middle] = (0, 0)
  for a, way, b in facts:
    dx, dy = step[way]
    if b == middle:
      at[a] = (dx, dy)
    else:
      at[b] = (-dx, -dy)
  assert len(at) == len(set(at.values())) == 3
  if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", story.question):
    way, place = match.groups()
    offset = step[way]
  else:
    place, way = re.fullmatch(
      r"What is the (\w+) (\w+) of\?", story.question
    ).groups()
    offset = tuple(-x for x in step[way])
  wanted = tuple(x + y for x, y in zip(at[place], offset))
  return [name for name, where in at.items() if where == wanted]


class TestBabi:
  @pytest.mark.parametrize("question", [1, 2, 3, 5])
  def test_against_a_second_reading(self, question):
    """A forward reader with the rules of the world finds the same answer."""
    most = min(babi_world.FACTS[question], 40)
    sizes = set()
    for i in range(400):
      story = babi_world.tell(question, Draws(9, question, i), most)
      reader = Reader()
      for fact in story.facts:
        reader.fact(fact)
      assert reader.answer(story.question) == story.answer, story
      sizes.add(len(story.facts))
    assert max(sizes) <= most
    if question == 1:
      assert sizes == {2, 4, 6, 8, 10}
    else:
      assert len(sizes) > 20 and min(sizes) in (2, 3)

  def test_directions_against_a_map(self):
    forms = collections.Counter()
    for i in range(400):
      story = babi_world.tell(4, Draws(9, 4, i), 2)
      assert on_a_map(story) == [story.answer]
      forms[re.sub(r"the \w+", "the P", story.question)] += 1
    # Four directions, asked for in two ways.
    assert len(forms) == 8 and min(forms.values()) > 25

  @pytest.mark.parametrize("question", BABI)
  def test_all_answers_come(self, question):
    most = min(babi_world.FACTS[question], 20)
    stories = [
      babi_world.tell(question, Draws(8, question, i), most) for i in range(300)
    ]
    counts = collections.Counter(story.answer for story in stories)
    assert set(counts) == set(babi_world.answers(question))
    if question < 5:
      assert max(counts.values()) < 2 * min(counts.values())
    said = {
      w
      for s in stories
      for w in re.findall(
        "[a-z]+|[.?]", " ".join([*s.facts, s.question]).lower()
      )
    }
    assert said | {s.answer.lower() for s in stories} <= set(babi_world.words())

  def test_every_verb_comes(self):
    said = " ".join(
      f
      for q in BABI
      for i in range(60)
      for f in babi_world.tell(q, Draws(q, i), 30).facts
    )
    verbs = """travelled to;went to;went back to;moved to;journeyed to;got;took;grabbed;picked up;left;
      dropped;discarded;put down;gave;handed;passed;north of;south of;east of;west of""".split(
      ";"
    )
    for verb in verbs:
      assert re.search(rf"\b{verb.strip()} the\b", said), verb
    assert re.search("the milk there\\.", said) and re.search(
      "the milk\\.", said
    )

  @pytest.mark.parametrize("question", BABI)
  def test_length_is_enough_and_tight(self, question):
    """Nothing is longer than what the limits of the facts count on."""
    found = dict(words=[set(), set()], bytes=[set(), set()])
    for i in range(300):
      story = babi_world.tell(question, Draws(7, i), 40)
      facts, ask = " ".join(story.facts), f"{story.question} {story.answer}"
      found["bytes"][0] |= {len(fact) + 1 for fact in story.facts}
      found["bytes"][1].add(len(ask))
      facts = re.sub(r"\.", " .", facts).split(" . ")
      found["words"][0] |= {
        len(fact.rstrip(" .").split()) + 1 for fact in facts
      }
      found["words"][1].add(len(ask.replace("?", " ?").split()))
    for tokens, limits in babi._LONGEST.items():
      for sizes, limit in zip(found[tokens], limits[question]):
        assert limit - 2 * (tokens == "bytes") <= max(sizes) <= limit

  @pytest.mark.parametrize("question", BABI)
  def test_words_and_bytes_tell_the_same(self, question):
    words = tasks.make(
      f"babi_qa{question}_small", max_facts=5 if question != 4 else 2, length=80
    )
    spelt = tasks.make(
      f"babi_qa{question}_small",
      max_facts=words.max_facts,
      length=300,
      tokens="bytes",
    )
    one = texts(words.batch(2, 0, 10), words.vocabulary)
    other = texts(spelt.batch(2, 0, 10))
    assert [
      " ".join(re.findall("[a-z]+|[.?]", t.lower())) for t in other
    ] == one
    assert words.num_outputs == words.vocab_size == len(words.vocabulary) < 64
    assert (
      spelt.num_outputs == spelt.vocab_size == 256 and spelt.vocabulary == ()
    )

  def test_presets(self):
    for question, facts in zip(BABI, (10, 68, 32, 2, 126)):
      task = tasks.make(f"babi_qa{question}")
      assert (task.question, task.tokens, task.num_train, task.num_test) == (
        question,
        "words",
        10_000,
        1000,
      )
      fact, rest = babi._LONGEST["words"][question]
      assert task.length == facts * fact + rest
    assert (
      tasks.make("babi_qa1").chance == 1 / 6
      and tasks.make("babi_qa5").chance == 1 / 7
    )

  @pytest.mark.parametrize("bad, message", [
    (dict(name="babi_qa1", question=6), "Babi: question must be an integer, 1 to 5; got 6"),
    (dict(name="babi_qa1", tokens="letters"), "unknown tokens of Babi: 'letters'"),
    (dict(name="babi_qa2", max_facts=2), "max_facts must be an integer, 3 or more; got 2"),
    (dict(name="babi_qa2", length=20), "length must be at least 27 words for 3 facts; got 20"),
    (dict(name="babilong_qa1", length=90), "BabiLong: length must be at least 93 bytes for 2 facts; got 90"),
    (dict(name="babilong_qa1", tokens="words", path=__file__), "tokens 'words' are for the generated"),
    (dict(name="babilong_qa1", path="/nowhere/at/all"), "BabiLong: there is no file"),
  ])  # fmt: skip
  def test_bad_input(self, bad, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      tasks.make(**bad)


FACT = re.compile(
  r"(?:Mary|John|Sandra|Daniel|Bill|Fred|Jeff) (?:[a-z]+ )+?the (?:apple|football|milk|"
  + "|".join(PLACES)
  + r")(?: there| to [A-Z][a-z]+)?\. |The \w+ is \w+ of the \w+\. "
)


class TestBabiLong:
  @pytest.mark.parametrize("question", BABI)
  def test_facts_keep_their_order_in_a_file(self, question, prose):
    """Without its facts, a row is the file, word for word, from a place on."""
    path, sentences = prose
    whole = " ".join(sentences * 3) + " "
    task = tasks.make(
      f"babilong_qa{question}", path=path, length=2000, max_facts=8
    )
    batch = task.batch(4, 0, 12)
    assert batch.mask.all()
    for text in texts(batch):
      facts = [fact[:-1] for fact in FACT.findall(text)]
      assert 2 <= len(facts) <= 8
      rest = FACT.sub("", text)
      background, ask = re.match(r"(.*?)((?:Where|What|Who) .*)", rest).groups()
      # The last sentence may be cut; its last symbol is then a space.
      assert background[:-1] in whole and background.startswith("Nr")
      asks, answer = ask.split("? ")
      story = babi_world.Story(facts, asks + "?", answer)
      if question == 4:
        assert on_a_map(story) == [answer]
        continue
      reader = Reader()
      for fact in facts:
        reader.fact(fact)
      assert reader.answer(story.question) == answer

  def test_places_are_uniform(self):
    """Of n + 1 places each is as likely as another, for each fact."""
    task = tasks.make("babilong_qa4", length=700)
    places = []
    for text in texts(task.batch(0, 0, 400)):
      at = [m.start() for m in FACT.finditer(text)]
      ends = [m.start() for m in re.finditer(r"\. [A-Z]", FACT.sub("", text))]
      before = [
        len(re.findall(r"\. ", FACT.sub("", text[: a + 1]))) for a in at
      ]
      assert len(at) == 2 and before == sorted(before)
      places += [b / (len(ends) + 1) for b in before]
    first, second = places[::2], places[1::2]
    # Of two uniform numbers the lower is a third on average.
    assert np.mean(first) == pytest.approx(1 / 3, abs=0.05)
    assert np.mean(second) == pytest.approx(2 / 3, abs=0.05)
    assert min(places) == 0 and max(places) > 0.99

  @pytest.mark.parametrize("length", [64, 96, 513])
  def test_words_fill_the_row(self, length):
    task = tasks.make("babilong_qa2_small", length=length)
    batch = task.batch(0, 0, 8)
    assert batch.mask.all() and (batch.weights.sum(1) == 1).all()
    assert (batch.weights[:, -2] == 1).all()
    # The tokens of the stories are those of `babi_qa2`.
    story = tasks.make("babi_qa2").vocabulary
    assert (
      task.vocabulary[: len(story)] == story == babilong._WORDS[: len(story)]
    )
    assert batch.targets[:, -2].max() < len(story)
