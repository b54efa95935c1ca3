"""What a call's arguments must be, and the messages where they are not; the same in every emitted package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Sizes = dict[str, int]
P = TypeVar("P")
PLANS_KEPT = 1024
RUN_TIME = ("B", "Sq", "Sk", "Tq", "Tk")
"""Names of sizes that are the language's; others are the spec's own."""
CHECKED = os.environ.get("ATTNCC_CHECK") == "1"
"""Whether every call reads what its index tensors hold, which waits for the device: for debugging."""


@dataclass(frozen=True)
class Tensor:
    """What an argument must look like: a name or number per axis, and its dtype."""

    name: str
    axes: tuple[int | str, ...]
    dtype: torch.dtype
    tiled: bool = False
    """Read by tiles of [rows, columns]: its last axis must be contiguous."""
    words: bool = False
    """Kernels read two of its bytes at once, as an integer."""
    contiguous: bool = False
    """Kernels know its strides: all axes must be."""


@dataclass(frozen=True)
class Size:
    """What a run-time size may be; kernels were proven to address `most` and no more."""

    most: int
    fixed: int | None = None
    multiple: int = 1
    least: int = 0


def fill(axes: Sequence[int | str], sizes: Sizes, partial: bool = False) -> tuple[int, ...]:
    return tuple(a if isinstance(a, int) else sizes.get(a, -1) if partial else sizes[a] for a in axes)


LEAST, GREATEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The positive numbers that fp32 holds in full."""


def check_scale(name: str, scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{name}: scale must be a float, got {type(scale).__name__}")
    if not LEAST <= scale <= GREATEST:
        raise ValueError(f"{name}: scale must be positive and finite in fp32, got {scale}")
    return float(scale)


def default_scale(name: str, formula: Callable[[Sizes], float], sizes: Sizes) -> float:
    """The spec's own scale, which may depend on the sizes of a call."""
    try:
        scale = formula(sizes)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{name}: the spec's scale has no value for {sizes}: {error}") from None
    return check_scale(name, scale)


def check_tensors(
    name: str, wanted: Sequence[Tensor], tensors: Sequence[torch.Tensor], known: Mapping[str, Size]
) -> Sizes:
    """Checks every argument of the package `name` and returns the sizes they agree on.

    Raises:
        TypeError, ValueError: with the argument's name, what was expected and what came.
    """
    sizes: Sizes = {}
    owner: dict[str, str] = {}
    first = tensors[0]
    for expected, t in zip(wanted, tensors, strict=True):
        where = f"{name}: {expected.name}"
        if t.dtype != expected.dtype:
            raise TypeError(f"{where} must be {expected.dtype}, got {t.dtype}")
        if t.device != first.device:
            raise ValueError(f"{where} must be on {first.device} like {wanted[0].name}, got {t.device}")
        check_shape(where, expected, t, sizes, owner)
        if expected.tiled and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{where} must be contiguous along its last axis, got strides {tuple(t.stride())}: call .contiguous()"
            )
        if expected.contiguous and not t.is_contiguous():
            raise ValueError(f"{where} must be contiguous, got strides {tuple(t.stride())}")
    for axis in [a for a in sizes if a.startswith("Sk / ")]:
        sizes["Sk"] = sizes.pop(axis) * int(axis.removeprefix("Sk / "))
    if "B + 1" in sizes:
        batch = sizes.pop("B + 1") - 1
        if batch < 0:
            raise ValueError(f"{name}: {owner['B + 1']} must hold B + 1 offsets, got none")
        if sizes.setdefault("B", batch) != batch:
            raise ValueError(f"{name}: {owner['B']} is for {sizes['B']} sequences, {owner['B + 1']} has {batch}")
    if "Sq" in sizes:
        sizes.setdefault("Sk", sizes["Sq"])  # where each key is that of a query, k has it as Sq
    for axis, size in known.items():
        check_size(name, axis, size, sizes[axis])
    return sizes


