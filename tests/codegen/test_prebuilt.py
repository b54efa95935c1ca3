"""Packages with cubins: what the driver is told, against the cubin itself and against what Triton would tell it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.nvidia import driver as nvidia
from typer.testing import CliRunner

from attncc import driver, spec
from attncc.cli import app
from attncc.codegen import _index, prebuilt
from attncc.errors import CompilerBug, SpecError, Unsupported

SPEC = "attncc: 1\nname: ahead\nheads: {q: 2, kv: 1}\ndims: 16\ndtype: fp16\nmask: causal\n"
SMALL = {
    "BM": 16, "BN": 16, "GROUP": 1, "ONE_PASS": 1, "TMA": 0, "SPLIT": 0, "FILL": 1, "num_warps": 1, "num_stages": 1,
    "maxnreg": 0,
}  # fmt: skip
CONFIGS = {"sm_80": SMALL, "sm_90": SMALL | {"TMA": 1}}
STREAM = 0x77


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """One config an architecture."""
    out = tmp_path_factory.mktemp("ahead")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "default_configs", lambda attn, device, **_: ((({}, CONFIGS[device.arch]),), "a test's"))
        patch.syspath_prepend(out)
        driver.compile(spec.loads(SPEC), out, aot=["sm_80", "sm_90"])
        yield importlib.import_module("ahead")


class Driver:
    """CUDA's driver as far as packages use it; keeps what it is told."""

    def __init__(self) -> None:
        self.codes: list[bytes] = []
        self.names: list[str] = []
        self.maps: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.shared: list[tuple[int, int]] = []

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        return 0

    cuCtxSetCurrent = cuFuncSetCacheConfig = lambda *_: 0

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        self.codes.append(code)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        self.names.append(name.decode())
        function._obj.value = len(self.names)
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self.shared.append((attribute, value))
        return 0

    def cuTensorMapEncodeTiled(self, goal: Any, kind: int, rank: int, address: Any, *others: Any) -> int:
        assert goal.value % 64 == 0
        self.maps.append((kind, rank, address.value, *(x if isinstance(x, int) else [*x] for x in others)))
        ctypes.memmove(goal.value, struct.pack("<128s", b"map %d" % (len(self.maps) - 1)), 128)
        return 0

    def cuLaunchKernel(self, function: Any, *given: Any) -> int:
        *block, stream, each, extra = given
        assert extra is None
        sizes = [size for _, size in parameters(self.codes[function.value - 1], self.names[function.value - 1])]
        content = [ctypes.string_at(at, size) for at, size in zip(each, sizes, strict=True)]
        self.launches.append((function.value, block, stream.value, content))
        return 0


@pytest.fixture
def cuda(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A stand-in for the driver and for an H100."""
    fake = Driver()
    monkeypatch.setattr(package._prebuilt._driver, "driver", lambda: fake)
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    package._RUNNER.functions.clear()
    package._RUNNER.cubins.clear()
    return fake


# -- what stands in a cubin ----------------------------------------------------------------------


def parameters(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """(offset, size) of a kernel's parameters, by the records that ptxas leaves for the driver."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names_at = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + 64 * n) for n in range(count)]
    names = cubin[sections[names_at][4] :]
    texts = {names[s[0] : names.index(b"\0", s[0])].decode(): cubin[s[4] : s[4] + s[5]] for s in sections}
    info, at, found = texts[f".nv.info.{kernel}"], 0, {}
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if (form, attribute) == (4, 0x17):  # EIFMT_SVAL, EIATTR_KPARAM_INFO
            _, ordinal, offset, packed = struct.unpack_from("<IHHI", info, at + 4)
            found[ordinal] = offset, packed >> 18
        at += 4 + (size if form == 4 else 0)
    return [found[n] for n in range(len(found))]


@pytest.mark.newest
@pytest.mark.parametrize("arch", CONFIGS)
def test_parameters_lie_as_the_cubin_has_them(package: ModuleType, arch: str) -> None:
    folder = Path(package.__file__ or "").parent / "aot" / arch
    found = _index.read(folder / "index.json")["ahead_forward"]
    assert len(found) == {"sm_80": 4, "sm_90": 6}[arch]
    for cubin in found:
        fields, size = _index.laid_out(cubin.places)
        theirs = parameters((folder / cubin.file).read_bytes(), cubin.symbol)
        first = theirs[0][0]  # maps are put on 64 bytes of constant memory, where parameters do not begin
        assert [(f.offset, _index.FORMATS[f.kind].size) for f in fields] == [(at - first, n) for at, n in theirs]
        assert size == sum(theirs[-1]) - first


# -- what the driver is told ---------------------------------------------------------------------


def launches(runner: Any, package: ModuleType, tensors: list[torch.Tensor], lse: bool, maps: bool) -> tuple[Any, Any]:
    """The launches of a call, and its tensors with those that it makes."""
    q, k, _ = tensors
    sizes = {"B": q.shape[0], "Sq": q.shape[2], "Sk": k.shape[2]}
    plan = package._prebuilt._gpu.Plan(1.0, tuple(q.shape), tuple(q.shape[:3]) if lse else None, [], [], 0)
    made = runner.launches(plan, tensors, sizes, CONFIGS["sm_90"], lse, maps)
    scratch = [torch.zeros(shape, dtype=dtype) for shape, dtype in plan.scratch]
    return made, [*tensors, torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[:3]) if lse else None, *scratch]


