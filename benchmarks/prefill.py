"""Prefill forward: attncc against FlexAttention and cuDNN's SDPA, interleaved in one process a case.

`python -m benchmarks.prefill emit DIR` writes the packages (any machine); `run DIR --json FILE` measures them on the
GPU here and needs torch and triton alone; `plot FILE -o SVG` draws the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case

Row = dict[str, Any]
TINY = Case("none", 1, 4, 4, 128, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    emit = steps.add_parser("emit")
    emit.add_argument("dir", type=Path)
    emit.add_argument("--target", default="sm_90")
    run = steps.add_parser("run")
    run.add_argument("dir", type=Path)
    run.add_argument("--only", default="", help="cases whose name holds this")
    run.add_argument("--json", type=Path)
    run.add_argument("--budget", type=float, default=1e9, help="seconds after which no further case is begun")
    run.add_argument("--patience", type=float, default=600, help="seconds all cases together have for compiling")
    plot = steps.add_parser("plot")
    plot.add_argument("file", type=Path)
    plot.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.step == "emit":
        write_packages(args.dir, args.target)
    elif args.step == "run":
        measure(args)
    else:
        from benchmarks.plot import draw

        draw(args.file, args.output)


def write_packages(out: Path, target: str) -> None:
    """Every package of the table, by the compiler."""
    from attncc import driver, spec

    for text in dict.fromkeys(case.spec for case in (*CASES, TINY)):
        print(driver.compile(spec.loads(text), out, [target]))


def measure(args: argparse.Namespace) -> None:
    """One process a case: all compile at once, then each in turn has the GPU to itself."""
    begun = time.monotonic()
    chosen = [c for c in CASES if args.only in c.name]
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Case, Any, Any]] = []
    for case in chosen:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(case, str(args.dir), theirs), daemon=True)
        process.start()
        workers.append((case, process, ours))
    ready = [(case, process, pipe) for case, process, pipe in workers if _heard(pipe, begun + args.patience)]
    late = sorted({c.name for c in chosen} - {case.name for case, _, _ in ready})
    for case, process, _ in workers:
        if case.name in late:
            process.kill()
    print(f"compiled after {time.monotonic() - begun:.0f} s; not ready: {late}", flush=True)
    sys.path.insert(0, str(args.dir))
    rows: list[Row] = host_rows() if not args.only else []
    for case, process, pipe in ready:
        if time.monotonic() - begun > args.budget:
            print(f"budget spent before {case.name}")
            break
        pipe.send("go")
        try:
            rows += pipe.recv()
        except EOFError:
            print(f"{case.name} failed", flush=True)
        process.join()
        if args.json:
            args.json.write_text(json.dumps({"meta": meta(), "rows": rows}, indent=1) + "\n")
    print_table(rows)


def _heard(pipe: Any, until: float) -> bool:
    """Whether a worker says that it is ready before the time is up."""
    try:
        return bool(pipe.poll(max(0.0, until - time.monotonic())) and pipe.recv() == "ready")
    except EOFError:
        return False


def _work(case: Case, folder: str, pipe: Any) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    sys.path.insert(0, folder)
    setup = Setup.of(case)
    for call in setup.calls().values():
        call()
    pipe.send("ready")
    pipe.recv()
    pipe.send(case_rows(setup))


@dataclass
class Setup:
    """A case with its tensors and its peers made ready."""

    case: Case
    qkv: tuple[Any, Any, Any]
    given: dict[str, Any]
    ours: Any
    flex: Any
    mask_first_s: float
    mask_warm_ms: float

    @classmethod
    def of(cls, case: Case) -> Setup:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        from benchmarks.cases import inputs, mods, operands
        from benchmarks.timing import device_ms

        qkv, given = operands(case), inputs(case)
        score, mask = mods(case, given)
        block, first, again = None, 0.0, 0.0
        if mask is not None:
            make = torch.compile(create_block_mask)
            start = time.monotonic()
            block = make(mask, None, None, case.s, case.s)
            torch.cuda.synchronize()
            first, again = time.monotonic() - start, device_ms(lambda: make(mask, None, None, case.s, case.s), 3)
        compiled = torch.compile(flex_attention, dynamic=False)
        options = {"score_mod": score, "block_mask": block, "scale": 0.088, "enable_gqa": case.hq != case.hk}
        ours = importlib.import_module(case.package).attention
        return cls(case, qkv, given, ours, lambda: compiled(*qkv, **options), first, again)

    def calls(self) -> dict[str, Any]:
        """ours, FlexAttention, and cuDNN where it can do the case."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        case = self.case

        def cudnn() -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    *self.qkv, is_causal=case.variant == "causal", scale=0.088, enable_gqa=case.hq != case.hk
                )

        out = {"attncc": lambda: self.ours(*self.qkv, **self.given, return_lse=True), "FlexAttention": self.flex}
        return out | ({"cuDNN": cudnn} if case.variant in ("none", "causal") else {})


