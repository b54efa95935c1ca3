"""Lowering, the one step from *what* to *how*: skeletons and fragments turn a variant into a tile program."""

from attncc.passes.lower.select import SKELETONS, select

__all__ = ["SKELETONS", "select"]
