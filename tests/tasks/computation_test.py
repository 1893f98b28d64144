"""Tasks of computation: the Chomsky hierarchy, groups, sums, brackets."""

import collections
import itertools
import math
import statistics

import numpy as np
import pytest
import task_checks

from memzoo import tasks
from memzoo.tasks import (  # noqa: F401  (they register their presets)
  chomsky_binary,
  chomsky_brackets,
  chomsky_context_free,
  chomsky_context_sensitive,
  chomsky_regular,
  dyck,
  listops,
  modular_sum,
  word_problem,
)

# The largest length up to which all strings are listed, for each task.
LISTED = {
  "even_pairs": 4, "parity_check": 4, "cycle_navigation": 4,
  "modular_arithmetic": 4, "stack_manipulation": 4, "reverse_string": 4,
  "modular_arithmetic_brackets": 6, "solve_equation": 7,
  "duplicate_string": 4, "missing_duplicate_string": 5, "odds_first": 5,
  "binary_addition": 5, "binary_multiplication": 5, "compute_sqrt": 5,
  "bucket_sort": 3,
}  # fmt: skip
# Tasks that are checked at longer strings, too.
LONG = {
  "modular_arithmetic_brackets": 13, "solve_equation": 13,
  "binary_addition": 17, "binary_multiplication": 17, "compute_sqrt": 17,
}  # fmt: skip

CASES = {
  f"chomsky_{name}": dict(
    name=f"chomsky_{name}_small",
    max_length=LONG.get(name, LISTED[name]),
    computation_steps=2 if name == "reverse_string" else 0,
  )
  for name in LISTED
} | {
  "word_problem": dict(name="word_problem_small", length=12),
  "modular_sum": dict(name="parity_grazzi", modulus=3),
  "dyck": dict(name="dyck_small", types=2, depth=2, min_length=3, max_length=9),
  "listops": dict(name="listops_small"),
}
test_contract = task_checks.contract_test(CASES)


def sample(task, batches):
  """Rows of a task, in batches of the size that the contract compiles."""
  parts = [task.batch(0, step, 8) for step in range(batches)]
  return [
    None if field[0] is None else np.concatenate(field) for field in zip(*parts)
  ]


def check_law(found, law):
  """Found outcomes are those of the law, as often as it says (chi-squared)."""
  assert abs(sum(law.values()) - 1) < 1e-9
  count = collections.Counter(found)
  total = sum(count.values())
  assert set(count) <= set(law)
  chi2 = sum((count[x] - total * p) ** 2 / (total * p) for x, p in law.items())
  freedom = max(len(law) - 1, 1)
  assert chi2 < freedom + 6 * math.sqrt(2 * freedom)


# All strings of length n with their answers, written from the definitions; as
# texts, so that Python's own arithmetic gives the answers.
ALPHABET = {
  "modular_arithmetic": "01234+-*", "solve_equation": "01234+-()x=",
  "modular_arithmetic_brackets": "01234+-*()",
}  # fmt: skip


def words(alphabet, n):
  return ["".join(word) for word in itertools.product(alphabet, repeat=n)]


def uniform(strings, answer):
  return {(s, answer(s)): 1 / len(strings) for s in strings}


def grammar(n, operators):
  """{expression of length n: probability}."""
  if n < 5:
    shape = {1: "d", 2: "-d", 3: "(d)", 4: "(-d)"}[n]
    return {shape.replace("d", d): 1 / 5 for d in "01234"}
  law = {}
  for left in range(1, n - 3):
    for (a, p), (b, q) in itertools.product(
      grammar(left, operators).items(), grammar(n - 3 - left, operators).items()
    ):
      for o in operators:
        law[f"({a}{o}{b})"] = p * q / (n - 4) / len(operators)
  return law


