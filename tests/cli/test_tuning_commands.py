"""The commands around tuning, on imagined trials: what one leaves the next one finds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from autotune.bench_in_mind import Imagined
from typer.testing import CliRunner

from attncc.autotune.fleet import jobs
from attncc.autotune.storages import open_storage
from attncc.autotune.store import Store
from attncc.cli.app import app

SPEC = "attncc: 1\nname: tuned\nheads: 2\ndims: 16\ndtype: fp16\nmask: causal\n"
SHAPE = "B=2,Sq=1024,Sk=1024"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    @contextmanager
    def opened(*_: Any) -> Iterator[Any]:
        yield Imagined(lambda config, shape: 1.0 + abs(config["BM"] - 16) / 100)

    monkeypatch.setattr("attncc.autotune.tune.opened", opened)
    monkeypatch.setenv("ATTNCC_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    Path("tuned.yaml").write_text(SPEC)
    return "tuned.yaml"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def tune(spec: str, *more: str) -> Mapping[str, Any]:
    common = ("--shape", SHAPE, "--device", "interpreter", "--sampler", "random", "--json")
    made = run("tune", spec, *common, *more)
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


def test_what_is_tuned_is_compiled_explained_exported_and_reported(spec: str) -> None:
    found = tune(spec, "--budget", "0")
    (shape,) = found["shapes"]
    assert shape["ms"] == shape["best_ms"] == 1.0
    assert shape["default_ms"] == 1.48
    assert [config["BM"] for bounds, config in found["table"] if not bounds] == [16]
    compiled = run("compile", spec, "--target", "interpreter", "-o", "out")
    assert "configs measured on interpreter" in compiled.stderr
    text = Path("out/tuned/configs/interpreter.py").read_text()
    assert run("export", spec, "--device", "interpreter").stdout == text
    explained = json.loads(run("explain", spec, "--shape", SHAPE, "--device", "interpreter", "--json").stdout)
    assert (explained["ms"], explained["default_ms"]) == (1.0, 1.48)
    assert run("report", spec, "-o", "page.html").exit_code == 0
    assert "1.48" in Path("page.html").read_text()
    assert run("package", "out/tuned", "--version", "2.0").stdout.strip() == "dist/tuned-2.0-py3-none-any.whl"


def test_trials_and_reasons_are_counted(spec: str) -> None:
    found = tune(spec, "--trials", "7")
    assert found["tried"] == 7
    assert found["statuses"]["measured"] >= 7
    assert tune(spec, "--trials", "7")["tried"] == 7
    assert len({r.knobs for r in Store(Path("store")).records()}) >= 14


def test_work_is_left_taken_up_and_collected(spec: str) -> None:
    url = "journal:trials"
    left = run("tune", spec, "--storage", url, "--for", "interpreter", "--trials", "6", "--shape", SHAPE)
    assert left.exit_code == 0, left.output
    assert [j.done for j in jobs(open_storage(url))] == [0]
    worked = run("worker", "--storage", url, "--once", "--device", "interpreter", "--json")
    assert worked.exit_code == 0, worked.output
    assert [w["variant"] for w in json.loads(worked.stdout)] == ["tuned"]
    assert [j.done for j in jobs(open_storage(url))] == [6]
    merged = run("merge", url, "--store", "other", "--json")
    (source,) = json.loads(merged.stdout)["sources"]
    assert source["added"] == len([*Store(Path("other")).records()]) > 6
    assert json.loads(run("merge", url, "--store", "other", "--json").stdout)["sources"][0]["added"] == 0


def test_a_table_for_people_says_what_is_next(spec: str) -> None:
    made = run("tune", spec, "--shape", SHAPE, "--device", "interpreter", "--trials", "3")
    assert made.exit_code == 0, made.output
    assert "B=2 Sq=1024 Sk=1024" in made.stdout
    assert "next: attncc compile tuned.yaml --target interpreter" in made.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tune", "SPEC"), 3, "libraries for CPUs have no configs to tune"),
        (("tune", "SPEC", "--device", "interpreter", "--shape", "B=0,Sq=4"), 2, "at least 1"),
        (("tune", "SPEC", "--device", "interpreter", "--shape", "Sq=4,S=4"), 2, "unknown key 'S'"),
        (("tune", "SPEC", "--device", "interpreter", "--budget", "5 days"), 2, "is no time"),
        (("tune", "SPEC", "--for", "nvidia_h200", "--trials", "3"), 2, "--storage"),
        (("tune", "SPEC", "--for", "nvidia_h200", "--storage", "t"), 2, "--trials"),
        (("tune", "SPEC", "--for", "nvidia_h300", "--storage", "t", "--trials", "3"), 2, "nvidia_h"),
        (("worker", "--storage", "redis://x", "--once"), 2, "accepted"),
        (("export", "SPEC", "--device", "nvidia_h200"), 2, "no certified record"),
        (("report", "SPEC"), 2, "attncc tune"),
        (("verify", "nowhere"), 2, "no package"),
        (("package", "nowhere"), 2, "no emitted package"),
        (("merge", "postgresql://me:secret@127.0.0.1:1/db"), 2, "127.0.0.1"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_wrong_commands_say_what_is_wrong(spec: str, arguments: tuple[str, ...], code: int, words: str) -> None:
    made = run(*(spec if a == "SPEC" else a for a in arguments))
    assert made.exit_code == code, made.output
    assert words in made.stderr
    assert "secret" not in made.output
