"""Rows as a table, as Markdown and as the JSON file that `benchmarks/results` keeps."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from attncc.version import VERSION

Row = dict[str, Any]
COLUMNS = ("case", "impl", "ms", "spread", "TFLOP/s", "peer", "ratio", "spread of it")


def meta() -> Row:
    """What a stranger needs to measure the same again."""
    import torch
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    except OSError:
        driver = ""
    return {
        "device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "attncc": VERSION,
        "date": date.today().isoformat(),
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
        row.get("peer", ""), str(row.get("ratio", "")), _range(row.get("ratio_spread"), 2),
    )  # fmt: skip


def _range(pair: Sequence[float] | None, digits: int) -> str:
    return "" if pair is None else "–".join(f"{x:.{digits}f}" for x in pair)


def table(rows: Iterable[Row]) -> str:
    lines = [COLUMNS, *map(cells, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Iterable[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Iterable[Row]) -> str:
    """Geometric means of the ratios to each peer."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["case"].startswith("fwd/") and "ratio" in row:
            ratios.setdefault(row["peer"], []).append(row["ratio"])
    return "\n".join(
        f"{peer}: geometric mean {math.exp(sum(map(math.log, r)) / len(r)):.3f} of {len(r)} cases, "
        f"{min(r):.3f} to {max(r):.3f}"
        for peer, r in ratios.items()
    )
