"""A chunk function as one fused kernel, forward and backward.

`chunk_scan` takes what `memzoo.ops.chunk.run` takes, a pure function of a
state and C steps, and makes a Pallas kernel of it that keeps the state on chip
while it walks over the sequence. The backward kernel walks back from states
that were kept and differentiates the same function inside the kernel.
"""

from memzoo.kernels.chunk_scan.driver import Axes as Axes
from memzoo.kernels.chunk_scan.driver import chunk_scan as chunk_scan
