"""On a CUDA GPU: every example against the oracle, and what only a GPU can show, by each back-end."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from carried import LOWERINGS

from attncc import driver, spec
from attncc.codegen.backends import BACKENDS

pytestmark = pytest.mark.gpu

EXAMPLES = [
    pytest.param(path, backend, id=f"{backend}-{path.stem}")
    for path, lowerings in LOWERINGS.items()
    for backend in BACKENDS
    if f"{backend}: forward" in lowerings
]
CUDA = "cuda"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def package(folder: Path, name: str, body: str, backend: str) -> ModuleType:
    """A package compiled for the GPU that is here."""
    name = f"{name}_{backend}"
    driver.compile(spec.loads(f"attncc: 1\nname: {name}\n{body}\n"), folder, backend=backend)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, dtype=dtype)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention in fp64; a row that sees no key is 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    s = q.double() @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(s.softmax(-1)) @ v


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.isfinite(got).all()
    assert float((got.double() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize(("path", "backend"), EXAMPLES)
def test_examples_agree_with_the_oracle(path: Path, backend: str) -> None:
    report = driver.check(path, backend=backend)
    wrong = [o for o in report.outcomes if not o.passed]
    assert not wrong, "\n".join(map(str, wrong))


VARIANTS = {
    "sigmoid": "mask: causal\nnormalizer: sigmoid\noutputs: [o]",
    "relu": "mask: causal\nnormalizer: relu\noutputs: [o]",
    "linear": "score: exp(qk * 0.1)\nmask: causal & window(90)\nnormalizer: linear(0.1)\noutputs: [o]",
    "sinks": "inputs: {z: {shape: [Hq], dtype: bf16}}\nmask: causal\nnormalizer: softmax(sink=z[h])",
    "ranges": "mask: (j < 3) | ((j >= 162) & (j < 270) & causal) | ((i - j < 40) & causal)",
    "bias": "inputs: {w: {shape: [Hq, Sq, Sk], dtype: fp16}}\nscore: qk * scale + w[h, row, j]\nmask: causal",
    "small_blocks": "inputs: {on: {shape: [Hq, m, n], dtype: bool}}\nmask: causal & on[h, i // 16, j // 16]",
    "starts": "inputs: {w: {shape: [], dtype: int32}, starts: {shape: [B], dtype: int32}}\n"
    "align: starts\nmask: causal & window(w)",
    "packed": "inputs: {ids: {shape: [Sk], dtype: int32}}\nlayout: varlen\nmask: ids[i] == ids[j]",
    "bshd": "layout: bshd\nmask: causal & window(100)",
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_the_oracle(name: str, dtype: str, backend: str) -> None:
    heads = "{q: 6, kv: 2, map: tile}" if name == "ranges" else "{q: 4, kv: 2}"
    text = f"attncc: 1\nname: variant\nheads: {heads}\ndims: {{qk: 64, v: 40}}\ndtype: {dtype}\n{VARIANTS[name]}\n"
    report = driver.check(spec.loads(text), backend=backend)
    wrong = [o for o in report.outcomes if not o.passed]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("ratio", [1, 3, 5, 8])
def test_any_ratio_of_heads(folder: Path, ratio: int, backend: str) -> None:
    m = package(folder, f"ratio_{ratio}", f"heads: {{q: {2 * ratio}, kv: 2}}\ndims: 64\nmask: causal", backend)
    q, k, v = normal(2, 2 * ratio, 1100, 64), normal(2, 2, 1100, 64), normal(2, 2, 1100, 64)
    seen = torch.ones(1100, 1100, device=CUDA, dtype=torch.bool).tril()
    close(m.attention(q, k, v), exact(q, k, v, seen))


@pytest.mark.parametrize(
    "dims", [(1, 1), (7, 7), (16, 16), (40, 24), (72, 72), (96, 96), (160, 160), (192, 128), (256, 256)]
)
def test_any_head_dim(folder: Path, dims: tuple[int, int], backend: str) -> None:
    d, e = dims
    m = package(folder, f"dims_{d}_{e}", f"heads: 4\ndims: {{qk: {d}, v: {e}}}", backend)
    q, k, v = normal(2, 4, 700, d), normal(2, 4, 900, d), normal(2, 4, 900, e)
    close(m.attention(q, k, v), exact(q, k, v))


def test_strides(folder: Path, backend: str) -> None:
    """Views that tensor maps can and cannot read: transposed, expanded, with odd strides, unaligned."""
    m = package(folder, "strides", "heads: {q: 4, kv: 4}\ndims: 64\nmask: causal", backend)
    s = 700
    seen = torch.ones(s, s, device=CUDA, dtype=torch.bool).tril()
    base = normal(2, s, 3, 4, 64)
    transposed = [base[:, :, n].transpose(1, 2) for n in range(3)]
    expanded = [normal(2, 4, s, 64), normal(1, 1, s, 64).expand(2, 4, s, 64), normal(2, 1, s, 64).expand(2, 4, s, 64)]
    odd = [normal(2, 4, s, 67)[..., :64] for _ in range(3)]
    unaligned = [normal(2 * 4 * s * 64 + 1)[1:].view(2, 4, s, 64) for _ in range(3)]
    for q, k, v in (transposed, expanded, odd, unaligned):
        close(m.attention(q, k, v), exact(q, k, v, seen))


def test_storage_beyond_two_to_the_31(folder: Path, backend: str) -> None:
    m = package(folder, "far", "heads: 2\ndims: 64\nmask: causal", backend)
    s, step = 600, 2**31 + 64
    seen = torch.ones(s, s, device=CUDA, dtype=torch.bool).tril()
    store = torch.empty(step + s * 64, device=CUDA, dtype=torch.bfloat16)
    far = store.as_strided((1, 2, s, 64), (2 * step, step, 64, 1))
    far.normal_()
    close(m.attention(far, far, far), exact(far, far, far, seen))
    del store, far
    torch.cuda.empty_cache()


def test_more_than_two_to_the_31_elements(folder: Path, backend: str) -> None:
    m = package(folder, "many", "heads: 8\ndims: 128\nmask: causal & window(64)", backend)
    b, s = 17, 2**17
    q = normal(b, 8, s, 128)
    assert q.numel() > 2**31
    o = m.attention(q, q, q)
    tail = slice(s - 256, s)
    i = torch.arange(256, device=CUDA)
    seen = (i[:, None] >= i) & (i[:, None] - i < 64)
    x = q[b - 1 :, 7:, tail]
    close(o[b - 1 :, 7:, tail][:, :, 64:], exact(x, x, x, seen)[:, :, 64:])


def test_hidden_values_do_not_leak(folder: Path, backend: str) -> None:
    """Large calls take two launches, small ones one; NaN and inf stay with the rows that see them."""
    m = package(folder, "hidden", "heads: 2\ndims: 64\nmask: causal", backend)
    for b, s in ((1, 300), (8, 1500)):
        q, k, v = (normal(b, 2, s, 64) for _ in range(3))
        v[:, :, s // 2 :] = torch.nan
        k[:, :, s // 2 + 3 :] = torch.inf
        o = m.attention(q, k, v)
        seen = torch.ones(s // 2, s // 2, device=CUDA, dtype=torch.bool).tril()
        x = [t[:, :, : s // 2] for t in (q, k, v)]
        close(o[:, :, : s // 2], exact(*x, seen))
        assert torch.isnan(o[:, :, s // 2 :]).all()


def test_graph_capture(folder: Path, backend: str) -> None:
    m = package(folder, "graphed", "heads: 4\ndims: 64\nmask: causal & window(100)", backend)
    q, k, v = (normal(2, 4, 900, 64) for _ in range(3))
    m.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = m.attention(q, k, v)
    for t in (q, k, v):
        t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, m.attention(q, k, v))


def test_two_streams(folder: Path, backend: str) -> None:
    m = package(
        folder,
        "streamed",
        "inputs: {ids: {shape: [Sk], dtype: int32}}\nheads: 4\ndims: 64\nmask: ids[i] == ids[j]",
        backend,
    )
    data: list[dict[str, Any]] = []
    for n in range(2):
        ids = torch.randint(0, 3 + n, (2000,), device=CUDA, dtype=torch.int32)
        data.append({"q": normal(1, 4, 2000, 64), "k": normal(1, 4, 2000, 64), "v": normal(1, 4, 2000, 64), "ids": ids})
    wanted = [m.attention(**d) for d in data]
    streams = [torch.cuda.Stream() for _ in data]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[n].append(m.attention(**data[n]))
    torch.cuda.synchronize()
    assert all(torch.equal(o, wanted[n]) for n in range(2) for o in got[n])


def test_torch_compile_and_opcheck(folder: Path, backend: str) -> None:
    m = package(folder, "traced", "heads: 4\ndims: 64\nmask: causal", backend)
    compiled = torch.compile(lambda q, k, v: m.attention(q, k, v) * 2.0, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for s in (300, 450):
            q, k, v = (normal(2, 4, s, 64) for _ in range(3))
            assert torch.allclose(compiled(q, k, v), m.attention(q, k, v) * 2.0)
    torch.library.opcheck(getattr(torch.ops, f"attncc_traced_{backend}").forward.default, (q, k, v, None))


def test_wrong_device(folder: Path, backend: str) -> None:
    m = package(folder, "placed", "heads: 4\ndims: 64", backend)
    q = normal(1, 4, 64, 64)
    with pytest.raises(ValueError, match=r"k must be on cuda:0 like q, got cpu"):
        m.attention(q, q.cpu(), q)
    with pytest.raises(RuntimeError, match=r"need an? (NVIDIA )?GPU"):
        m.attention(q.cpu(), q.cpu(), q.cpu())


def test_no_gradient(folder: Path, backend: str) -> None:
    m = package(folder, "forward_only", "heads: 4\ndims: 64", backend)
    q = normal(1, 4, 64, 64)
    with pytest.raises(RuntimeError, match=r"q requires a gradient"):
        m.attention(q.clone().requires_grad_(), q, q)


def test_head_dims_that_tensor_cores_hold_in_pieces(folder: Path) -> None:
    m = package(folder, "wide", "heads: 4\ndims: 512", "triton")
    q, k, v = (normal(2, 4, n, 512) for n in (700, 900, 900))
    close(m.attention(q, k, v), exact(q, k, v))


def test_calls_from_threads(folder: Path, backend: str) -> None:
    """A thread that never called CUDA has no context yet."""
    m = package(folder, "threaded", "heads: 4\ndims: 64\nmask: causal", backend)
    q, k, v = (normal(2, 4, 500, 64) for _ in range(3))
    want = m.attention(q, k, v)
    with ThreadPoolExecutor(4) as pool:
        got = [*pool.map(lambda _: m.attention(q, k, v), range(64))]
    torch.cuda.synchronize()
    assert all(torch.equal(o, want) for o in got)


def test_cubins_need_no_triton(folder: Path) -> None:
    package(folder, "bare", "heads: 4\ndims: 64\nmask: causal", "tvm")
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = sys.modules['tvm'] = sys.modules['attncc'] = None\n"
        "import bare_tvm\n"
        "q = torch.randn(1, 4, 100, 64, device='cuda', dtype=torch.bfloat16)\n"
        "want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
        "assert (bare_tvm.attention(q, q, q) - want).abs().max() < 0.05\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


PREBUILT = {
    "dense": "heads: {q: 4, kv: 2}\ndims: 64\nmask: causal",
    "bias": "inputs: {w: {shape: [Hq, Sq, Sk], dtype: fp16}}\nheads: 4\ndims: 64\nscore: qk * scale + w[h, row, j]",
    "packed": "layout: varlen\nheads: 4\ndims: 128\nmask: causal",
}


def prebuilt_calls(name: str) -> Iterator[dict[str, Any]]:
    """Small and large, odd and even, aligned and not."""
    for b, s in ((1, 100), (2, 12), (2, 1024), (3, 1501)):
        if name == "packed":
            ends = torch.arange(b + 1, device=CUDA, dtype=torch.int32) * s
            q, k, v = (normal(b * s, 4, 128) for _ in range(3))
            yield {"q": q, "k": k, "v": v, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
            continue
        kv = 2 if name == "dense" else 4
        more = {"w": normal(4, s, s, dtype=torch.float16)} if name == "bias" else {}
        k, v = normal(b, kv, s, 64), normal(b, kv, s, 64)
        wide = normal(b, kv, s, 67)[..., 1:65]
        yield {"q": normal(b, 4, s, 64), "k": k, "v": v} | more
        yield {"q": normal(b, 4, s, 67)[..., :64], "k": wide, "v": v} | more
        yield {"q": normal(b, s, 4, 64).transpose(1, 2), "k": k, "v": v} | more


@pytest.mark.parametrize("name", PREBUILT)
def test_cubins_compute_what_triton_does(folder: Path, name: str) -> None:
    """To the last bit, in a graph and on a stream of its own too."""
    arch = f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    plain = package(folder, f"ordinary_{name}", PREBUILT[name], "triton")
    driver.compile(spec.loads(f"attncc: 1\nname: ahead_{name}\n{PREBUILT[name]}\n"), folder, aot=[arch])
    importlib.invalidate_caches()
    ahead = importlib.import_module(f"ahead_{name}")
    for call in prebuilt_calls(name):
        both = [m.attention(**call, return_lse=True) for m in (plain, ahead)]
        assert all(torch.equal(got, want) for want, got in zip(*both, strict=True))
        assert torch.equal(ahead.attention(**call), want := plain.attention(**call))
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()
            assert torch.equal(ahead.attention(**call), want)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = ahead.attention(**call)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, want)
    assert ahead._RUNNER.other is None
    assert f"aot/{arch}" in ahead.choose(CUDA, B=1, Sq=64, Sk=64, Tq=64, Tk=64)[1]


def test_cubins_of_triton_kernels_need_neither_triton_nor_a_compiler(folder: Path) -> None:
    arch = f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    driver.compile(spec.loads("attncc: 1\nname: lone\nheads: 4\ndims: 64\nmask: causal\n"), folder, aot=[arch])
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = sys.modules['tvm'] = sys.modules['attncc'] = None\n"
        "import lone\n"
        "for s in (100, 3000):\n"
        "    q = torch.randn(2, 4, s, 64, device='cuda', dtype=torch.bfloat16)\n"
        "    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
        "    assert (lone.attention(q, q, q) - want).abs().max() < 0.05\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CC"} | {"PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
