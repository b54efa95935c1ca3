"""From records to the configs of a package: whose records, what the file says, and what a call then gets."""

from __future__ import annotations

import ast
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autotune.tuning_records import CERTIFICATE, TOOLS, WHEN, record
from typer.testing import CliRunner, Result

from attncc import driver, spec
from attncc.autotune.record import Card, Record, Resources
from attncc.autotune.store import Store
from attncc.autotune.tuned import tuned_configs
from attncc.check.run import imported
from attncc.cli import app
from attncc.codegen import _cards, gate
from attncc.codegen.configs import TargetConfigs, configs_text
from attncc.codegen.gate import Findings
from attncc.device import CARDS, find
from attncc.ir.text import digest

SPEC = "attncc: 1\nname: tiny\nheads: {q: 2, kv: 1}\ndims: 64\nmask: causal\n"
ATTN, _ = driver.lower(spec.loads(SPEC).attention)
PROGRAM = digest(spec.loads(SPEC).attention)
H200 = find("nvidia_h200")
ROWS = driver.default_config(ATTN, H200).rows
DEFAULT = dict(ROWS[-1][1])
LARGE, HUGE = {"B": 1, "Sq": 4096, "Sk": 4096}, {"B": 1, "Sq": 16384, "Sk": 16384}
WIDE, DEEP = DEFAULT | {"E_KEYS": 64}, DEFAULT | {"E_STAGES": 3}


def tried(card: str = "nvidia_h200", **changes: Any) -> list[Record]:
    """WIDE wins at LARGE, DEEP at HUGE."""
    times = {0: (LARGE, {"a": 0.5, "b": 0.8, "c": 1.0}), 1: (HUGE, {"a": 9.0, "b": 7.0, "c": 8.0})}
    configs = {"a": WIDE, "b": DEEP, "c": DEFAULT}
    fixed = {"card": Card.of(find(card)), "program": PROGRAM} | changes
    return [
        record(shape=shape, config=configs[which], ms=ms, **fixed)
        for shape, by in times.values()
        for which, ms in by.items()
    ]


def told(records: Sequence[Record], device: str = "nvidia_h200") -> TargetConfigs:
    configs = tuned_configs(ATTN, records, find(device))
    assert configs is not None
    return configs


def module(configs: TargetConfigs, folder: Path) -> SimpleNamespace:
    """The emitted text, imported."""
    path = folder / f"{configs.target}.py"
    path.write_text(configs_text(ATTN, configs))
    return SimpleNamespace(**{k: v for k, v in runpy.run_path(str(path)).items() if k.isupper()}, __name__=path.stem)


# -- whose records -------------------------------------------------------------------------------


def test_a_card_gets_its_own_records() -> None:
    configs = told([*tried("nvidia_h100"), *tried()])
    assert configs.rows == (*ROWS[:-1], ({"pairs": 2**26}, WIDE), ({}, DEEP))
    assert configs.certificate["card"] == "nvidia_h200"
    assert configs.origin.startswith("Measured on nvidia_h200, 2026-11-28, with attncc 0.1, torch 2.13, triton 3.6.0")
    for words in (
        "at 2 shapes at most 0.0% slower",
        "at least 12 cases, on inputs random, one_hot",
        "40% of the limit",
    ):
        assert words in configs.origin


@pytest.mark.parametrize(
    ("device", "measured", "nearest"),
    [
        ("nvidia_gh200", ["nvidia_h100_pcie", "nvidia_h200", "nvidia_h20"], "nvidia_h200"),
        ("nvidia_h100", ["nvidia_h20", "nvidia_h200"], "nvidia_h200"),
        ("nvidia_h100_pcie", ["nvidia_h20", "nvidia_h100", "nvidia_h200"], "nvidia_h100"),
        ("sm_90", ["nvidia_a100", "nvidia_h20"], "nvidia_h20"),
    ],
)
def test_another_card_gets_those_of_the_nearest(device: str, measured: list[str], nearest: str) -> None:
    configs = told([r for card in measured for r in tried(card)], device)
    assert configs.certificate["card"] == nearest
    assert configs.target == device
    assert configs.origin.startswith(f"Not measured here: nearest card of sm_90, {nearest}. Measured on {nearest}")
    assert configs.device.get("sms") == (None if device == "sm_90" else find(device).sms)


def test_another_card_gets_no_config_that_does_not_fit() -> None:
    fitting = Resources(shared_bytes=1000)
    records = [
        r.model_copy(update={"resources": fitting}) if r.config in (DEEP, DEFAULT) else r for r in tried("nvidia_h200")
    ]
    large = Resources(shared_bytes=find("nvidia_h100").shared_bytes_per_block + 1)
    for other in (large, None):
        some = [r.model_copy(update={"resources": other}) if r.config == WIDE else r for r in records]
        assert [c for _, c in told(some, "nvidia_h100").rows[len(ROWS) - 1 :]] == [DEEP]
        assert WIDE in [c for _, c in told(some).rows], "where it was measured it did fit"
    nowhere = [r.model_copy(update={"resources": None}) for r in records]
    assert tuned_configs(ATTN, nowhere, find("nvidia_h100")) is None
    assert "shared_bytes" not in told(nowhere).certificate


