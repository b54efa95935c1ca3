"""The command line: what it prints, in text and JSON, and the exit code of every kind of outcome."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from attncc import driver
from attncc.check.cases import Case
from attncc.cli import app, output
from attncc.cli.output import parse_shape
from attncc.device import DEVICES
from attncc.errors import CompilerBug, SpecError
from attncc.reference import Deviation

SPEC = """attncc: 1
name: tiny
heads: {q: 2, kv: 1}
dims: 16
dtype: fp16
mask: causal
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def bad(tmp_path: Path, old: str, new: str) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(SPEC.replace(old, new))
    return path


# -- outcomes ------------------------------------------------------------------------------------


def test_compile_prints_the_package(spec: Path, tmp_path: Path) -> None:
    result = run("compile", spec, "-o", tmp_path / "out", "--target", "sm_90", "--target", "interpreter")
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()) == tmp_path / "out" / "tiny"
    assert (tmp_path / "out" / "tiny" / "spec.yaml").read_text() == SPEC


def test_compile_as_json(spec: Path, tmp_path: Path) -> None:
    result = run("compile", spec, "-o", tmp_path, "--target", "sm_80", "--json")
    assert json.loads(result.stdout) == {"package": str(tmp_path / "tiny"), "targets": ["sm_80"]}


def test_a_wrong_spec_is_exit_2_with_its_line_and_no_traceback(tmp_path: Path) -> None:
    result = run("compile", bad(tmp_path, "mask: causal", "mask: causl"), "-o", tmp_path)
    assert result.exit_code == 2
    assert "bad.yaml:6:7" in result.stderr
    assert "^^^^^" in result.stderr
    assert "did you mean 'causal'?" in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout


