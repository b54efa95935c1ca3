"""Every error attncc raises: a user's faults (`AttnccError`), and our own (`CompilerBug`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Self


@dataclass(frozen=True, slots=True)
class Location:
    """Where a piece of the user's text stands; `line` and `column` count from 1."""

    file: str
    line: int
    column: int
    text: str = ""
    """The whole source line, without its newline."""
    width: int = 1
    """How many characters of the line are meant."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def shift(self, columns: int, width: int) -> Location:
        """The location of a part of this text: `columns` further right, `width` characters long."""
        return replace(self, column=self.column + columns, width=max(1, width))

    def underline(self) -> str:
        """The source line with the meant characters underlined; empty when the text is not known."""
        if not self.text:
            return ""
        gutter = f"{self.line} | "
        shown = self.text.replace("\t", " ")
        left, window = max(0, self.column - 60), 100
        shown = ("…" if left else "") + shown[left : left + window]
        pad = self.column - 1 - left + (1 if left else 0)
        width = max(1, min(self.width, len(shown) - pad))
        return f"  {gutter}{shown}\n  {' ' * (len(gutter) + pad)}{'^' * width}"


class AttnccError(Exception):
    """A fault of the input, with the place it stands at and what to do about it."""

    def __init__(self, message: str, location: Location | None = None, hint: str = "") -> None:
        self.message = message
        self.location = location
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        head = f"{self.location}: {self.message}" if self.location else self.message
        underline = self.location.underline() if self.location else ""
        hint = f"  {self.hint}" if self.hint else ""
        return "\n".join(part for part in (head, underline, hint) if part)

    def at(self, location: Location | None) -> Self:
        """The same error at `location`, unless it already has one."""
        if self.location is None:
            self.location = location
        return self


class SpecError(AttnccError):
    """The spec (YAML or Python) is not valid."""


class Unsupported(AttnccError):
    """The spec is valid, but nothing in attncc can carry it out for this target yet.

    `key` is the spec's key that stands in the way, such as `kv` or `parts[0].state`.
    """

    def __init__(self, message: str, key: str = "", location: Location | None = None, hint: str = "") -> None:
        super().__init__(message, location, hint)
        self.key = key


class TuneError(AttnccError):
    """No configuration could be measured or chosen, or what tuning keeps could not be read or written."""


class CheckError(AttnccError):
    """An emitted package disagrees with the oracle."""


class CompilerBug(Exception):
    """attncc broke one of its own rules; please report it with the spec."""


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint that names the valid word closest to `word`, else lists them all."""
    known = sorted(words)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(known)}"
