"""Where traced code of the user's stands: frames and tracebacks in, locations with the user's own line out."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType
from typing import Final

from attncc.errors import Location

FOREIGN: Final = frozenset({"attncc", "torch"})
"""Packages whose frames are not the user's."""


def is_users(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] not in FOREIGN


def frames() -> Iterator[FrameType]:
    """The user's frames, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame):
            yield frame
        frame = frame.f_back


def here() -> Location | None:
    """The expression of the user's that is being evaluated."""
    frame = next(frames(), None)
    return None if frame is None else _location(frame.f_code, frame.f_lasti, frame.f_lineno)


def raised_at(traceback: TracebackType | None) -> Location | None:
    """The user's expression that an exception came from."""
    place = None
    while traceback is not None:
        if is_users(traceback.tb_frame):
            code = traceback.tb_frame.f_code
            place = _location(code, traceback.tb_lasti, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place


def defined_at(code: CodeType) -> Location:
    """The line a function starts on."""
    text = linecache.getline(code.co_filename, code.co_firstlineno).rstrip("\n")
    margin = len(text) - len(text.lstrip())
    return Location(code.co_filename, code.co_firstlineno, margin + 1, text, max(1, len(text.strip())))


def _location(code: CodeType, instruction: int, line: int) -> Location:
    positions = list(code.co_positions())
    start, end, left, right = positions[instruction // 2] if instruction >= 0 else (line, line, None, None)
    start = start or line
    text = linecache.getline(code.co_filename, start).rstrip("\n")
    if left is None:
        left, right = len(text) - len(text.lstrip()), len(text)
    last = len(text) if right is None or end != start else _column(text, right)
    first = _column(text, left)
    return Location(code.co_filename, start, first + 1, text, max(1, last - first))


def _column(text: str, offset: int) -> int:
    """A byte offset as a character offset."""
    return len(text.encode()[:offset].decode(errors="ignore"))
