"""Retrieval from a modern Hopfield network, block by block."""

from memzoo.kernels.hopfield.retrieval import hopfield as hopfield
