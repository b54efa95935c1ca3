"""`attncc targets`: the device table."""

from __future__ import annotations

from dataclasses import asdict

from attncc import driver
from attncc.cli.output import Json, guarded, print_json, print_table

# shared memory of a block, TFLOP/s of dense bf16 products
COLUMNS = ("target", "arch", "SMs", "shared", "L2", "GB/s", "TFLOP/s", "TMA", "here")


@guarded
def command(as_json: Json = False) -> None:
    """List what can be compiled for: architectures and cards; `here` marks this machine."""
    present = {d.name for d in driver.resolve(None)}
    devices = driver.targets()
    if as_json:
        print_json({"targets": [asdict(d) | {"here": d.name in present} for d in devices]})
        return
    rows = [
        (
            d.name,
            d.arch,
            d.sms,
            f"{d.shared_bytes_per_block // 1024} KB",
            f"{d.l2_bytes // 2**20} MB",
            f"{d.bandwidth_gbps:g}",
            f"{d.bf16_tflops:g}",
            "yes" if d.has_tma else "",
            "yes" if d.name in present else "",
        )
        for d in devices
    ]
    print_table(COLUMNS, rows)
