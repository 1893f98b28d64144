"""Pallas kernels for TPU and GPU, installed as `memzoo.kernels`.

One folder per op. A kernel is an implementation ('pallas') of an op of
`memzoo.ops` and is reached through it.
"""

from memzoo.kernels.interpret import interpret as interpret
from memzoo.kernels.interpret import interpreting as interpreting
