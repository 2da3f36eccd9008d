"""The pages of a blind study. They bring everything along; nothing on a page tells the runs apart before the end."""

from __future__ import annotations

import html

from benchmarks.study_votes import Result

SECURITY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; media-src 'self'; form-action 'self'"
KEYS_JS = """"use strict";
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const buttons = [...document.querySelectorAll("[data-keys]")];
  const button = buttons.find((one) => one.dataset.keys.split(" ").includes(event.key));
  if (button) { event.preventDefault(); button.click(); }
});
const videos = [...document.querySelectorAll("video")];
const restart = () => videos.forEach((video) => { video.currentTime = 0; video.play(); });
const again = document.getElementById("again");
if (again) again.addEventListener("click", restart);
Promise.all(videos.map((video) => new Promise((done) => {
  if (video.readyState >= 3) done(); else video.addEventListener("canplay", done, { once: true });
}))).then(restart);
for (const form of document.forms) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
}
addEventListener("pageshow", () => { for (const form of document.forms) delete form.dataset.sent; });
"""
_CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --tint: #f6f8fa; --blue: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 56rem; margin: 0 auto; padding: 1.25rem 1rem 2rem; }
header { display: flex; align-items: center; gap: .75rem; color: var(--soft); font-size: .9rem; }
progress { flex: 1; height: .75rem; accent-color: var(--blue); }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 1rem 0 .25rem; }
.prompt { margin: 0 0 1rem; font-size: 1.1rem; }
.votes { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem 1rem; }
video { width: 100%; max-height: 60vh; aspect-ratio: var(--shape); display: block; background: var(--tint);
  border: 1px solid var(--line); border-radius: 6px; object-fit: contain; image-rendering: pixelated; }
button { font: inherit; padding: .7rem .5rem; min-height: 3rem; border: 1px solid var(--line); border-radius: 6px;
  background: #fff; color: var(--ink); cursor: pointer; }
.choose { background: var(--blue); border-color: var(--blue); color: #fff; font-weight: 600; }
button:hover { filter: brightness(.93); }
button:focus-visible, a:focus-visible { outline: 3px solid #E69F00; outline-offset: 2px; }
.tie { grid-column: 1 / -1; }
kbd { font: inherit; font-size: .85em; opacity: .85; border: 1px solid; border-radius: 4px; padding: 0 .35em;
  margin-left: .35em; }
nav { display: flex; justify-content: space-between; align-items: center; gap: 1rem; margin-top: 1rem;
  color: var(--soft); font-size: .9rem; }
nav button { min-height: 2.5rem; padding: .3rem .9rem; }
a { color: var(--blue); display: inline-block; padding: .5rem 0; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { overflow-wrap: normal; }
.answer { border-left: 4px solid var(--blue); background: var(--tint); padding: .75rem 1rem; margin: 1rem 0; }
@media (max-width: 600px) { .votes { gap: .75rem .5rem; } kbd { display: none; } main { padding-top: .75rem; } }
"""


def _page(title: str, body: str, style: str = "") -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}{style}</style></head><body><main>{body}</main>"
        '<script src="/keys.js"></script></body></html>\n'
    )


def vote_page(*, place: int, total: int, done: int, question: str, prompt: str, size: tuple[int, int]) -> str:
    """The page of one pair.

    Args:
        place: of the pair in this person's order, from 0.
        total: number of pairs.
        done: pairs voted on so far.
        question: what to judge.
        prompt: of both videos.
        size: height and width of the videos.
    """
    videos = "".join(
        f'<video src="/video/{place}/{side}.mp4" aria-label="{side} video" autoplay loop muted playsinline></video>'
        for side in ("left", "right")
    )
    back = f'<a href="/pair/{place - 1}">Back to the previous pair</a>' if place else "<span></span>"
    body = f"""
<header><span>Pair {place + 1} of {total}</span>
<progress value="{done}" max="{total}">{done} of {total}</progress></header>
<h1>{html.escape(question)}</h1><p class="prompt">&ldquo;{html.escape(prompt)}&rdquo;</p>
<form method="post" action="/vote" class="votes">{videos}<input type="hidden" name="place" value="{place}">
<button class="choose" name="choice" value="left" data-keys="ArrowLeft 1">Left<kbd>&larr;</kbd></button>
<button class="choose" name="choice" value="right" data-keys="ArrowRight 2">Right<kbd>&rarr;</kbd></button>
<button class="tie" name="choice" value="tie" data-keys="ArrowDown 0">No difference<kbd>&darr;</kbd></button>
</form><nav>{back}<button type="button" id="again" data-keys="r R">Play again<kbd>R</kbd></button></nav>"""
    return _page(f"Pair {place + 1} of {total}", body, f":root {{ --shape: {size[1]} / {size[0]}; }}")


def done_page(*, name_a: str, name_b: str, own: Result, everyone: Result) -> str:
    """What the votes say, after the last one; here the runs have names."""
    rows = "".join(
        f"<tr><th>{html.escape(side)}</th><td>{html.escape(name)}</td><td>{mine}</td><td>{all_}</td></tr>"
        for side, name, mine, all_ in (
            ("A", name_a, own.wins_a, everyone.wins_a),
            ("B", name_b, own.wins_b, everyone.wins_b),
            ("", "no difference", own.ties, everyone.ties),
        )
    )
    body = f"""
<h1>Thank you, that was the last pair.</h1><p class="answer">{html.escape(str(everyone))}.</p>
<table><thead><tr><th></th><th>Run</th><th>Your votes</th><th>All votes</th></tr></thead><tbody>{rows}</tbody></table>
<p>Every vote is in the file of this study; you can close this page.</p>"""
    return _page("All pairs done", body)


def error_page(message: str) -> str:
    """What went wrong with a request."""
    return _page("Not possible", f'<h1>{html.escape(message)}</h1><p><a href="/">To the next pair</a></p>')
