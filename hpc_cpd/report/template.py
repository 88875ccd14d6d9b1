"""The frame of an HTML page: styles for light, dark and print, and nothing fetched from anywhere."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from hpc_cpd.report.style import THEMES, Theme, png
from hpc_cpd.run.publish import write_bytes

T = TypeVar("T")

STYLE = """
:root { color-scheme: light dark; --bg:#f4f6f8; --card:#fff; --text:#1b2430; --muted:#5c6877; --line:#dfe4ea;
  --accent:#0b62a8; --warn:#8a5a00; --warn-bg:#fdf3dc; --bar:#dcebf7; --code:#eef1f4; }
@media (prefers-color-scheme: dark) { :root { --bg:#0f1318; --card:#171c23; --text:#e6ebf1; --muted:#93a0b0;
  --line:#2b333d; --accent:#5fb2f2; --warn:#f2cd7c; --warn-bg:#2c2514; --bar:#1d3a54; --code:#0f1318; } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--text); line-height:1.5;
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:2.2rem 1.2rem 4rem }
h1 { font-size:1.9rem; line-height:1.2; margin:0 0 .25rem; letter-spacing:-.01em }
h2 { font-size:1.15rem; margin:0 0 .35rem } h3 { font-size:1rem; margin:1.2rem 0 .3rem }
p { margin:.3rem 0 .8rem; max-width:75ch } .lead,.small,figcaption { color:var(--muted) }
.small { font-size:.85rem } a { color:var(--accent) }
nav { margin:1rem 0 1.6rem; display:flex; flex-wrap:wrap; gap:.3rem 1.1rem; font-size:.92rem }
section { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:1.2rem 1.4rem; margin:0 0 1.2rem }
.cards { display:grid; grid-template-columns:repeat(3,1fr); gap:.9rem; margin:0 0 1.2rem }
.card { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:.9rem 1.1rem }
.card b { display:block; font-size:1.95rem; line-height:1.15; font-weight:650;
  font-variant-numeric:tabular-nums; letter-spacing:-.02em }
.card span { display:block; font-size:.9rem; font-weight:600 } .card small { color:var(--muted); display:block }
.notes { background:var(--warn-bg); color:var(--warn); border:1px solid var(--line); border-radius:12px;
  padding:.7rem 1.2rem; margin:0 0 1.2rem } .notes ul { margin:.2rem 0; padding-left:1.2rem }
figure { margin:.6rem 0 0 } figure img { max-width:100%; height:auto; display:block; margin:0 auto; border-radius:6px }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums;
  font-size:.92rem } th,td { padding:.32rem .6rem; text-align:right; border-bottom:1px solid var(--line);
  white-space:nowrap } th:first-child,td:first-child { text-align:left } thead th { color:var(--muted);
  font-weight:600; border-bottom:2px solid var(--line) } td small { color:var(--muted); margin-left:.4em }
tbody tr.first td { border-top:2px solid var(--line) } tfoot td { font-weight:650; border-bottom:0 }
td.rate { background:linear-gradient(90deg,var(--bar) var(--p,0%),transparent var(--p,0%)) }
pre { background:var(--code); border:1px solid var(--line); border-radius:8px; padding:.8rem 1rem; overflow-x:auto;
  font-size:.86rem; line-height:1.45 } dl { display:grid; grid-template-columns:max-content 1fr; gap:.2rem 1.2rem;
  margin:.4rem 0; font-size:.92rem } dt { color:var(--muted) } dd { margin:0; overflow-wrap:anywhere }
details summary { cursor:pointer; color:var(--accent); margin:.5rem 0 } ul.files { columns:2; font-size:.92rem }
@media (max-width:640px) { .cards { grid-template-columns:1fr 1fr }
  ul.files { columns:1 } main { padding:1.2rem .7rem } section { padding:.9rem } }
@media print { :root { --bg:#fff; --card:#fff; --text:#000; --muted:#444; --line:#ccc; --accent:#000; --code:#fff;
  --bar:#e6eef5; --warn:#000; --warn-bg:#fff } body { font-size:11pt } nav { display:none }
  main { max-width:none; padding:0 } section { border:0; padding:0 0 .6rem } figure,tr,.card { break-inside:avoid }
  td.rate { print-color-adjust:exact; -webkit-print-color-adjust:exact } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


def write_page(folder: Path, title: str, parts: Iterable[str]) -> Path:
    """Write ``index.html``, whose body is `parts`, into `folder`; return it."""
    page = PAGE.format(title=text(title), style=STYLE, body="\n".join(part for part in parts if part))
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def draw(figures: Mapping[str, Callable[[T, Theme], Figure | None]], results: T, folder: Path) -> list[str]:
    """Write the pictures of `results`, light and dark, or delete what is left of earlier ones; return those drawn."""
    drawn = []
    for name, figure_of in figures.items():
        for theme in THEMES:
            figure, path = figure_of(results, theme), folder / f"{name}{theme.suffix}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, png(figure))
                drawn.append(name)
    return list(dict.fromkeys(drawn))


def opening(title: str, lead: str, anchors: Mapping[str, str], notes: Iterable[str]) -> list[str]:
    """The parts above the first section. `anchors`: id of a place -> what the link to it is called."""
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in anchors.items())
    warnings = "".join(f"<li>{text(note)}</li>" for note in notes)
    return [
        f'<header><h1>{text(title)}</h1><p class="lead">{text(lead)}</p></header>',
        f"<nav>{links}</nav>",
        f'<div class="notes" role="note"><ul>{warnings}</ul></div>' if warnings else "",
    ]


def section(anchor: str, title: str, content: str) -> str:
    """`content` is HTML; `anchor`: the id of the place, empty: none."""
    place = f' id="{anchor}"' if anchor else ""
    return f"<section{place}><h2>{text(title)}</h2>{content}</section>"


def again(commands: str) -> str:
    """The section with what to type."""
    return section("again", "Run it again", f"<p>From the root of the repository:</p><pre>{text(commands)}</pre>")


def table(headings: Iterable[str], rows: Iterable[str], foot: str = "") -> str:
    """A table that scrolls where it is too wide; `rows` and `foot` are HTML."""
    head = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>{foot}"
    return f'<div class="scroll"><table>{body}</table></div>'


def small(words: str) -> str:
    """What stands behind a number in small letters; nothing for nothing."""
    return f"<small>{text(words)}</small>" if words else ""


def text(value: Any) -> str:
    """As HTML, in which nothing of it is markup."""
    return html.escape(str(value), quote=True)


def picture(name: str, title: str, caption: str) -> str:
    """A section around NAME.png, and its dark twin for who prefers it."""
    dark = next(theme.suffix for theme in THEMES if theme.suffix)
    return (
        f'<section><h2>{text(title)}</h2><figure><a href="{name}.png"><picture>'
        f'<source srcset="{name}{dark}.png" media="screen and (prefers-color-scheme: dark)">'
        f'<img src="{name}.png" alt="{text(title)}" loading="lazy"></picture></a>'
        f"<figcaption><p>{text(caption)}</p></figcaption></figure></section>"
    )
