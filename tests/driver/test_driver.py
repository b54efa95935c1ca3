"""The driver: packages on disk, errors with their place, the stages of the IR, and the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attncc import driver, spec
from attncc.check.run import check_package
from attncc.device import find, here
from attncc.errors import CompilerBug, SpecError, Unsupported

ROOT = Path(__file__).parents[2]
SPEC = """attncc: 1
name: tiny
heads: {q: 4, kv: 2}
dims: {qk: 16, v: 24}
dtype: fp16
inputs:
  slopes: {shape: [Hq], dtype: fp32}
score: qk * scale - slopes[h] * abs(i - j)
mask: causal & (window(20) | sink(3))
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- compile -------------------------------------------------------------------------------------


def test_the_package_is_where_it_should_be(tmp_path: Path) -> None:
    path = driver.compile(spec.loads(SPEC), tmp_path / "deep" / "out", ["sm_90", "sm_80"])
    assert path == tmp_path / "deep" / "out" / "tiny"
    files = tree(path)
    assert {"__init__.py", "kernels.py", "spec.yaml", "configs/sm_80.py", "configs/sm_90.py"} <= set(files)
    assert files["spec.yaml"].decode() == SPEC
    assert os.listdir(path.parent) == ["tiny"]


def test_a_file_is_a_spec_too(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SPEC)
    from_file = tree(driver.compile(tmp_path / "tiny.yaml", tmp_path / "a", ["interpreter"]))
    from_name = tree(driver.compile(str(tmp_path / "tiny.yaml"), tmp_path / "b", [find("interpreter")]))
    assert from_file == from_name


def test_an_earlier_package_is_replaced_whole(tmp_path: Path) -> None:
    first = driver.compile(spec.loads(SPEC), tmp_path, ["sm_80"])
    (first / "kernels.py").write_text("broken")
    (first / "left_over.py").write_text("")
    second = driver.compile(spec.loads(SPEC), tmp_path, ["sm_90"])
    assert second == first
    assert "configs/sm_80.py" not in tree(second)
    assert "left_over.py" not in tree(second)
    assert (second / "kernels.py").read_text() != "broken"


@pytest.mark.parametrize("content", ["thesis.tex", "__init__.py"])
def test_anything_else_is_not_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / content).write_text("precious")
    with pytest.raises(SpecError, match="no attncc package"):
        driver.compile(spec.loads(SPEC), tmp_path, ["interpreter"])
    assert tree(tmp_path) == {f"tiny/{content}": b"precious"}


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("precious")
    with pytest.raises(SpecError, match="no attncc package"):
        driver.compile(spec.loads(SPEC), tmp_path, ["interpreter"])


def test_a_failure_leaves_the_earlier_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(driver.compile(spec.loads(SPEC), tmp_path, ["interpreter"]))
    real = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if path.name == "kernels.py":
            raise OSError("no space left")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        driver.compile(spec.loads(SPEC), tmp_path, ["sm_90"])
    assert tree(tmp_path / "tiny") == before
    assert os.listdir(tmp_path) == ["tiny"]


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    driver.compile(spec.loads(SPEC), tmp_path, ["cpu"], lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1] == steps[-1][2]


def test_the_package_needs_no_attncc(tmp_path: Path) -> None:
    driver.compile(spec.loads(SPEC), tmp_path, ["interpreter"])
    code = """
import sys
sys.modules["attncc"] = None
import torch, tiny
q, k, v, slopes = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 24), torch.rand(4)
o = tiny.attention(q.half(), k.half(), v.half(), slopes=slopes)
assert o.shape == (1, 4, 9, 24) and o.isfinite().all()
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_the_same_bytes_under_any_hash_seed(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from attncc import driver
from attncc.codegen.gate import Findings
from attncc.errors import Unsupported
driver.examine = lambda *where: Findings(())  # compiling engines twice over would take minutes
for path in Path("examples").glob("*.yaml"):
    try:
        driver.compile(path, sys.argv[1], ["sm_90", "interpreter"])
    except Unsupported:
        continue
"""
    seeds = ("0", "1234")
    for seed in seeds:
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    first, second = (tree(tmp_path / seed) for seed in seeds)
    assert first == second
    assert len(first) > 8 * len(os.listdir(tmp_path / seeds[0])) > 8 * 40


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("dropout: 0.1", "dropout"),
        ("kv: pooled(16)", "kv"),
        ("modes: [prefill, backward]", "modes"),
        ("quantize: {q: int4(per=token)}", "quantize"),
    ],
)
def test_what_is_unsupported_has_its_line(line: str, key: str, tmp_path: Path) -> None:
    loaded = spec.loads(SPEC + line + "\n", "variant.yaml")
    for action in (lambda: driver.compile(loaded, tmp_path), lambda: driver.check(loaded)):
        with pytest.raises(Unsupported) as error:
            action()
        assert error.value.key == key
        assert error.value.location is not None
        assert error.value.location.line == 10
    assert not list(tmp_path.iterdir())


