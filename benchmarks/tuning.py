"""The autotuner: how good its search is, and what it gains.

`sweep SPEC -o FILE` measures every config on the GPU here; `replay FILE` then compares searches on it, anywhere.
`reach SPEC` tunes in a budget and looks up in a sweep how near its best that comes; `compare SPEC` sets tuning against
`triton.autotune`, `sparsity SPEC` tuning on a real map against tuning on full rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean

from attncc.autotune.declared import shapes_of
from attncc.autotune.search import SAMPLERS, SEEDS, SLACK
from attncc.autotune.store import Store
from attncc.autotune.task import Options, Task, task
from attncc.cli.output import print_table
from attncc.cli.tune import shape_of
from attncc.device import find
from attncc.driver import load
from attncc.errors import AttnccError
from benchmarks import contest, report, sweep
from benchmarks import replay as replays
from benchmarks.report import Row


def main() -> int:
    args = parser().parse_args()
    try:
        return args.step(args)
    except AttnccError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    steps = top.add_subparsers(required=True)
    swept = _step(steps, "sweep", measure, "measure every config of a space, the most promising first")
    swept.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    swept.add_argument("--limit", type=int, metavar="N", help="configs, in the order of the model")
    swept.add_argument("--budget", type=float, metavar="S", help="seconds; what is measured then is kept")
    swept.add_argument("--store", type=Path, metavar="DIR", help="where a sweep goes on (default: FILE.store)")
    made = _step(steps, "imagine", imagine, "a sweep by the model, with noise: to try replays on")
    made.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    _replay_step(steps)
    near = _step(steps, "reach", reach, "tune in a budget; how near the best of a sweep that comes")
    near.add_argument("--sweep", type=Path, required=True, metavar="FILE", help="of the same spec and shapes")
    near.add_argument("--budget", type=float, default=300.0, metavar="S", help="seconds")
    near.add_argument("--json", type=Path, metavar="FILE")
    against = _step(steps, "compare", compare, "tune in several budgets, and by triton.autotune")
    against.add_argument("--budgets", type=numbers, default=(20.0, 60.0, 300.0), metavar="S,S", help="seconds")
    against.add_argument("--json", type=Path, metavar="FILE")
    maps = _step(steps, "sparsity", sparsity, "tune on the declared map and on full rows; time both on the map")
    maps.add_argument("--budget", type=float, default=120.0, metavar="S", help="seconds, of each of the two")
    maps.add_argument("--json", type=Path, metavar="FILE")
    return top


def _step(steps: argparse._SubParsersAction, name: str, step: object, about: str) -> argparse.ArgumentParser:
    """A step that takes a spec, shapes and a device."""
    made = steps.add_parser(name, help=about)
    made.add_argument("spec")
    made.add_argument("--shape", action="append", type=shape_of, metavar="B=2,Sq=4096", help="repeatable")
    made.add_argument("--device", type=find, help="the GPU here (default), or interpreter")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--seconds", type=float, default=0.1, help="of timing, for each config and shape")
    made.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that compile at once")
    made.set_defaults(step=step)
    return made


def _replay_step(steps: argparse._SubParsersAction) -> None:
    made = steps.add_parser("replay", help="searches on a sweep that was measured once; no GPU")
    made.add_argument("file", type=Path, nargs="+")
    made.add_argument("--sampler", type=names, default=("tpe", "random"), metavar="A,B")
    made.add_argument("--first", type=numbers, default=(SEEDS,), metavar="N,N", help="best predictions tried first")
    made.add_argument("--slack", type=numbers, default=(SLACK,), metavar="X,X", help="predicted over predicted best")
    made.add_argument("--startup", type=numbers, default=(replays.STARTUP,), metavar="N,N", help="TPE's random trials")
    made.add_argument("--seeds", type=int, default=20, help="replays of each")
    made.add_argument("--trials", type=int, default=200, help="of a replay, at most")
    made.add_argument("--ahead", type=int, default=8, help="configs that are asked for ahead, as compilers are many")
    made.add_argument("--trial-s", type=float, default=replays.Cost().trial, help="of a trial the sweep has no time of")
    made.add_argument("--shape-s", type=float, default=replays.Cost().shape, help="of each of its shapes")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw: .html, .svg or .png")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.set_defaults(step=replay)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(n) for n in text.split(","))


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [n for n in chosen if n not in SAMPLERS]:
        raise argparse.ArgumentTypeError(f"unknown sampler {unknown[0]}: choose from {', '.join(SAMPLERS)}")
    return chosen


def what_of(args: argparse.Namespace) -> Task:
    if args.device is not None and not args.device.is_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    return task(args.spec, args.shape, args.device)


def options_of(args: argparse.Namespace, budget: float | None) -> Options:
    return Options(budget, seed=args.seed, seconds=args.seconds, compilers=args.jobs)


def measure(args: argparse.Namespace) -> int:
    what = what_of(args)
    store = Store(args.store or args.output.with_name(args.output.name + ".store"))
    head = report.tuning_meta(what.device) | {"variant": what.spec.attention.name, "spec": what.spec.text}
    found = sweep.measure(what, options_of(args, args.budget), store, args.output, head, args.limit)
    _told(found, args.output)
    return 0


def imagine(args: argparse.Namespace) -> int:
    loaded, device = load(args.spec), args.device or find("nvidia_h200")
    what = Task(loaded, loaded.attention, device, shapes_of(loaded.attention, args.shape, device.is_gpu))
    head = {"device": f"{device.name}, imagined", "variant": what.spec.attention.name}
    found = sweep.imagine(what, head, args.seed)
    sweep.save(args.output, found)
    _told(found, args.output)
    return 0


def _told(found: sweep.Sweep, file: Path) -> None:
    measured = sum(p.status == "measured" for p in found.points)
    print(
        f"{len(found.points)} of {found.space} configs, {found.share:.1%} of the space; {measured} have times: {file}"
    )
    for shape, default, best in zip(found.shapes, found.default_ms, found.best_ms, strict=True):
        print(f"  {dict(shape)}: default {default:.4g} ms, best {best:.4g} ms, {default / best:.2f} x")


def replay(args: argparse.Namespace) -> int:
    settings = replays.grid(args.sampler, [int(n) for n in args.first], args.slack, [int(n) for n in args.startup])
    cost = replays.Cost(args.trial_s, args.shape_s)
    rows: list[Row] = []
    meta: Row = {}
    for file in args.file:
        swept = sweep.load(file)
        meta = {**swept.meta, "seeds": args.seeds, "ahead": args.ahead, "share of the space": round(swept.share, 4)}
        found = {
            s: [replays.replay(swept, s, seed, args.trials, args.ahead, cost) for seed in range(args.seeds)]
            for s in settings
        }
        mine = [replays.row(s, traces) for s, traces in found.items()]
        rows += [row | {"sweep": file.name} for row in mine]
        _print_replays(mine, f"{file.name}: {swept.share:.1%} of a space of {swept.space}, mean of {args.seeds} seeds")
        if args.output:
            several = args.output.with_stem(f"{args.output.stem}-{file.stem}")
            replays.draw(args.output if len(args.file) == 1 else several, meta, found)
    if args.json:
        report.save(args.json, meta, rows, [])
    return 0


def _print_replays(rows: list[Row], title: str) -> None:
    print(f"{title}: share of the best speed")
    trials, seconds = (dict.fromkeys(k for r in rows for k in r[by]) for by in ("by_trials", "by_seconds"))
    heads = ("setting", *(f"{n} trials" for n in trials), *(f"{s} s" for s in seconds), "worst", "trials to 98 %")
    lines = [
        (
            r["case"],
            *(f"{r['by_trials'].get(n, ''):.4}" for n in trials),
            *(f"{r['by_seconds'][s]:.4}" if s in r["by_seconds"] else "" for s in seconds),
            f"{r['worst']:.4}",
            "" if r["near_trials"] is None else f"{r['near_trials']:g}",
        )
        for r in rows
    ]
    print_table(heads, lines)


def reach(args: argparse.Namespace) -> int:
    what, swept = what_of(args), sweep.load(args.sweep)
    found = contest.tuned(what, options_of(args, args.budget))
    impl = f"attncc, {args.budget:g} s"
    rows = contest.shares(what, swept, contest.winners(what, found), impl, round(found.seconds, 1))
    print_table(
        ("case", "ms", "the sweep's best", "share", "untuned"),
        [(r["case"], r["ms"], r["best_ms"], f"{r['share']:.1%}", f"{r['default_share']:.1%}") for r in rows],
    )
    mean = geometric_mean([r["share"] for r in rows])
    print(f"{impl}: geometric mean {mean:.1%} of the best of {len(swept.points)} configs, in {found.seconds:.0f} s")
    if args.json:
        head = report.tuning_meta(what.device) | {"share of the space": round(swept.share, 4)}
        report.save(args.json, head, rows, [])
    return 0


def compare(args: argparse.Namespace) -> int:
    what = what_of(args)
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # first compilations are first ones
        rows, without = contest.compare(what, options_of(args, None), args.budgets)
    return _ended(args, what, rows, without)


def sparsity(args: argparse.Namespace) -> int:
    what = what_of(args)
    return _ended(args, what, contest.sparsity(what, options_of(args, args.budget)), [])


def _ended(args: argparse.Namespace, what: Task, rows: list[Row], without: list[Row]) -> int:
    print(report.table(rows), "", report.summary(rows), sep="\n")
    for entry in without:
        print(f"no result of {entry['impl']} for {entry['case']}: {entry['missing']}")
    said = [f"{r['case']}: {r['impl']} took {r['seconds']} s, chose {r['config']}" for r in rows if "seconds" in r]
    print("\n".join(dict.fromkeys(said)))
    if args.json:
        report.save(args.json, report.tuning_meta(what.device), rows, without)
    return 0


if __name__ == "__main__":
    sys.exit(main())
