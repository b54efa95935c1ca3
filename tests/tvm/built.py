"""Packages for the CPU with the library of one instruction set: built in half the time, and no doubt which ran."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any
from unittest.mock import patch

import tvm
from codegen.emitted import Package, package
from jitted import BY_NAME, RUNNABLE

from attncc.check.cases import Case
from attncc.codegen.tvm.isa import Isa


@cache
def built(body: str, isa: str = RUNNABLE[0].name, level: int = 3) -> Package:
    """The package of a spec that lacks its version and name; `level`: how much LLVM optimises, 3 where users are."""

    def target(isa: Isa) -> Any:
        made = tvm.target.Target({"kind": "llvm", "mcpu": isa.cpu, "mtriple": isa.triple, "opt-level": level})
        return made.with_host(made)

    with (
        patch("attncc.codegen.tvm.libraries.ISAS", (BY_NAME[isa],)),
        patch("attncc.codegen.tvm.build.target", target),
    ):
        return package(f"{body}\ndoc: for {isa}", target="cpu")


def agrees(p: Package, cases: Iterable[Case]) -> None:
    """Fails where the package and the oracle differ."""
    wrong = [o for o in map(p.agrees, cases) if o.verdict != "ok"]
    assert not wrong, [(str(o.case), o.verdict, o.detail, o.deviations) for o in wrong]


def in_turn(number: int) -> str:
    """An instruction set that is here, each as often as another."""
    return RUNNABLE[number % len(RUNNABLE)].name
