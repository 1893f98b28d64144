"""Figures of the diagnostics: each returns a `matplotlib.figure.Figure`.

No figure touches pyplot or a backend: `figure.savefig(path)` writes it. Where
several memories can share the axes, `results` is one result or {label: result}.
"""

from collections.abc import Mapping
import math

import numpy as np

LIMIT = 1e-7  # of relative effects: the resolution of float32


def horizon(results):
  """`Horizon`s: the normalised effect over the lag, on a logarithmic axis.

  Lags where the curve is below 1e-7, float32's resolution, are left out.
  """
  figure, (axis,) = _figure(1, width=6)
  for style, (label, result) in zip(_styles(), _named(results).items()):
    curve = np.asarray(result.curve)
    shown = np.where(curve > LIMIT, curve, np.nan)
    label = ": ".join(filter(None, (label, f"horizon {int(result.horizon)}")))
    axis.plot(result.lag, shown, label=label, **style)
    axis.update_datalim([(len(curve) - 1, 1)])  # lags that are left out
  axis.axhline(math.exp(-1), color="grey", linestyle=":", linewidth=1)
  axis.set(
    yscale="log", xlabel="lag (inputs)",
    ylabel="effect on the last output (relative)",
    title="memory horizon (strongest earlier input: 1)",
  )  # fmt: skip
  axis.legend(fontsize=8)
  return figure


def tokens_held(results):
  """`TokensHeld`: tokens and bits over n, and accuracy by lag at the last n."""
  figure, (tokens, bits, lags) = _figure(3)
  results = _named(results)
  for style, (label, result) in zip(_styles(), results.items()):
    n = result.length
    note = f"{label or 'state'} ({result.state_size:,} floats)"
    tokens.plot(n, result.tokens, label=note, **style)
    bits.plot(n, result.bits_per_float, label=note, **style)
    shown = result.accuracy[-1, : n[-1]]
    lags.plot(
      np.arange(n[-1]), shown, label=f"{label or 'state'}, n = {n[-1]}", **style
    )
  most = max(r.length[-1] for r in results.values())
  tokens.plot([0, most], [0, most], "--", color="grey", label="all of them")
  for chance in {1 / r.vocab_size for r in results.values()}:
    lags.axhline(chance, color="grey", linestyle=":", linewidth=1)
  tokens.set(
    xlabel="tokens presented", ylabel="tokens recovered", title="capacity"
  )
  bits.set(
    xlabel="tokens presented", ylabel="bits per float of the state",
    title="information, lower bound", ylim=(0, None),
  )  # fmt: skip
  lags.set(
    xlabel="lag (tokens before the last)", ylabel="accuracy", ylim=(0, 1.03),
    title="where they are lost (dotted: chance)",
  )  # fmt: skip
  tokens.legend(fontsize=8)
  lags.legend(fontsize=8)
  return figure


def forgetting(results):
  """`Forgetting`: what is recovered of an item as others follow."""
  figure, (recovery, cosine) = _figure(2)
  for style, (label, result) in zip(_styles(), _named(results).items()):
    note = ": ".join(filter(None, (label, f"horizon {result.horizon}")))
    recovery.plot(result.lag, result.recovery, label=note, **style)
    cosine.plot(result.lag, result.cosine, label=label, **style)
  recovery.axhline(math.exp(-1), color="grey", linestyle=":", linewidth=1)
  recovery.set(
    xlabel="items since (lag)", ylabel="accuracy above chance (1 = all)",
    ylim=(-0.05, 1.05), title="forgetting",
  )  # fmt: skip
  cosine.set(
    xlabel="items since (lag)", ylabel="cosine to the item",
    ylim=(-0.05, 1.05), title="quality of the decoded input",
  )  # fmt: skip
  recovery.legend(fontsize=8)
  return figure


def interference(result):
  """`Interference`: the matrix, and what is lost of each item."""
  figure, (matrix, lost) = _figure(2)
  change = np.asarray(result.relative)
  count = len(change)
  off = change[~np.eye(count, dtype=bool)]
  top = max(float(off.max(initial=0)), 1e-6)
  matrix.grid(False)
  image = matrix.imshow(change, vmin=0, vmax=top, cmap="viridis")
  figure.colorbar(
    image, ax=matrix, extend="max", shrink=0.85,
    label="change of the read-out (relative)",
  )  # fmt: skip
  matrix.set(
    xlabel="item written (in order)", ylabel="item read",
    title=f"interference: {float(result.retroactive):.2g} on earlier items",
  )  # fmt: skip
  lost.bar(np.arange(count), np.asarray(result.lost), color="tab:blue")
  lost.set(
    xlabel="item", ylabel="distance of last to first read-out (relative)",
    title="lost after all items",
  )  # fmt: skip
  for axis in (matrix.xaxis, matrix.yaxis, lost.xaxis):
    axis.get_major_locator().set_params(integer=True)
  return figure


