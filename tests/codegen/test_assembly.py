"""Reading disassembly: kinds of instructions, and which of them stand in the main loop."""

from __future__ import annotations

from attncc.codegen.assembly import AMDGCN, SASS, read


def sass(*lines: str) -> str:
    """Labels as they are; every other line becomes an instruction."""
    text = (line if line.endswith(":") else f"        /*{i * 16:04x}*/    {line} ;" for i, line in enumerate(lines))
    return "\n".join(text)


def test_the_longest_beginning_names_the_kind() -> None:
    counts = read(sass("LDG.E R0, [R2]", "@!P1 LDGSTS.E [R1], [R2]", "UTCBAR [UR4]", "UTCHMMA gdesc[UR4]"), SASS)
    assert counts.total == {"global_load": 1, "cp_async": 1, "tcgen05": 1}
    assert counts.loop == {}


def test_only_the_innermost_loop_that_multiplies_is_the_main_loop() -> None:
    counts = read(
        sass(
            "UTMALDG.4D [UR4]",
            ".L_outer:",
            "LDG.E R0, [R2]",
            ".L_inner:",
            "HGMMA.64x64x16 R0",
            "MUFU.EX2 R1, R2",
            "@P0 BRA `(.L_inner)",
            "STL [R1], R3",
            "@P1 BRA `(.L_outer)",
            ".L_copy:",
            "STG.E [R2], R0",
            "@P2 BRA `(.L_copy)",
            "EXIT",
        ),
        SASS,
    )
    assert counts.loop == {"special_function": 1, "wgmma": 1}
    assert counts.total["spill_store"] == 1


def test_a_wait_behind_the_exit_does_not_pull_the_epilogue_in() -> None:
    """ptxas puts spin waits behind EXIT, with a jump back into the loop."""
    counts = read(
        sass(
            ".L_main:",
            "@!P0 BRA `(.L_wait)",
            ".L_ready:",
            "HGMMA.64x64x16 R0",
            "@P1 BRA `(.L_main)",
            "UTMASTG.4D [UR4]",
            "EXIT",
            ".L_wait:",
            "SHFL.BFLY R0",
            "@!P0 BRA `(.L_wait)",
            "BRA `(.L_ready)",
        ),
        SASS,
    )
    assert counts.loop == {"shuffle": 1, "wgmma": 1}
    assert counts.total["tma_store"] == 1


def test_a_branch_on_a_uniform_condition_goes_on() -> None:
    counts = read(sass(".L_a:", "BRA.U UP0, `(.L_b)", "UTCHMMA gdesc[UR4]", ".L_b:", "@P0 BRA `(.L_a)", "EXIT"), SASS)
    assert counts.loop == {"tcgen05": 1}


def test_two_loops_of_one_kernel_are_both_main() -> None:
    body = ("HMMA.16816 R0", "PRMT R1, R2")
    counts = read(sass(".L_a:", *body, "@P0 BRA `(.L_a)", ".L_b:", *body, "@P0 BRA `(.L_b)", "EXIT"), SASS)
    assert counts.loop == {"mma": 2, "permute": 2}


def test_amd_text() -> None:
    text = """
    .LBB0_1:                                ; =>This Inner Loop Header: Depth=1
        global_load_dwordx4 v[0:3], v4, s[2:3]
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        s_cbranch_scc1 .LBB0_1
        scratch_store_dword off, v0, s0
        s_endpgm
    """
    counts = read("\n".join(line.removeprefix("    ") for line in text.splitlines()), AMDGCN)
    assert counts.loop == {"global_load": 1, "mma": 1}
    assert counts.total["spill_store"] == 1


def test_code_without_loops() -> None:
    assert read("", SASS).total == {}
    assert read(sass("HMMA R0", "EXIT"), SASS).loop == {}
