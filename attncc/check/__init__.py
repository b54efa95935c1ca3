"""Differential tests: an emitted package against the oracle, on operands that have broken kernels before."""
