"""Storages of trials: every scheme opens, nothing else does, a torn journal mends, and no message shows a password."""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages._grpc.server import make_server

from attncc.autotune import storages
from attncc.autotune.storages import open_storage
from attncc.errors import AttnccError, SpecError, TuneError, Unsupported

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storages, "PATIENCE_S", 1)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


@pytest.fixture
def closed_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run_trials(storage: BaseStorage, number: int) -> None:
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    for n in range(number):
        trial = study.ask()
        trial.suggest_int("BM", 16, 128)
        study.tell(trial, n)


def values(storage: BaseStorage) -> list[float]:
    return [v for t in optuna.load_study(storage=storage, study_name="s").trials for v in t.values or ()]


# -- what opens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("{tmp}/a.journal", JournalStorage),
        ("journal:{tmp}/a.journal", JournalStorage),
        ("journal:{tmp}/new/folder/a: {{b}}.journal", JournalStorage),
        ("JOURNAL:{tmp}/a.journal", JournalStorage),
        ("sqlite:///{tmp}/a.db", RDBStorage),
        ("sqlite:///{tmp}/100%25 {{SCHEMA_VERSION}}@b.db", RDBStorage),
    ],
)
def test_files_keep_trials(tmp_path: Path, url: str, kind: type[BaseStorage]) -> None:
    url = url.format(tmp=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage = open_storage(url)
    assert isinstance(storage, kind)
    run_trials(storage, 2)
    assert values(open_storage(url)) == [0, 1]


def test_a_relative_path_is_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("tuning/a.journal")
    monkeypatch.chdir("/")
    run_trials(storage, 1)
    assert values(open_storage(str(tmp_path / "tuning" / "a.journal"))) == [0]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "PostgreSQL"])
@pytest.mark.parametrize(
    ("rest", "opened"),
    [
        ("u:p%7Bw%40@h:5433/d", "u:p%7Bw%40@h:5433/d?connect_timeout=1"),
        ("h/d?sslmode=require", "h/d?connect_timeout=1&sslmode=require"),
        ("u@h/d?connect_timeout=60", "u@h/d?connect_timeout=60"),
    ],
)
def test_postgresql_is_opened_with_psycopg_and_heartbeats(
    monkeypatch: pytest.MonkeyPatch, scheme: str, rest: str, opened: str
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(storages, "RDBStorage", lambda url, engine, **rest: calls.append((url.format(), rest)))
    open_storage(f"{scheme}://{rest}")
    assert calls == [(f"postgresql+psycopg://{opened}", {"heartbeat_interval": 30, "grace_period": 120})]


def test_databases_fail_the_trials_of_dead_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "HEARTBEAT_S", 1)
    monkeypatch.setattr(storages, "GRACE_S", 1)
    storage = open_storage(f"sqlite:///{tmp_path}/a.db")
    assert isinstance(storage, RDBStorage)
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask()
    storage.record_heartbeat(trial._trial_id)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        optuna.storages.fail_stale_trials(study)
    assert study.trials[0].state == optuna.trial.TrialState.FAIL


