"""What the statements of a kernel and its functions owe each other: names, types, tensors, calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from attncc.ir.expr import FLOATS, INTS, STORED, Dtype, Expr, Shape, broadcast
from attncc.ir.rewrite import buffers, names, walk
from attncc.ir.rules import Tensor, Type, faults, leaves_first, malformed, show
from attncc.ir.text import statement_lines, text
from attncc.ir.tile import (
    AtOnce,
    Barrier,
    CallFn,
    For,
    Function,
    If,
    Kernel,
    Let,
    Note,
    Param,
    Statement,
    Store,
    StoreTile,
    reads,
)

Fault = tuple[str, str]

TENSORS: Final = ("operand", "buffer")
DIMS_MATTER: Final = ("iota", "full", "reshape", "tile")
"""Operators whose shape is evaluated, so that its knobs must be at hand."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A statement in a function. Few are ever spoken of, so none is put into words before that."""

    function: str
    statement: Statement

    def __str__(self) -> str:
        """The statement's first line, behind the name of its function."""
        s = self.statement
        printable = not any(map(malformed, (n for e in reads(s) for n in walk(e))))
        return f"{self.function}: {next(statement_lines(s), '')}" if printable else f"{self.function}: {s!r}"


Where = str | Spot


@dataclass(frozen=True, slots=True)
class Scope:
    """What a body knows at one point of it, and the faults found so far."""

    where: str
    tensors: Mapping[str, Param]
    typed_tensors: Mapping[str, Tensor]
    functions: Mapping[str, Function]
    constexprs: frozenset[str]
    types: dict[str, Type]
    fixed: frozenset[str] = frozenset()
    """Names bound outside of the innermost loop or run-time branch: they keep their types there."""
    found: list[tuple[Where, str]] = field(default_factory=list[tuple[Where, str]])

    def inner(self) -> Scope:
        """The scope of a loop's or branch's block: what it binds anew ends with it."""
        return replace(self, types=dict(self.types), fixed=frozenset(self.types))

    def faults(self) -> Iterator[Fault]:
        return ((str(where), what) for where, what in self.found)


def kernel_faults(kernel: Kernel) -> Iterator[Fault]:
    """Every rule that a kernel or one of its functions breaks: where, and what is wrong."""
    functions: dict[str, Function] = {}
    for function in kernel.functions:
        where = f"function {function.name}"
        if function.name in functions:
            yield where, "defined twice"
        scope = _enter(where, function.params, functions)
        _block(scope, function.body)
        for result in function.results:
            check_expression(scope, f"{where}: return {result.attr}", result)
        yield from scope.faults()
        functions[function.name] = function
    scope = _enter(f"kernel {kernel.name}", kernel.params, functions)
    for p in kernel.params:
        if p.role == "value":
            yield f"kernel {kernel.name}", f"'{p.name}' is a tile, which only functions take"
    _block(scope, kernel.body)
    yield from scope.faults()


def _enter(where: str, params: tuple[Param, ...], functions: Mapping[str, Function]) -> Scope:
    all_names = [p.name for p in params]
    tensors = {p.name: p for p in params if p.role in TENSORS}
    scope = Scope(
        where,
        tensors,
        {
            p.name: Tensor(p.dtype, 4 if p.role == "operand" else p.rank, p.tiles, p.role == "operand")
            for p in tensors.values()
        },
        dict(functions),
        frozenset(p.name for p in params if p.role == "constexpr"),
        {p.name: (p.dtype, p.shape) for p in params if p.role not in TENSORS},
    )
    for name in sorted({n for n in all_names if all_names.count(n) > 1}):
        scope.found.append((where, f"parameter '{name}' is there twice"))
    return scope


def _block(scope: Scope, body: tuple[Statement, ...]) -> None:
    for s in body:
        STATEMENTS[type(s)](scope, Spot(scope.where, s), s)


# -- statements ----------------------------------------------------------------------------------


def _let(scope: Scope, where: Where, s: Let) -> None:
    check_expression(scope, where, s.value)
    if (s.var.dtype, s.var.shape) != (s.value.dtype, s.value.shape):
        given = show(s.value.dtype, s.value.shape)
        scope.found.append((where, f"'{s.var.attr}' is {show(s.var.dtype, s.var.shape)}, its value {given}"))
    _bind(scope, where, s.var)