QUANTISED = [
    ("cache: int8(smooth=mean)", "caches whose keys have no mean taken off"),
    ("k: nvfp4", "fp8_e4m3, fp8_e5m2, int8"),
    ("p: int4", "fp8_e4m3, fp8_e5m2, int8"),
    ("k: int8(symmetric=false)", "symmetric formats"),
    ("q: int8(per=thread)", "q and k per tensor, head, block, token"),
    ("k: int8(per=channel)", "q and k per tensor, head, block, token"),
    ("v: int8(per=token)", "v per tensor, head, channel"),
    ("p: int8(per=group(16))", "p per token, relative to the greatest weight of its row"),
]


@pytest.mark.parametrize(("quantizer", "supported"), QUANTISED)
def test_quantizers_that_nothing_carries_say_what_is(quantizer: str, supported: str, tmp_path: Path) -> None:
    text = f"attncc: 1\nname: t\nheads: 2\ndims: 32\nquantize:\n  {quantizer}\n"
    with pytest.raises(Unsupported) as error:
        driver.compile(spec.loads(text), tmp_path, ["sm_90"])
    assert (error.value.key, error.value.hint) == ("quantize", f"supported: {supported}")
    assert "has no lowering for this value yet" in str(error.value)
    assert error.value.location is not None
    assert error.value.location.line == 6  # of the operand


@pytest.mark.parametrize(
    ("more", "supported"),
    [
        ("layout: varlen", "the layouts bhsd and bshd"),
        ("normalizer: relu\noutputs: [o]", "q and k where the normalizer is no softmax"),
    ],
)
def test_what_does_not_go_with_quantised_values(more: str, supported: str, tmp_path: Path) -> None:
    text = f"attncc: 1\nname: t\nheads: 2\ndims: 32\nquantize: {{v: int8}}\n{more}\n"
    with pytest.raises(Unsupported) as error:
        driver.compile(spec.loads(text), tmp_path, ["sm_90"])
    assert (error.value.key, error.value.hint) == ("quantize", f"supported: {supported}")


@pytest.mark.parametrize(
    ("line", "why"), [("quantize: {q: int8}", "do not quantise operands"), ("kv: paged(16)", "do not read keys from")]
)
@pytest.mark.parametrize(("target", "backend"), [("cpu", None), ("sm_90", "tvm")])
def test_tvm_refuses_what_it_would_leave_out(
    target: str, backend: str | None, line: str, why: str, tmp_path: Path
) -> None:
    text = f"attncc: 1\nname: t\nheads: 2\ndims: 32\n{line}\n"
    with pytest.raises(Unsupported, match=why) as error:
        driver.compile(spec.loads(text), tmp_path, [target], backend=backend)
    assert error.value.key == line.partition(":")[0]
    assert error.value.location is not None
    assert "--target interpreter" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_what_is_unsupported_has_its_line_in_its_part(tmp_path: Path) -> None:
    text = "attncc: 1\nname: t\nheads: 2\ndims: 16\nparts:\n  - mask: causal\n    select:\n"
    text += "      block: {q: 1, k: 8}\n      score: random\n      rule: topk(2)\n"
    with pytest.raises(Unsupported) as error:
        driver.compile(spec.loads(text), tmp_path)
    assert error.value.key == "select"
    assert error.value.location is not None
    assert error.value.location.line == 8


def test_a_card_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    card = replace(find("sm_80"), name="nvidia_old", arch="sm_70")
    with pytest.raises(Unsupported, match="sm_70"):
        driver.compile(spec.loads(SPEC), tmp_path, [card])
    assert not list(tmp_path.iterdir())


def test_a_bug_names_the_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: object) -> None:
        raise CompilerBug("no such tile")

    monkeypatch.setattr(driver, "verify_program", broken)
    with pytest.raises(CompilerBug) as error:
        driver.compile(spec.loads(SPEC, "variant.yaml"), tmp_path, ["interpreter"])
    assert error.value.__notes__ == ["while compiling 'tiny' of variant.yaml"]


# -- explain -------------------------------------------------------------------------------------


def test_stages_stand_in_the_order_of_the_pipeline() -> None:
    stages = driver.explain(spec.loads(SPEC))
    assert tuple(s.name for s in stages) == driver.STAGES
    assert len({s.text for s in stages}) > 3
    assert stages[-1].text.startswith("# skeleton: ")


def test_one_stage() -> None:
    loaded = spec.loads(SPEC)
    whole = {s.name: s for s in driver.explain(loaded)}
    for name in driver.STAGES:
        assert driver.explain(loaded, name) == (whole[name],)


UNSUPPORTED = "dropout: 0.1\nepilogue: [lerp_v(0.5)]\nprologue: [smooth]\n"


