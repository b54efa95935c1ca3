"""Legality of both IR levels: all faults of a variant or a program, each in its context, as one `CompilerBug`.

`ir.rules` has the types of expressions, `verify_attention` and `verify_program` what holds beyond one formula:
which names and tensors exist where, and what parts, primitives, statements, kernels and launches owe each other.
"""

from __future__ import annotations

from collections.abc import Iterable

from attncc.errors import CompilerBug
from attncc.ir.attention import Attention
from attncc.ir.tile import Program
from attncc.ir.verify_attention import attention_faults
from attncc.ir.verify_formula import Fault
from attncc.ir.verify_program import program_faults


def verify_attention(attn: Attention) -> None:
    """Raises `CompilerBug` with every rule that the variant breaks."""
    _report(f"attention '{attn.name}'", attention_faults(attn))


def verify_program(program: Program) -> None:
    """Raises `CompilerBug` with every rule that the program breaks."""
    _report(f"program '{program.name}'", program_faults(program))
    if program.append is not None:
        verify_program(program.append)


def _report(subject: str, faults: Iterable[Fault]) -> None:
    found = tuple(dict.fromkeys(faults))
    if found:
        lines = "".join(f"\n  {where}\n    {what}" for where, what in found)
        raise CompilerBug(f"{subject} breaks {len(found)} rules of the IR:{lines}")