def _bind(scope: Scope, where: Where, var: Expr) -> None:
    name = str(var.attr)
    new: Type = (var.dtype, var.shape)
    if var.op != "name":
        scope.found.append((where, f"'{var.op}' cannot be bound"))
        return
    if name in scope.constexprs or name in scope.tensors:
        scope.found.append((where, f"'{name}' is a parameter that cannot be rebound"))
    if name in scope.fixed and scope.types[name] != new:
        was = show(*scope.types[name])
        scope.found.append((where, f"'{name}' is {was} outside of this block, rebound as {show(*new)}"))
    scope.types[name] = new


def _store(scope: Scope, where: Where, s: Store) -> None:
    for e in reads(s):
        check_expression(scope, where, e)
    tensor = scope.typed_tensors.get(s.buffer)
    if tensor is None:
        scope.found.append((where, f"tensor '{s.buffer}' is not known"))
        return
    if len(s.index) != tensor.rank:
        scope.found.append((where, f"'{s.buffer}' has {tensor.rank} axes, got {len(s.index)} indices"))
    for e in s.index:
        if e.dtype not in INTS:
            scope.found.append((where, f"'{s.buffer}' is indexed by a {e.dtype}"))
    if s.mask is not None and s.mask.dtype != "bool":
        scope.found.append((where, f"the mask is {s.mask.dtype}"))
    if _kind(s.value.dtype) != _kind(tensor.dtype):
        scope.found.append((where, f"'{s.buffer}' holds {tensor.dtype}, got {s.value.dtype}"))
    lanes = _broadcast(scope, where, *(e.shape for e in s.index))
    every = _broadcast(scope, where, lanes, *(e.shape for e in reads(s)))
    if lanes != every:
        scope.found.append((where, f"{list(every)} values go to {list(lanes)} places"))


def _broadcast(scope: Scope, where: Where, *shapes: Shape) -> Shape:
    try:
        return broadcast(*shapes) if shapes else ()
    except ValueError as error:
        scope.found.append((where, str(error)))
        return ()


def _kind(dtype: Dtype) -> str:
    if dtype in STORED:
        return dtype
    return "float" if dtype in FLOATS else "bool" if dtype == "bool" else "int"


def _store_tile(scope: Scope, where: Where, s: StoreTile) -> None:
    for e in reads(s):
        check_expression(scope, where, e)
    for e in s.index:
        check_scalar(scope, where, e, INTS)
    p = scope.tensors.get(s.operand)
    if p is None or p.role != "operand":
        scope.found.append((where, f"'{s.operand}' is no operand"))
        return
    if s.value.dtype != p.dtype or len(s.value.shape) != 2 or (p.tiles and s.value.shape not in p.tiles):
        got = show(s.value.dtype, s.value.shape)
        scope.found.append((where, f"'{p.name}' takes {p.dtype} tiles of {list(p.tiles)}, got {got}"))
    _extent(scope, where, p)


def _extent(scope: Scope, where: Where, p: Param) -> None:
    """A tile is bounded by its operand's extent, whose names must be at hand."""
    if p.extent is not None:
        check_expression(scope, f"{where} (extent of {p.name})", p.extent[0])


def _for(scope: Scope, where: Where, s: For) -> None:
    for e in reads(s):
        check_expression(scope, where, e)
        check_scalar(scope, where, e, INTS)
    inner = scope.inner()
    _bind(inner, where, s.var)
    _block(replace(inner, fixed=inner.fixed | {str(s.var.attr)}), s.body)


def _if(scope: Scope, where: Where, s: If) -> None:
    check_expression(scope, where, s.condition)
    check_scalar(scope, where, s.condition, ("bool", *INTS))
    if names(s.condition) <= scope.constexprs:
        _block(scope, s.body)  # resolved when compiled: what it binds lives on
    else:
        _block(scope.inner(), s.body)