def test_records_of_an_older_toolchain_do_not_count() -> None:
    older = tried(toolchain=TOOLS.model_copy(update={"triton": "3.5"}), when=WHEN.replace(year=2025))
    newer = [r for r in tried() if r.config != WIDE]
    assert WIDE not in [c for _, c in told([*older, *newer]).rows]


NOTHING: dict[str, list[Record]] = {
    "none": [],
    "not certified": tried(certificate=None),
    "another architecture": tried("nvidia_a100"),
    "a knob is missing": [r.model_copy(update={"config": {"BM": 64}}) for r in tried()],
    "a knob is unknown": [r.model_copy(update={"config": r.config | {"os": 1}}) for r in tried()],
    "an engine without its knobs": [
        r.model_copy(update={"config": {k: v for k, v in WIDE.items() if k != "E_KEYS"}}) for r in tried()
    ],
    "the default alone is fastest": [
        r.model_copy(update={"ms": 0.1, "certificate": None}) if r.config == DEFAULT else r for r in tried()
    ],
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_tell(case: str) -> None:
    assert tuned_configs(ATTN, NOTHING[case], H200) is None


# -- the file ------------------------------------------------------------------------------------


def test_the_file_is_plain_data(tmp_path: Path) -> None:
    configs = told(tried())
    text = configs_text(ATTN, configs)
    assert max(map(len, text.splitlines())) <= 120
    for node in ast.parse(text).body[1:]:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
    m = module(configs, tmp_path)
    assert configs.rows == m.TABLE
    assert m.MEASURED == ((LARGE, 0.5, 1.0), (HUGE, 7.0, 8.0))
    assert (m.DEVICE["sms"], m.DEVICE["cards"]["nvidia_h20"]) == (132, (78, 4000, 148))
    assert m.CERTIFICATE["inputs"] == ("random", "one_hot")
    assert {k: m.CERTIFICATE[k] for k in ("cases", "worst", "loss", "shared_bytes", "triton")} == {
        "cases": 12, "worst": 0.4, "loss": 0.0, "shared_bytes": 65536, "triton": "3.6.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "word",
    ['"""', "'''", "\\", '\\"""', "\n", "\u2028", "\x00", "{x}", "  # ", "a" * 64, '")\nimport os\n("', "é漢\u202e"],
)
def test_words_of_records_are_only_ever_text(word: str, tmp_path: Path) -> None:
    tools = TOOLS.model_copy(update={"driver": word, "ptxas": word, "triton": word})
    certificate = CERTIFICATE.model_copy(update={"inputs": (word, f"{word}x"[-64:], "random")})
    configs = told(tried(toolchain=tools, certificate=certificate))
    text = configs_text(ATTN, configs)
    tree = ast.parse(text)
    assert [type(node).__name__ for node in tree.body] == ["Expr", *["Assign"] * 4]
    assert "os" not in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert max(map(len, text.splitlines())) <= 120
    assert configs.rows == module(configs, tmp_path).TABLE


def test_a_file_shows_few_shapes(tmp_path: Path) -> None:
    many = [record(program=PROGRAM, shape={"B": b, "Sq": 4096, "Sk": 4096}, config=WIDE) for b in range(1, 40)]
    shown = module(told(many), tmp_path).MEASURED
    assert 6 <= len(shown) <= 12
    assert shown[0][0]["B"] == 1


# -- what a call gets ----------------------------------------------------------------------------


def here(name: str, sms: int = 132, arch: str = "sm_90", shared: int = 227 * 1024, l2: int = 50 * 2**20) -> Any:
    return _cards.Here(name, arch, sms, shared, l2)


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Any]:
    """Tuned H200, H20 and A100, untuned sm_90 and H100 with PCIe."""
    cards = ("nvidia_h200", "nvidia_h20")
    tuned = {card: module(told(tried(card), card), tmp_path) for card in cards}
    a100 = SimpleNamespace(DEVICE={**tuned["nvidia_h200"].DEVICE, "arch": "sm_80"}, CERTIFICATE={}, TABLE=())
    plain = SimpleNamespace(TABLE=ROWS)
    return tuned | {"nvidia_a100": a100, "nvidia_h100_pcie": plain, "sm_90": plain, "sm_80": plain}


