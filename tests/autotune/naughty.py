"""A child that does what it is told, dying included: for the tests of those who ask it."""

import os
import signal
import sys
import tempfile
import time
from typing import Any

from attncc.codegen.answer import answer


def obey(question: dict[str, Any]) -> dict[str, Any]:
    match question["do"]:
        case "hang":
            time.sleep(60)
        case "leave":
            tempfile.mkdtemp()
            time.sleep(60)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "raise":
            raise RuntimeError("no more registers")
        case "exit":
            sys.exit(3)
        case "print":
            print("noise")
            os.write(1, b"more noise\n")
    return {"pid": os.getpid(), "arguments": sys.argv[1:], "set": os.environ.get("SET")}


if __name__ == "__main__":
    answer(obey)
