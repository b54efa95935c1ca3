"""Packages compiled for the tests of what they do: imported once, with tiles as small as the shapes they are given."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.check.run import Outcome, check_case
from attncc.ir.attention import Attention

OUT: Final = Path(tempfile.mkdtemp(prefix="emitted-"))  # in the folder of the session, which ends with it
sys.path.insert(0, str(OUT))


@dataclass(frozen=True)
class Package:
    """An emitted package and the variant it was compiled from."""

    attn: Attention
    module: ModuleType
    path: Path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.attention(*args, **kwargs)

    def tiles(self, rows: int, keys: int, one_pass: int = 0, split: int = 0, fill: int = 64) -> Package:
        """Takes tiles of this shape from now on; `split` key tiles or more to a share, where it is not 0."""
        knobs = {"BM": rows, "BN": keys, "GROUP": 2, "ONE_PASS": one_pass, "num_warps": 4, "num_stages": 1}
        knobs |= {"SPLIT": split, "FILL": fill}
        self.module.VARIANT.configs["interpreter"].TABLE = (({}, knobs),)
        self.module._RUNNER.plans.clear()
        return self

    def agrees(self, case: Case) -> Outcome:
        """What the acceptance rule says of a call."""
        return check_case(self.attn, self.module.attention, case, "cpu")


def passes(p: Package, *cases: Case) -> None:
    """All of these calls are accepted, none is refused."""
    wrong = [o for o in map(p.agrees, cases) if o.verdict != "ok"]
    assert not wrong, [(str(o.case), o.verdict, o.detail, *map(str, o.deviations)) for o in wrong]


@cache
def package(body: str, name: str = "", target: str = "interpreter") -> Package:
    """The package of a spec that lacks its version and name."""
    name = name or f"emitted_{len(list(OUT.iterdir()))}"
    loaded = spec.loads(f"attncc: 1\nname: {name}\n{body}\n")
    path = driver.compile(loaded, OUT, [target])
    importlib.invalidate_caches()
    return Package(loaded.attention, importlib.import_module(name), path)


CALLED: Final = """
import sys
import torch
folder, name, calls, count = sys.argv[1:]
sys.path.insert(0, folder)
attention = __import__(name).attention
for at in range(int(count)):
    try:
        print(attention(**torch.load(f"{calls}/{at}.pt")).isfinite().all().item())
    except ValueError as error:
        print(error)
"""


def said_when_checked(p: Package, calls: Sequence[dict[str, torch.Tensor]], folder: Path) -> list[str]:
    """Of each call with ATTNCC_CHECK=1: whether its output is finite, or the error without the package's name.

    In a process of its own: the variable is read when a package is imported.
    """
    for at, x in enumerate(calls):
        torch.save(x, folder / f"{at}.pt")
    done = subprocess.run(
        [sys.executable, "-c", CALLED, str(p.path.parent), p.path.name, str(folder), str(len(calls))],
        env={**os.environ, "ATTNCC_CHECK": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.removeprefix(f"{p.attn.name}: ") for line in done.stdout.splitlines()]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