def test_a_proxy_passes_trials_on(tmp_path: Path) -> None:
    behind = open_storage(f"sqlite:///{tmp_path}/a.db")
    with ThreadPoolExecutor(2) as pool:
        server = make_server(behind, "localhost", 0, pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            storage = open_storage(f"grpc://127.0.0.1:{port}")
            assert isinstance(storage, GrpcStorageProxy)
            run_trials(storage, 2)
        finally:
            server.stop(None).wait()
    assert values(behind) == [0, 1]


# -- what does not -------------------------------------------------------------------------------

WRONG = [
    "",
    "journal:",
    "journal:a\0b",
    "a\0b",
    "journal://host/a",
    f"//u:{SECRET}@h/d",
    f"redis://u:{SECRET}@h",
    f"mysql://u:{SECRET}@h/d",
    f"mysql+pymysql://u:{SECRET}@h/d",
    f"postgres://u:{SECRET}@h/d",
    f"postgresql+psycopg2://u:{SECRET}@h/d",
    f"http://u:{SECRET}@h/d",
    f"file:///a?password={SECRET}",
    f"u:{SECRET}@h/d",
    f"postgresql:u:{SECRET}@h/d",
    f"postgresql:/u:{SECRET}@h/d",
    f"postgresql://u:{SECRET}@x@h/d",
    f"postgresql://u:@{SECRET}@h/d",
    f"postgresql://u:{SECRET}",
    f"postgresql://u:{SECRET}@h:port/d",
    f"postgresql://u:{SECRET}@h:1:2/d",
    f"postgresql://u:{SECRET}@h/d\0",
    "sqlite:",
    "sqlite://",
    "sqlite:///",
    "sqlite:///:memory:",
    "sqlite:///a.db?mode=ro",
    f"sqlite://u:{SECRET}@h/d",
    "sqlite+pysqlite:///a.db",
    "grpc:",
    "grpc://",
    "grpc://host",
    "grpc://:13000",
    "grpc://host:0",
    "grpc://host:65536",
    "grpc://host:port",
    "grpc://host:13000/path",
    "grpc://host:13000?a=b",
    "grpc://[::1:13000",
    f"grpc://u:{SECRET}@h:13000",
]


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_url_is_refused_with_what_is_accepted(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as error:
        open_storage(url)
    for word in ("journal:PATH", "sqlite:///FILE", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE", "grpc://HOST:PORT"):
        assert word in error.value.hint
    assert SECRET not in everything(error.value)
    assert not list(tmp_path.iterdir())


def everything(error: BaseException | None) -> str:
    """The texts of an error and of whatever hangs on to it."""
    found = []
    while error is not None:
        found.append(f"{error} {error.args}")
        error = error.__cause__ or error.__context__
    return "\n".join(found)


def test_a_directory_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not a file"):
        open_storage(str(tmp_path))


def test_files_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "text.db").write_text("This is no database, but text that is long enough to be one." * 10)
    for url in (f"{tmp_path}/file/a", f"sqlite:///{tmp_path}/no/a.db", f"sqlite:///{tmp_path}/text.db"):
        with pytest.raises(TuneError, match="cannot be opened"):
            open_storage(url)


@pytest.mark.parametrize(
    "rest",
    [
        "u:{secret}@{at}/d",
        "u:{secret}%40@{at}/d",
        "{at}/d?user=u&password={secret}",
        "u:{secret}@{at}/d?password={secret}",
    ],
)
def test_a_database_that_does_not_answer_is_named_without_its_password(rest: str, closed_port: int) -> None:
    url = "postgresql://" + rest.format(secret=SECRET, at=f"127.0.0.1:{closed_port}")
    with pytest.raises(TuneError) as error:
        open_storage(url)
    assert f"127.0.0.1, port {closed_port}" in str(error.value)
    assert "refused" in str(error.value)
    assert SECRET not in everything(error.value)


def test_what_a_driver_says_is_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot log in\n as u with {SECRET}@, {SECRET}-2")

    monkeypatch.setattr(storages, "RDBStorage", refuse)
    with pytest.raises(TuneError, match=r"cannot log in as u with \*\*\*, \*\*\*\n") as error:
        open_storage(f"postgresql://u:{SECRET}%40@h/d?sslpassword={SECRET}-2")
    assert SECRET not in everything(error.value)


@pytest.mark.parametrize("rest", ["u:{}@a..b/d", "u:{}@127.0.0.1:99999/d", "u:{}@127.0.0.1/d?colour=red"])
def test_what_a_driver_does_not_take_is_an_error(rest: str) -> None:
    with pytest.raises(TuneError, match="cannot be opened: database at") as error:
        open_storage("postgresql://" + rest.format(SECRET))
    assert SECRET not in everything(error.value)


def test_a_proxy_that_does_not_answer_is_named(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PATIENCE_S", 0.1)
    with pytest.raises(TuneError, match=rf"127\.0\.0\.1, port {closed_port}, within 0\.1 s"):
        open_storage(f"grpc://127.0.0.1:{closed_port}")


@pytest.mark.parametrize(("url", "package"), [(f"postgresql://u:{SECRET}@h/d", "psycopg"), ("grpc://h:1", "grpc")])
def test_missing_packages_are_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unsupported, match=rf"{package}.*missing") as error:
        open_storage(url)
    assert "attncc[fleet]" in error.value.hint
    assert SECRET not in everything(error.value)


# -- journals that were hurt ---------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "a.journal"
    run_trials(open_storage(str(path)), 2)
    return path


def test_a_journal_cut_off_anywhere_goes_on(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    whole = journal.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in (*range(last, len(whole), 5), len(whole) - 1):
        journal.write_bytes(whole[:cut])
        storage = open_storage(str(journal))
        assert values(storage) == [0]
        run_trials(storage, 1)
        assert values(open_storage(str(journal))) == [0, 0]


def test_a_worker_mends_what_another_left_half_written(journal: Path) -> None:
    mine, other = open_storage(str(journal)), open_storage(str(journal))
    with open(journal, "ab") as file:
        file.write(b'{"op_code":4,"worker_id":"a-1","stu')
    assert values(mine) == [0, 1]
    run_trials(mine, 1)
    assert values(other) == values(open_storage(str(journal))) == [0, 1, 0]


def garbage(whole: bytes, where: str) -> bytes:
    first, rest = whole.split(b"\n", 1)
    log = json.loads(first)
    return {
        "words": first + b"\nhello\n" + rest,
        "half a line": first + b"\n" + first[:30] + rest,
        "binary": first + b"\n\xff\xfe\0\n" + rest,
        "zeros": first + b"\0" * 100 + b"\n" + rest,
        "zeros at the end": whole + b"\0" * 100,
        "words at the end": whole + b"hello",
        "a line of words at the end": whole + b"hello\n",
        "a list": first + b"\n[]\n" + rest,
        "a number": first + b"\n7\n" + rest,
        "nothing in it": first + b"\n{}\n" + rest,
        "no such operation": first + b"\n" + json.dumps(log | {"op_code": 99}).encode() + b"\n" + rest,
        "fields missing": b'{"op_code":0,"worker_id":"a"}\n' + whole,
        "deep": first + b"\n" + b"[" * 100_000 + b"\n" + rest,
        "a spec": b"attncc: 1\nname: tiny\n",
        "a spec of one line": b"attncc: 1\n",
        "one line without an end": b"attncc: 1",
        "a newline": b"\n",
    }[where]


GARBAGE = (
    "words",
    "half a line",
    "binary",
    "zeros",
    "zeros at the end",
    "words at the end",
    "a line of words at the end",
    "a list",
    "a number",
    "nothing in it",
    "no such operation",
    "fields missing",
    "deep",
    "a spec",
    "a spec of one line",
    "one line without an end",
    "a newline",
)


@pytest.mark.parametrize("where", GARBAGE)
def test_a_corrupt_journal_is_refused_and_left_alone(journal: Path, where: str) -> None:
    corrupt = garbage(journal.read_bytes(), where)
    journal.write_bytes(corrupt)
    with pytest.raises(TuneError, match=r"corrupt.*\n.*--storage.*still in the store") as error:
        open_storage(str(journal))
    assert str(journal) in str(error.value)
    assert journal.read_bytes() == corrupt


def test_an_empty_file_becomes_a_journal(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    run_trials(open_storage(f"{tmp_path}/a"), 1)
    assert values(open_storage(f"{tmp_path}/a")) == [0]


def test_workers_share_a_journal(journal: Path) -> None:
    fork = multiprocessing.get_context("fork")

    def work() -> None:
        run_trials(open_storage(str(journal)), 5)

    workers = [fork.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(values(open_storage(str(journal)))) == sorted([0, 1, *range(5), *range(5)])


def test_a_journal_that_stays_locked_is_an_error(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "LOCKED_S", 0.1)
    with FileLock(f"{journal}.lock"), pytest.raises(AttnccError, match="cannot be opened"):
        open_storage(str(journal))