def _call(scope: Scope, where: Where, s: CallFn) -> None:
    function = scope.functions.get(s.function)
    if function is None:
        scope.found.append((where, f"there is no function '{s.function}' before this"))
        return
    if len(s.args) != len(function.params):
        scope.found.append((where, f"'{s.function}' takes {len(function.params)} arguments, got {len(s.args)}"))
    for p, a in zip(function.params, s.args, strict=False):
        _argument(scope, where, p, a)
    if len(s.targets) != len(function.results):
        scope.found.append((where, f"'{s.function}' gives {len(function.results)} results, got {len(s.targets)} names"))
    for target, result in zip(s.targets, function.results, strict=False):
        if (target.dtype, target.shape) != (result.dtype, result.shape):
            given = show(result.dtype, result.shape)
            scope.found.append((where, f"'{target.attr}' is {show(target.dtype, target.shape)}, the result {given}"))
        _bind(scope, where, target)


def _argument(scope: Scope, where: Where, p: Param, a: Expr) -> None:
    what = f"parameter '{p.name}'"
    if p.role in TENSORS:
        given = scope.tensors.get(str(a.attr)) if a.op == "name" else None
        same = given is not None and (given.role, given.dtype, given.rank) == (p.role, p.dtype, p.rank)
        if not same:
            scope.found.append((where, f"{what} is a {p.dtype} {p.role} of rank {p.rank}, got {text(a)}"))
        return
    check_expression(scope, where, a)
    if p.role == "constexpr":
        if not names(a) <= scope.constexprs or buffers(a):
            scope.found.append((where, f"{what} is constexpr, got {text(a)}"))
    elif (a.dtype, a.shape) != (p.dtype, p.shape):
        scope.found.append((where, f"{what} is {show(p.dtype, p.shape)}, got {show(a.dtype, a.shape)}"))


def _note(scope: Scope, where: Where, s: Note | Barrier) -> None:
    """A comment breaks no rule, nor does a barrier."""


def _at_once(scope: Scope, where: Where, s: AtOnce) -> None:
    if not len(s.calls) - 1 == len(s.warps) == len(s.registers):
        scope.found.append((where, f"{len(s.calls)} calls, warps of {len(s.warps)}, registers of {len(s.registers)}"))
    if any(call.targets for call in s.calls):
        scope.found.append((where, "a call gives results"))
    _block(scope, s.calls)


STATEMENTS: Final[Mapping[type, Callable[..., None]]] = {
    Note: _note,
    Barrier: _note,
    AtOnce: _at_once,
    Let: _let,
    Store: _store,
    StoreTile: _store_tile,
    For: _for,
    If: _if,
    CallFn: _call,
}


# -- expressions ---------------------------------------------------------------------------------


def check_expression(scope: Scope, where: Where, e: Expr) -> None:
    """Every node well typed, every name bound with this type, every dim's knob at hand."""
    tensors = scope.typed_tensors
    for node in leaves_first(e):
        what = faults(node, tensors, "tile")
        if what:
            scope.found.append((where, what))
        elif node.op == "name":
            _name(scope, where, node)
        elif node.op == "tile":
            _extent(scope, where, scope.tensors[str(node.attr)])
        if node.op in DIMS_MATTER:
            for knob in sorted({dim.partition("/")[0] for dim in node.shape if isinstance(dim, str)}):
                if knob not in scope.constexprs:
                    scope.found.append((where, f"the dim '{knob}' is no constexpr here"))


def _name(scope: Scope, where: Where, node: Expr) -> None:
    name = str(node.attr)
    bound = scope.types.get(name)
    if bound is None:
        scope.found.append((where, f"'{name}' is not bound here"))
    elif name not in scope.constexprs and bound != (node.dtype, node.shape):
        scope.found.append((where, f"'{name}' is {show(*bound)}, read as {show(node.dtype, node.shape)}"))


def check_scalar(scope: Scope, where: Where, e: Expr, dtypes: tuple[Dtype, ...]) -> None:
    """No shape, and one of these dtypes."""
    if e.shape or e.dtype not in dtypes:
        scope.found.append((where, f"expected a scalar {' or '.join(dtypes)}, got {show(e.dtype, e.shape)}"))
