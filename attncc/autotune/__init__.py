"""Finds the fastest config of a variant that is right, on the device at hand, and keeps what it learnt."""