def by_triton(launch: Any, given: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What Triton 3.6 would hand over, constants too, and its tensor maps as its C code has them."""
    maps: list[Any] = []

    def fill(at: int, swizzle: int, item: int, kind: int, box: Any, shape: Any, strides: Any, padding: int) -> str:
        steps = [item * step for step in strides[:-1]]
        ones = [1] * len(shape)
        maps.append((kind, len(shape), at, shape[::-1], steps[::-1], box[::-1], ones, 0, swizzle, 2, padding))
        return f"map {len(maps) - 1}"

    monkeypatch.setattr(
        triton.runtime.driver, "_active", SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill))
    )
    told: list[Any] = []
    for x in launch.prepared(launch.bound, given, 0.25, launch.make_map):
        if hasattr(x, "block_shape"):
            meta = {"swizzle": 1, "elem_size": 2, "elem_type": 6, "block_size": x.block_shape, "fp4_padded": False}
            told += nvidia.make_tensordesc_arg(x, meta)
        else:
            told.append(x.data_ptr() if isinstance(x, torch.Tensor) else x)
    return told, maps


def value(content: bytes, like: Any) -> Any:
    if len(content) == 128:
        return content.rstrip(b"\0").decode()
    return struct.unpack({8: "<q", 4: "<f" if isinstance(like, float) else "<i"}[len(content)], content)[0]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float16)


CALLS = {
    "plain": lambda: [normal(2, h, n, 16) for h, n in ((2, 40), (1, 56), (1, 56))],
    "one entry, one head": lambda: [normal(1, h, n, 16) for h, n in ((2, 33), (1, 17), (1, 17))],
    "transposed": lambda: [normal(2, n, h, 16).transpose(1, 2) for h, n in ((2, 40), (1, 56), (1, 56))],
    "odd strides": lambda: [normal(2, h, n, 19)[..., :16] for h, n in ((2, 40), (1, 56), (1, 56))],
    "unaligned": lambda: [normal(2 * h * n * 16 + 1)[1:].view(2, h, n, 16) for h, n in ((2, 40), (1, 56), (1, 56))],
}


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_launch_is_what_triton_would_launch(
    package: ModuleType, cuda: Driver, call: str, lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, tensors = package._RUNNER, CALLS[call]()
    maps = runner.maps_fit(tensors)
    assert maps == (call not in ("odd strides", "unaligned"))
    (ours,), given = launches(runner, package, tensors, lse, maps)
    other = runner.by_triton("a test")
    monkeypatch.setattr(other, "way", replace(other.way, interpreted=False))
    (theirs,), _ = launches(other, package, tensors, lse, maps)
    ours(given, 0.25, STREAM)
    ours(given, 0.25, STREAM)
    told, encoded = by_triton(theirs, given, monkeypatch)
    constants = {"BM", "BN", "GROUP", "WRITE_LSE", "PASS", "TMA"}
    told = [x for x in told[: -len(constants)] if x is not None]
    function, block, stream, content = cuda.launches[0]
    assert [value(c, like) for c, like in zip(content, [*told, 0, 0], strict=True)] == [*told, 0, 0]
    assert [m[:8] + m[9:] for m in cuda.maps] == [m[:8] + m[9:] for m in encoded]  # the swizzle is the compiler's
    assert block == [theirs.programs, 1, 1, 32, 1, 1, ours.cubin.shared_bytes]
    assert (function, stream) == (1, STREAM)
    assert cuda.launches[1] == cuda.launches[0]
    assert cuda.names == ["ahead_forward"]
    assert cuda.shared == [(8, ours.cubin.shared_bytes)]


@pytest.mark.newest
def test_the_most_special_cubin_is_taken(package: ModuleType, cuda: Driver) -> None:
    """By the pointers and strides of q, k and v."""
    assumed: dict[str, set[int]] = {}
    for call, tensors in CALLS.items():
        (launch,), _ = launches(package._RUNNER, package, tensors(), True, False)
        assumed[call] = {p.detail for p in (*launch.cubin.places[:3], *launch.cubin.places[6:15])}
    assert assumed.pop("odd strides") == assumed.pop("unaligned") == {1}
    assert all(x == {16} for x in assumed.values())


def test_numbers_of_64_bits_are_not_cut(package: ModuleType, cuda: Driver) -> None:
    q, step = torch.empty(1, 2, 40, 16, dtype=torch.float16, device="meta"), 2**33
    far = [q.as_strided((1, n, 40, 16), (step, step // 2, 16, 1)) for n in (2, 1, 1)]
    (launch,), _ = launches(package._RUNNER, package, far, False, False)
    assert launch.content.count(struct.pack("<q", step // 2)) >= 3
    assert not any(_prebuilt_fits(package, "i32", x) for x in (2**31, -(2**31) - 1, None, 1.0))


def _prebuilt_fits(package: ModuleType, kind: str, x: Any) -> bool:
    return package._prebuilt.fits(_index.Place(kind, 1), x)


def test_a_persistent_launch_takes_its_tuple_apart(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an engine: a counter, an output that is not wanted, entries of a tuple; the options are its own."""
    module = package._prebuilt
    properties = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    counter, nowhere, x = torch.zeros(3, dtype=torch.int32), torch.zeros(1), torch.zeros(8)
    persistent = importlib.import_module("ahead._persistent")
    monkeypatch.setattr(persistent, "counter", lambda: counter)
    monkeypatch.setattr(persistent, "nowhere", lambda: nowhere)
    launch = module.PersistentCubin(module.Named("_hopper", "forward"), 90, {})
    parameters = [("tensor", "lse"), ("counter",), ("args", ("tensor", "x"), ("size", "n")), ("programs",)]
    flat = launch.flat(parameters)
    launch.bound.arguments = [None, None, None, launch.own(3, "programs"), None, 5]
    launch.own(1, "counter")
    launch.bound.tensors = [(0, 0), (4, 1)]
    places = [_index.place(*p) for p in (["pointer", 16], ["pointer", 16], ["pointer", 1], ["i32", 1], ["i32", 1])]
    cubin = _index.Cubin("f", "0", "forward", 288, 0, {"num_warps": 4}, tuple(places))
    assert launch.take([replace(cubin, options={"num_warps": 8}), cubin], [None, x]) is cubin
    assert (launch.programs, flat[-1]) == (7, ("size", "n"))
    assert launch.changing == [(0, "pointer", 0), (8, "pointer", 1), (16, "pointer", 2)]
    assert struct.unpack_from("<ii", launch.content, 24) == (5, 90)
    assert launch.offsets == [0, 8, 16, 24, 28, 32, 40]


# -- what has no cubin ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90")]
)
def test_a_gpu_runs_cubins_of_its_own_generation(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert package._RUNNER.find(torch.device("cuda", 0)) == arch


@pytest.mark.parametrize("capability", [(7, 5), (9, 1), (10, 0), (12, 0)])
def test_other_gpus_have_none(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(package._prebuilt.Missing, match=rf"sm_80, sm_90, none for sm_{capability[0]}{capability[1]}"):
        package._RUNNER.find(torch.device("cuda", 0))


def test_amd_s_gpus_have_none(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(package._prebuilt.Missing, match="none for AMD's GPUs"):
        package._RUNNER.find(torch.device("cuda", 0))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)
    is_cuda = True


@pytest.mark.parametrize("on_miss", ["warn", "default", "error"])
def test_a_miss_is_not_silent(package: ModuleType, monkeypatch: pytest.MonkeyPatch, on_miss: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    runner = package._prebuilt.Runner(replace(package.VARIANT, on_miss=on_miss), ("sm_80", "sm_90"))
    monkeypatch.setattr(runner, "file", lambda *_: (SimpleNamespace(TABLE=(({}, SMALL),)), "a test's"))
    tensors = [x.as_subclass(Elsewhere) for x in CALLS["plain"]()]
    other = runner.by_triton("a test")
    monkeypatch.setattr(other, "plan", lambda *given: given[1:])
    said = "ahead: there are cubins for sm_80, sm_90, none for sm_100"
    if on_miss == "error":
        with pytest.raises(RuntimeError, match=f"^{said}, and on_miss is 'error'$"):
            runner.plan(tensors, True, False)
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert runner.plan(tensors, True, False) == (True, False)
    assert [str(w.message) for w in heard] == [f"{said}: Triton compiles one"] * (on_miss == "warn")


@pytest.mark.parametrize("knob", ["BM", "BN", "GROUP", "num_warps", "num_stages"])
def test_a_config_that_was_not_compiled_is_missing(
    package: ModuleType, cuda: Driver, monkeypatch: pytest.MonkeyPatch, knob: str
) -> None:
    monkeypatch.setitem(CONFIGS, "sm_90", CONFIGS["sm_90"] | {knob: 32})
    with pytest.raises(package._prebuilt.Missing, match="ahead_forward has no cubin"):
        launches(package._RUNNER, package, CALLS["plain"](), False, True)


def test_without_a_gpu_calls_are_interpreted(package: ModuleType) -> None:
    q, k, v = CALLS["plain"]()
    got = package.attention(q, k[:, :, :40], v[:, :, :40])
    want = torch.nn.functional.scaled_dot_product_attention(
        q, *(x[:, :, :40].expand_as(q) for x in (k, v)), is_causal=True
    )
    assert (got - want).abs().max() < 0.01


ALONE = """
import sys
sys.modules["triton"] = sys.modules["attncc"] = None
import torch, ahead
q = torch.zeros(1, 2, 8, 16, dtype=torch.float16)
try:
    ahead.attention(q, q[:, :1], q[:, :1])
except RuntimeError as error:
    print(error)
print(sorted(m for m in sys.modules if m.startswith("triton.")))
"""


@pytest.mark.newest
def test_a_package_is_imported_without_triton(package: ModuleType) -> None:
    where = Path(package.__file__ or "").parents[1]
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=where, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "tensors are on cpu, cubins need a GPU, and Triton, which would compile one, is not installed",
        "[]",
    ], done.stderr


# -- what is damaged -----------------------------------------------------------------------------

CUBIN = {
    "file": "f.cubin", "digest": "0", "symbol": "f", "threads": 32, "shared_bytes": 0, "options": {"num_warps": 1},
    "places": [["pointer", 16]],
}  # fmt: skip
MAP = {"dtype": 6, "item": 2, "swizzle": 1, "box": [1, 1, 16, 16]}


def damaged(**changes: Any) -> str:
    return json.dumps({"f": [{k: v for k, v in (CUBIN | changes).items() if v is not ...}]})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '{"f": 3}', '{"f": [3]}', '{"f": [{}]}', damaged(file=3), damaged(file="../f"),
        damaged(file="/f"), damaged(file=...), damaged(more=1), damaged(threads=-1), damaged(threads="32"),
        damaged(shared_bytes=2**31), damaged(options=3), damaged(options={"num_warps": "4"}), damaged(places=3),
        damaged(places=[3]), damaged(places=[["pointer"]]), damaged(places=[["pointer", 0]]),
        damaged(places=[["i128", 1]]), damaged(places=[["constant", "x"]]), damaged(places=[["map", 3]]),
        damaged(places=[["map", MAP | {"box": 3}]]), damaged(places=[["map", MAP | {"item": None}]]),
        damaged(places=[["map", MAP | {"more": 1}]]), damaged(places=[["i32", True]]),
        damaged(places=[["i32", 1, 1]]),
    ],
)  # fmt: skip
def test_damaged_indices(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(_index.Damaged, match=r"index\.json is no index of cubins"):
        _index.read(tmp_path / "index.json")


def test_a_sound_index_is_read(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(damaged(places=[["pointer", 16], ["map", MAP], ["constant", None], ["fp32"]]))
    assert [p.kind for p in _index.read(tmp_path / "index.json")["f"][0].places] == [
        "pointer",
        "map",
        "constant",
        "fp32",
    ]


def test_lost_and_altered_files(
    package: ModuleType, cuda: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(package._prebuilt, "FOLDER", tmp_path)
    again = "compile the package again with --aot sm_90"
    with pytest.raises(RuntimeError, match=rf"^ahead: aot/sm_90: index\.json cannot be read .*: {again}$"):
        package._RUNNER.read("sm_90")
    (tmp_path / "sm_90").mkdir()
    cubin = _index.cubin(CUBIN)
    with pytest.raises(RuntimeError, match=rf"^ahead: aot/sm_90: f\.cubin cannot be read .*: {again}$"):
        package._RUNNER.load(torch.device("cuda", 0), "sm_90", cubin)
    (tmp_path / "sm_90" / "f.cubin").write_bytes(b"other code")
    with pytest.raises(RuntimeError, match=rf"^ahead: aot/sm_90: f\.cubin is not what was compiled: {again}$"):
        package._RUNNER.load(torch.device("cuda", 0), "sm_90", cubin)
    with pytest.raises(RuntimeError, match=r"of f takes 300000 bytes of shared memory, this GPU has 232448"):
        package._RUNNER.load(torch.device("cuda", 0), "sm_90", replace(cubin, shared_bytes=300_000))
    assert not cuda.codes


# -- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aot", "others", "said"),
    [
        ("sm_91", (), "unknown target 'sm_91'"),
        ("", (), "unknown target ''"),
        ("sm_80,", (), "unknown target ''"),
        ("cpu", (), "no cubin runs on target 'cpu'"),
        ("sm_80,interpreter", (), "no cubin runs on target 'interpreter'"),
        ("gfx942", (), "no cubin runs on target 'gfx942'"),
        ("sm_90", ("--backend", "tvm"), "--aot is for Triton's kernels"),
    ],
)
def test_wrong_requests(tmp_path: Path, aot: str, others: tuple[str, ...], said: str) -> None:
    (tmp_path / "ahead.yaml").write_text(SPEC)
    result = CliRunner().invoke(
        app, ["compile", str(tmp_path / "ahead.yaml"), "-o", str(tmp_path), "--aot", aot, *others]
    )
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "ahead").exists()


def test_nothing_asked_for() -> None:
    assert prebuilt.ahead(None, "tvm") == ()
    with pytest.raises(SpecError, match="names no architecture"):
        prebuilt.ahead([], None)


def test_aot_is_a_target_too() -> None:
    def names(*given: Any) -> list[str]:
        return [d.name for d in driver.resolve(*given)]

    assert names(None, ["sm_80", "sm_90"]) == ["sm_80", "sm_90"]
    assert names(["nvidia_h200", "cpu"], ["sm_90", "sm_80"]) == ["nvidia_h200", "cpu", "sm_80"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_scratch_size": 128}, "memory of Triton's"),
        ({"profile_scratch_size": 8}, "a profiler's memory"),
        ({"num_ctas": 2, "launch_cooperative_grid": True}, "a cluster and a cooperative grid"),
        ({"launch_cooperative_grid": True}, "a cooperative grid"),
    ],
)
def test_what_no_plain_launch_gives_is_refused(changes: dict[str, Any], said: str) -> None:
    plain = {
        "global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "launch_cooperative_grid": False,
    }  # fmt: skip
    with pytest.raises(Unsupported, match=f"kernel f needs {said}, which"):
        prebuilt._entry("f", {}, SimpleNamespace(metadata=SimpleNamespace(**plain | changes)))


@pytest.mark.parametrize("kind", ["fp16", "i8", "i1", "u64"])
def test_types_of_arguments_that_are_refused(kind: str) -> None:
    with pytest.raises(Unsupported, match=f"an argument of type {kind}"):
        prebuilt._place(kind, None, (), iter(()))


def test_a_child_that_fails_is_heard(tmp_path: Path) -> None:
    with pytest.raises(CompilerBug, match=r"(?s)'absent' do not compile for sm_90.*No module named 'absent'"):
        prebuilt.prebuild(tmp_path / "absent", "sm_90", ["sm_90"])