@pytest.mark.parametrize(
    ("card", "file", "rule"),
    [
        (here("NVIDIA H200"), "nvidia_h200", "the card's own file"),
        (here("NVIDIA H20", 78, l2=60 * 2**20), "nvidia_h20", "the card's own file"),
        (here("NVIDIA H100 PCIe", 114), "nvidia_h100_pcie", "the card's own file"),
        (here("NVIDIA GH200 480GB"), "nvidia_h200", "no config for NVIDIA GH200 480GB, using that of nvidia_h200, the"),
        (here("NVIDIA H100 80GB HBM3"), "nvidia_h200", "using that of nvidia_h200, the nearest card"),
        (here("NVIDIA H200 MIG 3g.71gb", 60), "nvidia_h20", "using that of nvidia_h20, the nearest card"),
        (here("NVIDIA H300", 80, l2=0), "nvidia_h20", "using that of nvidia_h20, the nearest card"),
        (here("NVIDIA H200 small", shared=65535, sms=100), "sm_90", "the architecture's file"),
        (here("NVIDIA H200 unknown", shared=0, sms=100), "sm_90", "the architecture's file"),
        (here("NVIDIA L40S", 142, "sm_89", 99 * 1024), "sm_80", "the nearest older architecture"),
        (here("NVIDIA B200", 148, "sm_100"), "sm_90", "the nearest older architecture"),
    ],
    ids=lambda x: x.name if isinstance(x, _cards.Here) else None,
)
def test_which_file_a_card_gets(files: Mapping[str, Any], card: Any, file: str, rule: str) -> None:
    found = _cards.find_card(files, card)
    assert found is not None
    assert found.name == file
    assert rule in found.rule
    assert found.is_own == ("using that of" not in found.rule)


def test_cards_that_differ_in_bandwidth_alone_are_told_apart(tmp_path: Path) -> None:
    files = {card: module(told(tried(card), card), tmp_path) for card in ("nvidia_h100", "nvidia_h200")}
    for name, nearest in (("NVIDIA GH200 144G HBM3e", "nvidia_h200"), ("NVIDIA GH200 480GB", "nvidia_h100")):
        bandwidth = CARDS["nvidia_gh200" if nearest == "nvidia_h100" else "nvidia_gh200_hbm3e"].bandwidth_gbps
        assert bandwidth in (4000, 4900)
        found = _cards.find_card(files, here(name))
        assert found is not None
        assert found.name == nearest


@pytest.mark.parametrize("card", [here("AMD MI300X", 304, "gfx942"), here("NVIDIA V100", 80, "sm_70")])
def test_no_file_serves_a_card(files: Mapping[str, Any], card: Any) -> None:
    assert _cards.find_card(files, card) is None


def test_what_does_not_fit_an_older_architecture_is_not_taken(files: Mapping[str, Any]) -> None:
    tuned = SimpleNamespace(TABLE=ROWS, CERTIFICATE={"shared_bytes": 160 * 1024})
    assert _cards.find_card({"sm_80": tuned}, here("NVIDIA L40S", 142, "sm_89", 99 * 1024)) is None
    assert _cards.find_card({"sm_80": tuned}, here("NVIDIA X", 142, "sm_89", 200 * 1024)) is not None


def test_the_rule_tells_of_the_row_and_the_time(files: Mapping[str, Any]) -> None:
    table = files["nvidia_h200"]
    for sizes, config, words in (
        (LARGE, WIDE, "; row: pairs <= 67108864; these sizes took 0.5 ms there (untuned 1 ms)"),
        (HUGE, DEEP, "; row: all other sizes; these sizes took 7 ms there (untuned 8 ms)"),
        (LARGE | {"B": 8}, DEEP, "; row: all other sizes"),
    ):
        sizes = sizes | {"pairs": sizes["B"] * sizes["Sq"] * sizes["Sk"]}
        bounds, got = _cards.row(table, sizes)
        assert got == config
        said = f", measured on nvidia_h200 2026-11-28{words}"
        assert _cards.told(table, bounds, sizes, table.CERTIFICATE["triton"]) == said
        assert "this is 9.9: `attncc verify` checks again" in _cards.told(table, bounds, sizes, "9.9")
    assert _cards.told(files["sm_90"], {}, LARGE, "9.9") == ""


def test_every_engine_of_a_tuned_table_is_examined(files: Mapping[str, Any]) -> None:
    package = SimpleNamespace(VARIANT=SimpleNamespace(configs=files))
    assert gate._engine_configs(package) == [WIDE, DEEP, DEFAULT]


