"""Tile programs become source text, and source text an importable package."""