def stack_law(n):
  law = collections.Counter()
  for given in range(1, max(n, 2)):
    for bits in words("01", given):
      for actions in words("234", n - given):
        stack = bits
        for action in actions:
          stack = stack[:-1] if action == "2" else stack + str(int(action) - 3)
        share = 1 / max(n - 1, 1) / 2**given / 3 ** (n - given)
        law[bits + actions, stack[::-1] + "2"] += share
  return law


def equation_law(n):
  if n < 3:
    return {("0" * n, "0"): 1.0}
  law = collections.Counter()
  for text, p in grammar(n - 2, "+-").items():
    value = eval(text) % 5
    for place in range(n - 2):
      hidden = next(
        i % (n - 2) for i in range(place, 2 * n) if text[i % (n - 2)].isdigit()
      )
      string = f"{text[:hidden]}x{text[hidden + 1 :]}={value}"
      law[string, text[hidden]] += p / (n - 2)
  return law


def binary_law(n, operation):
  law = collections.Counter()
  if n <= 2:
    for a in range(2**n - 1):
      string = f"{a:0{n}b}"[::-1]
      answer = f"{a:b}"[::-1] if operation == "+" else "0" * (n - 1)
      law[string, answer + "2"] = 1 / (2**n - 1)
    return law
  for size in range(1, n - 1):
    other = n - 1 - size
    pairs = itertools.product(range(1, 2**size), range(1, 2**other))
    for a, b in pairs:
      result = a + b if operation == "+" else a * b
      string = f"{a:0{size}b}"[::-1] + "2" + f"{b:0{other}b}"[::-1]
      share = 1 / (n - 2) / (2**size - 1) / (2**other - 1)
      law[string, f"{result:b}"[::-1] + "2"] += share
  return law