def test_choose_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def properties(device: torch.device) -> Any:
        name = seen["name"]
        return SimpleNamespace(
            name=name, major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448
        )

    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    out = driver.compile(
        spec.loads(SPEC), tmp_path, [H200], tuned=lambda attn, device, program: tuned_configs(attn, tried(), device)
    )
    with imported(out) as package:
        seen["name"] = "NVIDIA H200"
        config, rule = package.choose("cuda:0", **LARGE)
        assert config == WIDE
        assert rule.startswith("the card's own file, measured on nvidia_h200 2026-11-28; row: pairs <= 67108864; these")
        assert package.choose("cuda:0", Sq=4096)[1].endswith("row: all other sizes")
        seen["name"] = "NVIDIA GH200 480GB"
        with pytest.warns(UserWarning, match="no config for NVIDIA GH200 480GB, using that of nvidia_h200"):
            assert package.choose("cuda:1", **HUGE)[0] == DEEP
        object.__setattr__(package.VARIANT, "on_miss", "error")
        with pytest.raises(RuntimeError, match="and on_miss is 'error'"):
            package.choose("cuda:2", **HUGE)


# -- compile, export, explain ---------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What every store holds."""
    held: list[Record] = []

    def records(self: Store, program: str | None = None, card: str | None = None) -> Any:
        return (r for r in held if program in (None, r.program) and card in (None, r.card.name))

    monkeypatch.setattr(Store, "records", records)
    return held


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def table(package: Path, target: str) -> Any:
    return runpy.run_path(str(package / "configs" / f"{target}.py"))


def test_compile_takes_what_the_store_knows(store: list[Record], path: Path, tmp_path: Path) -> None:
    store += [*tried(), *tried("nvidia_h20", program="f" * 16)]
    result = run("compile", path, "-o", tmp_path, "--target", "nvidia_h200", "--target", "nvidia_a100")
    assert result.exit_code == 0, result.output
    assert result.stderr == "nvidia_h200: configs measured on nvidia_h200, 2026-11-28, at 2 shapes\n"
    package = Path(result.stdout.strip())
    assert table(package, "nvidia_h200")["TABLE"][-1] == ({}, DEEP)
    assert "CERTIFICATE" not in table(package, "nvidia_a100")


def test_compile_says_that_nothing_wins(store: list[Record], path: Path, tmp_path: Path) -> None:
    store += tried(certificate=None)
    result = run("compile", path, "-o", tmp_path, "--target", "nvidia_h200", "--json")
    assert "the default rule, for none of 6 records has a certified config that wins" in result.stderr
    assert json.loads(result.stdout)["targets"] == ["nvidia_h200"]
    assert table(tmp_path / "tiny", "nvidia_h200")["TABLE"] == ROWS


def test_a_tuned_engine_that_must_not_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Findings(("it spills",)), Findings(())])
    monkeypatch.setattr("attncc.driver.examine", lambda *where: next(found))
    out = driver.compile(
        spec.loads(SPEC), tmp_path, [H200], tuned=lambda attn, device, program: tuned_configs(attn, tried(), device)
    )
    made = table(out, "nvidia_h200")
    assert made["TABLE"] == ROWS
    assert "What was tuned is left out: it spills." in made["__doc__"]


def test_export_prints_the_module(store: list[Record], path: Path, tmp_path: Path) -> None:
    store += tried()
    printed = run("export", path, "--device", "nvidia_h200")
    assert printed.exit_code == 0, printed.output
    assert printed.stdout == configs_text(ATTN, told(tried()))
    written = run("export", path, "--device", "nvidia_h200", "-o", tmp_path / "x.py", "--store", tmp_path)
    assert (tmp_path / "x.py").read_text() == printed.stdout
    assert written.stdout.strip() == str(tmp_path / "x.py")


@pytest.mark.parametrize(
    ("device", "words"),
    [("nvidia_a100", "no certified record of 'tiny' for nvidia_a100"), ("nvidia_h2000", "did you mean")],
)
def test_export_of_what_is_not_known(store: list[Record], path: Path, device: str, words: str) -> None:
    store += tried()
    result = run("export", path, "--device", device)
    assert result.exit_code == 2
    assert words in result.stderr


def test_explain_tells_which_config_and_why(store: list[Record], path: Path) -> None:
    store += tried()
    shape = "B=1,Sq=4096,Sk=4096"
    text = run("explain", path, "--shape", shape, "--device", "nvidia_h200").stdout
    row = f"row {len(ROWS)} of {len(ROWS) + 1}: pairs <= 67108864"
    for words in ("E_KEYS=64", row, "Measured on nvidia_h200", "0.5 ms", "1 ms, measured"):
        assert words in text
    data = json.loads(run("explain", path, "--shape", shape, "--device", "nvidia_h200", "--json").stdout)
    assert (data["config"], data["ms"], data["default_ms"]) == (WIDE, 0.5, 1.0)
    untuned = run("explain", path, "--shape", shape, "--device", "nvidia_a100").stdout
    assert "Not tuned here; a default rule for sm_80" in untuned
    assert untuned.count("not measured") == 2
    assert run("explain", path, "--device", "nvidia_h200").exit_code == 2
