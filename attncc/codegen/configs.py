"""The configs of one target as a module of an emitted package: plain data."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attncc.codegen.call import sentence
from attncc.codegen.parameters import mapping
from attncc.codegen.source import WIDTH, Writer, filled
from attncc.ir.attention import Attention

Scalar = str | int | float | bool
Plain = Scalar | tuple[Scalar, ...] | Mapping[str, tuple[Scalar, ...]]
Facts = Mapping[str, Plain]
Measured = tuple[Mapping[str, int], float, float | None]
"""Sizes, the milliseconds of their config, and those of what would run untuned, where that was measured."""


@dataclass(frozen=True, slots=True)
class TargetConfigs:
    """What a package knows of one target: rows of (upper bounds of sizes, config), the last without bounds."""

    target: str
    rows: tuple[tuple[Mapping[str, int], Mapping[str, int]], ...]
    origin: str
    """How the configs were found: a default rule, or a measurement and its certificate."""
    device: Facts = field(default_factory=dict[str, Plain])
    """Of a tuned card: by which another one is found to be like it."""
    certificate: Facts = field(default_factory=dict[str, Plain])
    """Of tuned configs: what was measured where, and how often compared with the oracle."""
    measured: tuple[Measured, ...] = ()

    @property
    def is_tuned(self) -> bool:
        return bool(self.certificate)


def uses_engine(configs: TargetConfigs) -> bool:
    return any(config.get("ENGINE") for _, config in configs.rows)


def configs_text(attn: Attention, t: TargetConfigs) -> str:
    """The module's text."""
    w = Writer()
    w.line(f'"""Configs of {attn.name} for {t.target}: plain data.')
    w.line()
    w.block(textwrap.wrap(sentence(t.origin), WIDTH) if t.is_tuned else [t.origin])
    w.line('"""')
    w.line()
    for title, facts in (("DEVICE", t.device), ("CERTIFICATE", t.certificate)):
        if facts:
            _facts(w, title, facts)
    if t.measured:
        w.line("# sizes, ms, and ms of the default rule's config")
        w.line("MEASURED = (")
        with w.indented():
            w.block(f"({mapping(sizes)}, {ms:.6g}, {_default(default)})," for sizes, ms, default in t.measured)
        w.line(")")
    w.line("# the first row whose bounds hold: ({size: at most}, config)")
    w.line("TABLE = (")
    with w.indented():
        for bounds, config in t.rows:
            w.line(f"({mapping(bounds)},")
            first, *others = filled(f'"{k}": {v}' for k, v in config.items())
            lines = [f" {{{first}", *(f"  {line}" for line in others)]
            w.block([*lines[:-1], f"{lines[-1].removesuffix(',')}}}),"])
    w.line(")")
    return w.text()


def _default(ms: float | None) -> str:
    return "None" if ms is None else f"{ms:.6g}"


def _facts(w: Writer, title: str, facts: Facts) -> None:
    w.line(f"{title} = {{")
    with w.indented():
        w.block(filled(f'"{k}": {_scalar(v)}' for k, v in facts.items() if isinstance(v, SCALARS)))
        for key, value in facts.items():
            if isinstance(value, SCALARS):
                continue
            words = [f'"{k}": {_tuple(v)}' for k, v in value.items()] if isinstance(value, Mapping) else _each(value)
            w.line(f'"{key}": {"{" if isinstance(value, Mapping) else "("}')
            with w.indented():
                w.block(filled(words))
            w.line("}," if isinstance(value, Mapping) else "),")
    w.line("}")


SCALARS: Final = (str, int, float)


def _each(values: Sequence[Scalar]) -> list[str]:
    return [_scalar(value) for value in values]


def _tuple(values: Sequence[Scalar]) -> str:
    return f"({', '.join(_each(values))})"


def _scalar(value: Scalar) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
