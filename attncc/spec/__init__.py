"""The spec language, schema 1: YAML and Python callables become `ir.attention`."""
