"""The spec language, schema 1: YAML and Python callables become `ir.attention`."""

from attncc.spec.front import attention
from attncc.spec.loading import Spec, load, loads
from attncc.spec.render import document
from attncc.spec.schema import schema

__all__ = ["Spec", "attention", "document", "load", "loads", "schema"]
