"""Pallas kernels for TPU and GPU, installed as `memzoo.kernels`.

One folder per op. A kernel is an implementation ('pallas') of an op of
`memzoo.ops` and is reached through it; there is none yet, and every op runs by
its XLA forms on all platforms.
"""
