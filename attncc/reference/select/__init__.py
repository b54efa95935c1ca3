"""Selections: which blocks or tokens of the keys a block of queries attends to."""

from attncc.reference.select.reuse import Selection
from attncc.reference.select.selection import select

__all__ = ["Selection", "select"]
