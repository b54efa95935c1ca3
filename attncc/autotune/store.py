"""The local store of tuning records: lines of JSON in `<root>/<card>/<program>.jsonl`, only ever appended to.

Writers take turns at a lock; readers need none. What is read may have been cut off by a crash or come from anywhere, so
a line that is no record of its file is skipped, and said.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from attncc.autotune.record import Digest, Name, Record
from attncc.errors import SpecError, TuneError, Unsupported

ROOT_VARIABLE: Final = "ATTNCC_STORE"
SUFFIX: Final = ".jsonl"
LOCK: Final = ".lock"
LINE_BYTES: Final = 64 * 1024
"""Of a line with its newline. The longest record that `record.py` allows takes less."""
PATIENCE_S: Final = 60.0
"""How long a writer waits for its turn; one turn takes milliseconds."""
REASON_CHARACTERS: Final = 200

_CARD: Final = TypeAdapter[str](Name)
_PROGRAM: Final = TypeAdapter[str](Digest)

Say = Callable[[str], None]


def default_root() -> Path:
    """Where this user's records are: `ATTNCC_STORE`, else the user's data directory."""
    if told := os.environ.get(ROOT_VARIABLE):
        return Path(told)
    try:
        from platformdirs import user_data_path
    except ImportError:
        hint = f"pip install 'attncc[tune]', or set {ROOT_VARIABLE} to a directory"
        raise Unsupported(
            "the package 'platformdirs' is missing, which finds the store's directory", hint=hint
        ) from None
    return user_data_path("attncc") / "tuning"


@dataclass(frozen=True, slots=True)
class Merged:
    """What became of the lines of another store."""

    added: int
    known: int
    """Records that were here already, or came twice."""
    skipped: int
    """Lines and files that hold no record."""


@dataclass(frozen=True, slots=True)
class Store:
    """The records below a directory, which need not exist yet.

    Skipped lines are logged: they are no fault of the caller's code, and a warning would be raised under `-W error`.
    """

    root: Path
    say: Say = logging.getLogger(__name__).warning

    def add(self, records: Iterable[Record]) -> None:
        """Appends `records`. When it returns they are on the disk; other writers' records stay."""
        by_file = _by_file(records)
        if by_file:
            with self._turn():
                self._append(by_file)

    def records(self, program: str | None = None, card: str | None = None) -> Iterator[Record]:
        """All records, of one program or card if told so, in the order of the files' names and of their lines."""
        _check(_PROGRAM, program, "program", "8 to 64 hexadecimal digits, in lower case")
        _check(_CARD, card, "card", "letters, digits and _, at most 64, not a digit first")
        return self._read(program, card)

    def merge(self, other: Path | Store) -> Merged:
        """Adds what is not known yet from another store, its directory, or a single file of records.

        The file's records may be of many cards and programs. Merging the same thing again adds nothing.
        """
        skipped: list[str] = []

        def skip(message: str) -> None:
            skipped.append(message)
            self.say(message)

        if isinstance(other, Path) and not os.path.exists(other):
            raise TuneError(f"there is no '{other}' to merge", hint="give a store's directory, or a file of records")
        if isinstance(other, Path) and not os.path.isdir(other):
            found = _by_file(_file_records(other, None, skip))
        else:
            source = other.root if isinstance(other, Store) else other
            found = _by_file(replace(self, root=source, say=skip).records())
        offered = sum(map(len, found.values()))
        if not found:
            return Merged(0, 0, len(skipped))
        with self._turn():
            new = {at: self._unknown(at, records) for at, records in found.items()}
            self._append(new)
        added = sum(map(len, new.values()))
        return Merged(added, offered - added, len(skipped))

    def _read(self, program: str | None, card: str | None) -> Iterator[Record]:
        for folder in self._listed(self.root, card):
            if _refusal(_CARD, folder.name) or not os.path.isdir(folder):
                self.say(_skipped(folder, "not a card's directory"))
                continue
            for file in self._listed(folder, program and program + SUFFIX):
                if file.suffix != SUFFIX or _refusal(_PROGRAM, file.stem):
                    self.say(_skipped(file, f"its name is not a program's digest and {SUFFIX}"))
                elif not self._is_inside(file):
                    self.say(_skipped(file, "it leads out of the store"))
                else:
                    yield from _file_records(file, (folder.name, file.stem), self.say)

    def _listed(self, folder: Path, only: str | None) -> list[Path]:
        """What a directory shows, or the one entry asked for if it is there; hidden files are not shown."""
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            self.say(_skipped(folder, _reason(error)))
            return []
        return [folder / name for name in names if not name.startswith(".") and only in (None, name)]

    def _is_inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))

    def _unknown(self, at: tuple[str, str], records: list[Record]) -> list[Record]:
        card, program = at
        known: defaultdict[object, list[Record]] = defaultdict(list)
        for record in self._read(program, card):
            known[_likeness(record)].append(record)
        new: list[Record] = []
        for record in records:
            alike = known[_likeness(record)]
            if record not in alike:
                alike.append(record)
                new.append(record)
        return new

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This process's and thread's turn to write."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / LOCK, timeout=PATIENCE_S):
                yield
        except Timeout:
            raise TuneError(
                f"another process has been writing to the store {self.root} for {PATIENCE_S:.0f} s",
                hint="see which one it is, and stop it; nothing was written",
            ) from None
        except (OSError, NotImplementedError) as error:  # the latter from file systems without locks
            raise TuneError(
                f"the store {self.root} cannot be written: {_reason(error)}",
                hint=f"choose another directory by {ROOT_VARIABLE} or --store",
            ) from error

    def _append(self, by_file: dict[tuple[str, str], list[Record]]) -> None:
        for (card, program), records in by_file.items():
            _check(_CARD, card, "card", "a name")
            _check(_PROGRAM, program, "program", "a digest")
            file = self.root / card / (program + SUFFIX)
            file.parent.mkdir(exist_ok=True)
            if not self._is_inside(file):
                raise TuneError(f"{file} leads out of the store {self.root}", hint="remove the symbolic link")
            if records:
                _append_lines(file, [record.model_dump_json().encode() + b"\n" for record in records])


