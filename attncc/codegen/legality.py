"""Whether a config can run on a GPU that need not be here, read off the machine code that it makes.

Run as a process: `python -m attncc.codegen.legality PACKAGE DEVICE` answers each line {"config": {...}} on standard
input by one line, what it found as JSON. What is compiled stays in Triton's cache for whoever runs it next.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from attncc.codegen import assembly
from attncc.codegen.answer import answer
from attncc.codegen.aot import only
from attncc.codegen.elsewhere import compiled, disassembled, has_pieces, is_careful, opened, resource_usage
from attncc.codegen.gate import judge
from attncc.codegen.uniform import undefined, unwritten
from attncc.device import Device, parse

MANY: Final = 64
"""Words that a thread may reload in a turn of a main loop and still be worth a try."""
UNUSED: Final = {"registers": 0, "spill_bytes": 0, "shared_bytes": 0}


@dataclass(frozen=True, slots=True)
class Found:
    """What a config's kernels take, the largest of each, and why they must not run; empty if they may."""

    reasons: tuple[str, ...] = ()
    registers: int = 0
    """Per thread."""
    spill_bytes: int = 0
    """Of a thread's own memory, where registers go that do not fit; tiles that are done again aside."""
    shared_bytes: int = 0


def judged(package: Any, config: Mapping[str, int], device: Device) -> Found:
    """Compiles the kernels of a call with this config, and judges each by what it takes and what ptxas made of it."""
    try:
        kernels = [*compiled(package, config)]
        if config.get("TMA") and has_pieces(package):  # of which ptxas spoils more where no tensor map reads them
            kernels += compiled(package, config, aligned=False)
    except Exception as error:  # whatever the compiler raises is this config's answer
        return Found((f"it does not compile: {type(error).__name__}: {error}"[:1000],))
    reasons: list[str] = []
    used = dict(UNUSED)
    for number, made in enumerate(kernels):
        taken = _takes(made, device) | ({"spill_bytes": 0} if is_careful(made) else {})
        used = {what: max(n, taken[what]) for what, n in used.items()}
        reasons += _excess(made, taken, device)
        if number == 0 and config.get("ENGINE"):
            reasons += judge(made).reasons
        elif "cubin" in made.asm:
            reasons += _faults(made, None if config.get("ENGINE") or is_careful(made) else MANY)
    return Found(tuple(dict.fromkeys(reasons)), **used)


def _takes(made: Any, device: Device) -> dict[str, int]:
    shared = {"shared_bytes": made.metadata.shared}
    if "cubin" in made.asm:
        said = resource_usage(made)
        return shared | {"registers": int(only(r"\bREG:(\d+)", said)), "spill_bytes": int(only(r"\bSTACK:(\d+)", said))}
    text = made.asm["amdgcn"]
    spilled = 4 * int(only(r"\.vgpr_spill_count:\s+(\d+)", text))
    return shared | {"registers": int(only(r"\.vgpr_count:\s+(\d+)", text)), "spill_bytes": spilled}


def _excess(made: Any, taken: Mapping[str, int], device: Device) -> list[str]:
    """What one program takes that the device does not have."""
    threads = made.metadata.num_warps * device.warp_size
    have = (
        ("bytes of shared memory", taken["shared_bytes"], device.shared_bytes_per_block),
        ("registers", taken["registers"] * threads, device.registers_per_sm),
    )
    return [f"{made.name} takes {n} {what}, {device.name} has {most}" for what, n, most in have if n > most]


def _faults(made: Any, few: int | None) -> list[str]:
    """Registers read before they are written, and those of a main loop that do not fit; `few` may be reloaded."""
    text = disassembled(made)
    lost = [*undefined(text)[:1], *unwritten(text)[:1]]
    reasons = [f"in {made.name} ptxas reads register {u.register} before it is written: {u.instruction}" for u in lost]
    spilled = assembly.read(text, assembly.SASS).turn.get("spill_load", 0)
    return [*reasons, *[f"{made.name} reloads {spilled} words a turn"] * (few is not None and spilled > few)]


def _main(folder: Path, device: Device) -> None:
    for module in ("torch", "triton"):  # seconds, in which the package may still be on its way
        import_module(module)
    package = cache(lambda: opened(folder, device))
    answer(lambda question: asdict(judged(package(), question["config"], device)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), parse(sys.argv[2]))