def missing_law(n):
  if n == 1:
    return {("1", "1"): 1.0}
  law = collections.Counter()
  for half in words("01", n // 2):
    twice = half + half
    for hole, bit in enumerate(twice):
      string = twice[:hole] + "2" + twice[hole + 1 :] + "3" * (n % 2)
      law[string, bit] += 1 / 2 ** (n // 2) / len(twice)
  return law


def arithmetic_law(n):
  n -= 1 - n % 2
  strings = [
    "".join(s)
    for s in itertools.product(
      *["01234" if i % 2 == 0 else "+-*" for i in range(n)]
    )
  ]
  return uniform(strings, lambda s: str(eval(s) % 5))


LAWS = {
  "even_pairs": lambda n: uniform(
    words("01", n),
    lambda s: str(sum(s[i : i + 2] in ("01", "10") for i in range(n)) % 2),
  ),
  "parity_check": lambda n: uniform(
    words("01", n), lambda s: str(s.count("1") % 2)
  ),
  "cycle_navigation": lambda n: uniform(
    words("012", n), lambda s: str((s.count("2") - s.count("0")) % 5)
  ),
  "modular_arithmetic": arithmetic_law,
  "stack_manipulation": stack_law,
  "reverse_string": lambda n: uniform(
    words("01", n), lambda s: "".join(reversed(s))
  ),
  "modular_arithmetic_brackets": lambda n: {
    (s, str(eval(s) % 5)): p for s, p in grammar(n, "+-*").items()
  },
  "solve_equation": equation_law,
  "duplicate_string": lambda n: uniform(words("01", n), lambda s: 2 * s),
  "missing_duplicate_string": missing_law,
  "odds_first": lambda n: uniform(
    words("01", n),
    lambda s: "".join(s[i] for i in sorted(range(n), key=lambda i: i % 2)),
  ),
  "binary_addition": lambda n: binary_law(n, "+"),
  "binary_multiplication": lambda n: binary_law(n, "*"),
  "compute_sqrt": lambda n: {
    (f"{x:0{n}b}", f"{math.isqrt(x):0{(n + 1) // 2}b}"): 1 / (2**n - 1)
    for x in range(1, 2**n)
  },
  "bucket_sort": lambda n: uniform(
    words("01234", n), lambda s: "".join(sorted(s))
  ),
}
TAPE = {
  "stack_manipulation": lambda n: n + 1, "reverse_string": lambda n: n,
  "duplicate_string": lambda n: 2 * n, "odds_first": lambda n: n,
  "bucket_sort": lambda n: n, "binary_addition": lambda n: n + 1,
  "binary_multiplication": lambda n: n,
  "compute_sqrt": lambda n: math.ceil(n / 2),
}  # fmt: skip


def texts(name, task, rows):
  """(string, answer) of each row, after a check of its layout."""
  alphabet = ALPHABET.get(name, "01234"[: task.symbols])
  assert task.symbols == len(alphabet)
  tape = TAPE.get(name, lambda n: 1)
  factor = 1 + task.computation_steps
  assert task.length == factor * task.max_length + tape(task.max_length)
  inputs, targets, weights, reset, mask = rows
  assert reset is None
  found = []
  for tokens, target, weight, here in zip(inputs, targets, weights, mask):
    n = int((tokens >= len(alphabet)).argmax())
    end = factor * n + tape(n)
    assert here[:end].all() and not here[end:].any()
    assert not tokens[end:].any()
    assert (tokens[n : factor * n] == len(alphabet)).all()
    assert (tokens[factor * n : end] == task.vocab_size - 1).all()
    asked = np.flatnonzero(weight)
    first = factor * n
    np.testing.assert_array_equal(asked, np.arange(first, first + len(asked)))
    assert asked[-1] < end
    np.testing.assert_allclose(weight[asked], 1 / len(asked), rtol=1e-6)
    string = "".join(alphabet[token] for token in tokens[:n])
    found.append((string, "".join(map(str, target[asked]))))
  return found


class TestChomsky:
  @pytest.mark.parametrize("name", LISTED)
  def test_law(self, name):
    """Short strings come as the definition says, with its answers; longer ones
    have the right answers."""
    task = tasks.make(**CASES[f"chomsky_{name}"])
    found = texts(name, task, sample(task, 800 if name in LONG else 200))
    longest = LISTED[name]
    law = collections.Counter()
    for n in range(1, longest + 1):
      for outcome, share in LAWS[name](n).items():
        law[outcome] += share / longest
    check_law([x for x in found if len(x[0]) <= longest], law)
    lengths = collections.Counter(len(string) for string, _ in found)
    if name != "modular_arithmetic":
      every = range(1, task.max_length + 1)
      check_law(lengths.elements(), {n: 1 / len(every) for n in every})
    for string, answer in found:
      if len(string) > longest:
        self.check_long(name, string, answer)

  @staticmethod
  def check_long(name, string, answer):
    if name == "modular_arithmetic_brackets":
      assert eval(string) % 5 == int(answer)
    elif name == "solve_equation":
      text, value = string.split("=")
      solutions = [
        x for x in "01234" if eval(text.replace("x", x)) % 5 == int(value)
      ]
      assert solutions == [answer]
    elif name == "compute_sqrt":
      root = math.isqrt(int(string, 2))
      assert answer == f"{root:0{(len(string) + 1) // 2}b}"
    else:
      a, b = (int(part[::-1], 2) for part in string.split("2"))
      result = a + b if name == "binary_addition" else a * b
      assert a and b and answer == f"{result:b}"[::-1] + "2"

  @pytest.mark.parametrize("name", LISTED)
  def test_presets(self, name):
    paper, small = (tasks.make(f"chomsky_{name}{s}") for s in ("", "_small"))
    assert (paper.min_length, paper.max_length) == (1, 40)
    assert (small.min_length, small.max_length) == (1, 16)
    test = tasks.make(f"chomsky_{name}", min_length=41, max_length=500)
    assert test.vocab_size == paper.vocab_size
    assert test.length == 500 + TAPE.get(name, lambda n: 1)(500)


class TestWordProblem:
  @pytest.mark.parametrize(
    "group, orders",
    [
      ("s3", {1: 1, 2: 3, 3: 2}),
      ("a5", {1: 1, 2: 15, 3: 20, 5: 24}),
      ("a4xz5", {1: 1, 2: 3, 3: 8, 5: 4, 10: 12, 15: 32}),
      ("z60", {d: sum(math.gcd(d, i) == 1 for i in range(d)) for d in range(1, 61) if 60 % d == 0}),
      ("s5", {1: 1, 2: 25, 3: 20, 4: 30, 5: 24, 6: 20}),
    ],
  )  # fmt: skip
  def test_group(self, group, orders):
    """The product is that of the group: axioms, and orders of its elements."""
    table = word_problem._table(group)
    size = sum(orders.values())
    every = np.arange(size)
    assert table.shape == (size, size)
    np.testing.assert_array_equal(table[0], every)
    np.testing.assert_array_equal(table[:, 0], every)
    np.testing.assert_array_equal(np.sort(table), np.tile(every, (size, 1)))
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 2000))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    found, power, step = np.zeros(size, int), every, 1
    while not found.all():
      found[(power == 0) & (found == 0)] = step
      power, step = table[power, every], step + 1
    assert collections.Counter(found.tolist()) == orders
    assert (table == table.T).all() == (group == "z60")

  def test_numbering(self):
    i, j = np.ogrid[:60, :60]
    np.testing.assert_array_equal(word_problem._table("z60"), (i + j) % 60)
    table = word_problem._table("a4xz5")
    np.testing.assert_array_equal(table % 5, (i + j) % 5)
    np.testing.assert_array_equal(
      table // 5, word_problem._table("a4")[i // 5, j // 5]
    )
    # In S3, with points 0 1 2: number 1 swaps 1 and 2, number 2 swaps 0 and 1;
    # first the one, then the other takes 0 to 1, 1 to 2 and 2 to 0: number 3.
    assert word_problem.elements("s3")[3] == (1, 2, 0)
    assert word_problem._table("s3")[1, 2] == 3

  def test_rows(self):
    task = tasks.make(**CASES["word_problem"])
    inputs, targets, weights, *rest = sample(task, 100)
    assert rest == [None, None] and (weights == 1).all()
    check_law(inputs.ravel().tolist(), {i: 1 / 6 for i in range(6)})
    multiply = word_problem._table("s3").tolist()
    for word, products in zip(inputs.tolist(), targets.tolist()):
      assert products == list(
        itertools.accumulate(word, lambda a, b: multiply[a][b])
      )

  def test_presets(self):
    for name, group, size, length, rows in [
      ("z60_merrill", "z60", 60, 20, 1_000_000),
      ("a4xz5_merrill", "a4xz5", 60, 20, 1_000_000),
      ("a5_merrill", "a5", 60, 20, 1_000_000),
      ("s3_deltaproduct", "s3", 6, 128, 100_000),
      ("s4_deltaproduct", "s4", 24, 128, 100_000),
      ("a5_deltaproduct", "a5", 60, 128, 100_000),
      ("s5_deltaproduct", "s5", 120, 128, 100_000),
    ]:
      task = tasks.make(f"word_problem_{name}")
      assert (task.group, task.vocab_size, task.length) == (group, size, length)
      assert task.num_train == rows and task.num_outputs == size
    assert tasks.make("word_problem_s5_deltaproduct", length=512).length == 512


