"""The CPU back-end: attention kernels built by TVM, which deploy as one small library each."""

import sys

_shows_errors = sys.excepthook
import tvm  # noqa: E402, F401

sys.excepthook = _shows_errors  # TVM's own hides uncaught errors