def _by_file(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """By card and program."""
    found: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record.card.name, record.program].append(record)
    return dict(found)


def _likeness(record: Record) -> object:
    """What equal records have in common, and few others."""
    return record.key, record.knobs, record.when


def _refusal(form: TypeAdapter[str], text: str) -> bool:
    try:
        form.validate_python(text)
    except ValidationError:
        return True
    return False


def _check(form: TypeAdapter[str], text: str | None, what: str, expected: str) -> None:
    """Both become parts of paths."""
    if text is not None and _refusal(form, text):
        raise SpecError(_plain(f"'{text}' is no {what}"), hint=f"expected {expected}")


def _append_lines(file: Path, lines: list[bytes]) -> None:
    """One write of whole lines. Behind what a killed writer left unfinished they start on a line of their own."""
    handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise TuneError(f"{file} is not a regular file", hint="move it away")
        is_torn = status.st_size and os.pread(handle, 1, status.st_size - 1) != b"\n"
        data = b"".join([b"\n" if is_torn else b"", *lines])
        written = os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    if written < len(data):
        raise TuneError(f"{file}: only {written} of {len(data)} bytes could be written", hint="is the disk full?")
    if not status.st_size:
        _sync(file.parent)
        _sync(file.parents[1])


def _sync(folder: Path) -> None:
    """A new name is on the disk once its directory is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_records(file: Path, belongs: tuple[str, str] | None, say: Say) -> Iterator[Record]:
    """The records of one file; with `belongs`, those of that card and program."""
    try:
        # a pipe would block an open without O_NONBLOCK
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as opened:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                say(_skipped(file, "not a regular file"))
                return
            for number, line in _lines(opened):
                record = _parse(line, belongs)
                if isinstance(record, Record):
                    yield record
                else:
                    say(_skipped(f"{file}:{number}", record))
    except OSError as error:
        say(_skipped(file, _reason(error)))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long only as much as shows it."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        yield number, line
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES + 1)


def _parse(line: bytes, belongs: tuple[str, str] | None) -> Record | str:
    """The line's record, or what is wrong with it."""
    if len(line) > LINE_BYTES:
        return f"longer than {LINE_BYTES} bytes"
    try:
        record = Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        if not where and not line.endswith(b"\n"):
            return "the last line is not finished"
        return f"{where}: {first['msg']}" if where else first["msg"]
    if belongs not in (None, (record.card.name, record.program)):
        return f"a record of card {record.card.name}, program {record.program}"
    return record


def _skipped(place: object, why: str) -> str:
    return f"{_plain(str(place))}: skipped: {_plain(why)[:REASON_CHARACTERS]}"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _plain(text: str) -> str:
    """Fit for a terminal, whatever names and keys that came from elsewhere contain."""
    return "".join(c if c.isprintable() else "?" for c in text)
