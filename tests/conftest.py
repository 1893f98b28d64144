"""Strict by default: dtype promotion, warnings, and a compilation cache."""

import itertools
import os
import pathlib
import subprocess
import sys
import time

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
  parser.addoption(
    "--minutes",
    type=float,
    help="skip what has not begun by then; the order rotates with the commit",
  )


def pytest_configure(config):
  config.addinivalue_line("markers", "slow: only in `make test-all`")
  if not hasattr(config, "workerinput"):  # workers inherit the environment
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    whole &= not config.getoption("--record")
    os.environ["MEMZOO_TEST_SAMPLE"] = str(int(whole))
  if config.getoption("--minutes") is not None:
    config.option.loadscopereorder = False  # the largest files are not first
  config.addinivalue_line("markers", "parity: needs the [parity] extra")
  config.addinivalue_line("markers", "nans: makes NaN on purpose")


START = time.monotonic()


def pytest_runtest_setup(item):
  minutes = item.config.getoption("--minutes")
  if minutes is not None and time.monotonic() - START > 60 * minutes:
    pytest.skip(f"not begun within {minutes:g} minutes")


@pytest.fixture(autouse=True)
def nan_checks(request):
  """A NaN out of any compiled function is an error, but in tests of `nans`."""
  with jax.debug_nans(request.node.get_closest_marker("nans") is None):
    yield


# A process may hold 65,530 memory maps (Linux' default), of which every
# compiled function takes a few; the compiler crashes where there are no more.
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS, TESTS_A_LOOK = 12_000, 20
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def compiled_functions():
  """Drops what was compiled long before it is more than a process may hold."""
  yield
  if next(_tests) % TESTS_A_LOOK == 0 and MAPS.exists():
    if MAPS.read_bytes().count(b"\n") > MOST_MAPS:
      jax.clear_caches()


ROOT = pathlib.Path(__file__).parent.parent
# Cells that the default tier takes beside those that changed; more where what
# they share did. The slow tier, which CI runs too, takes all others.
SAMPLE, SHARED_SAMPLE = 4, 6


def rotation():
  """A number of the commit: what is taken first, where not all is taken."""
  head = git("rev-parse", "HEAD")
  return int(head[0][:8], 16) if head else 0


def git(*arguments):
  """What git prints, by lines; [] where there is no repository."""
  done = subprocess.run(
    ["git", *arguments], cwd=ROOT, capture_output=True, text=True
  )
  return done.stdout.split() if done.returncode == 0 else []


# Tests and the sources whose change makes the default tier run all of them. It
# runs one function in `EVERY` of the others, which rotates with the commit.
AREAS = {
  "tests/agent": ("experiments/agent", "experiments/ppo", "memzoo/tasks/"),
  "tests/bench": ("experiments/bench", "experiments/timing"),
  "tests/compat": ("memzoo/compat/",),
  "tests/diagnostics": ("memzoo/diagnostics/", "experiments/diagnose"),
  "tests/experiments": ("experiments/",),
  "tests/kernels/": ("kernels/", "memzoo/targets"),
  "tests/models": ("memzoo/models/",),
  "tests/ops/": ("memzoo/ops/",),
  "tests/tasks": ("memzoo/tasks/",),
  "tests/training": (
    "memzoo/training", "memzoo/checkpoint", "memzoo/parallel",
    "experiments/train",
  ),
}  # fmt: skip
EVERY = 3


def default_tier(names, functions):
  """What the default tier tests of all that has many of its kind: whatever
  changed against main (on main, in the last commit), and a sample of the rest
  that rotates with the commit.

  Args:
    names: of cells.
    functions: of tests, 'tests/FILE.py::NAME', in their order.

  Returns:
    (the cells that it tests, the functions that it leaves out), sets.
  """
  head = git("rev-parse", "HEAD")
  if not head:
    return set(names), set()
  base = git("merge-base", "HEAD", "main")
  base = "HEAD~1" if base in ([], head) else base[0]
  changed = git("diff", "--name-only", base)
  changed += git("ls-files", "--others", "--exclude-standard")
  changed = [path for path in changed if path.endswith(".py")]
  shared = ("memzoo/core", "memzoo/ops", "tests/checks", "tests/conf")
  wide = any(path.startswith(shared) for path in changed)
  stems = {pathlib.PurePath(p).stem.removesuffix("_test") for p in changed}
  first = rotation()
  count = SHARED_SAMPLE if wide else SAMPLE
  cells = {names[(first + n) % len(names)] for n in range(count)}
  left_out = set()
  for area, sources in AREAS.items():
    if not any(path.startswith((area, *sources)) for path in changed):
      of_area = [f for f in functions if f.startswith(area)]
      left_out |= {f for n, f in enumerate(of_area) if (first + n) % EVERY}
  return cells | stems & set(names), left_out


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  # One worker per file, since its tests share compilations; the conformance
  # suite is spread over the workers by cell. The cells that the default tier
  # leaves to the slow one are marked here.
  import memzoo

  names = list(memzoo.names())
  functions = {item: item.nodeid.partition("[")[0] for item in items}
  cells, left_out = set(names), set()
  if os.environ["MEMZOO_TEST_SAMPLE"] == "1":
    cells, left_out = default_tier(
      names, list(dict.fromkeys(functions.values()))
    )
  groups = {}
  for item in items:
    group = item.path.stem
    cell = group.removesuffix("_test")
    callspec = getattr(item, "callspec", None)
    if group == "conformance_test" and callspec is not None:
      cell = callspec.params["name"]
      group += "-" + cell
    item.add_marker(pytest.mark.xdist_group(group))
    groups.setdefault(group, []).append(item)
    left = functions[item] in left_out
    if left or (cell in names and cell not in cells):
      item.add_marker(pytest.mark.slow)
  if config.getoption("--minutes") is not None:
    order = list(groups.values())
    first = rotation() % len(order)
    items[:] = [item for g in order[first:] + order[:first] for item in g]
  if config.getoption("--slow"):
    return
  skip = pytest.mark.skip(reason="slow: run with --slow (make test-all)")
  for item in items:
    if "slow" in item.keywords:
      item.add_marker(skip)
