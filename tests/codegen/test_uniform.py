"""Reads of registers before a write, in machine code of a few lines."""

from __future__ import annotations

import pytest

from attncc.codegen.uniform import undefined, unwritten


def sass(*lines: str) -> str:
    """Lines as nvdisasm prints them; a label ends in a colon."""
    return "\n".join(
        x if x.endswith(":") else f"        /*{n:04x}*/                   {x} ;" for n, x in enumerate(lines)
    )


def found(*lines: str) -> list[int]:
    return [u.register for u in undefined(sass(*lines))]


def test_a_write_before_a_read() -> None:
    assert found("UMOV UR4, URZ", "UIADD3 UR5, UR4, 0x1, URZ", "EXIT") == []


def test_a_read_before_any_write() -> None:
    assert found("UIADD3 UR5, UR4, 0x1, URZ", "UMOV UR4, URZ", "EXIT") == [4]


def test_a_write_that_a_branch_goes_past() -> None:
    """What ptxas does with a descriptor that a loop and the code behind it share."""
    skipped = ("@!P2 BRA `(.L_x_1)", "UIADD3 UR40, UP0, UR12, 0x2, URZ", ".L_x_1:", "UMOV UR36, UR40", "EXIT")
    assert found("UMOV UR12, URZ", *skipped) == [40]
    assert found("UMOV UR12, URZ", "UMOV UR40, URZ", *skipped) == []


def test_a_predicate_may_stand_before_what_is_written() -> None:
    """It tells whether the result is 0."""
    zero = "ULOP3.LUT UP1, UR19, UR4, 0x7fffff80, URZ, 0xc0, !UPT"
    assert found("UMOV UR4, URZ", zero, "UMOV UR5, UR19", "EXIT") == []
    assert found("UMOV UR19, URZ", zero, "EXIT") == [4]
    assert found("UMOV UR4, URZ", "UIADD3 UR19, UP0, UR19, 0x20, URZ", "EXIT") == [19]


def test_both_ways_write() -> None:
    ways = ("@P0 BRA `(.L_x_1)", "UMOV UR4, 0x1", "BRA `(.L_x_2)", ".L_x_1:", "UMOV UR4, 0x2", ".L_x_2:")
    assert found(*ways, "UMOV UR5, UR4", "EXIT") == []


def test_a_loop_reads_what_its_turn_before_wrote() -> None:
    loop = (".L_x_1:", "UMOV UR5, UR4", "UMOV UR4, UR5", "@P0 BRA `(.L_x_1)", "EXIT")
    assert found("UMOV UR4, URZ", *loop) == []
    assert found("NOP", *loop) == [4]


def test_opposite_predicates_write_whole() -> None:
    both = ("@UP0 USEL UR7, UR1, UR2, !UP1", "@!UP0 UMOV UR7, UR1", "UMOV UR8, UR7", "EXIT")
    assert found("UMOV UR1, URZ", "UMOV UR2, URZ", *both) == []
    between = (both[0], "UISETP.LT.AND UP0, UPT, UR1, UR2, UPT", *both[1:])
    assert found("UMOV UR1, URZ", "UMOV UR2, URZ", *between) == [7]
    assert found("UMOV UR1, URZ", "@!UP0 UMOV UR7, UR1", "UMOV UR8, UR7", "EXIT") == [7]


def test_pairs() -> None:
    assert found("ULDC.64 UR4, c[0x0][0x208]", "UMOV UR6, UR5", "EXIT") == []
    assert found("UMOV UR4, URZ", "UMOV UR6, UR5", "EXIT") == [5]


@pytest.mark.parametrize(
    ("instruction", "reads"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", [16, 17, 18, 19]),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT", [16, 17, 18, 19]),
        ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0", [18, 19]),
        ("UTMALDG.4D [UR40], [UR4]", []),
        ("@!UP1 SYNCS.EXCH.64 URZ, [UR4+0x30140], UR8", []),
        ("R2UR UR6, R0", []),
    ],
)
def test_what_instructions_read(instruction: str, reads: list[int]) -> None:
    assert found(instruction, "EXIT") == reads


