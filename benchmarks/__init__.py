"""Benchmarks against the peers, on one GPU."""
