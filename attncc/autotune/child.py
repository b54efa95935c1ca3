"""A process that answers questions one line at a time, and may crash or hang without harm to who asks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Literal, Self

from attncc.errors import AttnccError

LAST_WORDS: Final = 1500
"""Bytes of its standard error that are told of."""


class ChildDied(AttnccError):
    """A child ended, or did not answer in time; the next question starts another one."""

    def __init__(self, status: Literal["crashed", "hung"], message: str) -> None:
        super().__init__(message)
        self.status: Literal["crashed", "hung"] = status


class Child:
    """Runs `python -m MODULE ARGUMENTS`, which answers each line of JSON on standard input by one on standard output.

    It is started by the first question, if not before. Not for several threads at once.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self.command = [sys.executable, "-m", module, *arguments]
        self.environment = dict(environment)
        self.process: subprocess.Popen[str] | None = None
        self.said: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `__exit__`)
        self.scratch = tempfile.TemporaryDirectory(prefix="attncc-child-", ignore_cleanup_errors=True)
        """For its temporary files: of one that is killed nobody else would remove them."""

    def ask(self, question: Mapping[str, Any], patience: float) -> Any:
        """The answer to one question.

        Raises:
            ChildDied: if it takes more than `patience` seconds, or the process ends.
        """
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(patience, give_up)
        timer.start()
        try:
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        code = process.wait()
        words = self.stop()
        if late.is_set():
            raise ChildDied("hung", f"no answer within {patience:.0f} s")
        raise ChildDied("crashed", f"the process ended with {_end(code)}{words}")

    def start(self) -> subprocess.Popen[str]:
        """Lets it begin with what it does before any question."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment, "PYTHONPATH": _path(), "TMPDIR": self.scratch.name},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
                start_new_session=True,
            )
        return self.process

    def stop(self) -> str:
        """Ends the process; what it last wrote to standard error. The next question starts another one."""
        if self.process is None:
            return ""
        _kill(self.process)
        self.process.communicate()
        self.process = None
        self.said.seek(0)
        words = self.said.read()[-LAST_WORDS:].strip()
        self.said.seek(0)
        self.said.truncate()
        return f":\n{words}" if words else ""

    def kill(self) -> None:
        """Ends the process in the middle of a question, if another thread waits for its answer."""
        if self.process is not None:
            _kill(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.said.close()
        self.scratch.cleanup()


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it started, compilers too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _path() -> str:
    root = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
