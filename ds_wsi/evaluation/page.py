"""The frame of our HTML pages: opens anywhere, with no script, no font and no image from outside."""

from collections.abc import Iterable
from html import escape

# Scripts, fonts and connections are refused by the browser too, should an escape ever be missed.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d2125; --soft: #626a72; --line: #dcdfe2; --wash: #f3f4f5; --accent: #1f5f99;
  --wrong: #a3301c; --wrong-wash: #fbeeea; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181b; --ink: #e4e6e8; --soft: #9aa3ab; --line: #33393f; --wash: #1e2226; --accent: #7db8ec;
  --wrong: #f29c87; --wrong-wash: #3a211b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1, h2 { font-family: Charter, "Bitstream Charter", Georgia, "Noto Serif", "DejaVu Serif", serif; font-weight: 600;
  line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h1 { margin: 0 0 .4rem; font-size: clamp(1.6rem, 5vw, 2.2rem); }
h2 { margin: 3rem 0 .8rem; font-size: 1.3rem; }
p { margin: 0 0 .9rem; max-width: 42rem; }
.note { color: var(--soft); font-size: .9rem; }
.prose { white-space: pre-line; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: .15em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem .42rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; white-space: nowrap;
  border-bottom: 1px solid var(--soft); }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
.headline tbody td.value { font-size: 1.15rem; font-weight: 600; }
.bar { width: 34%; min-width: 9rem; padding-left: 1rem; }
thead .bar { text-align: center; }
.bar svg { display: block; width: 100%; height: .8rem; overflow: visible; }
.predictions tbody th { white-space: nowrap; }
.confusion, .cohort { width: auto; }
.confusion .diagonal { background: var(--wash); font-weight: 650; }
.roc text { fill: var(--ink); font-size: 13px; }
body:has(.results) { max-width: 84rem; }
.results .group { padding-right: 0; border-bottom-color: var(--line); text-align: center; }
.results td:first-child { white-space: nowrap; }
.results thead tr + tr th:last-child { padding-right: .9rem; }
.predicted { font-weight: 650; }
.mark { display: inline-block; padding: 0 .5em; border: 1px solid transparent; border-radius: .25em;
  color: var(--soft); }
td .mark { margin-left: -.5em; }
.wrong .mark { border-color: currentColor; background: var(--wrong-wash); color: var(--wrong); font-weight: 650; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; margin: 0; font-size: .92rem;
  border-top: 1px solid var(--line); }
dt, dd { margin: 0; padding: .36rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
dt { padding-right: 1.5rem; color: var(--soft); }
figure { margin: 0 0 2rem; scroll-margin-top: 1rem; }
figure:target figcaption { border-left: .25rem solid var(--accent); padding-left: .6rem; }
figcaption { margin-bottom: .5rem; font-size: .92rem; overflow-wrap: anywhere; }
figcaption strong { margin-right: .5em; }
img { display: block; width: auto; max-width: 100%; height: auto; max-height: 44rem; padding: .5rem; background: #fff;
  border: 1px solid var(--line); border-radius: .25rem; }
@media (max-width: 36rem) {
  body { padding: 1.5rem 1rem 3rem; }
  dl { grid-template-columns: 1fr; }
  dt { padding-bottom: 0; border-bottom: 0; font-size: .82rem; }
  dd { padding-top: 0; }
  .bar { display: none; }
  .curves img { max-width: none; width: 40rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #fff; --accent: #000;
    --wrong: #000; --wrong-wash: #fff; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .scroll, .curves { overflow: visible; }
  .curves img { max-width: 100%; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  img { border: 0; padding: 0; max-height: 17cm; }
}
"""

_NUMBER = ' class="number"'


def page(title: str, body: str) -> str:
    """A whole page of `body`, which is HTML already."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def section(heading: str, content: str) -> str:
    """A section of `content`, which is HTML already."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def table(head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """Join cells that are HTML already into a table that scrolls by itself on a narrow screen."""
    lines = "\n".join(rows)
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead><tr>{"".join(head)}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table></div>"
    )


def head_cell(text: str, number: bool = False) -> str:
    """A column's heading."""
    return f'<th scope="col"{_NUMBER if number else ""}>{escape(text)}</th>'
