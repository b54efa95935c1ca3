"""What the launches, kernels and scratch buffers of a program owe each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attncc.ir.expr import INTS
from attncc.ir.rewrite import buffers, substitute
from attncc.ir.rules import Type
from attncc.ir.tile import Barrier, CallFn, Function, If, Program, Statement, block, reads, writes
from attncc.ir.verify_kernel import TENSORS, Fault, Scope, check_expression, check_scalar, kernel_faults


def program_faults(program: Program) -> Iterator[Fault]:
    """Every rule that a program breaks: where, and what is wrong."""
    for what, all_names in (
        ("kernel", [k.name for k in program.kernels]),
        ("knob", [k.name for k in program.knobs]),
        ("scratch", [s.name for s in program.scratch]),
    ):
        for name in sorted({n for n in all_names if all_names.count(n) > 1}):
            yield f"{what} {name}", "defined twice"
    for knob in program.knobs:
        if not knob.choices or min(knob.choices) < 0:
            yield f"knob {knob.name}", f"impossible choices {list(knob.choices)}"
    yield from _launches(program)
    for kernel in program.kernels:
        yield from kernel_faults(kernel)
    yield from _shared_functions(program)
    yield from _numbers(program)
    yield from _scratch_order(program)


def _launches(program: Program) -> Iterator[Fault]:
    kernels = {k.name: k for k in program.kernels}
    knobs = {k.name for k in program.knobs}
    launches = (*program.launches, *(program.engine.launches if program.engine else ()))
    launched = {launch.kernel for launch in launches}
    for name in kernels:
        if name not in launched:
            yield f"kernel {name}", "never launched"
    for launch in launches:
        where = f"launch {launch.kernel}"
        if launch.kernel not in kernels:
            yield where, "there is no such kernel"
            continue
        constexprs = {p.name for p in kernels[launch.kernel].params if p.role == "constexpr"}
        given = {name for name, _ in launch.constants}
        for name in sorted(given - constexprs):
            yield where, f"'{name}' is no constexpr of the kernel"
        for name in sorted(constexprs - given - knobs):
            yield where, f"constexpr '{name}' is neither a knob nor fixed by the launch"


def _shared_functions(program: Program) -> Iterator[Fault]:
    """Kernels stand in one module: a function that several of them have is there once."""
    first: dict[str, tuple[str, Function]] = {}
    for kernel in program.kernels:
        for f in kernel.functions:
            owner, known = first.setdefault(f.name, (kernel.name, f))
            if known != f:
                yield f"function {f.name}", f"another one in kernel {kernel.name} than in kernel {owner}"


def _numbers(program: Program) -> Iterator[Fault]:
    """Grids and scratch shapes: integer scalars over run-time numbers and knobs."""
    known: dict[str, Type] = {k.name: ("i32", ()) for k in program.knobs}
    for kernel in program.kernels:
        known |= {p.name: (p.dtype, ()) for p in kernel.params if p.role == "scalar"}
    formulas = [(f"kernel {k.name}: grid", k.grid) for k in program.kernels]
    formulas += [(f"scratch {s.name}", e) for s in program.scratch for e in s.shape]
    for where, e in formulas:
        scope = Scope(where, {}, {}, {}, frozenset(), known)
        check_expression(scope, where, e)
        check_scalar(scope, where, e, INTS)
        yield from scope.faults()


def _scratch_order(program: Program) -> Iterator[Fault]:
    """Scratch memory is read after an earlier launch wrote it."""
    engine = program.engine
    scratch = {s.name: s for s in (*program.scratch, *(engine.scratch if engine else ()))}
    kernels = {k.name: k for k in program.kernels}
    written = {s.name for s in engine.scratch} if engine else set[str]()
    known: dict[str, dict[str, Effects]] = {k.name: {} for k in program.kernels}
    for launch in (*program.launches, *(engine.launches if engine else ())):
        kernel = kernels.get(launch.kernel)
        if kernel is None:
            continue
        functions = {f.name: f for f in kernel.functions}
        read, wrote = _effects(kernel.body, dict(launch.constants), functions, known[kernel.name])
        for name in sorted((read & scratch.keys()) - written):
            yield f"launch {launch.kernel}", f"scratch '{name}' is read before any launch wrote it"
        written |= wrote
        for p in kernel.params:
            made = scratch.get(p.name)
            rank = 4 if p.role == "operand" else p.rank
            if made is not None and (p.dtype != made.dtype or rank != len(made.shape)):
                yield f"kernel {kernel.name}", f"'{p.name}' is scratch {made.dtype} of rank {len(made.shape)}"


Effects = tuple[frozenset[str], frozenset[str]]
"""The tensors that are read, and those that are written."""


def _effects(
    body: tuple[Statement, ...],
    constants: Mapping[str, int],
    functions: Mapping[str, Function],
    known: dict[str, Effects],
) -> Effects:
    """What a body reads and writes, dead branches of this launch left out; `known` has what functions do.

    What a program has written itself, before a barrier, it does not read of others.
    """
    read: set[str] = set()
    wrote: set[str] = set()
    own: set[str] = set()
    for s in body:
        if isinstance(s, Barrier):
            own |= wrote
        if isinstance(s, If) and substitute(s.condition, constants).value in (False, 0):
            continue
        for e in reads(s):
            read |= buffers(e) - own
        wrote.update(writes(s))
        inner = (_effects(block(s), constants, functions, known),) if block(s) else ()
        if isinstance(s, CallFn) and s.function in functions:
            inner = (_of_call(s, functions, known),)
        for more_read, more_written in inner:
            read |= more_read - own
            wrote |= more_written
    return frozenset(read), frozenset(wrote)


def _of_call(call: CallFn, functions: Mapping[str, Function], known: dict[str, Effects]) -> Effects:
    """What a function does, by the names that its tensors have where it is called."""
    callee = functions[call.function]
    if callee.name not in known:
        known[callee.name] = frozenset[str](), frozenset[str]()  # of one that calls itself, which is a fault elsewhere
        known[callee.name] = _effects(callee.body, {}, functions, known)
    pairs = zip(callee.params, call.args, strict=False)
    aliases = {p.name: str(a.attr) for p, a in pairs if p.role in TENSORS}
    read, wrote = known[callee.name]
    return frozenset(aliases.get(n, n) for n in read), frozenset(aliases.get(n, n) for n in wrote)
