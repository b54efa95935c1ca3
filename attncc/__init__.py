"""attncc compiles an attention variant, written in a few lines, into an importable package of kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from attncc.driver import check, compile, explain
    from attncc.errors import AttnccError, SpecError, Unsupported
    from attncc.spec import Spec, attention, load, loads

__all__ = [
    "AttnccError",
    "Spec",
    "SpecError",
    "Unsupported",
    "attention",
    "check",
    "compile",
    "explain",
    "load",
    "loads",
]

_HOME: Final = {
    "AttnccError": "attncc.errors",
    "SpecError": "attncc.errors",
    "Unsupported": "attncc.errors",
    "Spec": "attncc.spec",
    "attention": "attncc.spec",
    "check": "attncc.driver",
    "compile": "attncc.driver",
    "explain": "attncc.driver",
    "load": "attncc.spec",
    "loads": "attncc.spec",
}
"""Imported when first asked for: parts of attncc are used where torch is not wanted."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attncc' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
