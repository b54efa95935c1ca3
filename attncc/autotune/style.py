"""The head of a report page: its style, for light and dark, plotly's script, and the rule that nothing is fetched."""

from __future__ import annotations

from html import escape
from typing import Final

from plotly.offline import get_plotlyjs

CSS: Final = """
:root { color-scheme: light dark; }
:root { --ink: #1f2328; --soft: #59636e; --line: #d6dbe1; --ground: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --ground: #14181d; }
}
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1, h2 { font-weight: 600; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; }
h2 { margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); font-size: 1.15rem; }
p { max-width: 46rem; margin: .5rem 0 .9rem; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0 0 1.2rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 4rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text:first-child { white-space: nowrap; }
td.code { font: .8rem/1.5 ui-monospace, monospace; overflow-wrap: normal; min-width: 18rem; }
.js-plotly-plot .cartesianlayer text, .js-plotly-plot .infolayer text { fill: var(--soft) !important; }
"""


def head(title: str) -> str:
    """All of the page up to its first heading."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
<script>{get_plotlyjs()}</script>
</head><body><main>
"""
