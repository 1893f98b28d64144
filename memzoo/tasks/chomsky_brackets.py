"""The tasks on bracketed expressions, deterministic context-free ones."""

import dataclasses

import jax
import jax.numpy as jnp

from memzoo.tasks import chomsky, sampling, task as task_lib
from memzoo.tasks.chomsky import Chomsky


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmeticBrackets(Chomsky):
  """The value, modulo m, of a random expression with brackets.

  An expression of length n is d, -d, (d) or (-d) for n = 1, 2, 3, 4, with a
  uniform number d; else it is (a o b), with a uniform operator o and random
  expressions a and b, the length of a uniform in 1..n-4. Symbols: 0..m-1 the
  numbers; from m on, the operators +, - and *, then ( and ).

  Attributes:
    modulus: m.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_modular_arithmetic_brackets (m = 5),
    chomsky_modular_arithmetic_brackets_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  modulus: int = 5

  def __post_init__(self):
    super().__post_init__()
    owner = "ModularArithmeticBrackets"
    task_lib.check_int(owner, "modulus", self.modulus, 2, 2**15)

  @property
  def symbols(self) -> int:
    return self.modulus + 5

  @property
  def num_outputs(self) -> int:
    return self.modulus

  @property
  def num_words(self) -> int:
    return 2 * self.max_length

  def draw(self, words, n):
    string, value = _expression(words, n, self.modulus, "+-*()")
    return string, value[None], 1

  def solve(self, string):
    return [_value(string, self.modulus, "+-*()")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveEquation(Chomsky):
  """Find the unknown number of a random equation modulo m.

  Symbols: 0..m-1 the numbers; from m on, + - ( ) x =. The string is e = v with
  a random expression e of length n - 2, as in `ModularArithmeticBrackets` but
  with + and - alone, and its value v; one number of e, the first at or after a
  uniform place (cyclically), is replaced by x. The answer is that number, the
  only solution. Where n < 3, the string is zeros, and so is the answer.

  Attributes:
    modulus: m.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_solve_equation (m = 5), chomsky_solve_equation_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  modulus: int = 5

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("SolveEquation", "modulus", self.modulus, 2, 2**15)

  @property
  def symbols(self) -> int:
    return self.modulus + 6

  @property
  def num_outputs(self) -> int:
    return self.modulus

  @property
  def num_words(self) -> int:
    return 2 * self.max_length + 1

  def draw(self, words, n):
    m = self.modulus
    unknown, equals = m + 4, m + 5
    size = jnp.maximum(n - 2, 0)
    string, value = _expression(words[1:], size, m, "+-()")

    place = jnp.arange(self.max_length, dtype=jnp.int32)
    wrap = jnp.maximum(size, 1)
    start = sampling.below(words[0], wrap)
    number = (place < size) & (string < m)
    away = jnp.where(number, (place - start) % wrap, self.max_length)
    hidden = jnp.argmin(away)
    answer = string[hidden]

    whole = jnp.where(place == hidden, unknown, string)
    whole = jnp.where(place == size, equals, whole)
    whole = jnp.where(place == size + 1, value, whole)
    whole = jnp.where(n < 3, 0, whole)
    return whole, jnp.where(n < 3, 0, answer)[None], 1

  def solve(self, string):
    m = self.modulus
    if len(string) < 3:
      return [0]
    left, value = string[:-2], string[-1]
    for number in range(m):
      trial = [number if symbol == m + 4 else symbol for symbol in left]
      if _value(trial, m, "+-()") == value:
        return [number]
    raise ValueError(f"SolveEquation: no solution for {string}")


def _expression(words, n, m: int, signs: str):
  """A random expression of length n and its value, by intervals.

  An expression fills an interval; where it has parts, they fill intervals that
  begin further right. So one pass from left to right lays the symbols down,
  and one pass from right to left gives the values.

  Args:
    words: random uint32 [2 L].
    n: int32 scalar, 0..L.
    m: modulus.
    signs: what the symbols from m on stand for.

  Returns:
    (string int32 [L], 0 from n on; value int32 scalar, 0 where n is 0).
  """
  split, choice = jnp.split(words, 2)
  most = split.shape[0]
  symbol = {sign: m + i for i, sign in enumerate(signs)}
  operators = 3 if "*" in signs else 2
  choice = m + sampling.below(choice, operators)
  number = sampling.below(split, m)
  place = jnp.arange(most + 1, dtype=jnp.int32)
  put = lambda array, i, x, where: jnp.where((place == i) & where, x, array)

  def parts(p, size):
    """Where the interval at p is cut: its two parts begin here and there."""
    left = 1 + sampling.below(split[p], jnp.maximum(size - 4, 1))
    return left, p + 1, p + 2 + left

  def lay(p, carry):
    string, sizes = carry
    size = sizes[p]
    left, first, second = parts(p, size)
    binary, bracket = size >= 5, size >= 3
    head = jnp.where(size == 2, symbol["-"], symbol["("])
    head = jnp.where(size == 1, number[p], head)
    string = put(string, p, head, size >= 1)
    string = put(string, p + size - 1, symbol[")"], bracket)
    string = put(string, first + left, choice[p], binary)
    inner = jnp.where(size == 2, 1, size - 2)
    sizes = put(sizes, first, jnp.where(binary, left, inner), size >= 2)
    sizes = put(sizes, second, size - 3 - left, binary)
    return string, sizes

  def value(i, values):
    p = most - 1 - i
    size = sizes[p]
    _, first, second = parts(p, size)
    a = values[first]
    b = values[jnp.minimum(second, most)]
    pair = jnp.where(choice[p] == symbol["-"], a - b, a + b)
    if operators == 3:
      pair = jnp.where(choice[p] == symbol["*"], a * b, pair)
    result = jnp.where(size >= 5, pair, a)
    result = jnp.where(size == 2, -a, result)
    result = jnp.where(size == 1, number[p], result)
    return values.at[p].set(result % m)

  zeros = jnp.zeros((most + 1,), jnp.int32)
  string, sizes = jax.lax.fori_loop(
    0, most, lay, (zeros, put(zeros, 0, n, True))
  )
  values = jax.lax.fori_loop(0, most, value, zeros)
  return string[:most], values[0]


def _value(string: list[int], m: int, signs: str) -> int:
  """The value of an expression modulo m, by a stack of open brackets."""
  text = [s if s < m else signs[s - m] for s in string]
  open_brackets = [[]]
  for item in text:
    if item == "(":
      open_brackets.append([])
    elif item == ")":
      inner = _flat_value(open_brackets.pop(), m)
      open_brackets[-1].append(inner)
    else:
      open_brackets[-1].append(item)
  (whole,) = open_brackets
  return _flat_value(whole, m)


def _flat_value(items: list, m: int) -> int:
  """The value of [-] a [o [-] b], an expression without brackets."""
  items = list(items)
  negative = items[0] == "-"
  left = -items[1] if negative else items[0]
  rest = items[2:] if negative else items[1:]
  if not rest:
    return left % m
  right = -rest[2] if rest[1] == "-" else rest[1]
  result = {"+": left + right, "-": left - right, "*": left * right}[rest[0]]
  return result % m


chomsky.register("modular_arithmetic_brackets", ModularArithmeticBrackets)
chomsky.register("solve_equation", SolveEquation)
