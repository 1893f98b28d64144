"""The benchmark of deep test-time memories beside titans-pytorch."""

import types

import pytest

from experiments import bench_titans

TINY = types.SimpleNamespace(
  batch=1, length=8, d_model=8, heads=2, mini_batch_size=4, seconds=0.0
)


def test_ours_run():
  runs = bench_titans.ours(TINY)
  assert {"titans", "ttt_mlp"} <= set(runs)
  outputs, gradients = runs["titans"]()
  assert outputs[0].shape == (1, 8, 8) and gradients


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
def test_table():
  pytest.importorskip("titans_pytorch")
  rows = bench_titans.measure(TINY)
  assert len(rows[0]) == len(bench_titans.HEAD)
  by_name = {row[0]: row for row in rows}
  assert by_name["titans-pytorch, exact"][5] == "1.00"
  assert by_name["titans-pytorch, default"][6] == "1.00"
