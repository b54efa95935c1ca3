"""CPU packages where they are deployed: what they need, what they refuse and how, and what building them needs."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import codegen.test_calls as calls
import pytest
import torch
from built import built
from codegen.emitted import Package, normal
from codegen.test_packages import PLAIN
from jitted import RUNNABLE

from attncc import driver, spec
from attncc.codegen.tvm.operators import OPERATORS
from attncc.errors import Unsupported

CAUSAL = f"{PLAIN}mask: causal"

# -- in another process --------------------------------------------------------------------------

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("attncc", "tvm", "triton"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Nothing())
sys.path.insert(0, "{folder}")
import torch
import {name} as package

def near(o, q, k):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)

for rows in (1, 3, 90):
    q, k = torch.randn(2, 4, rows, 16), torch.randn(2, 2, 90, 16)
    near(package.attention(q, k, k), q, k)
print(package.choose("cpu", Sq=64)[1])
assert not {{"attncc", "tvm", "triton"}} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with every library, alone in a folder."""
    folder = tmp_path_factory.mktemp("deployed")
    return driver.compile(spec.loads(f"attncc: 1\nname: deployed\n{CAUSAL}\n"), folder, ["cpu"])


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("capability", ["", "avx2"])
def test_it_needs_neither_attncc_nor_tvm_nor_triton(deployed: Path, capability: str, tmp_path: Path) -> None:
    limit = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    done = run(ALONE.format(folder=deployed.parent, name=deployed.name), tmp_path, **limit)
    assert done.returncode == 0, done.stderr
    if capability:
        assert done.stdout == "the library cpu/avx2.so\n"


def test_a_processor_of_another_kind(deployed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clear error before any of its instructions runs."""
    done = run(ALONE.format(folder=deployed.parent, name=deployed.name), tmp_path, ATEN_CPU_CAPABILITY="default")
    assert "RuntimeError: deployed: this processor (x86_64, " in done.stderr
    assert "runs none of the libraries built: avx2, avx512" in done.stderr
    one = built(f"{CAUSAL}\nscale: 0.3", "avx2")
    q = normal(1, 4, 5, 16)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match=r"this processor \(aarch64, .*\) runs none of the libraries built: avx2"):
        one(q, q[:, :2], q[:, :2])


def test_every_instruction_set_of_this_machine_is_built(deployed: Path) -> None:
    found = {p.name: p.stat().st_size for p in (deployed / "cpu").iterdir()}
    assert set(found) == {"avx512.so", "avx2.so"}
    assert max(found.values()) < 300_000
    assert not (deployed / "kernels.py").exists()


def test_a_package_for_here_alone_has_the_library_that_is_chosen_here(deployed: Path, tmp_path: Path) -> None:
    alone = driver.compile(deployed / "spec.yaml", tmp_path, ["cpu"], portable=False)
    (library,) = (alone / "cpu").iterdir()
    assert library.stem == RUNNABLE[0].name
    assert library.read_bytes() == (deployed / "cpu" / library.name).read_bytes()


def test_the_same_spec_gives_the_same_libraries(deployed: Path, tmp_path: Path) -> None:
    again = driver.compile(deployed / "spec.yaml", tmp_path, ["cpu"])
    for library in (deployed / "cpu").iterdir():
        assert library.read_bytes() == (again / "cpu" / library.name).read_bytes()


def test_a_package_compiled_again_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    q, k = normal(1, 4, 50, 16), normal(1, 2, 50, 16, seed=1)
    results: list[torch.Tensor] = []
    for mask in ("causal", "window(3)"):
        loaded = spec.loads(f"attncc: 1\nname: again\n{PLAIN}mask: {mask}\n")
        driver.compile(loaded, tmp_path, ["cpu"])
        for module in [m for m in sys.modules if m == "again" or m.startswith("again.")]:
            del sys.modules[module]
        importlib.invalidate_caches()
        results.append(importlib.import_module("again").attention(q, k, k))
        want = built(f"{PLAIN}mask: {mask}")(q, k, k)
        assert torch.equal(results[-1], want)
    assert not torch.equal(*results)


# -- bad calls -----------------------------------------------------------------------------------


class Untiled:
    """A package in whose libraries tiles have one size."""

    def __init__(self, package: Package) -> None:
        self.package = package

    def tiles(self, rows: int, keys: int) -> Package:
        return self.package


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "package", lambda body: Untiled(built(body)))


ELSEWHERE = "tensors are on meta, the package was compiled for CPUs alone: compile it with --target for that device too"
BAD = calls.BAD | {"all elsewhere": (calls.BAD["all elsewhere"][0], RuntimeError, ELSEWHERE)}
CUTS = "cu_seqlens_{} must rise from 0 to at most 20, got "
CHANGED: dict[str, tuple[str, list[int], str]] = {
    "not from 0": ("q", [1, 7, 20], "[1, 7, 20]"),
    "below 0": ("k", [-1, 7, 20], "[-1, 7, 20]"),
    "falling": ("k", [0, 9, 7], "[0, 9, 7]"),
    "behind the end": ("q", [0, 7, 21], "[0, 7, 21]"),
    "far behind": ("k", [0, 7, 2**31 - 1], "[0, 7, 2147483647]"),
}


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case: str) -> None:
    """The messages are the GPU's."""
    changes, kind, text = BAD[case]
    with pytest.raises(kind, match=re.escape(text)) as raised:
        calls.call(**changes)
    assert raised.type is kind


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("case", calls.BAD_PACKED)
def test_bad_packed_calls(case: str) -> None:
    changes, kind, text = calls.BAD_PACKED[case]
    with pytest.raises(kind, match=re.escape(text)):
        calls.call_packed(**changes)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("case", CHANGED)
def test_offsets_that_would_leave_the_tensor(case: str) -> None:
    which, starts, text = CHANGED[case]
    with pytest.raises(ValueError, match=re.escape(CUTS.format(which) + text)):
        calls.call_packed(**{f"cu_seqlens_{which}": torch.tensor(starts, dtype=torch.int32)})


@pytest.mark.usefixtures("on_the_cpu")
def test_a_bad_call_spoils_nothing() -> None:
    before = calls.call()
    with pytest.raises(ValueError, match="v must"):
        calls.call(v=calls.strided)
    assert torch.equal(calls.call(), before)
    assert calls.call_packed().shape == (20, 2, 16)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)])
