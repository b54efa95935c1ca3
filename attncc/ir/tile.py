"""The lower IR level: *how* a variant is computed, as kernels over tiles of values.

A kernel is a list of statements over `Expr`s with shapes. Dims are ints, names of knobs (`BM`), or a knob
divided by a number (`BN/8`). Names may be rebound (a loop carries what it rebinds); `ir.interp` is the
living definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from attncc.ir.expr import Dim, Dtype, Expr, Shape, name
from attncc.ir.rewrite import buffers

Dialect = Literal["triton", "gluon"]
Role = Literal["operand", "buffer", "scalar", "value", "constexpr"]


def extent_of(dim: Dim, config: Mapping[str, int]) -> int:
    """The number a dim stands for under a config."""
    if isinstance(dim, int):
        return dim
    knob, _, divisor = dim.partition("/")
    return config[knob] // int(divisor or 1)


@dataclass(frozen=True, slots=True)
class Note:
    """A comment for whoever reads the emitted kernel; says why."""

    text: str


@dataclass(frozen=True, slots=True)
class Let:
    """Binds or rebinds a name."""

    var: Expr
    value: Expr
    note: str = ""
    """A trailing comment, by custom the shape."""


@dataclass(frozen=True, slots=True)
class Store:
    """Writes `value` at `index` (one expression per axis, broadcast together) where `mask`."""

    buffer: str
    index: tuple[Expr, ...]
    value: Expr
    mask: Expr | None = None


@dataclass(frozen=True, slots=True)
class StoreTile:
    """Writes a [rows, columns] tile of an operand; rows and columns past its end are clipped."""

    operand: str
    index: tuple[Expr, Expr, Expr, Expr]
    """b, h, first row, first column."""
    value: Expr


@dataclass(frozen=True, slots=True)
class For:
    """`var` runs from lo to hi (exclusive) by step."""

    var: Expr
    lo: Expr
    hi: Expr
    step: Expr
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class If:
    """A branch on a scalar; on a constexpr it is resolved when the kernel is compiled."""

    condition: Expr
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class CallFn:
    """Binds the results of a device function of this kernel's program."""

    targets: tuple[Expr, ...]
    function: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Barrier:
    """All that a program read and wrote before this it has read and written before what follows."""


@dataclass(frozen=True, slots=True)
class Soon:
    """What is read here will be read again before long: memory may begin to bring it. Nothing is bound."""

    value: Expr


Statement = Note | Let | Store | StoreTile | For | If | CallFn | Barrier | Soon


def reads_memory(f: Function) -> bool:
    """Whether a function reads tensors itself."""
    return any(buffers(e) for s in f.body for e in reads(s))


def reads(s: Statement) -> tuple[Expr, ...]:
    """The expressions a statement evaluates itself (those of its block aside)."""
    match s:
        case Note() | Barrier():
            return ()
        case Let(_, value) | Soon(value):
            return (value,)
        case Store(_, index, value, mask):
            return (*index, value) if mask is None else (*index, value, mask)
        case StoreTile(_, index, value):
            return (*index, value)
        case For(_, lo, hi, step):
            return (lo, hi, step)
        case If(condition):
            return (condition,)
        case CallFn(_, _, args):
            return args


def binds(s: Statement) -> tuple[Expr, ...]:
    """The names a statement binds."""
    match s:
        case Let(var) | For(var):
            return (var,)
        case CallFn(targets):
            return targets
        case _:
            return ()


def writes(s: Statement) -> tuple[str, ...]:
    """The tensors a statement writes itself."""
    match s:
        case Store(tensor) | StoreTile(tensor):
            return (tensor,)
        case _:
            return ()


def block(s: Statement) -> tuple[Statement, ...]:
    """The statements inside a loop or branch."""
    match s:
        case For() | If():
            return s.body
        case _:
            return ()


