"""Offline compilation: real binaries for GPUs that are not here, their resources, and failures as data."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from attncc.codegen.aot import Failed, Job, Resources, build, build_all
from attncc.errors import CompilerBug, SpecError, Unsupported

pytestmark = pytest.mark.newest
SOURCE = Path(__file__).with_name("attention_kernel.py")
TILE = "tensordesc<bf16[1, 1, 64, 128]>"
ATTENTION = Job(
    source=str(SOURCE),
    kernel="attention",
    target="sm_90",
    signature={
        **dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), TILE),
        "lse": "*fp32",
        "scale": "fp32",
        "Sq": "i32",
        "Sk": "i32",
    },
    constexprs={"BM": 64, "BN": 64, "D": 128},
    options={"num_warps": 4, "num_stages": 2},
)
ROWS = Job(
    source=str(SOURCE),
    kernel="scale_rows",
    target="sm_80",
    signature={"x": "*fp32", "y": "*fp32", "stride": "i32", "n": "i32"},
    constexprs={"BLOCK": 512},
)


@pytest.fixture(scope="module")
def built() -> dict[str, Resources]:
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    outcomes = build_all([replace(ATTENTION, target=t) for t in targets], workers=2)
    assert not [o for o in outcomes if isinstance(o, Failed)]
    return dict(zip(targets, outcomes, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "matrix"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mma")]
)
def test_each_target_multiplies_with_its_own_instruction(built: dict[str, Resources], target: str, matrix: str) -> None:
    resources = built[target]
    assert resources.target == target
    assert resources.loop[matrix] > 0
    assert {"mma", "wgmma", "tcgen05"}.intersection(resources.instructions) == {matrix}
    assert 32 < resources.registers <= 512
    assert resources.shared_bytes >= 64 * 128 * 2


def test_descriptors_become_tma_where_there_is_tma(built: dict[str, Resources]) -> None:
    for target in ("sm_90", "sm_100"):
        assert built[target].instructions["tma_load"] >= 3
        assert built[target].instructions["tma_store"] >= 1
        assert built[target].loop.get("tma_store", 0) == 0
    assert "tma_load" not in built["sm_80"].instructions


def test_the_main_loop_is_apart_from_prologue_and_epilogue(built: dict[str, Resources]) -> None:
    hopper = built["sm_90"]
    assert hopper.loop["tma_load"] == 2  # K and V; Q and the first stages stand before
    assert hopper.instructions["tma_load"] > 2
    assert hopper.instructions["special_function"] == hopper.loop["special_function"] + 2  # 1 / l and log2(l)


def test_registers_that_do_not_fit_are_reported() -> None:
    tight = build(replace(ATTENTION, options={"num_warps": 4, "num_stages": 1, "maxnreg": 96}))
    assert tight.registers <= 96
    assert tight.spill_bytes > 0
    assert tight.instructions["spill_store"] > 0


def test_serialised_wgmma_is_reported() -> None:
    tile = "tensordesc<bf16[1, 1, 128, 128]>"
    job = replace(
        ATTENTION,
        signature=dict(ATTENTION.signature) | dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), tile),
        constexprs={"BM": 128, "BN": 128, "D": 128},
        options={"num_warps": 4, "num_stages": 2},
    )
    notes = build(job).notes
    assert any(note.startswith(("C7510", "C7511", "C7512")) for note in notes), notes
    assert not any("attention" in note for note in notes)


def test_the_interpreter_of_this_process_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert build(ROWS).instructions["global_load"] > 0


def test_alignment_reaches_the_compiler() -> None:
    plain = build(ROWS)
    aligned = build(replace(ROWS, aligned=("x", "y", "stride", "n")))
    assert aligned.instructions["global_load"] < plain.instructions["global_load"]


def test_the_same_job_gives_the_same_figures() -> None:
    first, second = build_all([ROWS, ROWS])
    assert first == second


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"constexprs": {}}, "BLOCK"),
        ({"constexprs": {"BLOCK": 512, "ROW": 1}}, "ROW"),
        ({"constexprs": {"BLOCK": 500}}, "power of 2"),
        ({"kernel": "missing"}, "missing"),
        ({"source": "/nowhere/kernels.py"}, "FileNotFoundError"),
        ({"options": {"num_warps": 3}}, "num_warps"),
        ({"signature": {**ROWS.signature, "x": "*fp33"}}, "fp33"),
    ],
)
def test_a_failed_job_says_why_and_spoils_no_other(change: dict[str, object], reason: str) -> None:
    bad, good = build_all([replace(ROWS, **change), ROWS])  # type: ignore[arg-type]
    assert isinstance(bad, Failed)
    assert reason in bad.reason
    assert isinstance(good, Resources)


def test_a_crash_of_the_compiler_is_one_failed_job(tmp_path: Path) -> None:
    deadly = tmp_path / "deadly.py"
    deadly.write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGSEGV)})\n")
    first, crashed, last = build_all([ROWS, replace(ROWS, source=str(deadly)), ROWS])
    assert isinstance(crashed, Failed)
    assert f"{-signal.SIGSEGV}" in crashed.reason
    assert first == last != crashed


def test_build_raises_with_the_compilers_words() -> None:
    with pytest.raises(CompilerBug, match=r"scale_rows.*sm_80"):
        build(replace(ROWS, constexprs={"BLOCK": 500}))


def test_targets_are_checked_before_anything_runs() -> None:
    with pytest.raises(Unsupported, match="interpreter"):
        build_all([ROWS, replace(ROWS, target="interpreter")])
    with pytest.raises(SpecError, match="sm_91"):
        build(replace(ROWS, target="sm_91"))
    assert build_all([]) == ()


def test_no_trace_is_left_in_the_environment() -> None:
    before = dict(os.environ)
    build(ROWS)
    assert dict(os.environ) == before
