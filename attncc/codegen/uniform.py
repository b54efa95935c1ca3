"""Registers that disassembled GPU code reads before anything wrote them.

ptxas 12.8, which Triton 3.6 ships, computes what two pieces of code share (parts of wgmma's matrix descriptors) at the
entry of the first, even where that may be skipped, or at the kernel's entry from what is not known there: the second
then multiplies whatever lies at some address. No message says so. This finds it, by the rule that no path from a
kernel's entry may reach a read of a uniform register without a write, nor all paths a read of another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

INSTRUCTION: Final = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?\w+)?\s*([A-Z0-9_.]+)\s*(.*?)\s*;")
LABEL: Final = re.compile(r"^(\.L_x_\d+):")
TARGET: Final = re.compile(r"`\((\.L_x_\d+)\)")
REGISTER: Final = re.compile(r"\bUR(\d+)\b")
DESCRIPTOR: Final = re.compile(r"gdesc\[UR(\d+)\]")
WRITERS: Final = re.compile(r"^(?:U(?!TMA|BLK|CGA|SETMAX|ISETP|PLOP|FSETP)|R2UR|S2UR|VOTEU|REDUX)")
"""Opcodes whose first operand is a uniform register that they write."""
COPIES: Final = frozenset({"IMAD.U32", "MOV"})
"""What moves a register that is written under a predicate: it is used under that, too."""
COPY: Final = re.compile(r"(P\d), PT, PT, PT, (UP\d), 0x80, 0x0")
"""Operands by which a predicate becomes a copy of a uniform one."""
VECTOR: Final = re.compile(r"(?<!\w)R(\d+)\b")
"""A register that each thread has its own of."""
SPAN: Final = {"HGMMA": 128, "QGMMA": 128}
"""So many registers an instruction writes from the one that is printed on; others up to 4."""
ZERO: Final = 63
"""URZ, which is printed by name; and how many there are."""


@dataclass(frozen=True, slots=True)
class Instruction:
    predicate: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    writes: frozenset[int]
    reads: frozenset[int]


@dataclass(frozen=True, slots=True)
class Writes:
    """What is written for certain by an instruction, and before it if it does not branch, or does; and what is written
    before it under a predicate."""

    whole: frozenset[int]
    passed: frozenset[int]
    taken: frozenset[int]
    half: frozenset[int]


@dataclass(frozen=True, slots=True)
class Undefined:
    """A read that some path reaches first."""

    register: int
    instruction: str


def undefined(text: str) -> tuple[Undefined, ...]:
    """Every such read of a uniform register in a kernel's SASS, as nvdisasm -c prints it."""
    code, labels = _parse(text)
    if not code:
        return ()
    writes = [*_certain_writes(code, frozenset(labels.values()))]
    before = _written_before(code, _edges(code, labels), writes)
    certain = ((at, x) for at, x in enumerate(code) if not x.predicate)  # predicates of one meaning have many names
    return tuple(
        Undefined(r, x.text)
        for at, x in certain
        for r in sorted(x.reads)
        if not before[at] >> r & 1 and not (x.opcode in COPIES and r in writes[at].half)
    )


def unwritten(text: str) -> tuple[Undefined, ...]:
    """Every read of another register that no path has written: predicates aside, no sound read is among them."""
    code, labels = _parse(text)
    if not code:
        return ()
    follows = _edges(code, labels)
    may = [_may_write(x) for x in code]
    before = [0] * len(code)
    todo = [0]
    seen = {0}
    while todo:
        at = todo.pop()
        after = before[at] | may[at]
        for to in follows[at]:
            if to not in seen or after & ~before[to]:
                before[to] |= after
                seen.add(to)
                todo.append(to)
    found: list[Undefined] = []
    for at in sorted(seen):
        x = code[at]
        written = 0 if _stores(x) else 1 + (re.match(r"U?P[T\d]", "".join(x.operands[:1])) is not None)
        read = {int(n) for operand in x.operands[written:] for n in VECTOR.findall(operand)}
        if x.opcode.startswith("LOP3"):  # predicates are kept as bits of a register that nothing cleared
            continue
        if x.opcode.startswith((*SPAN, "PRMT")):  # a product that adds to nothing, half of a register: both name it
            read -= {int(n) for n in VECTOR.findall(x.operands[0])}
        found += (Undefined(r, x.text) for r in sorted(read) if not before[at] >> r & 1)
    return tuple(found)


def _stores(x: Instruction) -> bool:
    return x.opcode.startswith(("ST", "RED", "BAR", "SYNCS", "WARPSYNC", "NANOSLEEP", "CCTL"))


def _may_write(x: Instruction) -> int:
    """Registers of the first operands, of which one may be a predicate, and some behind them: rather too many; bits."""
    written = 0
    if not _stores(x):
        some = (1 << SPAN.get(x.opcode.partition(".")[0], 4)) - 1
        for operand in x.operands[:2]:
            for found in VECTOR.finditer(operand):
                written |= some << int(found[1])
    return written


@lru_cache(maxsize=1)  # both questions are about one text, of some ten thousand instructions
def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(_instruction(*found.groups(default="")))
    return code, labels


