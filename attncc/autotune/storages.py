"""The text of `--storage` becomes an Optuna storage: a journal file for a machine, a database or a proxy for a fleet.

Messages name the host and the port, and never show a password.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from attncc.errors import SpecError, TuneError, Unsupported

ACCEPTED: Final = (
    "accepted: PATH or journal:PATH, sqlite:///FILE, postgresql://USER:PASSWORD@HOST:PORT/DATABASE, grpc://HOST:PORT"
)
HEARTBEAT_S: Final = 30
GRACE_S: Final = 120
"""A worker that was silent for so long is dead, and its trial failed."""
PATIENCE_S: Final = 10
"""Until a server that does not answer counts as gone."""
LOCKED_S: Final = 60
"""How long a writer waits for its turn at a journal; one turn takes milliseconds."""
REASON_CHARACTERS: Final = 300

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_PSYCOPG: Final = "postgresql+psycopg"
_LOG: Final = b'{"op_code":'
"""How every line of a journal starts."""


def open_storage(url: str) -> BaseStorage:
    """The storage that `url` tells of, made if it is a file that does not exist, and reached if it is a server."""
    found = _SCHEME.match(url)
    scheme = found.group(1).lower() if found else "journal"
    if scheme not in _OPENERS or url.startswith("//"):
        what = f"'{scheme}:' is no storage of trials" if found else "a storage of trials needs a scheme before '//'"
        raise SpecError(what, hint=ACCEPTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of heartbeats and the proxy
        return _OPENERS[scheme](url)


def is_url(text: str) -> bool:
    """Whether a text names a storage by its scheme, rather than a file."""
    found = _SCHEME.match(text)
    return found is not None and found.group(1).lower() in _OPENERS


def without_password(text: str) -> str:
    """A storage or file as messages may show it: without what stands before an @."""
    scheme, slashes, rest = text.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if slashes else text


# -- a journal -----------------------------------------------------------------------------------


def _journal(text: str) -> BaseStorage:
    name = text[len("journal:") :] if text.lower().startswith("journal:") else text
    if not name or "\0" in name or name.startswith("//"):
        raise SpecError("the storage names no file", hint=ACCEPTED)
    path = os.path.abspath(name)
    if os.path.exists(path) and not os.path.isfile(path):
        raise SpecError(f"the storage {name} is not a file", hint=ACCEPTED)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        turn = _Turn(path)
        turn.acquire()
        try:
            _see_last_line(path)
        finally:
            turn.release()
        return JournalStorage(JournalFileBackend(path, turn))
    except OSError as error:
        raise TuneError(f"the storage {name} cannot be opened: {error.strerror or error}", hint=ACCEPTED) from error
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError) as error:
        raise _corrupt(path) from error


def _corrupt(path: str) -> TuneError:
    hint = "start another one with --storage; what was measured is still in the store of records"
    return TuneError(f"the journal {path} is corrupt, or not a journal", hint=hint)


class _Turn(JournalFileOpenLock):
    """A lock that ends with its process, and whose holder finds nothing unfinished in the journal.

    Optuna cannot read on behind a line that a killed writer left half-written, so the next writer takes it away.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path
        self._file_lock = FileLock(path + ".lock", timeout=LOCKED_S)

    def acquire(self) -> bool:
        self._file_lock.acquire()
        try:
            _drop_unfinished(self._path)
        except BaseException:
            self._file_lock.release()
            raise
        return True

    def release(self) -> None:
        self._file_lock.release()


def _drop_unfinished(path: str) -> None:
    """Cuts a journal off behind its last whole line; what does not look like a journal is left as it is."""
    if _is_empty(path):
        return
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
            tail = text[end : end + len(_LOG)]
        if tail != _LOG[: len(tail)]:
            raise _corrupt(path)
        if tail:
            file.truncate(end)


def _see_last_line(path: str) -> None:
    """Optuna takes a last line that it cannot read for an unfinished one, and appends to it."""
    if _is_empty(path):
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        json.loads(text[text.rfind(b"\n", 0, len(text) - 1) + 1 :])


def _is_empty(path: str) -> bool:
    return not os.path.exists(path) or not os.path.getsize(path)


# -- databases -----------------------------------------------------------------------------------


def _sqlite(text: str) -> BaseStorage:
    url = _parsed(text)
    if url.host or url.query or url.database in (None, "", ":memory:"):
        raise SpecError("a storage in SQLite needs a file, and takes no options", hint=ACCEPTED)
    return _database(url, f"file {url.database}")


def _postgresql(text: str) -> BaseStorage:
    url = _parsed(text).set(drivername=_PSYCOPG)
    url = url.set(query={"connect_timeout": str(PATIENCE_S), **url.query})
    place = f"{url.host or 'this machine'}, port {url.port or 5432}"
    return _database(url, f"database at {place}")


def _parsed(text: str) -> URL:
    """Without the text in any message: where a password holds a / or an @, any part may be a piece of it."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or "@" in (url.host or "") or "\0" in text:
        hint = "write special characters of the user and the password as %XX, and the port as a number"
        raise SpecError("the URL of the database cannot be read", hint=f"{hint}; {ACCEPTED}")
    return url


def _database(url: URL, place: str) -> BaseStorage:
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    try:
        return RDBStorage(text, {"pool_pre_ping": True}, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)
    except ImportError:
        missing = True
        reason = ""
    except (SQLAlchemyError, RuntimeError, UnicodeError) as error:  # tables of another Optuna; a host that is no name
        missing = False
        reason = _reason(error, url)
    # raised here, so that no message of the driver hangs on to it
    if missing:
        hint = "pip install 'attncc[fleet]', or 'psycopg[binary]'"
        raise Unsupported("the package 'psycopg' is missing, which PostgreSQL needs", hint=hint)
    raise TuneError(f"the storage cannot be opened: {place}: {reason}", hint="is it running, and the URL right?")


def _reason(error: Exception, url: URL) -> str:
    """What the driver says, on one line and without passwords."""
    text = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
    options = [str(value) for key, value in url.query.items() if "password" in key.lower()]
    for secret in filter(None, (url.password, *options)):
        text = text.replace(str(secret), "***")
    return text[:REASON_CHARACTERS]


# -- a proxy -------------------------------------------------------------------------------------


def _proxy(text: str) -> BaseStorage:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or text.lower() not in (f"grpc://{host}:{port}", f"grpc://[{host}]:{port}"):
        raise SpecError("a proxy of a storage needs a host and a port, and nothing else", hint=ACCEPTED)
    host = f"[{host}]" if ":" in host else host
    try:
        import grpc

        storage = GrpcStorageProxy(host=host, port=port)
    except ImportError:
        hint = "pip install 'attncc[fleet]', or grpcio and protobuf"
        raise Unsupported("the packages 'grpcio' and 'protobuf' are missing, which a proxy needs", hint=hint) from None
    try:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
    except grpc.FutureTimeoutError:
        what = f"no proxy of a storage answers at {host}, port {port}, within {PATIENCE_S} s"
        raise TuneError(what, hint="start one with optuna.storages.run_grpc_proxy_server") from None
    return storage


_OPENERS: Final[dict[str, Callable[[str], BaseStorage]]] = {
    "journal": _journal,
    "sqlite": _sqlite,
    "postgresql": _postgresql,
    _PSYCOPG: _postgresql,
    "grpc": _proxy,
}
