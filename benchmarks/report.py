"""Rows as a table, as Markdown and as the JSON file that `benchmarks/results` keeps."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.version import VERSION

if TYPE_CHECKING:
    from attncc.device import Device
    from benchmarks.timing import Ratio, Timing

Row = dict[str, Any]
COLUMNS = ("case", "impl", "ms", "spread", "TFLOP/s", "TB/s", "peer", "ratio", "spread of it", "of the best")


def compared(case: str, times: Mapping[str, Timing], work: float, unit: str = "tflops") -> list[Row]:
    """Ours once for each peer, followed by the peer; ours alone where no peer is left.

    `work` of one call: FLOPs, or bytes where the unit is tbps.
    """

    def row(impl: str) -> Row:
        t = times[impl]
        rate = float(f"{work / t.ms / 1e9:.4g}")
        return {"case": case, "impl": impl, "ms": round(t.ms, 5), "spread": t.spread, unit: rate}

    rows: list[Row] = []
    for peer in [name for name in times if name != "attncc"]:
        rows += [row("attncc") | ratio(peer, times["attncc"].against(times[peer])), row(peer)]
    return rows or [row("attncc")]


def ratio(peer: str, r: Ratio) -> Row:
    """A row's keys that compare it with a peer."""
    return {
        "peer": peer, "ratio": round(r.median, 3), "ratio_spread": [round(r.low, 3), round(r.high, 3)],
        "best_ratio": round(r.best, 3),
    }  # fmt: skip


def cpu_meta() -> Row:
    """What a stranger needs to measure the same again on a CPU."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": model, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "tvm": version("apache-tvm"), "attncc": VERSION, "date": date.today().isoformat(),
        "spread": "quartiles",
    }  # fmt: skip


def gpu_meta() -> Row:
    """What a stranger needs to measure the same again on a GPU."""
    import torch
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    except OSError:
        driver = ""
    head = {
        "device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "attncc": VERSION,
        "date": date.today().isoformat(), "spread": "least and greatest",
    }  # fmt: skip
    try:
        return head | {"flash-attn-4": version("flash-attn-4")}
    except PackageNotFoundError:
        return head


def tuning_meta(device: Device) -> Row:
    """What a stranger needs to tune the same again, on a GPU or in Triton's interpreter."""
    import torch

    from attncc.autotune.toolchain import toolchain  # needs more than torch and triton, which is all that a GPU run has

    tools = toolchain(device)
    return {
        "device": torch.cuda.get_device_name() if device.is_gpu else device.name, "driver": tools.driver,
        "torch": tools.torch, "triton": tools.triton, "attncc": VERSION, "date": date.today().isoformat(),
        "spread": "least and greatest",
    }  # fmt: skip


def save(file: Path, head: Row, rows: Sequence[Row], without: Sequence[Row]) -> None:
    """`without`: what has no rows, and why; the key is there only where that happened."""
    data = {"meta": head, "rows": list(rows)} | ({"without": list(without)} if without else {})
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(file)


def cells(row: Row) -> tuple[str, ...]:
    return (
        row["case"], row["impl"], f"{row['ms']:.4f}", _range(row.get("spread"), 4), str(row.get("tflops", "")),
        str(row.get("tbps", "")), row.get("peer", ""), str(row.get("ratio", "")), _range(row.get("ratio_spread"), 2),
        str(row.get("best_ratio", "")),
    )  # fmt: skip


def line(rows: Iterable[Row]) -> str:
    """A measurement's rows in a few words, while others go on."""
    said: list[str] = []
    for row in rows:
        if "missing" in row:
            said.append(f"no {row['impl']}: {row['missing']}")
        elif "ms" in row:
            said.append(
                f"{row['impl']} {row['ms']:.4f} ms" + (f", {row['ratio']} × {row['peer']}" if "ratio" in row else "")
            )
    return "; ".join(said)


def _range(pair: Sequence[float] | None, digits: int) -> str:
    return "" if pair is None else "–".join(f"{x:.{digits}f}" for x in pair)


def _lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Heads and cells of the columns that have any."""
    lines = [*map(cells, rows)]
    used = [n for n in range(len(COLUMNS)) if any(line[n] for line in lines)]
    return [tuple(line[n] for n in used) for line in (COLUMNS, *lines)]


def table(rows: Iterable[Row]) -> str:
    lines = _lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Iterable[Row]) -> str:
    head, *lines = _lines(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def summary(rows: Iterable[Row]) -> str:
    """Geometric means of the ratios to each peer, of each kind of work by itself where rows name theirs."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["case"].startswith(("fwd/", "decode/")) and "ratio" in row:
            kind = f"{row['work']}, {row['peer']}" if "work" in row else row["peer"]
            ratios.setdefault(kind, []).append(row["ratio"])
    return "\n".join(
        f"{kind}: geometric mean {math.exp(sum(map(math.log, r)) / len(r)):.3f} of {len(r)} cases, "
        f"{min(r):.3f} to {max(r):.3f}"
        for kind, r in ratios.items()
    )
