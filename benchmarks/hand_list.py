"""What Triton users do: `triton.autotune` over a list of configs written by hand, on our portable forward kernel."""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from attncc.autotune.declared import Shape
from attncc.autotune.task import Task
from attncc.autotune.trial import Bench
from attncc.check.run import imported
from attncc.driver import lower
from attncc.errors import Unsupported
from attncc.passes.lower.defaults import default_configs

Config = Mapping[str, int]
HAND_LIST: Final[tuple[Config, ...]] = tuple(
    {"BM": rows, "BN": keys, "num_stages": stages, "num_warps": warps}
    for rows, keys, stages, warps in itertools.product((64, 128), (32, 64, 128), (2, 3, 4), (4, 8))
)
"""The ranges that Triton's tutorial on fused attention tries."""
TILE: Final = ("BM", "BN")
OPTIONS: Final = ("num_warps", "num_stages", "maxnreg")


def autotuned(package: Path, what: Task, seed: int, hand_list: Sequence[Config] = HAND_LIST) -> list[Config]:
    """The config that Triton chooses for each shape, as one of the package's.

    Raises:
        Unsupported: for a variant whose first kernel is not the forward one, for its tiles must fit that kernel's.
    """
    found: list[Config] = []
    with imported(package) as module, torch.no_grad():
        bench = Bench(package, module, what.device, seed)
        rows, _ = default_configs(lower(what.attn)[0], what.device, with_engine=False)
        base = {**rows[-1][1], "ONE_PASS": 0, "maxnreg": 0}
        base |= {knob: min(c[knob] for c in hand_list) for knob in TILE}  # scratch is largest for the smallest tiles
        forward = Forward(bench, base, hand_list)
        for shape in what.shapes:
            best = forward.tune(shape)
            found.append({**base, **best})
    return found


class Forward:
    """The portable forward kernel of a package, under Triton's tuner."""

    def __init__(self, bench: Bench, base: Config, hand_list: Sequence[Config]) -> None:
        runner = bench.module._RUNNER
        self.bench, self.base, self.runner = bench, base, getattr(runner, "gpu", runner)
        self.gpu = sys.modules[type(self.runner).__module__]
        off = {k: n for k, n in base.items() if k not in OPTIONS} | {"ENGINE": 0, "WRITE_LSE": 1}
        self.kernel = next(k for k in self.runner.variant.kernels if k.when(off))
        name = self.kernel.function.__name__
        if not name.endswith("_forward"):
            raise Unsupported(f"{name} runs first, which lists tiles of one size", key="mask")
        triton = importlib.import_module("triton")
        parameters = dict(zip(self.kernel.function.arg_names, self.kernel.parameters, strict=True))
        sizes = [arg for arg, p in parameters.items() if p[0] == "size"]
        blocks = {arg: p[2:] for arg, p in parameters.items() if p[0] == "tile"}

        def fit(arguments: dict[str, Any]) -> None:
            """Tensor maps, where operands are read through them, have the config's blocks."""
            for arg, (rows, columns) in blocks.items():
                if hasattr(arguments[arg], "block_shape"):
                    arguments[arg].block_shape = [1, 1, arguments.get(rows, rows), arguments.get(columns, columns)]

        configs = [
            triton.Config({k: c[k] for k in TILE}, num_warps=c["num_warps"], num_stages=c["num_stages"], pre_hook=fit)
            for c in hand_list
        ]
        timed = {} if bench.device.is_gpu else {"do_bench": by_clock}
        self.tuner = triton.autotune(configs=configs, key=sizes, **timed)(self.kernel.function)

    def tune(self, shape: Shape) -> Config:
        """What Triton chooses for a shape, whose first call tries all."""
        x = self.bench._drawn(shape)
        given = {"q": x.q, "k": x.k, "v": x.v, **x.inputs, **x.offsets}
        tensors = [given[t.name] for t in self.runner.variant.tensors]
        self.bench._use(self.base)
        plan = self.runner.plan(tensors, self.runner.variant.lse is not None, True)
        launch = next(one for one in plan.launches if one.function is self.kernel.function)
        q = tensors[0]
        o = q.new_empty(plan.output)
        lse = None if plan.lse is None else q.new_empty(plan.lse, dtype=torch.float32)
        scratch = [q.new_empty(s, dtype=dtype) for s, dtype in plan.scratch]
        arguments = launch.prepared(launch.bound, [*tensors, o, lse, *scratch], plan.scale, launch.make_map)
        names = self.kernel.function.arg_names
        kept = {name: value for name, value in zip(names, arguments, strict=True) if name not in TILE}
        numbers = self.gpu.check_tensors(shape, self.runner.variant.tensors, tensors, self.runner.variant.sizes)
        numbers = {**numbers, **self.base}
        self.tuner[lambda meta: (self.kernel.programs({**numbers, **{k: meta[k] for k in TILE}}),)](**kept)
        if self.bench.device.is_gpu:
            torch.cuda.synchronize()
        best = self.tuner.best_config
        return {**best.kwargs, "num_warps": best.num_warps, "num_stages": best.num_stages}


def by_clock(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Triton's own way of timing needs a GPU."""
    found: list[float] = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        found.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(found)] * len(quantiles)