class TestModularSum:
  def test_every_step(self):
    task = tasks.make("modular_counting_small")
    inputs, targets, weights, _, mask = sample(task, 25)
    assert mask.all() and (weights == 1).all() and inputs.shape == (200, 32)
    np.testing.assert_array_equal(targets, np.cumsum(inputs, 1) % 5)
    check_law(inputs.ravel().tolist(), {i: 0.2 for i in range(5)})

  def test_last_step(self):
    task = tasks.make(**CASES["modular_sum"])
    inputs, targets, weights, _, mask = sample(task, 100)
    n = mask.sum(1)
    np.testing.assert_array_equal(mask, np.arange(39) < n[:, None])
    assert not inputs[~mask].any()
    check_law(n.tolist(), {i: 1 / 38 for i in range(2, 40)})
    np.testing.assert_array_equal(weights, np.arange(39) == n[:, None] - 1)
    last = targets[np.arange(len(n)), n - 1]
    np.testing.assert_array_equal(last, inputs.sum(1) % 3)
    check_law(inputs[mask].tolist(), {i: 1 / 3 for i in range(3)})

  def test_presets(self):
    paper = tasks.make("parity_grazzi")
    assert (paper.modulus, paper.asked, paper.length) == (2, "last", 39)
    test = tasks.make("parity_grazzi", min_length=39, max_length=255)
    assert test.length == 255
    small = tasks.make("parity_small")
    assert (small.modulus, small.asked, small.min_length) == (2, "every", 32)


