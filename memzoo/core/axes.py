"""Axis letters and named array types, in one place.

  B batch    T time     D model width   H heads      K key
  V value    N hidden   M slots         C chunk      E experts

Shape comments everywhere read `[T, H, K]` in these letters.
"""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Inexact, Int

Key = jax.Array  # a typed PRNG key, as jax.random.key makes
Params = Any  # a pytree of real arrays, by name
State = Any  # a pytree of arrays of fixed shape and dtype

X = Float[Array, "D"]
Y = Float[Array, "D"]
Xs = Float[Array, "T D"]
Ys = Float[Array, "T D"]
Reset = Bool[Array, "T"]
Mask = Bool[Array, "T"]

Hidden = Inexact[Array, "N"]
Hiddens = Inexact[Array, "T N"]
Matrix = Float[Array, "K V"]
Queries = Float[Array, "T K"]
Keys = Float[Array, "T K"]
Values = Float[Array, "T V"]
Scalars = Float[Array, "T"]
LogDecay = Float[Array, "T"] | Float[Array, "T K"]
Tokens = Int[Array, "T"]
