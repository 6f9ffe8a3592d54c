"""What do all pages look like? One HTML file that asks nobody for anything: style is in it, pictures are SVG."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.report.svg import Markup, element, text

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5c6670; --line: #d5dae0; --bar: #4477aa;
  --worse: #cc6633; --kept: #228833; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8578f; --c4: #8a6d00;
  --c5: #3a8fc4; --c6: #6a4fb3; --c7: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa5b0; --line: #353c44;
  --bar: #6f9fd0; --worse: #e08a5a; --kept: #55b56a; --c0: #58a9e0; --c1: #f08a4b; --c2: #3cc79b; --c3: #e08fc0;
  --c4: #d8b84a; --c5: #8cc8f0; --c6: #a794ea; --c7: #9aa5b0; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --bar: #4477aa;
  --worse: #cc6633; --kept: #228833; --c0: #0072b2; --c1: #d55e00; --c2: #007a59; --c3: #b8578f; --c4: #8a6d00;
  --c5: #3a8fc4; --c6: #6a4fb3; --c7: #444; } body { max-width: none; } .wide { overflow: visible; }
  svg.plot, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } svg rect { print-color-adjust: exact; } }
body { margin: 2em auto; padding: 0 1.2em; max-width: 78em; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid var(--line); } p.note { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.86em; margin: 0.8em 0; }
th, td { padding: 0.22em 0.7em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; } .right { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; } svg.plot { width: 34em; max-width: 100%; height: auto; }
svg.cell { width: 7em; height: 0.7em; } svg text { fill: var(--ink); font-size: 12px; }
svg .small { font-size: 11px; fill: var(--soft); } svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
.frame { fill: none; stroke: var(--soft); } .grid { stroke: var(--line); stroke-width: 0.7; }
.level { stroke: var(--soft); stroke-dasharray: 5 4; } .bar { fill: var(--bar); } .worse { fill: var(--worse); }
.kept { fill: var(--kept); } .point { color: var(--c7); } .point circle { fill: currentColor; }
.point line { stroke: currentColor; stroke-width: 1.6; } .point .number { font-weight: 600; }
svg.long { width: 24em; max-width: 100%; height: 0.9em; } .room { fill: var(--line); } .fill { fill: currentColor; }
svg.mesh { width: 50em; max-width: 100%; height: auto; } .node { fill: none; stroke: var(--line); }
.group { fill: none; stroke: currentColor; stroke-width: 1.4; } .gpu { fill: currentColor; fill-opacity: 0.22; }
.wire { stroke: var(--soft); fill: none; } .arrow { fill: var(--soft); } svg .strong { font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.8em 2.4em; margin: 1em 0; } .tiles b { display: block; font-size: 1.5em;
  font-variant-numeric: tabular-nums; } .tiles span, .legend { color: var(--soft); font-size: 0.86em; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
.legend svg { width: 0.8em; height: 0.8em; margin-right: 0.3em; }
.name { white-space: nowrap; } svg.slices { width: 5em; height: 1.7em; }
svg.slices rect { stroke: var(--paper); stroke-width: 0.5; }
""" + "".join(f".c{number} {{ color: var(--c{number}); }} " for number in range(8))

_ALONE = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser fetches nothing, and runs nothing."""


def framed(title: str, parts: Sequence[str]) -> str:
    """Return a whole page.

    Args:
        title: of the window; it is escaped.
        parts: what stands on the page, as markup.
    """
    head = element("title", text(title)) + element("style", _STYLE)
    metadata = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_ALONE}">'
    metadata += '<meta name="viewport" content="width=device-width">'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{metadata}{head}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def note(words: str) -> Markup:
    """Return a paragraph of what has to be known of what stands beside it."""
    return element("p", text(words), class_="note")
