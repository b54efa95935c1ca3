"""What an emitted package has to write new keys and values into a cache: its description, and its function."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

from attncc.codegen.call import bare, cache_rows, dtype_of, opening, operands, tuple_text, width_of
from attncc.codegen.host import host_function
from attncc.codegen.parameters import mapping, parameters_name
from attncc.codegen.source import Writer
from attncc.codegen.tensors import TORCH_DTYPE, axes_of, input_tensor, scratch_entry, size_bounds, strided
from attncc.codegen.triton import lower_name
from attncc.ir.appending import count, places, room, tokens, writes_queries
from attncc.ir.attention import SIZE_NAMES, Attention, Input, Size
from attncc.ir.cache import BY_TOKEN, beside, cached, quantizer, row_axes
from attncc.ir.given import Given
from attncc.ir.keeping import RING, recalled, states, writing
from attncc.ir.staircase import staircase
from attncc.ir.tile import Launch, Program

ABOUT_QUERIES: Final = (
    "Queries go the same way, into q, which attention takes then and whose memory is not that of q_new. Give those of",
    "all new tokens, of prefill too. Tokens without a place leave their rows of q as they are.",
)
ABOUT_STATES: Final = (
    "Steps ask for tokens before those of a call: the states carry each sequence's last Sr rows, LEAST at least,",
    "which may hold anything before its first token. New tokens of a sequence stand one behind the other. Rows beyond",
    "LEAST let as many tokens be taken back: the next call begins at an earlier position then.",
)


def write(w: Writer, attn: Attention, program: Program, ahead: Sequence[str]) -> None:
    """The variant of the call, what runs it, and the function."""
    given = _tensors(attn)
    w.line()
    w.line("APPENDING = Variant(")
    with w.indented():
        w.line(f'name="{attn.name}.append",')
        w.line("tensors=(")
        with w.indented():
            for x in given:
                how = ", tiled=True" * (x.name in _axes(attn)) + ", contiguous=True" * x.contiguous
                w.line(f'Tensor("{x.name}", {axes_of(x.axes)}, torch.{TORCH_DTYPE[x.dtype]}{how}),')
            w.block(input_tensor(attn, x) for x in _inputs(attn))
        w.line("),")
        w.line("output=(),")
        w.line("lse=None,")
        w.line(f"sizes={{{', '.join(_sizes(attn))}}},")
        w.line("scale=lambda n: 1.0,")
        axes = _axes(attn) | dict.fromkeys((lower_name(s.name) for s in program.scratch), "bhsd")
        w.line(f"axes={{{', '.join(f'{chr(34)}{k}{chr(34)}: {chr(34)}{v}{chr(34)}' for k, v in axes.items())}}},")
        if len(program.launches) == 1:
            w.entry(f"kernels=({_kernel(attn, program, program.launches[0])},)")
        else:
            w.line("kernels=(")
            with w.indented():
                for launch in program.launches:
                    w.entry(_kernel(attn, program, launch))
            w.line("),")
        w.block(["scratch=("] if program.scratch else [])
        with w.indented():
            for scratch in program.scratch:
                w.entry(scratch_entry(scratch))
        w.block(["),"] if program.scratch else [])
    w.line(")")
    quoted = tuple_text(f'"{arch}"' for arch in ahead)
    runner = "_gpu.Runner(APPENDING, _launch.BY_TRITON)"
    if ahead:
        runner = f'_prebuilt.Runner(APPENDING, {quoted}).by_triton("append has no cubins")'
    written = tuple_text(f'"{name}"' for name in _written(attn))
    w.line(f"_APPENDER = _append.Appender(lambda: {runner}, {written})")
    w.line(f'_APPEND = _append.register("{attn.name}", _APPENDER, [t.name for t in APPENDING.tensors])')
    w.block(["", ""])
    _function(w, attn, given)


def _kernel(attn: Attention, program: Program, launch: Launch) -> str:
    k = program.kernel(launch.kernel)
    options = f", options={mapping(dict(launch.options))}" if launch.options else ""
    return f"Kernel(kernels.{k.name}, {host_function(k.grid)}, {parameters_name(attn, k)}{options})"


def _function(w: Writer, attn: Attention, given: Sequence[Given]) -> None:
    first = len(tokens(attn)) + len(_kept_operands(attn))
    names = [*(x.name for x in given), *(x.name for x in _inputs(attn))]
    w.signature("append", [*names[:first], "*", *names[first:]])
    with w.indented():
        plain = "as they are" if attn.kept is None else "behind their steps"
        how = "as the spec's quantizer holds them" if quantizer(attn) else plain
        w.block(opening(f"Writes the keys and values of new tokens into the cache, in place and {how}.", 115))
        w.line()
        if staircase(attn):
            w.line("Segments that have aged go down the staircase, each step reading what the one before has left.")
            w.line()
        if attn.kept is not None:
            steps = ", ".join(dict.fromkeys(step.name for step in attn.kept.steps))
            what = (
                f"They go through {steps} on their way, at the position of their place: give them as they were before."
            )
            w.block(textwrap.wrap(what, 115))
            w.line()
        if writes_queries(attn):
            w.block(ABOUT_QUERIES)
            w.line()
        if states(attn):
            least = max(recalled(attn).values())
            w.block(line.replace("LEAST", str(least)) for line in ABOUT_STATES)
            w.line()
        if any(c.per not in BY_TOKEN for c in cached(attn)):
            w.line("Scales of whole sequences are read, not found: what is beyond them becomes the greatest number.")
            w.line()
        w.line("Args:")
        with w.indented():
            w.block(f"{x.name}: {bare(axes_of(x.axes))} {x.dtype}, {x.doc}" for x in given)
            w.block(f"{x.name}: [{', '.join(map(str, x.shape))}] {x.dtype}" for x in _inputs(attn))
        w.line()
        w.line("Raises:")
        with w.indented():
            w.line("TypeError, ValueError: an argument's dtype, device, shape or stride is wrong; says which and how.")
        w.line('"""')
        pairs = ", ".join(f'"{name}": {name}' for name in names)
        w.line(f"_append.call(APPENDING.name, _APPENDER, _APPEND, {{{pairs}}})")


