"""The process in which configs are tried: it may crash, hang or poison its GPU, and is then replaced.

Run as `python -m attncc.autotune.trial PACKAGE DEVICE SEED`; questions name a method of `Bench` and its arguments, as
{"do": name, ...}. A trial's answer has a `status`: `measured`, `wrong` or `failed`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from attncc import spec
from attncc.autotune.declared import Shape, as_declared, sizes_of
from attncc.autotune.record import Certificate
from attncc.autotune.sparsity import kept
from attncc.autotune.timing import samples, summary
from attncc.check.cases import Case, cases
from attncc.check.operands import Operands, draw
from attncc.check.run import TORCH_DTYPES, check_case, has_lse, imported
from attncc.codegen.answer import answer
from attncc.device import Device, parse
from attncc.ir.keeping import keep
from attncc.ir.widths import exit_width

Config = Mapping[str, int]
Answer = dict[str, Any]

ROUNDS: Final = 6
"""Of a comparison."""
ROOM: Final = 2**34
"""Bytes of operands that are kept for the next config."""
APART: Final = 16.0
"""Units in the last place of the largest result by which two right configs may differ."""


class Bench:
    """A package on one device, the operands of its shapes, and what its trusted configs made of them."""

    def __init__(self, folder: Path, module: Any, device: Device, seed: int) -> None:
        self.attn = keep(spec.load(folder / "spec.yaml").attention)
        self.module, self.device, self.seed = module, device, seed
        self.place = "cuda" if device.is_gpu else "cpu"
        self.operands: dict[str, Operands] = {}
        self.trusted: dict[str, Tensor] = {}

    def describe(self, shape: Shape) -> Answer:
        """The share of the pairs that the masks of this shape's call keep, and its sparsity."""
        found = kept(self.attn, self._drawn(shape))
        return {"kept": found.share, "sparsity": found.sparsity.model_dump()}

    def measure(self, shape: Shape, config: Config, trusted: Config, seconds: float, cold: bool) -> Answer:
        """The time of a config that computes what the trusted one does, near enough to be worth a check."""
        x = self._drawn(shape)
        key = json.dumps(shape, sort_keys=True)
        if key not in self.trusted:
            self._use(trusted)
            self.trusted[key] = self._call(x)
        self._use(config)
        why = _difference(self._poisoned(x), self.trusted[key])
        if why:
            return {"status": "wrong", "why": why}
        return {"status": "measured", **summary(samples(lambda: self._call(x), self.device, seconds, cold))}

    def certify(self, config: Config) -> Answer:
        """The certificate of a config: compared with fp64 on shapes and operands that are known to be hard."""
        self._use(config)
        todo = cases(self.attn, large=self.device.is_gpu)
        worst = 0.0
        for case in todo:
            outcome = check_case(self.attn, self.module.attention, case, self.place, self.seed)
            if not outcome.passed:
                errors = ", ".join(f"{d.output} {d.error:.1e} > {d.limit:.1e}" for d in outcome.deviations)
                return {"status": "wrong", "why": f"{case}: {outcome.detail or errors}"}
            worst = max([worst, *(d.error / d.limit for d in outcome.deviations if d.limit)])
        inputs = tuple(dict.fromkeys(case.trait for case in todo))
        certificate = Certificate(cases=len(todo), inputs=inputs, worst=min(worst, 1.0))
        return {"status": "measured", "certificate": certificate.model_dump()}

    def compare(self, shape: Shape, configs: list[Config], seconds: float, cold: bool) -> Answer:
        """Times of several configs in turn, in rounds."""
        x = self._drawn(shape)
        rounds: list[list[float]] = [[] for _ in configs]
        for number in range(ROUNDS):
            order = range(len(configs)) if number % 2 else range(len(configs) - 1, -1, -1)
            for at in order:
                self._use(configs[at])
                found = samples(lambda: self._call(x), self.device, seconds / ROUNDS / len(configs), cold)
                rounds[at].append(summary(found)["ms"])
        return {"status": "measured", "rounds": rounds}

    def choices(self) -> Answer:
        """The configs that the package has for this device, each once; why these, and their certificate if any."""
        runner = getattr(self.module._RUNNER, "gpu", self.module._RUNNER)
        table, rule = runner.file(torch.device(self.place))
        configs = [config for _, config in table.TABLE]
        once = [c for n, c in enumerate(configs) if c not in configs[:n]]
        return {"configs": once, "rule": rule, "certificate": getattr(table, "CERTIFICATE", {})}

    def _use(self, config: Config) -> None:
        """This config for every call from now on."""
        for table in self.module.VARIANT.configs.values():
            table.TABLE = (({}, config),)
        runner = self.module._RUNNER
        getattr(runner, "gpu", runner).plans.clear()

    def _drawn(self, shape: Shape) -> Operands:
        key = json.dumps(shape, sort_keys=True)
        if key not in self.operands:
            if sum(map(_bytes, self.operands.values())) > ROOM:
                self.operands.clear()
            generator = torch.Generator(self.place).manual_seed(self.seed)
            sizes = sizes_of(shape)
            x = draw(self.attn, Case(sizes["B"], sizes["Sq"], sizes["Sk"]), TORCH_DTYPES[self.attn.dtype], generator)
            self.operands[key] = as_declared(self.attn, x, shape, generator)
        return self.operands[key]

    def _call(self, x: Operands) -> Tensor:
        more = {"return_lse": True} if has_lse(self.attn) else {}
        out = self.module.attention(*x.positional, **x.keywords, **more)
        return out[0] if more else out

    def _poisoned(self, x: Operands) -> Tensor:
        """The result of a call whose output lies where NaN was before."""
        shape = (*x.q.shape[:-1], exit_width(self.attn))
        torch.full(shape, torch.nan, dtype=x.q.dtype, device=x.q.device)
        return self._call(x)


def _bytes(x: Operands) -> int:
    return sum(t.nbytes for t in (*x.positional, *x.keywords.values()))


def _difference(got: Tensor, trusted: Tensor) -> str:
    """What is wrong with a result; empty if it is near the trusted one."""
    if not bool(got.isfinite().all()):
        return "the output holds NaN or infinity"
    apart = (got.double() - trusted.double()).abs().max().item()
    limit = APART * torch.finfo(got.dtype).eps * trusted.double().abs().max().item()
    return f"the output is {apart:.2e} off the default config's, at most {limit:.2e} is rounding" * (apart > limit)


def _main(folder: Path, device: Device, seed: int) -> None:
    if device.is_gpu:
        torch.cuda.init()
    with torch.no_grad(), ExitStack() as stack:

        @cache
        def bench() -> Bench:
            return Bench(folder, stack.enter_context(imported(folder)), device, seed)

        asked = (Bench.describe, Bench.measure, Bench.certify, Bench.compare, Bench.choices)
        questions = {f.__name__: f for f in asked}

        def handle(question: dict[str, Any]) -> Answer:
            ask = questions[question.pop("do")]
            try:
                found = ask(bench(), **question)
                if device.is_gpu:
                    torch.cuda.synchronize()
            except Exception as error:  # whatever the package or its GPU raises is this trial's outcome
                return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:1500]}
            return found

        answer(handle)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), parse(sys.argv[2]), int(sys.argv[3]))
