"""The index of a folder of cubins: what each of them takes, and how its parameters lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Format:
    """How a parameter of some kind is packed."""

    code: str
    size: int
    alignment: int


FORMATS = {
    "pointer": Format("=Q", 8, 8),
    "i32": Format("=i", 4, 4),
    "i64": Format("=q", 8, 8),
    "fp32": Format("=f", 4, 4),
    "map": Format("=128s", 128, 64),
}
KINDS = {"constant", *FORMATS}
MAP_FIELDS = ("dtype", "item", "swizzle")
SCRATCH = 2
"""Pointers that Triton adds: memory for all programs, and for its profiler. Kernels here need neither: null."""


class Damaged(Exception):
    """An index that cannot be read."""


@dataclass(frozen=True)
class Place:
    """What a cubin takes as one argument.

    kind: `constant`, which is no parameter, or a key of FORMATS. detail: a constant's value; of what pointers and
    integers are multiples; of a tensor map the driver's numbers `dtype` and `swizzle`, the bytes of an `item`, and the
    shape `box` of a block.
    """

    kind: str
    detail: Any = None


@dataclass(frozen=True)
class Field:
    """A parameter: `part` counts the shape and then the strides that follow a tensor map."""

    offset: int
    kind: str
    place: int | None
    part: int | None = None


@dataclass(frozen=True)
class Cubin:
    """One kernel, compiled for one kind of arguments."""

    file: str
    digest: str
    symbol: str
    threads: int
    shared_bytes: int
    options: Mapping[str, int]
    places: tuple[Place, ...]


def digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


def laid_out(places: Sequence[Place]) -> tuple[list[Field], int]:
    """Where each parameter lies behind the first, and how many bytes there are in all."""
    fields: list[Field] = []
    size = 0
    for kind, place, part in parameters(places):
        form = FORMATS[kind]
        offset = -(-size // form.alignment) * form.alignment
        fields.append(Field(offset, kind, place, part))
        size = offset + form.size
    return fields, size


def parameters(places: Sequence[Place]) -> Iterator[tuple[str, int | None, int | None]]:
    """(kind, place, part) of every parameter."""
    for n, place in enumerate(places):
        if place.kind == "constant":
            continue
        yield place.kind, n, None
        if place.kind == "map":
            rank = len(place.detail["box"])
            yield from (("i32" if part < rank else "i64", n, part) for part in range(2 * rank))
    yield from [("pointer", None, None)] * SCRATCH


# -- reading -------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, tuple[Cubin, ...]]:
    """The cubins of an index by kernel, those for the most special arguments first.

    Raises:
        Damaged: it is not there, no JSON, or no index.
    """
    try:
        data = json.loads(path.read_text())
        return {name: tuple(map(cubin, found)) for name, found in data.items()}
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path.name} is no index of cubins ({type(error).__name__}: {error})") from None


def cubin(data: Mapping[str, Any]) -> Cubin:
    made = Cubin(**{**data, "places": tuple(place(*x) for x in data["places"])})
    numbers = (made.threads, made.shared_bytes, *made.options.values())
    if not all(isinstance(x, str) for x in (made.file, made.digest, made.symbol)) or not all(map(is_count, numbers)):
        raise ValueError(f"a cubin as {data!r:.100}")
    if Path(made.file).name != made.file:
        raise ValueError(f"a file outside the folder: {made.file!r:.100}")
    return made


def place(kind: str, detail: Any = None) -> Place:
    fine = kind in KINDS
    if kind in ("pointer", "i32", "i64"):
        fine = is_count(detail) and detail > 0
    elif kind == "map":
        numbers = [*(detail[name] for name in MAP_FIELDS), *detail["box"]]
        fine = set(detail) == {*MAP_FIELDS, "box"} and all(map(is_count, numbers))
    elif kind == "constant":
        fine = detail is None or isinstance(detail, int)
    if not fine:
        raise ValueError(f"a place as {[kind, detail]!r:.100}")
    return Place(kind, detail)


def is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31
