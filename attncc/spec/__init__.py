"""The spec language, schema 1: YAML and Python callables become `ir.attention`."""

from attncc.spec.loading import Spec, load, loads
from attncc.spec.schema import schema

__all__ = ["Spec", "load", "loads", "schema"]
