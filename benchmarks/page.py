"""The report's text as Markdown and as one HTML file. No script, no framework, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure: title, caption, file stem, and the <svg> for a wide and for a narrow window."""

    title: str
    caption: str
    name: str
    wide: str
    narrow: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything a report says. The first figure stands before the table, the others after it."""

    title: str
    question: str
    answer: str
    figures: Sequence[Figure]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]
    table_note: str
    clip_columns: Sequence[str]
    clips: Sequence[tuple[str, Sequence[str]]]
    setup: Sequence[tuple[str, str]]
    limits: Sequence[str]
    commands: Sequence[str]


_CLIP_NOTE = "The same prompts and the same noise, before and after training."


def markdown(content: Content) -> str:
    """The report for a repository page; its figures are the PNG files in figures/."""
    lines = [f"# {content.title}", "", f"**{content.question}**", "", content.answer, ""]
    first, rest = content.figures[:1], content.figures[1:]
    lines += _markdown_figures(first) + ["## Results", ""]
    head, rows = content.table
    lines += [_row(head), _row(["---"] * len(head)), *map(_row, rows), "", content.table_note, ""]
    if content.clips:
        lines += ["## Videos", "", _CLIP_NOTE, "", "![frames of the videos](figures/videos.png)", ""]
    lines += _markdown_figures(rest)
    lines += ["## Set-up", "", _row(["", ""]), _row(["---", "---"]), *map(_row, content.setup), ""]
    lines += ["## Limits", "", *(f"- {limit}" for limit in content.limits), ""]
    lines += ["## Commands", "", "```sh", *content.commands, "```", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _markdown_figures(figures: Sequence[Figure]) -> list[str]:
    lines: list[str] = []
    for figure in figures:
        files = f"[SVG](figures/{figure.name}.svg), [numbers](figures/{figure.name}.csv)"
        lines += [f"## {figure.title}", "", f"![{figure.title}](figures/{figure.name}.png)", ""]
        lines += [f"{figure.caption} {files}", ""]
    return lines


_CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.question { font-size: 1.1rem; font-weight: 600; margin: 0 0 .5rem; }
.answer { border-left: 4px solid #0072B2; background: var(--tint); padding: .75rem 1rem; margin: 0 0 1.5rem; }
figure { margin: 0; max-width: 56rem; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.results td, .results th { overflow-wrap: normal; padding-right: 1.5rem; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.setup th { font-weight: 600; width: 11rem; }
.clips { display: grid; gap: .5rem .75rem; max-width: 44rem; align-items: center; }
.clips .prompt { grid-column: 1 / -1; font-weight: 600; margin-top: .6rem; }
.clips figure { min-width: 0; }
.clips video { width: 100%; max-width: 12rem; display: block; image-rendering: pixelated; background: var(--tint); }
.clips figcaption { margin-top: .15rem; font-size: .8rem; }
pre { background: var(--tint); padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; }
@media (max-width: 600px) {
  main { padding-top: 1rem; }
  .wide { display: none; } .narrow { display: block; }
  .setup, .setup tbody, .setup tr, .setup th, .setup td { display: block; width: auto; }
  .setup th { border: 0; padding-bottom: 0; }
}
"""


def html_page(content: Content) -> str:
    """The report as one HTML file with its figures and videos inside."""
    first, rest = content.figures[:1], content.figures[1:]
    body = [
        f"<h1>{html.escape(content.title)}</h1>",
        f'<p class="question">{html.escape(content.question)}</p>',
        f'<p class="answer">{html.escape(content.answer)}</p>',
        *map(_html_figure, first),
        "<h2>Results</h2>",
        _html_table(*content.table),
        f'<p class="note">{html.escape(content.table_note)}</p>',
        _html_clips(content),
        *map(_html_figure, rest),
        '<h2>Set-up</h2><table class="setup"><tbody>',
        *(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in content.setup),
        "</tbody></table>",
        "<h2>Limits</h2><ul>",
        *(f"<li>{html.escape(limit)}</li>" for limit in content.limits),
        "</ul><h2>Commands</h2>",
        f"<pre>{html.escape(chr(10).join(content.commands))}</pre>",
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The page brings everything along: the browser is told to load nothing else.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'media-src data:; img-src data:">',
            f"<title>{html.escape(content.title)}</title><style>{_CSS}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def _html_figure(figure: Figure) -> str:
    title = html.escape(figure.title)
    drawings = "".join(
        f'<div class="{kind}" role="img" aria-label="{title}">{svg}</div>'
        for kind, svg in (("wide", figure.wide), ("narrow", figure.narrow))
    )
    return f"<h2>{title}</h2><figure>{drawings}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _html_clips(content: Content) -> str:
    if not content.clips:
        return ""
    parts = [f"<h2>Videos</h2><p>{_CLIP_NOTE}</p>"]
    parts.append(f'<div class="clips" style="grid-template-columns: repeat({len(content.clip_columns)}, 1fr)">')
    for prompt, videos in content.clips:
        parts.append(f'<div class="prompt">{html.escape(prompt)}</div>')
        for name, source in zip(content.clip_columns, videos, strict=True):
            label = html.escape(f"{prompt}, {name}")
            parts.append(
                f'<figure><video src="{source}" aria-label="{label}" autoplay loop muted playsinline></video>'
                f"<figcaption>{html.escape(name)}</figcaption></figure>"
            )
    return "\n".join([*parts, "</div>"])
