"""Runs an emitted package on every case and judges each result by the acceptance rule."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import torch
from torch import Tensor

from attncc.check.cases import REFUSABLE, Case, cases
from attncc.check.operands import Operands, draw
from attncc.device import Device
from attncc.ir.attention import Attention
from attncc.ir.keeping import keep
from attncc.reference import Deviation, acceptance

Verdict = Literal["ok", "refused", "WRONG", "raised"]

TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
AS_KEPT: Final = "keys were drawn as the cache holds them: attention was checked, not the steps that append takes"
_numbers = count()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one case went; `refused` is a clear error where one is allowed, `raised` an error where none is."""

    case: Case
    verdict: Verdict
    deviations: tuple[Deviation, ...] = ()
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict in ("ok", "refused")

    def as_data(self) -> dict[str, Any]:
        deviations = {d.output: {"error": d.error, "eager": d.eager, "limit": d.limit} for d in self.deviations}
        sizes = {"B": self.case.B, "Sq": self.case.Sq, "Sk": self.case.Sk, "trait": self.case.trait}
        return sizes | {"verdict": self.verdict, "deviations": deviations, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found."""

    name: str
    device: str
    dtype: str
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(o.passed for o in self.outcomes)

    @property
    def summary(self) -> str:
        good = sum(o.passed for o in self.outcomes)
        return (
            f"{self.name}: {good} of {len(self.outcomes)} cases agree with the oracle on {self.device} in {self.dtype}"
        )

    def as_data(self) -> dict[str, Any]:
        head = {"name": self.name, "device": self.device, "dtype": self.dtype, "passed": self.passed}
        return head | {"notes": list(self.notes), "cases": [o.as_data() for o in self.outcomes]}


def check_package(
    attn: Attention,
    package: Path,
    device: Device,
    shapes: Iterable[Mapping[str, int]] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    seed: int = 0,
    captured: Mapping[str, Tensor] = {},
) -> Report:
    """Compares the package of `attn` with the oracle, on `device`: small shapes where it is the CPU.

    Inputs are drawn, but for those in `captured`.
    """
    todo = cases(attn, shapes, large=device.is_gpu)
    place = "cuda" if device.is_gpu else "cpu"
    outcomes: list[Outcome] = []
    with imported(package) as module:
        for done, case in enumerate(todo):
            progress(str(case), done, len(todo))
            outcomes.append(check_case(attn, module.attention, case, place, seed, captured))
    progress("done", len(todo), len(todo))
    notes = () if keep(attn).kept is None else (AS_KEPT,)
    return Report(attn.name, device.name, attn.dtype, tuple(outcomes), notes)


@contextmanager
def imported(package: Path) -> Iterator[ModuleType]:
    """The package as a module under a name of its own, forgotten afterwards."""
    name = f"attncc_checked_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(package)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]


def check_case(
    attn: Attention,
    attention: Callable[..., Any],
    case: Case,
    device: str,
    seed: int = 0,
    captured: Mapping[str, Tensor] = {},
) -> Outcome:
    """Calls `attention` with the operands of `case` and judges what comes back.

    The keys of a cache are drawn as it holds them, behind the steps that it has behind it.
    """
    attn = keep(attn)

    def drawn(which: Case) -> Operands:
        operands = draw(attn, which, TORCH_DTYPES[attn.dtype], torch.Generator(device).manual_seed(seed))
        given = {name: x.to(device) for name, x in captured.items()}
        return replace(operands, inputs={**operands.inputs, **given})

    operands = drawn(case)
    try:
        got = _call(attn, attention, operands)
        if case.trait == "nan_neighbour":
            clean = _call(attn, attention, drawn(replace(case, trait="random")))
            return _unmoved(attn, case, got, clean, operands.compared)
    except Exception as error:  # whatever the package raises is this case's outcome
        clear = case.trait in REFUSABLE and isinstance(error, TypeError | ValueError)
        return Outcome(case, "refused" if clear else "raised", detail=f"{type(error).__name__}: {error}")
    return _judge(attn, case, got, operands)


def _judge(attn: Attention, case: Case, got: tuple[Tensor, Tensor | None], x: Operands) -> Outcome:
    """By the acceptance rule; a result of the wrong shape is wrong."""
    o, lse = got
    out = (o, lse) if lse is not None else o
    arguments: dict[str, Any] = {"inputs": x.inputs, **x.offsets}
    if x.cache:  # what codes stand for is given, and not rounded again
        attn = replace(attn, quantize=tuple(z for z in attn.quantize if z.operand != "cache"))
    try:
        agreement = acceptance(out, attn, x.q, x.k, x.v, **arguments)
    except ValueError as error:
        return Outcome(case, "WRONG", detail=str(error))
    return Outcome(case, "ok" if agreement.ok else "WRONG", agreement.deviations)


def has_lse(attn: Attention) -> bool:
    """Whether a call can return the log-sum-exp."""
    return attn.wants("lse") and all(part.normalizer.kind == "softmax" for part in attn.parts)


def _call(attn: Attention, attention: Callable[..., Any], x: Operands) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"triton\.")  # its interpreter computes on NaN through NumPy
        if has_lse(attn):
            return attention(*x.positional, **x.keywords, return_lse=True)
        return attention(*x.positional, **x.keywords), None


def _unmoved(
    attn: Attention,
    case: Case,
    got: tuple[Tensor, Tensor | None],
    clean: tuple[Tensor, Tensor | None],
    compared: int,
) -> Outcome:
    """The sequences before the one of NaN have the results they have beside an ordinary one, but for rounding."""
    lse_axis = 1 if attn.layout == "varlen" else 0
    for x, y, axis in zip(got, clean, (0, lse_axis), strict=True):
        if x is None or y is None:
            continue
        ours, theirs = x.narrow(axis, 0, compared), y.narrow(axis, 0, compared)
        # another kernel may do the rows again that NaN has spoilt, and round otherwise
        rounding = 0.0 if attn.numerics.reproducible == "batch" else 4 * torch.finfo(x.dtype).eps
        if not torch.allclose(ours, theirs, rtol=rounding, atol=rounding, equal_nan=False):
            return Outcome(case, "WRONG", detail="NaN in another sequence changes this one's result")
    return Outcome(case, "ok", detail="the same as beside ordinary values")