def every(body: Iterable[Statement]) -> Iterator[Statement]:
    """All statements of a body, each before those inside it."""
    for s in body:
        yield s
        yield from every(block(s))


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a kernel or device function; an argument for it is a `name` expression or a value.

    operand: a [b, h, row, column] tensor read or written by tiles (by descriptor or pointer); buffer: any
    other tensor; scalar: a run-time number; value: a tile (functions only); constexpr: fixed when compiled
    (knobs and flags).
    """

    name: str
    role: Role
    dtype: Dtype = "f32"
    rank: int = 0
    """buffer: its number of axes."""
    shape: Shape = ()
    """value: its dims."""
    tiles: tuple[tuple[Dim, Dim], ...] = ()
    """operand: the (rows, columns) of each tile shape in which it is read or written."""
    extent: tuple[Expr, int] | None = None
    """operand: its number of rows and columns, beyond which it reads as 0 and is not written; None where nothing ever
    reaches beyond."""
    doc: str = ""
    strides: tuple[int, ...] = ()
    """buffer: those of a tensor that is contiguous, known when compiled; else they are parameters, too."""


@dataclass(frozen=True, slots=True)
class Function:
    """A device function: typed parameters, a body, and the names it returns.

    It sees its parameters alone: operands and buffers are passed by name, like everything else.
    """

    name: str
    params: tuple[Param, ...]
    body: tuple[Statement, ...]
    results: tuple[Expr, ...]
    doc: str = ""


@dataclass(frozen=True, slots=True)
class Knob:
    """A tunable constant: its legal values, the first being the safe default."""

    name: str
    choices: tuple[int, ...]
    doc: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: programs are numbered along axis 0; `grid` counts them, over sizes and knobs."""

    name: str
    params: tuple[Param, ...]
    body: tuple[Statement, ...]
    functions: tuple[Function, ...]
    grid: Expr
    doc: str = ""
    dialect: Dialect = "triton"
    """The language that it is printed in."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """A temporary the launcher allocates: shape over sizes and knobs, filled by an earlier kernel."""

    name: str
    shape: tuple[Expr, ...]
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, with the constexprs that only this launch fixes."""

    kernel: str
    constants: tuple[tuple[str, int], ...] = ()
    when: Expr | None = None
    """Over sizes and knobs: launched only where it holds; None always."""
    options: tuple[tuple[str, int], ...] = ()
    """Options of the compiler that a config does not choose for it; 0 leaves one to the compiler."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A fixed kernel of one architecture, and the functions by which it knows its variant.

    What they share travels in tuples: `args` is what a launch has, `place` tells where a query tile is, `tile` are the
    numbers known of it (those that are `known` before it is, then floats, then integers), and `rows` the vectors of its
    rows. A function's parameters are entries of these, or arguments that its role gives it.
    """

    name: str
    replaces: tuple[str, ...]
    """The portable kernels that are launched only where it is not: it stands in their place."""
    functions: tuple[Function, ...]
    args: tuple[Param, ...]
    known: tuple[Expr, ...]
    place: tuple[Expr, ...]
    tile: tuple[Expr, ...]
    rows: tuple[Expr, ...]
    qk: tuple[int, ...]
    v: tuple[int, ...]
    """Widths of the pieces of a head dim."""
    grid: Expr
    """Query tiles, over sizes and knobs."""
    exact: bool
    """Whether functions are computed as well as fp32 allows, however long it takes."""
    beside: Param | None = None
    """What is read beside the products, as a tile for each of theirs."""
    knobs: tuple[Knob, ...] = ()
    before: tuple[Launch, ...] = ()
    """Launches of portable kernels that make what it alone reads."""
    after: tuple[Launch, ...] = ()
    """Launches of portable kernels that do what it leaves."""
    scratch: tuple[Scratch, ...] = ()
    """What only it and those read or write."""
    tensors: tuple[str, str, str] = ("q", "k", "v")
    """Where its tiles of queries, keys and values come from."""
    turned: bool = False
    """Whether values come as [b, h, column, key]."""
    parts: bool = False
    """Whether operands are read in blocks of 64 columns, and products are as wide as a head is."""
    output: str = "o"
    """Where its tiles of outputs go to."""
    lost: str = ""
    """The list of query tiles into which a hidden NaN may have leaked, where it keeps one."""
    job: tuple[Expr, ...] = ()
    """What tells of the keys that a program has, where it has not all of them."""
    states: tuple[str, ...] = ()
    """Where it leaves the states of rows that others end: greatest scores, sums, and outputs as sums."""
    serves: Expr | None = None
    """The calls that it is for, over sizes and knobs; None for all whose config asks for it."""

    @property
    def is_due(self) -> Expr:
        """Whether it does a call, over sizes and knobs."""
        asked = name("ENGINE") > 0
        return asked if self.serves is None else asked & self.serves

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Of portable kernels that run only beside it."""
        return (*self.before, *self.after)


@dataclass(frozen=True, slots=True)
class Program:
    """Kernels, their launches in order, and scratch buffers; knobs stay symbols until a config binds them."""

    name: str
    kernels: tuple[Kernel, ...]
    launches: tuple[Launch, ...]
    knobs: tuple[Knob, ...]
    scratch: tuple[Scratch, ...] = ()
    skeleton: str = ""
    why: str = ""
    """The rule that chose the skeleton, in words."""
    engine: Engine | None = None
    """What serves large calls where the launch's config says so."""
    engine_gap: str = ""
    """Why there is none."""
    short_gap: str = ""
    """Why calls of few queries have no kernels of their own."""
    append: Program | None = None
    """What writes new keys and values into the cache, where that has a call of its own."""

    def kernel(self, name: str) -> Kernel:
        return next(k for k in self.kernels if k.name == name)