def test_all_stages_can_be_seen_of_what_cannot_be_lowered() -> None:
    stages = driver.explain(spec.loads(SPEC + UNSUPPORTED))
    assert tuple(s.name for s in stages) == driver.STAGES
    assert "key_tiles" in stages[-2].text
    assert stages[-1].missing == ("dropout", "prologue")
    assert stages[-1].text.startswith("# no skeleton carries this variant yet\n# 'dropout'")
    assert "supported: all steps but smooth" in stages[-1].text


def test_the_last_stage_alone_says_what_is_missing() -> None:
    (stage,) = driver.explain(spec.loads(SPEC + "dropout: 0.1\n"), "lower")
    assert stage.missing == ("dropout",)


# -- systems -------------------------------------------------------------------------------------


def test_systems_tell_what_they_use_and_what_carries_them(tmp_path: Path) -> None:
    head, tail = SPEC.split("name: tiny\n")
    (tmp_path / "b.yaml").write_text(f"{head}name: first\nfamily: alpha\nsource: arXiv 1\n{tail}")
    (tmp_path / "a.yaml").write_text(f"{head}name: second\nfamily: alpha\n{tail}{UNSUPPORTED}")
    (tmp_path / "c.yaml").write_text(SPEC)
    (tmp_path / "0.yaml").write_text(SPEC.replace("causal", "causl"))
    (tmp_path / "no_spec.txt").write_text("")
    found = driver.systems(tmp_path)
    assert [(s.file, s.name) for s in found] == [
        ("c.yaml", "tiny"), ("b.yaml", "first"), ("a.yaml", "second"), ("0.yaml", "0"),
    ]  # fmt: skip
    plain, first, second, broken = found
    used = {"score": ("data", "positions"), "mask": ("positions",)}
    assert (first.family, first.source, first.primitives) == ("alpha", "arXiv 1", used)
    assert (first.lowerings, first.missing) == (
        ("triton: forward", "triton: decode", "tvm: forward", "tvm: decode"),
        (),
    )
    assert plain.primitives == first.primitives
    assert second.primitives == used | {"dropout": ("philox",), "prologue": ("smooth",), "epilogue": ("lerp_v",)}
    assert (second.lowerings, second.missing) == ((), ("dropout", "prologue"))
    assert "did you mean 'causal'?" in broken.error
    assert not broken.lowerings


def test_systems_need_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere"):
        driver.systems(tmp_path / "nowhere")


def test_the_examples_are_the_default() -> None:
    found = {s.name: s for s in driver.systems()}
    assert sorted(found) == sorted(p.stem for p in (ROOT / "examples").glob("*.yaml"))
    assert not [s for s in found.values() if s.error]
    assert all(s.lowerings or s.missing for s in found.values())
    assert found["gemma2_local"].lowerings


def test_an_unknown_stage_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="cannonicalize") as error:
        driver.explain(spec.loads(SPEC), "cannonicalize")
    assert "canonicalize" in error.value.hint


# -- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype: fp16": "dtype: bf16"},
        {"dtype: fp16": "dtype: fp32"},
        {"dtype: fp16": "layout: bshd\ndtype: fp16"},
        {"dtype: fp16": "layout: varlen\ndtype: fp16"},
    ],
)
def test_check_agrees_on_this_machine(change: dict[str, str]) -> None:
    text = SPEC
    for old, new in change.items():
        text = text.replace(old, new)
    report = driver.check(spec.loads(text), [{"B": 2, "Sq": 19, "Sk": 37}])
    assert report.passed, [(str(o.case), o.verdict, o.detail, o.deviations) for o in report.outcomes if not o.passed]


@pytest.mark.parametrize("layout", ["bhsd", "varlen"])
def test_bf16_itself_runs_here(layout: str, tmp_path: Path) -> None:
    loaded = spec.loads(SPEC.replace("dtype: fp16", f"dtype: bf16\nlayout: {layout}"))
    device = here()[0]
    package = driver.compile(loaded, tmp_path, [device])
    report = check_package(loaded.attention, package, device, [{"B": 2, "Sq": 5, "Sk": 9}])
    assert report.dtype == "bf16"
    assert report.passed, [(str(o.case), o.verdict, o.detail) for o in report.outcomes if not o.passed]


def test_check_says_what_stood_in_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "here", lambda: (find("interpreter"),))
    report = driver.check(spec.loads(SPEC.replace("fp16", "bf16")), [{"B": 1, "Sq": 3, "Sk": 5}])
    assert report.dtype == "fp16"
    assert any("bf16" in note for note in report.notes)


def test_a_target_that_cannot_run_here_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "here", lambda: (find("cpu"),))
    with pytest.raises(SpecError, match="'sm_90' cannot be checked: no such GPU is here"):
        driver.check(spec.loads(SPEC), target="sm_90")
    with pytest.raises(SpecError, match="unknown target 'sm_9'"):
        driver.check(spec.loads(SPEC), target="sm_9")