def test_a_wrong_spec_as_json(tmp_path: Path) -> None:
    result = run("explain", bad(tmp_path, "mask: causal", "mask: causl"), "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 2
    assert error["kind"] == "SpecError"
    assert (error["location"]["line"], error["location"]["column"]) == (6, 7)
    assert "causal" in error["hint"]


def test_what_is_not_supported_is_exit_3_with_its_line(tmp_path: Path) -> None:
    path = bad(tmp_path, "mask: causal", "mask: causal\ndropout: 0.1")
    result = run("compile", path, "-o", tmp_path)
    assert result.exit_code == 3, result.output
    assert "bad.yaml:7" in result.stderr
    as_json = json.loads(run("compile", path, "-o", tmp_path, "--json").stdout)
    assert (as_json["error"]["key"], as_json["exit_code"]) == ("dropout", 3)


def test_our_own_fault_is_exit_70_with_a_traceback(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise CompilerBug("tile of shape [] in kernel 'prefill'")

    monkeypatch.setattr(driver, "explain", broken)
    result = run("explain", spec)
    assert result.exit_code == 70
    assert "tile of shape [] in kernel 'prefill'" in result.stderr
    assert "report" in result.stderr
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile",),
        ("compile", "nowhere.yaml", "-o", "out"),
        ("compile", "SPEC", "--target", "sm_91"),
        ("explain", "SPEC", "--pass", "sparsfy"),
        ("check", "SPEC", "--shape", "S=3"),
        ("check", "SPEC", "--shape", "Sq=-3"),
        ("check", "SPEC", "--shape", "Sq"),
        ("check", "SPEC", "--seed", "one"),
        ("targets", "--verbose"),
        ("tune", "SPEC", "--budget", "soon"),
        ("tune", "SPEC", "--shape", "B=x"),
        ("tune", "SPEC", "--device", "nvidia_h200"),
        ("tune", "SPEC", "--sampler", "luck", "--device", "interpreter", "--budget", "1s"),
        ("tune", "SPEC", "--storage", "mysql://nowhere"),
        ("tune", "SPEC", "--for", "nvidia_h200"),
        ("worker",),
        ("merge", "nowhere.jsonl"),
        ("report", "SPEC"),
    ],
)
def test_a_wrong_command_line_is_exit_2(spec: Path, arguments: tuple[str, ...]) -> None:
    result = run(*(spec if a == "SPEC" else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr
    assert "Traceback" not in result.output


def test_hints_name_the_nearest_word(spec: Path) -> None:
    assert "did you mean 'sparsify'?" in run("explain", spec, "--pass", "sparsfy").stderr
    assert "did you mean 'sm_90'?" in run("compile", spec, "--target", "sm_91").stderr


# -- check ---------------------------------------------------------------------------------------


def report(*verdicts: str) -> driver.Report:
    deviation = Deviation("o", 3e-3, 1e-3, 2.2e-3)
    outcomes = [
        driver.Outcome(Case(1, 4, 4 + n), v, (deviation,) if v == "WRONG" else ())  # type: ignore[arg-type]
        for n, v in enumerate(verdicts)
    ]
    return driver.Report("tiny", "cpu", "fp16", tuple(outcomes), ("a note",))


@pytest.mark.parametrize(("verdicts", "code"), [(("ok", "refused"), 0), (("ok", "WRONG"), 1), (("raised",), 1)])
def test_check_says_what_failed(
    spec: Path, monkeypatch: pytest.MonkeyPatch, verdicts: tuple[str, ...], code: int
) -> None:
    monkeypatch.setattr(driver, "check", lambda *_: report(*verdicts))
    result = run("check", spec)
    assert result.exit_code == code
    assert all(v in result.stdout for v in verdicts)
    assert "note: a note" in result.stdout
    assert ("3.0e-03" in result.stdout) == ("WRONG" in verdicts)
    as_json = run("check", spec, "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout)["passed"] == (code == 0)


def test_check_on_this_machine(spec: Path) -> None:
    result = run("check", spec, "--shape", "B=1,Sq=20,Sk=33", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0, data
    assert {(c["Sq"], c["Sk"]) for c in data["cases"]} == {(20, 33)}


def test_shapes_on_the_command_line() -> None:
    assert parse_shape("B=2, Sq=100,Sk=3") == {"B": 2, "Sq": 100, "Sk": 3}
    for wrong in ("", "B", "B=", "B=2;Sq=3", "B=1.5"):
        with pytest.raises(SpecError):
            parse_shape(wrong)


# -- what is printed -----------------------------------------------------------------------------


def test_explain_shows_every_stage(spec: Path) -> None:
    text = run("explain", spec).stdout
    places = [text.index(f"── {stage} ") for stage in driver.STAGES]
    assert places == sorted(places)
    assert "because:" in text


def test_explain_shows_one_stage(spec: Path) -> None:
    alone = run("explain", spec, "--pass", "sparsify").stdout
    stages = {s["name"]: s["text"] for s in json.loads(run("explain", spec, "--json").stdout)["stages"]}
    assert list(stages) == list(driver.STAGES)
    assert alone.strip() == stages["sparsify"].strip()


def test_explain_says_what_has_no_lowering(tmp_path: Path) -> None:
    path = bad(tmp_path, "mask: causal", "mask: causal\ndropout: 0.1")
    whole = run("explain", path)
    assert whole.exit_code == 0, whole.output
    assert "# 'dropout' has no lowering for this value yet; supported: 0" in whole.stdout
    stages = json.loads(run("explain", path, "--json").stdout)["stages"]
    assert [s["name"] for s in stages] == list(driver.STAGES)
    assert stages[-1]["missing"] == ["dropout"]


def test_list_tells_of_every_spec(spec: Path) -> None:
    (spec.parent / "other.yaml").write_text(
        SPEC.replace("name: tiny", "name: other\nfamily: f|g\nsource: arXiv 2401.00001")
    )
    table = run("list", spec.parent)
    assert table.exit_code == 0, table.output
    row = r"^ tiny +triton: forward, triton: decode, tvm: forward, tvm: decode +mask\(positions\) *$"
    assert re.search(row, table.stdout, re.MULTILINE)
    assert table.stdout.endswith("2 specs: 2 with a lowering, 0 that do not load\n")
    page = run("list", spec.parent, "--markdown").stdout.splitlines()
    assert page[0] == "# Systems"
    link = "[arXiv 2401.00001](https://arxiv.org/abs/2401.00001)"
    assert page[-2:] == [
        "| `tiny` |  |  | triton: forward, triton: decode, tvm: forward, tvm: decode | mask(positions) |",
        rf"| `other` | f\|g | {link} | triton: forward, triton: decode, tvm: forward, tvm: decode | mask(positions) |",
    ]
    listed = json.loads(run("list", spec.parent, "--json").stdout)["systems"]
    assert [s["name"] for s in listed] == ["tiny", "other"]
    assert listed[0]["primitives"] == {"mask": ["positions"]}


def test_list_shows_what_does_not_load_and_exits_2(spec: Path) -> None:
    (spec.parent / "broken.yaml").write_text(SPEC.replace("causal", "causl"))
    for options in ((), ("--json",), ("--markdown",)):
        result = run("list", spec.parent, *options)
        assert result.exit_code == 2
        assert "broken" in result.stdout
        assert "tiny" in result.stdout
        assert "did you mean 'causal'?" in result.stdout
    assert run("list", spec).exit_code == 2


def test_targets_lists_the_device_table() -> None:
    table = run("targets")
    assert table.exit_code == 0
    assert all(name in table.stdout for name in DEVICES)
    listed = json.loads(run("targets", "--json").stdout)["targets"]
    assert [d["name"] for d in listed] == list(DEVICES)
    assert listed[0]["shared_bytes_per_block"] == 163 * 1024


def test_schema_is_json_either_way() -> None:
    pretty, plain = run("schema").stdout, run("schema", "--json").stdout
    assert json.loads(pretty) == json.loads(plain)
    assert plain.count("\n") == 1 < pretty.count("\n")
    assert {"attncc", "name", "heads", "dims", "mask"} <= set(json.loads(plain)["properties"])


def test_help_names_the_exit_codes() -> None:
    text = run("--help").stdout
    assert all(word in text for word in ("compile", "check", "explain", "list", "schema", "targets", "70"))


# -- the process ---------------------------------------------------------------------------------


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attncc", "targets", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["targets"]


def test_the_cli_does_not_import_triton() -> None:
    """A package on a machine without a GPU sets TRITON_INTERPRET first."""
    code = "import sys, attncc.cli; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (30.0, False)])
def test_a_bar_is_shown_for_long_work_only(monkeypatch: pytest.MonkeyPatch, patience: float, shown: bool) -> None:
    written = io.StringIO()

    def terminal(**_: Any) -> Console:
        return Console(file=written, force_terminal=True)

    monkeypatch.setattr(output, "Console", terminal)
    monkeypatch.setattr(output, "PATIENCE_S", patience)
    with output.progress(as_json=False) as step:
        assert step is not None
        step("printing", 1, 3)
        time.sleep(0.2)
    assert ("printing" in written.getvalue()) == shown


def test_no_bar_for_scripts() -> None:
    with output.progress(as_json=True) as step:
        assert step is None