class TestDyck:
  @staticmethod
  def strings(least, most, text="", stack="", share=1.0):
    """(string, probability) of the automaton, k = m = 2, if it ends in time."""
    if len(text) >= most:
      return
    moves = collections.Counter()
    if len(stack) < 2:
      moves.update({x: 0.25 for x in "ab"})
    if stack:
      moves[stack[-1].upper()] = 0.5
    elif len(text) >= least:
      yield text, share / 2
    total = sum(moves.values()) + (
      0.5 if not stack and len(text) >= least else 0
    )
    for x, p in moves.items():
      after = stack[:-1] if x.isupper() else stack + x
      yield from TestDyck.strings(
        least, most, text + x, after, share * p / total
      )

  def test_law(self):
    """Rejected strings, in the reference, are what the law leaves out."""
    law = dict(self.strings(3, 9))
    assert {len(text) for text in law} == {4, 6, 8}
    total = sum(law.values())
    law = {text: share / total for text, share in law.items()}
    task = tasks.make(**CASES["dyck"])
    assert task.length == 8
    inputs, targets, weights, _, mask = sample(task, 400)
    n = mask.sum(1)
    np.testing.assert_array_equal(mask, np.arange(8) < n[:, None])
    assert not inputs[~mask].any() and not weights[~mask].any()
    found = ["".join("abAB"[t] for t in row[:m]) for row, m in zip(inputs, n)]
    check_law(found, law)
    for text, target, weight in zip(found, targets, weights):
      for t in range(len(text)):
        open_brackets = text[: t + 1]
        while "aA" in open_brackets or "bB" in open_brackets:
          open_brackets = open_brackets.replace("aA", "").replace("bB", "")
        assert weight[t] == bool(open_brackets)
        if open_brackets:
          assert "ab"[target[t]] == open_brackets[-1]

  def test_presets(self):
    for k, (m, most) in itertools.product((2, 8, 32, 128), ((3, 84), (5, 180))):
      task = tasks.make(f"dyck_hewitt_k{k}_m{m}")
      assert (task.types, task.depth, task.max_length) == (k, m, most)
      assert task.min_length == 1 and task.vocab_size == 2 * k


