"""Experiments by flags: train, compare, bench."""
