"""What a spec declares: head counts, inputs, sizes, alignment; and the scope its expressions are read in."""

from __future__ import annotations

import keyword
import re
from typing import Final

from attncc.errors import SpecError, nearest
from attncc.ir.attention import POSITION_NAMES, SIZE_NAMES, Align, Dims, Heads, Input, Size
from attncc.ir.expr import INTS, Expr, const, name
from attncc.spec.expression import Scope
from attncc.spec.macros import LOAD_DTYPES, MACROS
from attncc.spec.operators import FUNCTIONS
from attncc.spec.schema import IDENTIFIER, SizeModel, SpecModel
from attncc.spec.source import Path_, Source

RUN_TIME_SIZES: Final = ("B", "Sq", "Sk")

API_NAMES: Final = frozenset(
    {
        *("q", "k", "v", "o", "lse", "out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *("block_table", "seqused_q", "seqused_k", "return_lse", "config", "stream", "dropout_seed"),
    }
)
"""Arguments and results of the emitted function."""
LANGUAGE_NAMES: Final = frozenset(
    {
        *POSITION_NAMES,
        *SIZE_NAMES,
        *MACROS,
        *FUNCTIONS,
        "qk",
        "scale",
        "bucket",
        "qdot",
        "true",
        "false",
        "inf",
        "score",
    }
)
PACKAGES: Final = frozenset({"attncc", "torch", "triton", "numpy", "tvm"})


def why_not(word: str) -> str:
    """Why `word` cannot name something of the user's, empty where it can."""
    if keyword.iskeyword(word):
        return "is a Python keyword"
    if word in LANGUAGE_NAMES:
        return "is a word of the language"
    if word in API_NAMES:
        return "is an argument of the emitted function"
    return "" if re.fullmatch(IDENTIFIER, word) and len(word) <= 64 else "is not an identifier"


def heads(model: SpecModel, source: Source) -> Heads:
    """Head counts; the key and value heads must divide the query heads."""
    if keyword.iskeyword(model.name) or model.name in PACKAGES:
        reason = "a Python keyword" if keyword.iskeyword(model.name) else "the name of another package"
        raise SpecError(f"'{model.name}' is {reason}", source.locate(("name",)))
    found = model.heads
    kv = found.q if found.kv is None else found.kv
    v = kv if found.v is None else found.v
    for key, count in (("kv", kv), ("v", v)):
        if found.q % count:
            divisors = [n for n in range(1, found.q + 1) if found.q % n == 0]
            close = min(divisors, key=lambda n: abs(n - count))
            message = f"{found.q} query heads cannot be shared among {count} {'key' if key == 'kv' else 'value'} heads"
            raise SpecError(message, source.locate(("heads", key)), f"heads.q must be a multiple, as of {close}")
    return Heads(found.q, kv, v, found.map)


def inputs(model: SpecModel, source: Source) -> tuple[Input, ...]:
    """The declared inputs, their names and flags checked."""
    declared: list[Input] = []
    for word, entry in model.inputs.items():
        path: Path_ = ("inputs", word)
        if reason := why_not(word):
            raise SpecError(f"an input cannot be called '{word}': it {reason}", source.locate_key(path))
        for axis, size in enumerate(entry.shape):
            _check_size_name(size, model, source, (*path, "shape", axis))
        integer = LOAD_DTYPES[entry.dtype] in INTS
        if entry.sorted and not (integer and entry.shape):
            place = source.locate_key((*path, "sorted"))
            raise SpecError("only an int input with an axis can be sorted", place, "dtype: int32")
        if entry.grad and (integer or entry.dtype == "bool"):
            raise SpecError(f"an input of {entry.dtype} has no gradient", source.locate_key((*path, "grad")))
        declared.append(Input(word, tuple(entry.shape), entry.dtype, entry.grad, entry.sorted))
    return tuple(declared)


def _check_size_name(size: int | str, model: SpecModel, source: Source, path: Path_) -> None:
    if isinstance(size, int) or size in SIZE_NAMES:
        return
    reason = "is an input" if size in model.inputs else why_not(size)
    if reason:
        raise SpecError(f"a size cannot be called '{size}': it {reason}", source.locate(path))


def sizes(model: SpecModel, source: Source, declared: tuple[Input, ...]) -> tuple[Size, ...]:
    """What the spec says of sizes; only those that some shape or the call itself has."""
    own = [s for x in declared for s in x.shape if isinstance(s, str) and s not in SIZE_NAMES]
    known = [*RUN_TIME_SIZES, *own]
    for word, entry in model.sizes.items():
        path: Path_ = ("sizes", word)
        if word in SIZE_NAMES and word not in RUN_TIME_SIZES:
            key = "dims" if word.startswith("D") else "heads"
            raise SpecError(f"'{word}' follows from '{key}'", source.locate_key(path))
        if word not in known:
            raise SpecError(f"no shape has a size '{word}'", source.locate_key(path), nearest(word, known))
        _check_bounds(entry, source, path)
    return tuple(Size(word, s.fixed, s.max, s.multiple) for word, s in model.sizes.items())


def _check_bounds(entry: SizeModel, source: Source, path: Path_) -> None:
    given = entry.model_fields_set
    if entry.fixed is not None and given - {"fixed"}:
        raise SpecError("a fixed size has no other bounds", source.locate_key((*path, "fixed")))
    if entry.max is not None and entry.max < entry.multiple:
        place = source.locate((*path, "max"))
        raise SpecError(f"no multiple of {entry.multiple} is at most {entry.max}", place)


def align(model: SpecModel, source: Source, declared: tuple[Input, ...]) -> Align:
    """Where query row 0 stands."""
    word = model.align
    if word in ("bottom_right", "top_left"):
        return Align("bottom_right" if word == "bottom_right" else "top_left")
    place = source.locate(("align",))
    x = next((x for x in declared if x.name == word), None)
    if x is None:
        hint = nearest(word, ["bottom_right", "top_left", *(x.name for x in declared)])
        raise SpecError(f"'{word}' is no alignment and no input", place, hint)
    if LOAD_DTYPES[x.dtype] not in INTS or x.shape != ("B",):
        raise SpecError(f"align needs an int input of shape [B], '{word}' is not", place)
    return Align("input", word)


def reference(word: str | None, path: Path_, source: Source, declared: tuple[Input, ...]) -> str:
    """The name of a declared input, empty where none is given."""
    known = [x.name for x in declared]
    if word and word not in known:
        hint = nearest(word, known) if known else f"declare it: inputs: {{{word}: {{shape: […]}}}}"
        raise SpecError(f"'{word}' is no input", source.locate(path), hint)
    return word or ""


def scope(heads: Heads, dims: Dims, declared: tuple[Input, ...], known: tuple[Size, ...], where: Align) -> Scope:
    """What expressions may name: compile-time sizes stand for their numbers."""
    values: dict[str, Expr] = {size: name(size) for size in RUN_TIME_SIZES}
    counts = {"Hq": heads.q, "Hk": heads.kv, "Hv": heads.v, "Dqk": dims.qk, "Dv": dims.v}
    values |= {size: const(n) for size, n in counts.items()}
    own = [s for x in declared for s in x.shape if isinstance(s, str)]
    values |= {size: name(size) for size in own if size not in values}
    values |= {s.name: const(s.fixed) for s in known if s.fixed is not None}
    return Scope({x.name: x for x in declared}, values, where)