class TestListOps:
  def test_grammar(self):
    """Rows are trees within the limits; their values by another reading."""
    task = tasks.make(**CASES["listops"])
    inputs, targets, weights, _, mask = sample(task, 50)
    name = {10: "min", 11: "max", 12: "med", 13: "sm"}
    evaluate = {
      "min": lambda *x: min(x), "max": lambda *x: max(x),
      "med": lambda *x: int(statistics.median(x)), "sm": lambda *x: sum(x) % 10,
    }  # fmt: skip
    assert (weights == 1).all() and task.length == 64
    operands, digits, operations = [], [], []
    for row, target, here in zip(inputs, targets, mask):
      n = int(here.sum())
      assert 8 < n < 65 and here[:n].all() and (row[n:] == 15).all()
      assert (row[:n] < 15).all()
      words = [
        f"{name[t]}(" if t in name else ")," if t == 14 else f"{t},"
        for t in row[:n].tolist()
      ]
      assert eval("".join(words), evaluate)[0] == target
      depth, open_lists = 0, []
      for token in row[:n].tolist():
        if token == 14:
          operands.append(open_lists.pop())
          continue
        if open_lists:
          open_lists[-1] += 1
        if token >= 10:
          operations.append(token)
          open_lists.append(0)
        else:
          digits.append(token)
        depth = max(depth, len(open_lists) + (token < 10))
      assert not open_lists and depth <= 4
    assert set(operands) == {2, 3, 4, 5}
    check_law(operations, {token: 1 / 4 for token in range(10, 14)})
    check_law(digits, {digit: 1 / 10 for digit in range(10)})

  def test_law_of_shapes(self):
    """Lists of two, depth 3: which of the two are lists, by probability 1/4."""
    task = tasks.make(
      "listops_small", min_length=3, max_length=11, max_depth=3, max_args=2
    )
    inputs, *_ = sample(task, 100)
    shape = np.select(
      [inputs < 10, inputs < 14, inputs == 14], ["d", "o", "e"], ""
    )
    law = {"odde": 9 / 16, "ooddede": 3 / 16, "ododdee": 3 / 16}
    law["ooddeoddee"] = 1 / 16
    check_law(["".join(row) for row in shape], law)

  def test_lra(self):
    task = tasks.make("lra_listops")
    assert (task.num_train, task.num_test, task.length) == (96_000, 2000, 1999)
    batch = task.batch(0, 0, 16)
    n = batch.mask.sum(1)
    assert 500 < n.min() and n.max() < 2000
    assert task_checks.score(task, batch, task.oracle(batch)) == 1.0
    assert task_checks.same(batch, task.batch(0, 0, 16))

  def test_finite_epochs(self):
    task = tasks.make("listops_small", num_train=20)
    rows = np.concatenate([task.batch(0, step, 8).inputs for step in range(5)])
    first, second = (
      {row.tobytes() for row in part} for part in (rows[:20], rows[20:])
    )
    assert len(first) == 20 and first == second
    assert (rows[:20] != rows[20:]).any()
    sizes = [
      b.weights.sum()
      for b in tasks.make("listops_small", num_test=20).eval_batches(8)
    ]
    assert sizes == [8, 8, 4]


@pytest.mark.parametrize(
  "case, message",
  [
    (dict(name="chomsky_parity_check", min_length=0), "min_length"),
    (dict(name="chomsky_bucket_sort", min_length=9, max_length=8), "max_length must be an integer, 9 or more"),
    (dict(name="chomsky_reverse_string", alphabet=1), "ReverseString: alphabet"),
    (dict(name="chomsky_solve_equation", modulus=1), "SolveEquation: modulus"),
    (dict(name="chomsky_odds_first", computation_steps=-1), "computation_steps"),
    (dict(name="word_problem_small", group="q8"), "group must be factors"),
    (dict(name="word_problem_small", group="s6xs3"), "at most 720 elements"),
    (dict(name="word_problem_small", length=0), "length"),
    (dict(name="parity_small", modulus=1), "modulus"),
    (dict(name="parity_small", asked="never"), "'every', 'last'|every, last"),
    (dict(name="dyck_small", min_length=9, max_length=10), "max_length"),
    (dict(name="listops_small", min_length=8, max_length=10), "max_length"),
    (dict(name="listops_small", max_depth=1), "max_depth"),
  ],
)  # fmt: skip
def test_errors(case, message):
  with pytest.raises(ValueError, match=message):
    tasks.make(**case)


def test_listops_without_trees(monkeypatch):
  monkeypatch.setattr(listops, "_MOST_DRAWS", 1000)
  task = tasks.make("listops_small", min_length=40, max_length=50, max_depth=2)
  with pytest.raises(ValueError, match="no tree in 1000 has more than"):
    task.batch(0, 0, 1)
