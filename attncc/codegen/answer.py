"""The answering side of a process that is asked one line of JSON at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def answer(handle: Callable[[Any], Any]) -> None:
    """Answers every line of standard input by one of standard output, until there are no more.

    Whatever else is printed, by compilers too, goes to standard error.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), file=replies, flush=True)