def _instruction(predicate: str, opcode: str, rest: str) -> Instruction:
    operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
    writes: set[int] = set()
    at = int(re.match(r"U?P\d", rest) is not None)  # a predicate may stand before what is written
    target = "".join(operands[at : at + 1])
    if WRITERS.match(opcode) and (found := re.fullmatch(r"UR(\d+)", target)):
        first = int(found[1])
        writes = {first, first + 1} if ".64" in opcode or "WIDE" in opcode else {first}
    reads: set[int] = set()
    elected = opcode.startswith("UTMA")  # one lane runs it, and wrote its operands under a predicate
    for operand in () if elected else operands[at + 1 :] if writes else operands:
        if "UR" not in operand:
            continue
        for found in DESCRIPTOR.finditer(operand):  # both operands' descriptors; A's is unused where registers hold it
            first = int(found[1])
            a = "".join(operands[1:2])
            held = re.fullmatch(r"R\d+", a) is not None
            reads |= set(range(first + 2 if held else first, first + 4))
        reads |= {int(n) for n in REGISTER.findall(DESCRIPTOR.sub("", operand))}
    text = f"{predicate} {opcode} {rest}".strip()
    return Instruction(predicate, opcode, operands, text, frozenset(writes), frozenset(reads))


def _edges(code: list[Instruction], labels: Mapping[str, int]) -> list[list[int]]:
    """What may follow each instruction. An indirect branch leads to every label that nothing before it leads to."""
    follows: list[list[int]] = []
    indirect: list[int] = []
    for at, x in enumerate(code):
        kind = x.opcode.partition(".")[0]
        target = TARGET.search(", ".join(x.operands)) if kind == "BRA" else None
        if target:
            may_pass = bool(x.predicate) or any("UP" in operand and "`" not in operand for operand in x.operands)
            follows.append([labels[target[1]], *([at + 1] if may_pass else [])])
        elif kind == "BRX":
            indirect.append(at)
            follows.append([])
        else:
            follows.append([] if kind in ("EXIT", "RET") and not x.predicate else [at + 1])
    led_to = {to for at, targets in enumerate(follows) for to in targets if at < to}
    for at in indirect:
        follows[at] += [to for to in labels.values() if to not in led_to]
    return [[to for to in targets if to < len(code)] for targets in follows]


def _written_before(code: list[Instruction], follows: list[list[int]], writes: Sequence[Writes]) -> list[int]:
    """For each instruction the set, as bits, of registers that every path to it has written."""
    comes_from: list[list[tuple[int, int]]] = [[] for _ in code]
    for at, targets in enumerate(follows):
        for to in targets:
            comes_from[to].append((at, _bits(writes[at].passed if to == at + 1 else writes[at].taken)))
    whole = [_bits(w.whole) for w in writes]
    every = (1 << ZERO) - 1
    before, after = [every] * len(code), [every] * len(code)
    changed = True
    while changed:
        changed = False
        for at in range(len(code)):
            known = 0 if at == 0 else every
            for source, on_the_way in comes_from[at]:
                known &= after[source] | on_the_way
            before[at] = known
            if after[at] != known | whole[at]:
                after[at], changed = known | whole[at], True
    return before


def _bits(registers: Iterable[int]) -> int:
    return sum(1 << r for r in {*registers})


def _certain_writes(code: list[Instruction], heads: frozenset[int]) -> Iterator[Writes]:
    """Under a predicate a register is written for certain if it was under the opposite one, too.

    A branch tells which of the two holds: behind it, registers are written that were under this one alone.
    """
    half: dict[int, set[str]] = {}
    same: dict[str, str] = {}
    for at, x in enumerate(code):
        half, same = ({}, {}) if at in heads else (half, same)
        opposite = _opposite(x.predicate)
        whole = frozenset(r for r in x.writes if not x.predicate or opposite in half.get(r, ()))
        branches = x.opcode.startswith("BRA") and x.predicate != ""
        passed, taken = (
            frozenset(r for r, under in half.items() if branches and {p, _named(p, same)} & under)
            for p in (opposite, x.predicate)
        )
        yield Writes(whole, passed, taken, frozenset(half))
        _note_half(half, same, x)


def _opposite(predicate: str) -> str:
    return predicate.replace("@!", "@") if "!" in predicate else predicate.replace("@", "@!")


def _named(predicate: str, same: Mapping[str, str]) -> str:
    """A predicate by the name of the one that it is a copy of."""
    sign, text = re.fullmatch(r"(@?!?)(\w*)", predicate).groups()  # type: ignore[union-attr]
    return sign + same.get(text, text)


def _note_half(half: dict[int, set[str]], same: dict[str, str], x: Instruction) -> None:
    """Keeps, for each register, the predicates under which it was written since they were last set; and copies."""
    for operand in x.operands[:2]:
        sets = "SETP" in x.opcode or "PLOP" in x.opcode or operand.startswith("UP")  # carries are predicates too
        if sets and re.fullmatch(r"U?P\d", operand):
            for under in half.values():
                under -= {f"@{operand}", f"@!{operand}"}
            for copy in [c for c, of in same.items() if operand in (c, of)]:
                del same[copy]
    copied = COPY.fullmatch(", ".join(x.operands)) if x.opcode == "PLOP3.LUT" and not x.predicate else None
    if copied:
        same[copied[1]] = copied[2]
    if x.predicate:
        for r in x.writes:
            half.setdefault(r, set()).add(x.predicate)
