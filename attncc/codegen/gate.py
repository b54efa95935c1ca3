"""Whether the engine of an emitted package may run: it is compiled for a GPU that need not be here, and looked at.

It runs in a process of its own, for it takes the place of Triton's driver.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from attncc.codegen import assembly
from attncc.codegen.elsewhere import compiled, disassembled, opened
from attncc.codegen.uniform import undefined, unwritten
from attncc.device import ARCHITECTURES

PATIENCE: Final = 120
"""Seconds, for all its configs."""
FEW: Final = 0.015
"""The share of the main loops' instructions that may reload spilled registers: six words in a turn."""
SOME: Final = 0.05
"""The same of the loops over cut tiles, of which a query tile has one or two; they are longer, by the mask."""
LONGER: Final = 1.15
"""How much longer than the shortest a loop over whole tiles may be: consumers' copies differ by a few instructions."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was seen of a compiled engine."""

    reasons: tuple[str, ...]
    """Why it must not run; empty if it may."""
    instructions: dict[str, int] = field(default_factory=dict[str, int])
    loop: dict[str, int] = field(default_factory=dict[str, int])
    """Counts by kind, in all and in the shortest turn of the innermost loops that multiply."""
    shared_bytes: int = 0


def examine(package: Path, cache: Path | None = None) -> Findings:
    """Compiles the engine of a package on disk, and judges it; `cache` keeps what is compiled, for Triton."""
    try:
        with tempfile.TemporaryDirectory(prefix="attncc-gate-") as scratch:
            child = subprocess.run(
                [sys.executable, "-m", __spec__.name, str(package)],
                env=environment(str(cache or scratch)),
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
    except subprocess.TimeoutExpired:
        return Findings((f"it does not compile within {PATIENCE} s",))
    if child.returncode:
        said = [line for line in child.stderr.splitlines() if "Error" in line] or ["no word of why"]
        return Findings((f"it does not compile: {said[-1].strip()}",))
    found = json.loads(child.stdout.splitlines()[-1])
    return Findings(**(found | {"reasons": tuple(found["reasons"])}))


def environment(scratch: str) -> dict[str, str]:
    """A child's: ours without the interpreter, and with a cache of its own."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": path, "TRITON_CACHE_DIR": scratch}


# -- inside the child ----------------------------------------------------------------------------


def judge(made: Any, said: str = "") -> Findings:
    """What is to be said of a compiled engine; `said` is what ptxas did, who is asked again where nobody listened."""
    text = disassembled(made)
    counts = assembly.read(text, assembly.SASS)
    notes = re.findall(r"C75\d\d", said or _asked_again(made.asm["ptx"]))
    reasons = [f"ptxas serialises its products ({note})" for note in notes]
    reasons += [f"ptxas reads UR{u.register} before it is written: {u.instruction}" for u in undefined(text)[:1]]
    reasons += [f"ptxas reads R{u.register} before it is written: {u.instruction}" for u in unwritten(text)[:1]]
    reasons += ["registers of its loops spill"] * spills(counts.reloads)
    return Findings(tuple(dict.fromkeys(reasons)), dict(counts.total), dict(counts.turn), made.metadata.shared)


def _asked_again(ptx: str) -> str:
    """What ptxas says of an engine."""
    ptxas = import_module("triton.backends.nvidia.compiler").get_ptxas(90).path
    with tempfile.TemporaryDirectory(prefix="attncc-gate-") as folder:
        file = Path(folder, "engine.ptx")
        file.write_text(ptx)
        command = [ptxas, "-v", "-arch=sm_90a", str(file), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(said.stderr)
    return said.stdout + said.stderr


def spills(turns: Sequence[tuple[int, int]]) -> bool:
    """Whether loops, each of so many instructions and reloads a turn, reload more than is of no account."""
    shortest = min((count for count, _ in turns), default=0)
    return any(reloads > count * (FEW if count <= LONGER * shortest else SOME) for count, reloads in turns)


def _judge_beside(made: Any) -> tuple[str, ...]:
    """What is to be said against a kernel that runs beside the engine."""
    found = unwritten(disassembled(made))[:1]
    return tuple(f"in {made.name} ptxas reads R{u.register} before it is written: {u.instruction}" for u in found)


def _main(folder: Path) -> None:
    package = opened(folder, ARCHITECTURES["sm_90"])
    import_module("triton").knobs.nvidia.dump_ptxas_log = True
    found: list[Findings] = []
    for config in _engine_configs(package):
        kernels = compiled(package, config)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            engine = next(kernels)
            log = said.getvalue()
            others = [*kernels]
        judged = judge(engine, log)
        beside = tuple(reason for x in others for reason in _judge_beside(x))
        found.append(replace(judged, reasons=(*judged.reasons, *beside)))
    reasons = tuple(dict.fromkeys(reason for f in found for reason in f.reasons))
    print(json.dumps(asdict(replace(found[0], reasons=reasons))))


def _engine_configs(package: Any) -> list[dict[str, int]]:
    """Each once: a tuned table has several."""
    rows = [config for module in package.VARIANT.configs.values() for _, config in module.TABLE]
    return [config for at, config in enumerate(rows) if config.get("ENGINE") and config not in rows[:at]]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