def state_statistics(result):
  """`StateStatistics`: norm and rank of the leaves of the state over time."""
  figure, (norm, rank) = _figure(2)
  for style, (name, values) in zip(_styles(), result.norm.items()):
    norm.plot(np.arange(len(values)), values, label=name, **style)
    if name in result.rank:
      label = f"{name} (at most {result.largest[name]})"
      rank.plot(np.arange(len(values)), result.rank[name], label=label, **style)
  norm.set(xlabel="inputs seen", ylabel="Frobenius norm", title="size of state")
  rank.set(
    xlabel="inputs seen", ylabel="effective rank (dimensions)",
    title="rank of state", ylim=(0, None),
  )  # fmt: skip
  norm.legend(fontsize=8)
  if result.rank:
    rank.legend(fontsize=8)
  return figure


def lyapunov(results):
  """`Lyapunov`: the spectrum, and how the leading exponent converged."""
  figure, (spectrum, running) = _figure(2)
  for style, (label, result) in zip(_styles(), _named(results).items()):
    values = np.asarray(result.exponents)
    note = ": ".join(filter(None, (label, f"largest {values[0]:.3g}")))
    spectrum.errorbar(
      np.arange(1, len(values) + 1), values, np.asarray(result.spread),
      label=note, capsize=3, **style,
    )  # fmt: skip
    track = np.asarray(result.running)[:, 0]
    style = {**style, "marker": None}
    running.plot(np.arange(1, len(track) + 1), track, label=label, **style)
  for axis in (spectrum, running):
    axis.axhline(0, color="grey", linestyle=":", linewidth=1)
  spectrum.set(
    xlabel="index", ylabel="Lyapunov exponent (nats per step)",
    title="spectrum (bars: spread over sequences)",
  )  # fmt: skip
  spectrum.xaxis.get_major_locator().set_params(integer=True)
  running.set(
    xlabel="steps averaged", ylabel="largest exponent (nats per step)",
    title="convergence",
  )  # fmt: skip
  spectrum.legend(fontsize=8)
  return figure


def write_map(result, leaf: str | None = None, row: int = 0):
  """`WriteMap`: the entries that each input changed, how much and how many.

  Leaves of integers are shown where there are no others.

  Args:
    result: of `write_map`.
    leaf: of the state; the largest one where it is None.
    row: which sequence.

  Raises:
    ValueError: on an unknown leaf.
  """
  if leaf is None:
    leaf = max(result.difference, key=lambda n: result.difference[n].size)
  if leaf not in result.difference:
    known = ", ".join(result.difference)
    raise ValueError(f"write_map: no leaf {leaf!r}; the state has {known}")
  figure, (entries, norm, share) = _figure(3)
  moved = np.abs(result.difference[leaf][row])
  entries.grid(False)
  image = entries.imshow(
    moved.reshape(len(moved), -1).T, aspect="auto", origin="lower",
    cmap="magma", interpolation="nearest",
  )  # fmt: skip
  figure.colorbar(image, ax=entries, label="size of the change")
  entries.set(
    xlabel="time (inputs)", ylabel="entry of the leaf, in order",
    title=f"written to {leaf}",
  )  # fmt: skip
  floats = [n for n, x in result.difference.items() if x.dtype.kind in "fc"]
  for style, name in zip(_styles(), floats or list(result.norm)):
    norm.plot(result.norm[name][row], label=name, **style)
    share.plot(result.changed[name][row], label=name, **style)
  norm.set(
    xlabel="time (inputs)", ylabel="norm of the change", title="how much"
  )
  share.set(
    xlabel="time (inputs)", ylabel="share of entries changed",
    ylim=(-0.03, 1.03), title="how many",
  )  # fmt: skip
  norm.legend(fontsize=8)
  return figure


def _figure(columns: int, width: float = 4.5):
  """A figure with one row of axes."""
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(
      "memzoo.diagnostics.figures needs matplotlib: pip install memzoo[plot]"
    ) from error
  figure = Figure(figsize=(width * columns, 3.8), layout="constrained")
  axes = figure.subplots(1, columns, squeeze=False)[0]
  for axis in axes:
    axis.grid(alpha=0.3)
  return figure, axes


def _named(results) -> Mapping:
  """{label: result}; one result has the label ''."""
  return results if isinstance(results, Mapping) else {"": results}


def _styles():
  """Colours, and markers that tell them apart in print."""
  for n in range(1000):
    marker = "osv^D*Xp"[n // 10 % 8]
    yield {
      "color": f"C{n % 10}", "marker": marker, "markersize": 3.5,
      "linewidth": 1.5,
    }  # fmt: skip