def test_an_indirect_branch_leads_to_what_nothing_else_leads_to() -> None:
    table = ("UMOV UR4, URZ", "BRX R10 -0x2e0", ".L_x_1:", "UMOV UR5, UR4", "EXIT", ".L_x_2:", "UMOV UR6, UR5", "EXIT")
    assert found(*table) == [5]


def test_no_code() -> None:
    assert undefined("") == ()


def test_a_branch_on_a_copy_of_the_predicate() -> None:
    """What is written under UP0 is written where P1, its copy, leads."""
    code = (
        "UMOV UR1, URZ",
        "UISETP.GE.AND UP0, UPT, UR1, URZ, UPT",
        "PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0",
        "@UP0 UMOV UR7, URZ",
        "@P1 BRA `(.L_x_1)",
        "UMOV UR7, UR1",
    )
    assert found(*code, ".L_x_1:", "UMOV UR8, UR7", "EXIT") == []
    other = code[4].replace("@P1", "@!P1")
    assert found(*code[:4], other, code[5], ".L_x_1:", "UMOV UR8, UR7", "EXIT") == [7]


# -- registers of a thread -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "registers"),
    [
        (("IADD3 R0, P0, R0, 0x20, RZ", "EXIT"), [0]),  # what ptxas made of a descriptor that nothing had computed
        (("S2R R0, SR_TID.X", "IADD3 R0, P0, R0, 0x20, RZ", "EXIT"), []),
        (("LDC.64 R2, c[0x0][0x10]", "IADD3 R4, R3, 0x1, RZ", "EXIT"), []),
        (("@P0 S2R R0, SR_TID.X", "IADD3 R1, R0, 0x1, RZ", "EXIT"), []),
        (("@P0 BRA `(.L_x_1)", "S2R R0, SR_TID.X", ".L_x_1:", "IADD3 R1, R0, 0x1, RZ", "EXIT"), []),
        ((".L_x_1:", "IADD3 R1, R0, 0x1, RZ", "S2R R0, SR_TID.X", "@P0 BRA `(.L_x_1)", "EXIT"), []),
        (("BRA `(.L_x_1)", "S2R R0, SR_TID.X", ".L_x_1:", "IADD3 R1, R0, 0x1, RZ", "EXIT"), [0]),
        (("STG.E [R2.64], R4", "EXIT"), [2, 4]),
        (("LOP3.LUT R15, R15, 0xffffffdf, RZ, 0xc0, !PT", "EXIT"), []),
        (("PRMT R20, RZ, 0x7610, R20", "EXIT"), []),
        (("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, !UPT", "FADD R0, R100, R151", "EXIT"), []),
        (("QGMMA.64x64x32.F32.E4M3.E4M3 R88, gdesc[UR16], RZ, !UPT", "FADD R0, R88, R119", "EXIT"), []),
        (("HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR16], R24", "EXIT"), [8]),
        # two operands of which the first may be written, with registers of both among the next ones
        (("LDC.64 R2, c[0x0][0x2a8]", "IMAD.SHL.U32 R6, R3, 0x2, RZ", "VIADD R0, R6, 0x1f", "EXIT"), []),
        (("NOP", "VIADD R0, R40, 0x1f", "EXIT"), [40]),
        (("S2R R10, SR_TID.X", "SHFL.BFLY PT, R19, R10, 0x1, 0x1f", "EXIT"), []),  # a predicate before what is written
        (("S2R R10, SR_TID.X", "SHFL.BFLY PT, R19, R40, 0x1, 0x1f", "EXIT"), [40]),
        ((), []),
    ],
)
def test_reads_that_no_path_has_written(lines: tuple[str, ...], registers: list[int]) -> None:
    assert [u.register for u in unwritten(sass(*lines))] == registers
