"""Results as a self-contained HTML page with inline style and figures, in a light and a dark theme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mgvideo.plan.figure import INK

from .results import Results

STYLE = """
:root { color-scheme: light dark; --ink: #23272e; --soft: #68707c; --line: #dfe3e8; --back: #fdfdfc; --card: #ffffff;
  --mark: #d1495b; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa3af; --line: #353b45; --back: #16191e;
  --card: #1d2127; --mark: #ef7d8b; --tint: #242930; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.015em; }
.about { color: var(--soft); margin: 0 0 1.5rem; font-size: 1.05rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0 0 1.5rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; }
pre { background: var(--tint); border-radius: 6px; padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; }
.wide { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; }
th { text-align: right; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); }
td { text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.words, td.words { text-align: left; } td.published { color: var(--soft); white-space: normal; min-width: 11rem; }
tr.baseline td { background: var(--tint); } tbody tr:hover td { color: var(--mark); }
td.name { font-weight: 600; } td.row, td.on { white-space: normal; min-width: 9rem; }
figure { margin: 2rem 0; } figure svg { width: 100%; max-width: 52rem; height: auto; display: block; margin: 0 auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
ul { color: var(--soft); font-size: .9rem; padding-left: 1.2rem; }
"""
TEXT_COLUMNS = ("row", "cell", "on", "published")


def render_page(results: Results, figures: Sequence[Path]) -> str:
    """Return report.html with the given SVG files inline."""
    table = results.table
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in results.facts())
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes())
    figure_html = "".join(f"<figure>{_inline(path)}</figure>" for path in figures)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(table.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escape(table.title)}</h1>\n<p class="about">{escape(table.about)}</p>\n<dl>{facts}</dl>\n'
        f"<pre>{escape(results.command)}</pre>\n{_table(results)}\n<ul>{notes}</ul>\n{figure_html}\n</main></body></html>\n"
    )


def _table(results: Results) -> str:
    """Return the table as HTML; rows of baselines have the class `baseline`."""
    headings, rows = results.grid()
    kinds = ["words" if heading in TEXT_COLUMNS else "" for heading in headings]
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in zip(kinds, headings, strict=True))
    body = []
    for row, cells in zip(results.rows, rows, strict=True):
        is_baseline = results.table.baseline_of(row.cell) is row.cell
        classes = [
            f"{kind} {'name' if heading == 'cell' else heading}" for kind, heading in zip(kinds, headings, strict=True)
        ]
        line = "".join(
            f'<td class="{kind.strip()}">{escape(text)}</td>' for kind, text in zip(classes, cells, strict=True)
        )
        body.append(f'<tr class="{"baseline" if is_baseline else ""}">{line}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _inline(path: Path) -> str:
    """Return an SVG file as an element of the page: with the page's text colour, and with ids unique to the file."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    names = sorted(set(re.findall(r'\bid="([^"]+)"', svg)), key=len, reverse=True)
    for name in names:
        svg = re.sub(rf'(id="|href="#|url\(#){re.escape(name)}(?=["\)])', rf"\g<1>{path.stem}-{name}", svg)
    return svg
