"""Runs the module named first, as `python -m` would, in an interpreter that hurries: `interpreter.py` says how."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from interpreter import hurry

hurry()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