def check_size(name: str, axis: str, wanted: Size, size: int) -> None:
    if wanted.fixed not in (None, size):
        raise ValueError(f"{name}: {axis} is {size}, the spec fixes it to {wanted.fixed}")
    if size % wanted.multiple:
        raise ValueError(f"{name}: {axis} is {size}, the spec has it as a multiple of {wanted.multiple}")
    if size < wanted.least:
        raise ValueError(f"{name}: {axis} is {size}, the kernels need {wanted.least} at least")
    if size > wanted.most:
        raise ValueError(
            f"{name}: {axis} is {size}, the package was compiled for at most {wanted.most}: "
            f"raise it by `sizes: {{{axis}: {{max: …}}}}` in the spec"
        )


def check_shape(where: str, expected: Tensor, t: torch.Tensor, sizes: Sizes, owner: dict[str, str]) -> None:
    wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else str(a) for a in expected.axes)
    if t.dim() != len(expected.axes):
        raise ValueError(f"{where} must have the {len(expected.axes)} axes [{wanted}], got shape {tuple(t.shape)}")
    for n, (axis, size) in enumerate(zip(expected.axes, t.shape, strict=True)):
        known = axis if isinstance(axis, int) else sizes.get(axis, size)
        if known != size:
            why = f", as {owner[axis]} has it" if axis in owner else ""
            raise ValueError(
                f"{where} must have shape [{wanted}], got {tuple(t.shape)}: axis {n} is {size}, not {known}{why}"
            )
        if isinstance(axis, str) and axis not in sizes:
            sizes[axis], owner[axis] = size, expected.name


def check_indices(
    name: str, wanted: Sequence[Tensor], tensors: Sequence[torch.Tensor], known: Mapping[str, Size]
) -> None:
    """Checks the tensors that say where sequences lie, beyond their shapes.

    Raises:
        ValueError: with the entry that is wrong, and what was expected.
    """
    sizes = check_tensors(name, wanted, tensors, known)
    named = {expected.name: t for expected, t in zip(wanted, tensors, strict=True)}
    for text, rows in (("cu_seqlens_q", "Tq"), ("cu_seqlens_k", "Tk")):
        if text in named:
            check_offsets(f"{name}: {text}", named[text].tolist(), sizes[rows])
    if "block_table" in named:
        used: list[int] = named["seqused_k"].tolist()
        pages, page_size = named["k"].shape[:2]
        for b, (n, row) in enumerate(zip(used, named["block_table"].tolist(), strict=True)):
            if not 0 <= n <= sizes["Sk"]:
                raise ValueError(
                    f"{name}: seqused_k[{b}] is {n}, expected 0 to {sizes['Sk']}: block_table has {len(row)} pages "
                    f"of {page_size} a sequence"
                )
            for at, page in enumerate(row[: -(-n // page_size)]):
                if not 0 <= page < pages:
                    raise ValueError(
                        f"{name}: block_table[{b}, {at}] is {page}, expected 0 to {pages - 1}: "
                        f"the sequence has {n} keys, and k has {pages} pages"
                    )


def check_offsets(where: str, offsets: Sequence[int], rows: int) -> None:
    """Checks that sequences begin one behind the other, within so many rows."""
    if offsets[0] != 0:
        raise ValueError(f"{where}[0] is {offsets[0]}, expected 0")
    for at in range(1, len(offsets)):
        if offsets[at] < offsets[at - 1]:
            raise ValueError(f"{where}[{at}] is {offsets[at]}, less than {offsets[at - 1]} before it")
    if offsets[-1] > rows:
        raise ValueError(f"{where}[{len(offsets) - 1}] is {offsets[-1]}, behind the {rows} rows there are")


def own_sizes(known: Mapping[str, Size], sizes: Sizes) -> tuple[int, ...]:
    """A call's sizes of the spec's own, in the order in which kernels of TVM take them."""
    return tuple(sizes[n] for n in known if n not in RUN_TIME)


def keep(plans: dict[Any, P], key: Any, plan: P) -> P:
    """Remembers a plan for calls like this one; all are dropped before they are too many."""
    if len(plans) >= PLANS_KEPT:
        plans.clear()
    plans[key] = plan
    return plan