def _kept_operands(attn: Attention) -> tuple[str, ...]:
    """What attention takes of what is written: the cache, and queries where they go through steps with keys."""
    return operands(attn) if writes_queries(attn) else operands(attn)[1:]


def _tensors(attn: Attention) -> list[Given]:
    """Of a call, in the order of its signature."""
    new = {x.name: x for x in tokens(attn)}
    found: list[Given] = []
    for x in _kept_operands(attn):
        doc = "of the queries behind their steps, written" if x == "q" else "of the cache, written"
        axes = new["q_new"].axes if x == "q" else _cache_axes(attn, x)
        found.append(Given(x, axes, dtype_of(attn, x), doc))
    return [*new.values(), *found, *beside(attn), *states(attn), *places(attn)]


def _inputs(attn: Attention) -> tuple[Input, ...]:
    """What steps read on the way into the cache."""
    return writing(attn).inputs if attn.kept is not None else ()


def _cache_axes(attn: Attention, operand: str) -> tuple[int | str, ...]:
    heads = {"k": attn.heads.kv, "v": attn.heads.v}[operand]
    return row_axes(attn, heads, width_of(attn, operand))


def _written(attn: Attention) -> list[str]:
    """Names of the tensors that it writes: scales of whole sequences are given."""
    found = staircase(attn) is not None or any(c.per in BY_TOKEN for c in cached(attn))
    own = [*_kept_operands(attn), *(x.name for x in states(attn))]
    return [*own, *(x.name for x in beside(attn) if found or x.name == "k_rope")]


def _axes(attn: Attention) -> dict[str, str]:
    """Where the axes of the tensors of rows are."""
    rows = strided(attn.layout)
    cache = "bshd" if attn.page_size else rows
    queries = ["q"] if writes_queries(attn) else []
    given = dict.fromkeys((*(x.name for x in tokens(attn)), *queries), rows) | dict.fromkeys(cache_rows(attn), cache)
    return given | dict.fromkeys((x.name for x in states(attn)), "bhsd")


def _sizes(attn: Attention) -> list[str]:
    batch = {"B", "B + 1"} & {axis for x in _tensors(attn) for axis in x.axes}
    own = dict.fromkeys(s for x in _inputs(attn) for s in x.shape if isinstance(s, str) and s not in SIZE_NAMES)
    known = [*([attn.size("B")] if batch else []), Size(count(attn)), attn.size(room(attn)), *map(attn.size, own)]
    found = [f'"{s.name}": {size_bounds(s)}' for s in known]
    least = max(recalled(attn).values(), default=0)
    return [*found, *([f'"{RING}": {size_bounds(Size(RING), least)}'] if least else [])]