def case_rows(setup: Setup) -> list[Row]:
    """Checks our result, then times it and its peers."""
    from benchmarks.cases import agreement, visible_pairs
    from benchmarks.timing import interleaved, ratio

    case = setup.case
    o, lse = setup.ours(*setup.qkv, **setup.given, return_lse=True)
    errors = agreement(case, setup.qkv, setup.given, o, lse)
    if errors[0] > 5e-3 or errors[1] > 2e-3:
        raise SystemExit(f"{case.name}: wrong, error {errors[0]:.1e} of o, {errors[1]:.1e} of lse")
    times = interleaved(setup.calls())
    flops = case.flops(visible_pairs(case, setup.given))
    rows: list[Row] = []
    for peer in [p for p in times if p != "attncc"]:
        middle, low, high = ratio(times[peer], times["attncc"])
        for impl in ("attncc", peer):
            t = times[impl]
            rows.append({
                "case": case.name, "impl": impl, "ms": round(t.ms, 4), "spread": [round(t.low, 4), round(t.high, 4)],
                "tflops": round(flops / t.ms / 1e9, 1),
            })  # fmt: skip
        ours = rows[-2]
        ours |= {"peer": peer, "ratio": round(middle, 3), "ratio_spread": [round(low, 3), round(high, 3)]}
        ours |= {"o_error": errors[0], "lse_error": errors[1]}
        print(
            f"{case.name:40s} {ours['tflops']:6.0f} TFLOP/s  {peer} x {middle:.3f} ({low:.2f}-{high:.2f})", flush=True
        )
    return rows + mask_rows(setup)


def mask_rows(setup: Setup) -> list[Row]:
    """What setting up the mask costs: FlexAttention's table; ours, the classification kernel, where there is one."""
    from dataclasses import replace

    from benchmarks.timing import device_ms

    if not setup.mask_first_s:
        return []
    package = importlib.import_module(setup.case.package)
    classify = [k for k in package.VARIANT.kernels if k.function.__name__.endswith("_classify")]
    ms = 0.0
    if classify:
        runner = type(package._RUNNER)(replace(package.VARIANT, kernels=tuple(classify)))
        tensors = (*setup.qkv, *setup.given.values())
        runner(tensors, None, False)
        ms = device_ms(lambda: runner(tensors, None, False), 20)
    case = setup.case.name.replace("fwd/", "mask/")
    peer = {"case": case, "impl": "FlexAttention", "ms": round(setup.mask_warm_ms, 4), "first_s": setup.mask_first_s}
    return [{"case": case, "impl": "attncc", "ms": round(ms, 4), "peer": "FlexAttention"}, peer]


def host_rows() -> list[Row]:
    """Host time of a tiny call."""
    import torch

    from benchmarks.cases import operands
    from benchmarks.timing import host_us

    q, k, v = operands(TINY)
    ours = importlib.import_module(TINY.package).attention
    sdpa = torch.nn.functional.scaled_dot_product_attention
    start = time.monotonic()
    ours(q, k, v)
    torch.cuda.synchronize()
    first = time.monotonic() - start
    with torch.no_grad():
        us = {
            "attncc": host_us(lambda: ours(q, k, v)),
            "attncc, with lse": host_us(lambda: ours(q, k, v, return_lse=True)),
            "SDPA": host_us(lambda: sdpa(q, k, v, scale=0.088)),
        }
    print("host time of a call, µs:", {n: round(x, 1) for n, x in us.items()}, f"first call {first:.2f} s", flush=True)
    case = TINY.name.replace("fwd/", "host/")
    rows: list[Row] = [{"case": case, "impl": n, "ms": round(x / 1e3, 5)} for n, x in us.items()]
    for row in rows[:2]:
        row |= {"peer": "SDPA", "ratio": round(us["SDPA"] / us[row["impl"]], 3)}
    rows[0]["first_call_s"] = round(first, 2)
    return rows


def meta() -> Row:
    import torch
    import triton

    from attncc.version import VERSION

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "attncc": VERSION,
        "date": date.today().isoformat(),
    }  # fmt: skip


def print_table(rows: list[Row]) -> None:
    print(f"\n{'case':40s} {'impl':18s} {'ms':>9s} {'TFLOP/s':>8s} {'peer':14s} {'ratio':>6s}")
    for r in rows:
        ratio, tflops = r.get("ratio", ""), r.get("tflops", "")
        print(f"{r['case']:40s} {r['impl']:18s} {r['ms']:9.4f} {tflops!s:>8s} {r.get('peer', ''):14s} {ratio!s:>6s}")


if __name__ == "__main__":
    main()
