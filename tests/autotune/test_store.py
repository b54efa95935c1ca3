"""The store: whatever is added comes back, whoever else writes or dies; what is no record is skipped, and said."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import string
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from attncc.autotune import store as store_module
from attncc.autotune.record import Card, Certificate, Record, Resources, Sparsity, Toolchain
from attncc.autotune.store import LINE_BYTES, Merged, Store, default_root
from attncc.cli import app
from attncc.device import CARDS
from attncc.errors import AttnccError, SpecError, TuneError

PROGRAM = "0123456789abcdef"
H100 = Card.of(CARDS["nvidia_h100"])
H200 = Card.of(CARDS["nvidia_h200"])
FORK = multiprocessing.get_context("fork")


def record(number: int = 0, card: Card = H100, program: str = PROGRAM, **fields: Any) -> Record:
    """Every number makes another one."""
    made: dict[str, Any] = {
        "variant": "tiny",
        "program": program,
        "card": card,
        "toolchain": Toolchain(attncc="0", torch="2.11", triton="3.6"),
        "shape": {"B": 1, "Sq": number},
        "config": {"BM": 64, "BN": 32},
        "status": "measured",
        "ms": 0.1,
        "when": datetime(2025, 1, 1, tzinfo=UTC),
    }
    return Record(**(made | fields))


class Said(list[str]):
    """A store's messages."""

    def store(self, root: Path) -> Store:
        return Store(root, self.append)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def store(tmp_path: Path, said: Said) -> Store:
    return said.store(tmp_path / "store")


def file_of(store: Store, card: str = "nvidia_h100", program: str = PROGRAM) -> Path:
    return store.root / card / f"{program}.jsonl"


def sizes(records: Iterable[Record]) -> list[int]:
    return [r.shape["Sq"] for r in records]


# -- what is added comes back --------------------------------------------------------------------


def test_records_come_back_by_card_and_program(store: Store, said: Said) -> None:
    other = "fedcba98"
    written = [record(1), record(2, card=H200), record(3, program=other), record(4)]
    store.add(written)
    assert sizes(store.records()) == [1, 4, 3, 2]
    assert list(store.records(PROGRAM)) == [written[0], written[3], written[1]]
    assert list(store.records(card="nvidia_h200")) == [written[1]]
    assert list(store.records(other, "nvidia_h100")) == [written[2]]
    assert list(store.records(other, "nvidia_h200")) == []
    assert list(store.records(card="nvidia_a100")) == []
    assert not said


def test_an_empty_store_needs_no_directory(store: Store, said: Said) -> None:
    store.add([])
    assert list(store.records()) == []
    assert not store.root.exists()
    assert not said