def test_empty_calls(shape: tuple[int, int, int]) -> None:
    b, rows, keys = shape
    k = normal(b, 2, keys, 16)
    o, lse = built(CAUSAL)(normal(b, 4, rows, 16), k, k, return_lse=True)
    assert o.shape == (b, 4, rows, 16)
    assert lse.shape == (b, 4, rows)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


# -- building ------------------------------------------------------------------------------------


def test_without_a_linker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(Unsupported, match="a CPU library needs a linker") as raised:
        driver.compile(spec.loads(f"attncc: 1\nname: unlinked\n{CAUSAL}\n"), tmp_path, ["cpu"])
    assert raised.value.hint == "install one of ld, cc, gcc, clang"
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_nothing_is_built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(Unsupported, match="no CPU library is built for riscv64") as raised:
        driver.compile(spec.loads(f"attncc: 1\nname: unbuilt\n{CAUSAL}\n"), tmp_path, ["cpu"])
    assert raised.value.hint == "it is for x86_64, aarch64"


def test_a_linker_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fails = (sys.executable, "-c", "raise SystemExit('no such emulation')")
    monkeypatch.setattr("attncc.codegen.tvm.build.LINKERS", (fails,))
    with pytest.raises(Unsupported, match=r"cannot link for avx512: no such emulation"):
        driver.compile(spec.loads(f"attncc: 1\nname: unlinked\n{CAUSAL}\n"), tmp_path, ["cpu"])


def test_without_tvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in [m for m in sys.modules if m.startswith("attncc.codegen.tvm")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(Unsupported, match="built by TVM, which is not installed") as raised:
        driver.compile(spec.loads(f"attncc: 1\nname: without\n{CAUSAL}\n"), tmp_path, ["cpu"])
    assert raised.value.hint == "pip install apache-tvm, or choose a GPU with --target"
    assert driver.compile(spec.loads(f"attncc: 1\nname: without\n{CAUSAL}\n"), tmp_path, ["sm_90"]).is_dir()


def test_tvm_is_imported_only_where_it_builds() -> None:
    script = "import sys, attncc.driver, attncc.cli; print('tvm' in sys.modules)"
    done = run(script, Path(__file__).parents[2], PYTHONPATH=".")
    assert done.stdout == "False\n", done.stderr


def test_what_cpu_kernels_do_not_have_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(OPERATORS, "erf")
    text = f"attncc: 1\nname: without_erf\n{PLAIN}score: qk * scale + erf(h)\n"
    with pytest.raises(Unsupported, match="CPU kernels have no 'erf'") as raised:
        driver.compile(spec.loads(text), tmp_path, ["cpu"])
    assert raised.value.key == "score"
    assert raised.value.location is not None
