"""Strict by default: dtype promotion, warnings, and a compilation cache."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is what the suite costs: cheap code is good enough for tiny
# arrays, and what was compiled once is kept outside the checkout.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_backend_optimization_level=1"
  + " --xla_llvm_disable_expensive_passes=true"
)
_cache = pathlib.Path(
  os.environ.get("MEMZOO_CACHE", pathlib.Path.home() / ".cache" / "memzoo")
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_addoption(parser):
  parser.addoption(
    "--slow", action="store_true", help="run the tests marked slow too"
  )
  parser.addoption(
    "--record",
    action="store_true",
    help="write the measured tolerances to memzoo/core/measured.json",
  )


def pytest_configure(config):
  config.addinivalue_line("markers", "slow: only in `make test-all`")
  config.addinivalue_line("markers", "parity: needs the [parity] extra")
  config.addinivalue_line("markers", "nans: makes NaN on purpose")


@pytest.fixture(autouse=True)
def nan_checks(request):
  """A NaN out of any compiled function is an error, but in tests of `nans`."""
  with jax.debug_nans(request.node.get_closest_marker("nans") is None):
    yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  # One worker per file, since its tests share compilations; the conformance
  # suite is spread over the workers by cell.
  for item in items:
    group = item.path.stem
    callspec = getattr(item, "callspec", None)
    if group == "conformance_test" and callspec is not None:
      group += "-" + callspec.params["name"]
    item.add_marker(pytest.mark.xdist_group(group))
  if config.getoption("--slow"):
    return
  skip = pytest.mark.skip(reason="slow: run with --slow (make test-all)")
  for item in items:
    if "slow" in item.keywords:
      item.add_marker(skip)