def test_adding_only_appends(store: Store) -> None:
    store.add([record(1)])
    before = file_of(store).read_bytes()
    store.add([record(2), record(3)])
    after = file_of(store).read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["shape"]["Sq"] for line in after.splitlines()] == [1, 2, 3]


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,63}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)
RATIOS = st.floats(0, 1e9, exclude_max=True)
TIMES = st.floats(1e-6, 1e9, exclude_max=True)
SHARES = st.floats(0, 1)
COUNTS = st.integers(0, 2**40 - 1)
CARD = st.builds(
    Card,
    name=NAMES,
    arch=NAMES,
    sms=st.integers(1, 2**20 - 1),
    shared_bytes_per_block=st.integers(1, 2**40 - 1),
    l2_bytes=st.integers(1, 2**40 - 1),
    bandwidth_gbps=TIMES,
    bf16_tflops=TIMES,
)
ENDINGS = st.one_of(
    st.fixed_dictionaries(
        {
            "status": st.just("measured"),
            "ms": TIMES,
            "spread": st.none() | st.tuples(TIMES, TIMES),
            "certificate": st.none()
            | st.builds(
                Certificate,
                cases=st.integers(1, 2**20 - 1),
                inputs=st.lists(TEXTS, max_size=64).map(tuple),
                worst=SHARES,
                gradients=st.booleans(),
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "status": st.sampled_from(["illegal", "wrong", "crashed", "hung", "failed"]),
            "why": st.text(st.characters(exclude_categories=["Cs"]), max_size=2000),
        }
    ),
)
ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
RECORDS = st.builds(
    lambda ending, **fields: Record(**fields, **ending),
    ENDINGS,
    variant=NAMES,
    program=st.text("0123456789abcdef", min_size=8, max_size=64),
    card=CARD,
    toolchain=st.builds(Toolchain, attncc=TEXTS, torch=TEXTS, triton=TEXTS, ptxas=TEXTS, driver=TEXTS),
    shape=st.dictionaries(NAMES, COUNTS, max_size=16),
    sparsity=st.none() | st.builds(Sparsity, tiles=RATIOS, variance=RATIOS, full=SHARES, skew=RATIOS),
    config=st.dictionaries(NAMES, st.integers(0, 2**31 - 1), min_size=1, max_size=64),
    predicted_ms=st.none() | TIMES,
    resources=st.none() | st.builds(Resources, registers=COUNTS, spill_bytes=COUNTS, shared_bytes=COUNTS),
    when=st.datetimes(datetime(1000, 1, 1), timezones=ZONES),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.lists(RECORDS, min_size=1, max_size=2), number=st.integers(0, 2**128))
def test_any_record_survives(made: list[Record], number: int, tmp_path: Path) -> None:
    said = Said()
    store = said.store(tmp_path / f"{number}-{len(os.listdir(tmp_path))}")
    store.add(made)
    back = list(store.records())
    assert len(back) == len(made)
    assert all(r in back for r in made)
    assert store.merge(Store(store.root)) == Merged(0, len(made), 0)
    assert not said


def test_the_longest_record_fits_a_line(store: Store, said: Said) -> None:
    control, name = "\x01" * 64, string.ascii_letters + "_" * 9
    longest = record(
        card=H100.model_copy(update={"name": "n" * 64, "arch": "a" * 64}),
        program="f" * 64,
        variant="v" * 64,
        toolchain=Toolchain(attncc=control, torch=control, triton=control, ptxas=control, driver=control),
        shape={f"{name}{n:03}": 2**40 - 1 for n in range(16)},
        config={f"{name}{n:03}": 2**31 - 1 for n in range(64)},
        why="\x01" * 2000,
        certificate=Certificate(cases=1, inputs=(control,) * 64, worst=0.1),
    )
    store.add([longest])
    assert list(store.records()) == [longest]
    assert len(file_of(store, "n" * 64, "f" * 64).read_bytes()) < LINE_BYTES
    assert not said


# -- many writers, and such as die ---------------------------------------------------------------


def test_two_processes_at_once_keep_all(store: Store, said: Said) -> None:
    def write(first: int) -> None:
        for n in range(first, first + 200, 4):
            store.add(record(m) for m in range(n, n + 4))

    writers = [FORK.Process(target=write, args=(first,)) for first in (0, 200)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        list(store.records())  # readers take no lock, and see whole records or none
        time.sleep(0.01)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(sizes(store.records())) == list(range(400))
    assert all("not finished" in message for message in said)


def test_threads_at_once_keep_all(store: Store) -> None:
    def write(first: int) -> None:
        for n in range(first, first + 10):
            store.add([record(n)])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sizes(store.records())) == list(range(40))


@pytest.mark.parametrize("patience", [0.003, 0.009, 0.02, 0.031, 0.05])
def test_a_killed_writer_loses_one_call_at_most(store: Store, said: Said, patience: float) -> None:
    done, tell = FORK.Pipe(duplex=False)

    def write() -> None:
        for n in range(100_000):
            store.add([record(n)])
            tell.send(n)

    writer = FORK.Process(target=write)
    writer.start()
    time.sleep(patience)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    tell.close()
    finished = 0
    while done.poll():
        try:
            finished = done.recv() + 1
        except EOFError:
            break
    store.add([record(999_999)])
    *found, last = sizes(store.records())
    assert last == 999_999
    assert found == list(range(len(found)))
    assert len(found) - finished in (0, 1)
    assert len(said) <= 1


def test_a_line_cut_off_anywhere_costs_that_record_alone(
    store: Store, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module.os, "fsync", lambda handle: None)
    store.add([record(1), record(2)])
    whole = file_of(store).read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        said.clear()
        file_of(store).write_bytes(whole[:cut])
        kept = [1, 2] if cut == len(whole) - 1 else [1]
        assert sizes(store.records()) == kept
        is_torn = start < cut < len(whole) - 1
        assert [m.endswith(f"{PROGRAM}.jsonl:2: skipped: the last line is not finished") for m in said] == [
            True
        ] * is_torn
        store.add([record(3)])
        assert file_of(store).read_bytes().startswith(whole[:cut])
        assert sizes(store.records()) == [*kept, 3]


def test_a_write_that_stops_half_way_is_an_error(store: Store, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add([record(1)])
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "write", lambda handle, data: write(handle, data[:100]))
        with pytest.raises(TuneError, match=r"only 100 of \d+ bytes .*\n.*disk full"):
            store.add([record(2)])
    store.add([record(3)])
    assert sizes(store.records()) == [1, 3]
    assert len(said) == 1


def test_a_writer_waits_for_its_turn_and_not_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add([record(1)])
    monkeypatch.setattr(store_module, "PATIENCE_S", 0.1)
    with FileLock(store.root / ".lock"), pytest.raises(TuneError, match="another process has been writing"):
        store.add([record(2)])
    assert sizes(store.records()) == [1]


# -- what is no record ---------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(record(7).model_dump_json())
    change(data)
    return json.dumps(data).encode()


def setting(**fields: Any) -> bytes:
    return edited(lambda data: data.update(fields))


BAD_LINES = {
    "empty": (b"", "EOF"),
    "blank": (b"   ", "EOF"),
    "words": (b"hello", "Invalid JSON"),
    "half a record": (record(7).model_dump_json().encode()[:300], "Invalid JSON"),
    "two records": (record(7).model_dump_json().encode() * 2, "trailing"),
    "a number": (b"17", "should be an object"),
    "a list": (b"[]", "should be an object"),
    "null": (b"null", "should be an object"),
    "nothing in it": (b"{}", "variant: Field required"),
    "deep": (b"[" * 5000 + b"]" * 5000, "recursion"),
    "binary": (bytes(range(256)).replace(b"\n", b""), "Invalid JSON"),
    "zeros": (b"\0" * 4096, "Invalid JSON"),
    "not UTF-8": (setting(why="@").replace(b"@", b"\xff\xfe"), "unicode"),
    "a lone surrogate": (setting(why="\ud800"), "Invalid JSON"),
    "too long": (setting(why="x" * LINE_BYTES), f"longer than {LINE_BYTES} bytes"),
    "much too long": (b"x" * (5 * LINE_BYTES + 3), f"longer than {LINE_BYTES} bytes"),
    "a long text": (setting(why="x" * 2001), "why: "),
    "a schema to come": (setting(schema=2), "schema: "),
    "a field to come": (setting(colour="red"), "colour: Extra inputs"),
    "a path for a program": (setting(program="../../../etc/passwd"), "program: "),
    "a path for a card": (edited(lambda d: d["card"].update(name="../x")), "card.name: "),
    "a program with a newline": (setting(program=PROGRAM + "\n"), "program: "),
    "another card": (record(7, card=H200).model_dump_json().encode(), "a record of card nvidia_h200"),
    "another program": (record(7, program="f" * 16).model_dump_json().encode(), "program ffffffffffffffff"),
    "no time": (setting(ms=None), "status 'measured' with ms=None"),
    "an endless time": (setting(ms=float("inf")), "ms: "),
    "not a time": (setting(ms=float("nan")), "ms: "),
    "a negative time": (setting(ms=-1), "ms: "),
    "no knobs": (setting(config={}), "config: "),
    "a huge number": (
        setting(shape={"B": 1}).replace(b'{"B": 1}', b'{"B": ' + b"9" * 5000 + b"}"),
        "number out of range",
    ),
    "a date that is none": (setting(when="yesterday"), "when: "),
    "a key for the terminal": (edited(lambda d: d.update({"\x1b[2J": 1})), "?[2J: Extra inputs"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_skipped_and_said(store: Store, said: Said, case: str) -> None:
    line, why = BAD_LINES[case]
    store.add([record(1)])
    with open(file_of(store), "ab") as file:
        file.write(line + b"\n")
    store.add([record(2)])
    assert sizes(store.records()) == [1, 2]
    (message,) = said
    assert message.startswith(f"{file_of(store)}:2: skipped: ")
    assert why in message
    assert len(message) < len(str(file_of(store))) + 300
    assert message.isprintable()


def test_a_long_line_of_one_byte_more(store: Store, said: Said) -> None:
    store.add([record(1)])
    line = record(2).model_dump_json().encode()
    with open(file_of(store), "ab") as file:
        file.write(line + b" " * (LINE_BYTES - len(line) - 1) + b"\n")
        file.write(line + b" " * (LINE_BYTES - len(line)) + b"\n")
    assert sizes(store.records()) == [1, 2]
    assert [":3: skipped: longer" in message for message in said] == [True]


OTHER = "aaaaaaaa.jsonl"
SPOILERS: dict[str, Callable[[Path], object]] = {
    "a directory": lambda root: (root / "nvidia_h100" / OTHER).mkdir(),
    "a pipe": lambda root: os.mkfifo(root / "nvidia_h100" / OTHER),
    "a link out": lambda root: (root / "nvidia_h100" / OTHER).symlink_to(outside(root) / OTHER),
    "a link to itself": lambda root: (root / "nvidia_h100" / OTHER).symlink_to(OTHER),
    "a link to nothing": lambda root: (root / "nvidia_h100" / OTHER).symlink_to("bbbbbbbb.jsonl"),
    "a name": lambda root: (root / "nvidia_h100" / "notes.jsonl").write_text("{}\n"),
    "an ending": lambda root: (root / "nvidia_h100" / "aaaaaaaa.txt").write_text("{}\n"),
    "a name for the terminal": lambda root: (root / "nvidia_h100" / "\x1b[2J.jsonl").write_text("{}\n"),
    "a name that is not UTF-8": lambda root: (root / "nvidia_h100" / os.fsdecode(b"\xff.jsonl")).touch(),
    "a file for a card": lambda root: (root / "nvidia_h200").write_text("{}\n"),
    "a card's name": lambda root: (root / "nvidia-h200").mkdir(),
    "a link to a card": lambda root: (root / "nvidia_h200").symlink_to(outside(root)),
}
"""Things in a store that do not belong there."""


def outside(root: Path) -> Path:
    """A directory beside the store, with records."""
    folder = root.parent / "outside"
    folder.mkdir()
    (folder / OTHER).write_text(record(9, card=H200, program="a" * 8).model_dump_json() + "\n")
    return folder


@pytest.mark.parametrize("name", SPOILERS)
def test_what_is_no_file_of_records_is_skipped_and_said(store: Store, said: Said, name: str) -> None:
    store.add([record(1)])
    SPOILERS[name](store.root)
    assert sizes(store.records()) == [1]
    (message,) = said
    assert ": skipped: " in message
    assert message.isprintable()


def test_a_file_that_cannot_be_read_is_skipped_and_said(
    store: Store, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([record(1), record(2, program="f" * 8)])
    opened = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if "ffffffff" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(store_module.os, "open", refuse)
    assert sizes(store.records()) == [1]
    assert said == [f"{file_of(store, program='f' * 8)}: skipped: Permission denied"]


def test_a_root_that_is_a_file_has_no_records(tmp_path: Path, said: Said) -> None:
    (tmp_path / "store").write_text("x")
    assert list(said.store(tmp_path / "store").records()) == []
    assert said == [f"{tmp_path / 'store'}: skipped: Not a directory"]


def test_what_is_skipped_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.add([record(1)])
    with open(file_of(store), "a") as file:
        file.write("100 %s\n")
    assert sizes(store.records()) == [1]
    assert [r.getMessage().count(":2: skipped: ") for r in caplog.records] == [1]


# -- paths ---------------------------------------------------------------------------------------

TRAVERSALS = (
    "..",
    "../x",
    "/",
    "/etc",
    "a/b",
    "",
    ".",
    "a\0b",
    "nvidia_h100/..",
    "a\n",
    "ABCDEF01/",
    "*",
    "~",
    "\x1b[2J",
)


@pytest.mark.parametrize("name", TRAVERSALS)
def test_names_that_could_lead_out_are_refused(store: Store, name: str) -> None:
    store.add([record(1)])
    with pytest.raises(SpecError, match="is no card"):
        store.records(card=name)
    with pytest.raises(SpecError, match="is no program"):
        store.records(program=name)


@pytest.mark.parametrize(
    "fields",
    [{"program": "../../aaaaaaaa"}, {"card": H100.model_copy(update={"name": "../out"})}],
    ids=["program", "card"],
)
def test_records_made_behind_the_schema_do_not_lead_out(store: Store, fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="is no"):
        store.add([record(1).model_copy(update=fields)])
    assert [p.name for p in store.root.parent.rglob("*")] == ["store", ".lock"]


def blocked(root: Path, how: str) -> Path:
    """A root that cannot be written, even by an administrator."""
    root.mkdir()
    match how:
        case "a file":
            (root / "s").write_text("")
            return root / "s"
        case "below a file":
            (root / "s").write_text("")
            return root / "s" / "t"
        case "a link to nothing":
            (root / "s").symlink_to(root / "nowhere")
            return root / "s"
        case "a link to itself":
            (root / "s").symlink_to("s")
            return root / "s"
        case "a card that is a file":
            (root / "nvidia_h100").write_text("")
        case "a card that leads out":
            (root.parent / "out").mkdir()
            (root / "nvidia_h100").symlink_to(root.parent / "out")
        case "a file that leads out":
            (root / "nvidia_h100").mkdir()
            (root / "nvidia_h100" / f"{PROGRAM}.jsonl").symlink_to(root.parent / "out.jsonl")
        case "a file that is a directory":
            (root / "nvidia_h100" / f"{PROGRAM}.jsonl").mkdir(parents=True)
        case "a file that is a pipe":
            (root / "nvidia_h100").mkdir()
            os.mkfifo(root / "nvidia_h100" / f"{PROGRAM}.jsonl")
        case "a lock that is a directory":
            (root / ".lock").mkdir()
        case "no file system for files":
            return Path("/proc/attncc")
    return root


BLOCKS = (
    "a file",
    "below a file",
    "a link to nothing",
    "a link to itself",
    "a card that is a file",
    "a card that leads out",
    "a file that leads out",
    "a file that is a directory",
    "a file that is a pipe",
    "a lock that is a directory",
    "no file system for files",
)


@pytest.mark.parametrize("how", BLOCKS)
def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, said: Said, how: str) -> None:
    root = blocked(tmp_path / "root", how)
    with pytest.raises(TuneError) as error:
        said.store(root).add([record(1)])
    assert str(root) in str(error.value)
    assert error.value.hint
    assert not (tmp_path / "out.jsonl").exists()
    assert not list(tmp_path.glob("out/*"))


def test_a_read_only_root_says_so_and_can_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add([record(1)])
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(TuneError, match=r"Read-only file system\n.*ATTNCC_STORE or --store"):
        store.add([record(2)])
    assert sizes(store.records()) == [1]


def test_a_root_may_be_a_link(tmp_path: Path, said: Said) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    said.store(tmp_path / "link").add([record(1)])
    assert sizes(said.store(tmp_path / "link").records()) == sizes(said.store(tmp_path / "disk").records()) == [1]
    assert not said


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNCC_STORE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    monkeypatch.setenv("ATTNCC_STORE", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_root() == tmp_path / "attncc" / "tuning"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(AttnccError, match=r"attncc\[tune\].*ATTNCC_STORE"):
        default_root()


# -- merging -------------------------------------------------------------------------------------


def test_merging_adds_what_is_not_known(tmp_path: Path, said: Said) -> None:
    here, there = said.store(tmp_path / "a"), said.store(tmp_path / "b")
    here.add([record(1), record(2)])
    there.add([record(2), record(3), record(4, card=H200), record(3)])
    assert here.merge(there) == Merged(added=2, known=2, skipped=0)
    assert here.merge(there.root) == Merged(added=0, known=4, skipped=0)
    assert sizes(here.records()) == [1, 2, 3, 4]
    assert here.merge(here) == Merged(0, 4, 0)
    assert sizes(there.records()) == [2, 3, 3, 4]


def test_merging_is_commutative_up_to_order(tmp_path: Path, said: Said) -> None:
    parts = [said.store(tmp_path / name) for name in "abc"]
    for n, part in enumerate(parts):
        part.add([record(n), record(n + 1), record(n, card=H200)])
    forward, backward = said.store(tmp_path / "f"), said.store(tmp_path / "g")
    for part in parts:
        forward.merge(part)
    for part in reversed(parts):
        backward.merge(part)
    found = list(forward.records())
    assert len(found) == 7
    assert sorted(map(repr, found)) == sorted(map(repr, backward.records()))


def test_the_same_data_is_the_same_record(store: Store, tmp_path: Path) -> None:
    summer = timezone(timedelta(hours=2))
    store.add([record(1, config={"BM": 64, "BN": 32}, when=datetime(2025, 6, 1, 10, tzinfo=UTC))])
    same = record(1, config={"BN": 32, "BM": 64}, when=datetime(2025, 6, 1, 12, tzinfo=summer))
    later = record(1, when=datetime(2025, 6, 1, 12, tzinfo=UTC))
    Store(tmp_path / "b").add([same, later, record(1, why="x", when=same.when)])
    assert store.merge(tmp_path / "b") == Merged(added=2, known=1, skipped=0)


def test_a_file_of_any_records_can_be_merged(store: Store, said: Said, tmp_path: Path) -> None:
    records = [record(1), record(2, card=H200), record(3, program="f" * 8), record(1)]
    lines = [r.model_dump_json() for r in records]
    (tmp_path / "export.txt").write_text("\n".join([*lines[:2], "garbage", *lines[2:], lines[0][:50]]))
    assert store.merge(tmp_path / "export.txt") == Merged(added=3, known=1, skipped=2)
    assert [m.partition(": skipped: ")[0] for m in said] == [f"{tmp_path / 'export.txt'}:{n}" for n in (3, 6)]
    assert sizes(store.records()) == [1, 3, 2]


def test_merging_skips_and_counts_what_is_no_record(store: Store, said: Said, tmp_path: Path) -> None:
    other = Store(tmp_path / "b")
    other.add([record(1)])
    with open(file_of(other), "ab") as file:
        file.writelines(line + b"\n" for line, _ in BAD_LINES.values())
    for name, spoil in SPOILERS.items():
        folder = tmp_path / name / "store"
        Store(folder).add([record(5)])
        spoil(folder)
        assert store.merge(folder).skipped == 1
    said.clear()
    assert store.merge(other) == Merged(added=1, known=0, skipped=len(BAD_LINES))
    assert len(said) == len(BAD_LINES)
    assert sizes(store.records()) == [5, 1]


def test_merging_what_is_not_there_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=r"there is no .*nowhere"):
        store.merge(tmp_path / "nowhere")
    assert store.merge(Store(tmp_path / "nowhere")) == Merged(0, 0, 0)
    assert not store.root.exists()


def test_two_merges_at_once_add_once(store: Store, tmp_path: Path) -> None:
    Store(tmp_path / "b").add(record(n) for n in range(50))
    mergers = [FORK.Process(target=store.merge, args=(tmp_path / "b",)) for _ in range(3)]
    for merger in mergers:
        merger.start()
    for merger in mergers:
        merger.join()
    assert sizes(store.records()) == list(range(50))


# -- the command ---------------------------------------------------------------------------------


def test_the_command_merges_into_the_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_STORE", str(tmp_path / "mine"))
    Store(tmp_path / "b").add([record(1), record(2)])
    with open(file_of(Store(tmp_path / "b")), "a") as file:
        file.write("garbage\n")
    (tmp_path / "c.jsonl").write_text(record(2).model_dump_json())
    arguments = ["merge", str(tmp_path / "b"), str(tmp_path / "c.jsonl")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["source", "added", "known", "skipped"] in rows
    assert [row[-3:] for row in rows if row and row[0].startswith(str(tmp_path))] == [["2", "0", "1"], ["0", "1", "0"]]
    assert ":3: skipped: Invalid JSON" in result.stderr
    assert sizes(Store(tmp_path / "mine").records()) == [1, 2]
    again = json.loads(CliRunner().invoke(app, [*arguments, "--store", str(tmp_path / "d"), "--json"]).stdout)
    assert again["store"] == str(tmp_path / "d")
    assert again["sources"][0] == {"source": str(tmp_path / "b"), "added": 2, "known": 0, "skipped": 1}
    assert sizes(Store(tmp_path / "d").records()) == [1, 2]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_refuses_what_is_not_there(tmp_path: Path, options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "nowhere"), "--store", str(tmp_path / "d"), *options])
    assert result.exit_code == 2
    assert "nowhere" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "d").exists()
