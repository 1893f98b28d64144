"""Whether kernels run in Pallas' interpreter, which every platform has."""

from collections.abc import Iterator
import contextlib
import contextvars

_interpreting = contextvars.ContextVar("memzoo_interpret", default=False)


@contextlib.contextmanager
def interpret(on: bool = True) -> Iterator[None]:
  """Runs the kernels that are traced inside by Pallas' interpreter.

  For numbers without the device: kernels are slow that way. It changes what
  is traced inside the context: a function that `jax.jit` has already cached
  keeps what it has.

  >>> with memzoo.kernels.interpret():
  ...   y = memzoo.ops.hopfield(x, q, implementation="pallas")

  Args:
    on: False takes an outer `interpret` back.
  """
  token = _interpreting.set(on)
  try:
    yield
  finally:
    _interpreting.reset(token)


def interpreting() -> bool:
  """Whether the code that is traced now is inside `interpret`."""
  return _interpreting.get()
