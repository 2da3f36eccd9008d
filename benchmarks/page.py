"""Reports as Markdown and as one HTML file. No script, no framework, nothing loaded from elsewhere.

A page is a title and sections; a section is a heading and blocks. A block is any object with `html()` and
`markdown()`, so that a report can be given sections of one's own.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Block(Protocol):
    """A part of a page."""

    def html(self) -> str:
        """As HTML, with nothing to load."""

    def markdown(self) -> str:
        """As Markdown; files are named relative to the report."""


@dataclass(frozen=True)
class Section:
    """A heading with blocks; level 2 stands for itself, level 3 belongs to the one before."""

    title: str
    blocks: Sequence[Block]
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. `kind`: "" or "note" (small), "question", "answer"."""

    text: str
    kind: str = ""

    def html(self) -> str:
        return f'<p class="{self.kind}">{_bold(self.text)}</p>' if self.kind else f"<p>{_bold(self.text)}</p>"

    def markdown(self) -> str:
        return f"**{self.text}**" if self.kind == "question" else self.text


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{_bold(item)}</li>" for item in self.items) + "</ul>"

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)


@dataclass(frozen=True)
class Code:
    """Lines for a shell."""

    lines: Sequence[str]

    def html(self) -> str:
        return f"<pre>{html.escape(chr(10).join(self.lines))}</pre>"

    def markdown(self) -> str:
        return "\n".join(["```sh", *self.lines, "```"])


@dataclass(frozen=True)
class Table:
    """Numbers with a header; its first column stays in sight when it is scrolled. Cells may use **bold**.

    `wrap`: whether the cells are text, which may take several lines.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wrap: bool = False

    def html(self) -> str:
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        lines = "".join(
            f"<tr><th>{_bold(first)}</th>{''.join(f'<td>{_bold(cell)}</td>' for cell in rest)}</tr>"
            for first, *rest in self.rows
        )
        body = f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
        kind = "results wrap" if self.wrap else "results"
        return f'<div class="scroll" tabindex="0"><table class="{kind}">{body}</table></div>'

    def markdown(self) -> str:
        return "\n".join([_row(self.head), _row(["---"] * len(self.head)), *map(_row, self.rows)])


@dataclass(frozen=True)
class Facts:
    """(name, value) pairs."""

    rows: Sequence[tuple[str, str]]

    def html(self) -> str:
        lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self.rows)
        return f'<table class="setup"><tbody>{"".join(lines)}</tbody></table>'

    def markdown(self) -> str:
        return "\n".join([_row(["", ""]), _row(["---", "---"]), *map(_row, self.rows)])


@dataclass(frozen=True)
class Figure:
    """A figure: title, caption, file stem in figures/, and the <svg> for a wide and for a narrow window."""

    title: str
    caption: str
    name: str
    wide: str
    narrow: str

    def html(self) -> str:
        label = html.escape(self.title)
        drawings = "".join(
            f'<div class="{kind}" role="img" aria-label="{label}">{svg}</div>'
            for kind, svg in (("wide", self.wide), ("narrow", self.narrow))
        )
        return f"<figure>{drawings}<figcaption>{html.escape(self.caption)}</figcaption></figure>"

    def markdown(self) -> str:
        files = f"[SVG](figures/{self.name}.svg), [numbers](figures/{self.name}.csv)"
        return f"![{self.title}](figures/{self.name}.png)\n\n{self.caption} {files}"


@dataclass(frozen=True)
class Clips:
    """Playing videos: one group per prompt, one video per name; they are in the page only, not in the Markdown.

    rows: (prompt, video sources as data URIs, in the order of `names`). size: (width, height) of a video in pixels.
    """

    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    size: tuple[int, int]

    def html(self) -> str:
        parts = []
        for prompt, videos in self.rows:
            parts.append(f'<p class="prompt">{html.escape(prompt)}</p><div class="clips">')
            for name, source in zip(self.names, videos, strict=True):
                label = html.escape(f"{prompt}, {name}")
                parts.append(
                    f'<figure><video src="{source}" width="{self.size[0]}" height="{self.size[1]}" '
                    f'aria-label="{label}" autoplay loop muted playsinline></video>'
                    f"<figcaption>{html.escape(name)}</figcaption></figure>"
                )
            parts.append("</div>")
        return "\n".join(parts)

    def markdown(self) -> str:
        return "They play in report.html."


def _bold(text: str) -> str:
    """Escaped text in which **words** are bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def markdown(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """A page for a repository; its figures are the PNG files in figures/."""
    parts = [f"# {title}", *(block.markdown() for block in lead)]
    for section in sections:
        parts += [f"{'#' * section.level} {section.title}", *(block.markdown() for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


_CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.25rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.question { font-size: 1.1rem; font-weight: 600; margin: 0 0 .5rem; }
.answer { border-left: 4px solid #0072B2; background: var(--tint); padding: .75rem 1rem; margin: 0 0 1.5rem; }
figure { margin: 0; max-width: 56rem; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
svg image { image-rendering: pixelated; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.results td, .results th { overflow-wrap: normal; padding-right: 1.25rem; min-width: 5.5rem; }
.results th { font-weight: 600; }
.results td { white-space: nowrap; }
.results.wrap td { white-space: normal; }
.results tr > :first-child { position: sticky; left: 0; background: #fff; min-width: 7rem; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.setup th { font-weight: 600; width: 11rem; }
.prompt { font-weight: 600; margin: 1rem 0 .4rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem .75rem; }
.clips figure { min-width: 0; }
.clips video { width: 100%; max-width: 12rem; height: auto; display: block; image-rendering: pixelated;
  background: var(--tint); }
.clips figcaption { margin-top: .15rem; font-size: .8rem; }
pre { background: var(--tint); padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; }
@media (max-width: 600px) {
  main { padding-top: 1rem; }
  .wide { display: none; } .narrow { display: block; }
  .setup, .setup tbody, .setup tr, .setup th, .setup td { display: block; width: auto; }
  .setup th { border: 0; padding-bottom: 0; }
  .clips { grid-template-columns: repeat(3, 1fr); }
  .results tr > :first-child { max-width: 8rem; }
}
"""


def html_page(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """The page as one HTML file with its figures and videos inside."""
    body = [f"<h1>{html.escape(title)}</h1>", *(block.html() for block in lead)]
    for section in sections:
        body.append(f"<h{section.level}>{html.escape(section.title)}</h{section.level}>")
        body += [block.html() for block in section.blocks]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The page brings everything along: the browser is told to load nothing else.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'media-src data:; img-src data:">',
            f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )
