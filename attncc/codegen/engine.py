"""The device functions of an engine as Gluon source: Triton's elementwise language, with tuples for what is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attncc.codegen import gluon_kernels
from attncc.codegen.source import WIDTH, Writer, called, definitions, filled
from attncc.codegen.triton import CALL, Printer, handles, strides
from attncc.errors import CompilerBug
from attncc.ir.tile import Engine, Function, Param

ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "known": ("args",),
    "place": ("number", "args", "BM", "GROUP", "AGAIN"),
    "walk": ("at", "args", "BM", "BN"),
    "cut": ("t", "s", "args", "BN"),
    "whole": ("t", "s", "args", "BN"),
    "beside": ("n", "row0", "at", "args"),
    "rows": ("rows", "s", "args"),
    "ramp": ("u", "s", "args"),
    "shift": ("n", "r", "s", "args"),
    "ends": ("r", "s", "args"),
    "base": (),
    "score": ("qk", "beside", "j", "r", "s", "args"),
    "keep": ("j", "r", "s", "args"),
    "finish": ("m", "total", "r", "s", "args"),
    "job": ("program", "args", "BM", "BN", "SPLIT", "FILL"),
    "part": ("program", "job", "count", "args", "BM", "BN", "SPLIT", "FILL"),
    "locate": ("n", "at", "args"),
    "state": ("slot", "at", "r", "s", "args"),
}
"""What each function is given: `at` tells where a query tile is, `s` is the tile's tuple, `r` that of its rows and of
the ramp along key tiles, `u` counts the keys of one, and `job` tells of a program's keys."""
CALLS: Final = CALL | {"sigmoid": "logistic"}
"""Functions that Gluon has otherwise, or not at all."""
APPROXIMATE: Final = {"tanh": "tanh_approx"}
"""Helpers by which a GPU computes faster than to the last bit; it makes 0.015 of a logit where a softcap is 30."""
CONSTANTS: Final = frozenset({"BM", "BN", "GROUP", "AGAIN", "SPLIT", "FILL"})


def print_engine(engine: Engine) -> list[str]:
    """The text of every function, and of the helpers they call."""
    texts = [_print(engine, f) for f in engine.functions]
    return [as_gluon(t) for t in (*definitions("helpers", called("helpers", texts)), *texts)]


def as_gluon(text: str) -> str:
    """Elementwise code of Triton under Gluon's names; layouts follow from its arguments."""
    for shaped in ("tl.arange", "tl.full", "tl.dot", "tl.sum", "tl.reshape"):
        if shaped in text:
            raise CompilerBug(f"{shaped} would need a layout in Gluon:\n{text}")
    return gluon_kernels.as_gluon(text)


def argument_names(params: Iterable[Param]) -> list[str]:
    """The entries of `args`: each tensor and its strides, then numbers."""
    params = tuple(params)
    tensors = [p for p in params if p.role == "buffer"]
    return [text for p in tensors for text in (*handles(p), *strides(p))] + [
        p.name for p in params if p.role == "scalar"
    ]


def _print(engine: Engine, f: Function) -> str:
    role = ROLES[f.name]
    w = Writer()
    w.line("@gluon.jit")
    signature = ", ".join(f"{name}: gl.constexpr" if name in CONSTANTS else name for name in role)
    w.line(f"def {f.name}({signature}):")
    tuples = {
        "args": argument_names(engine.args),
        "at": [str(e.attr) for e in engine.place],
        "s": [str(e.attr) for e in engine.tile],
        "r": [str(e.attr) for e in engine.rows],
        "job": [str(e.attr) for e in engine.job],
    }
    printer = Printer(f.params, {}, {}, CALLS | ({} if engine.exact else APPROXIMATE))
    needed = {text for p in f.params for text in _names_of(p)} - {*role}
    with w.indented():
        w.line(f'"""{f.doc}"""')
        for group, names in tuples.items():
            if group in role and needed & {*names}:
                names = [f"_{text}" if text in role else text for text in names]
                needed -= {*names}
                _unpack(w, names, group)
        if needed - CONSTANTS:
            raise CompilerBug(f"{f.name} reads {sorted(needed)}, which its role does not give it")
        for s in f.body:
            printer.statement(w, s)
        w.line(f"return {_results(engine, f)}")
    return w.text().rstrip()


def _unpack(w: Writer, names: Sequence[str], group: str) -> None:
    text = f"{', '.join(names)}{',' * (len(names) == 1)} = {group}"
    if len(text) <= WIDTH - 4:
        w.line(text)
        return
    w.line("(")
    with w.indented():
        w.block(filled(names))
    w.line(f") = {group}")


def _names_of(p: Param) -> list[str]:
    return [*handles(p), *strides(p)] if p.role == "buffer" else [p.name]


def _results(engine: Engine, f: Function) -> str:
    texts = [str(r.attr) for r in f.results]
    match f.name:
        case "place":
            own = len(engine.place)
            return f"({', '.join(texts[:own])}), ({', '.join(texts[own:])})"
        case "walk":
            own = len(texts) - len(engine.tile)
            return f"{', '.join(texts[:own])}, ({', '.join(texts[own:])})"
        case "rows" | "known" | "ramp" | "shift" | "ends" | "base":
            return f"({', '.join(texts)}{',' * (len(texts) == 1)})"
        case _:
            return ", ".join(texts)
