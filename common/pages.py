"""Pictures and pages that open from disk: contact sheets, retrieval panels, tables, curves.

No scripts, no network, no files beside the page: pictures are embedded as JPEG thumbnails, the one stylesheet is inline
and named by its hash in the page's content security policy. Whatever is a plain `str` is text from outside and is
escaped where it enters a page; only what the functions of this file return (`Html`) is taken as markup.

    page("Subgroups", [("First hundred", "Anchor first.", strip([(path, name), ...]), ...), ...])
"""

import base64
import hashlib
import html
import io
import math
import os
import unicodedata
import urllib.parse
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import whole, write_text
from common.images import ImageStore, open_image

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #626b75; --line: #dfe3e7; --paper: #fbfbfa; --card: #ffffff;
  --right: #14804a; --s0: #2563a8; --s1: #c2571a; --s2: #2e8555; --s3: #8a4fa8; --s4: #a8324a; --s5: #5c6b1f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #97a1ab; --line: #31373d; --paper: #15181b;
  --card: #1d2125; --right: #4fc98a; --s0: #78b0ec; --s1: #f0a06a; --s2: #78cf9f; --s3: #cb9be6; --s4: #f08a9d;
  --s5: #c3d16f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; margin: .6rem 0; }
figure { margin: 0; width: 6.6rem; }
figure.big { width: auto; max-width: 100%; }
figure.query { width: 9rem; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--line); }
figure.big img { width: auto; max-width: 100%; }
figure.right img { outline: 3px solid var(--right); outline-offset: 1px; }
figure.right figcaption { color: var(--right); font-weight: 600; }
figcaption { font-size: .76rem; line-height: 1.3; margin-top: .3rem; color: var(--soft); overflow-wrap: anywhere; }
.panel { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; padding: .9rem; margin: .8rem 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
.panel .ask { width: 9rem; }
.panel .found { flex: 1 1 16rem; min-width: 0; }
.panel .strip { margin: 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .8rem;
  margin: .8rem 0; }
.pair { display: grid; grid-template-columns: 6.4rem 1fr 6.4rem; gap: 0 .6rem; padding: .8rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; align-items: start; align-content: start; }
.pair figure { width: auto; min-width: 0; }
.pair img { aspect-ratio: 1; object-fit: contain; }
.pair .delta { align-self: center; text-align: center; margin: 0; overflow-wrap: break-word; min-width: 0;
  font-size: .86rem; line-height: 1.35; }
.pair .delta::after { content: "→"; display: block; color: var(--soft); font-weight: 400; }
.pair .note { grid-column: 1 / -1; margin: .5rem 0 0; overflow-wrap: anywhere; }
.turn a, .turn b { display: inline-block; padding: .1rem .5rem; }
a { color: inherit; }
.delta { margin: 0 0 .3rem; font-weight: 600; }
.good { color: var(--right); } .bad { color: var(--soft); text-decoration: line-through; }
.note { margin: 0 0 .6rem; color: var(--soft); font-size: .86rem; }
svg { display: block; width: 100%; max-width: 44rem; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--soft); } .grid { stroke: var(--line); } .path { fill: none; stroke-width: 1.8; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
.s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
@media (max-width: 30rem) { body { padding: 1.2rem .8rem 3rem; } figure { width: 5rem; }
  .pair { grid-template-columns: 1fr 1fr 1fr; } }
"""

NAME = 30  # characters of a name under a small picture; a longer one is cut in the middle, whole in its tooltip
CUT = 600  # characters of one text shown on a page; the rest becomes an ellipsis that says how much was left out


class Html(str):
    """Markup made by this file; every other string is text and is escaped."""


def clean(text: object) -> str:
    """One printable line: control characters, direction overrides and lone surrogates out, runs of space to one."""
    kept = []
    for char in str(text):
        if char.isspace():
            kept.append(" ")
        # Cc: escape codes for a terminal; Cs: cannot be encoded; Cf: U+202E and friends turn the rest of a line round.
        # U+200D joins emoji and U+200C is ordinary Persian spelling: both harmless, kept.
        elif char in "\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cs", "Cf"):
            kept.append(char)
    return " ".join("".join(kept).split())


def escape(text: object) -> Html:
    """Text as markup: cleaned, cut at CUT characters and escaped (quotes too); Html passes through unchanged."""
    if isinstance(text, Html):
        return text
    line = clean(text)
    if len(line) > CUT:
        line = f"{line[:CUT]}… ({len(line) - CUT:,} more characters)"
    return Html(html.escape(line, quote=True))


def _open(image: str | os.PathLike | Image.Image) -> Image.Image:
    """Only a thumbnail is made of it: a very large photograph is read small."""
    return image.convert("RGB") if isinstance(image, Image.Image) else open_image(image, "reduce")


def _encode(image: Image.Image, size: int) -> str:
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@lru_cache(maxsize=4096)
def _thumbnail_of(path: str, size: int) -> str:
    return _encode(_open(path), size)


def thumbnail(image: str | os.PathLike | Image.Image, size: int = 200) -> str:
    """data: URI of a JPEG no larger than size x size pixels; image is a path or a PIL image."""
    return _encode(_open(image), size) if isinstance(image, Image.Image) else _thumbnail_of(os.fspath(image), size)


def shortened(text: object, most: int = NAME) -> Html:
    """A name that keeps its two ends: "dresses-long-…-0013.jpg", the whole in a tooltip."""
    line = clean(text)
    if isinstance(text, Html) or len(line) <= most:
        return escape(text)
    short = f"{line[: most // 2]}…{line[-(most // 2) :]}"
    return Html(f'<span title="{escape(line)}">{html.escape(short)}</span>')


def address(path: str | os.PathLike, beside: str | os.PathLike) -> str:
    """The address of a file as seen from a page in the folder `beside`; only bytes that a link may hold."""
    return urllib.parse.quote(os.path.relpath(path, beside).encode("utf-8", "surrogateescape"))


def figure(
    image: str | os.PathLike | Image.Image,
    caption: object = "",
    size: int = 900,
    kind: str = "big",
    beside: str = "",
    linked: bool = False,
) -> Html:
    """One picture with its caption; kind: "big" (as wide as it is), "small", "query" or "right" (framed).

    beside: the folder of the page, which makes the picture, if it is a path, a link to its file. linked: that file is
    also what is shown, once it comes into view, and no thumbnail is embedded."""
    assert kind in ("big", "small", "query", "right"), kind
    alt = html.escape(clean(caption)[:200], quote=True) if not isinstance(caption, Html) else ""
    words = escape(caption) if kind == "big" else shortened(caption)
    below = f"<figcaption>{words}</figcaption>" if caption else ""
    file = address(image, beside) if beside and not isinstance(image, Image.Image) else ""
    source = f'src="{file}" loading="lazy"' if linked else f'src="{thumbnail(image, size)}"'
    seen = f'<img {source} alt="{alt}">'
    seen = f'<a href="{file}">{seen}</a>' if file else seen
    return Html(f'<figure class="{kind}">{seen}{below}</figure>')


def strip(items: list, right: int | None = None) -> Html:
    """Thumbnails side by side: images or (image, label) pairs; the one at index `right` is framed."""
    pairs = [item if isinstance(item, tuple) else (item, "") for item in items]
    cells = [figure(im, label, 200, "right" if i == right else "small") for i, (im, label) in enumerate(pairs)]
    return Html(f'<div class="strip">{"".join(cells)}</div>')


def panel(query, text: object, ranked: list, right: int | None = None, note: object = "", answer=None) -> Html:
    """One retrieval: the query picture and its text, then the ranked pictures, with the right one framed.

    query: image or (image, label). ranked: images or (image, label), best first; `right`: index of the right one among
    them, or None; `answer`: the right one (as an item of ranked), shown framed at the end when it is not among them.
    """
    image, label = query if isinstance(query, tuple) else (query, "")
    items = list(ranked)
    if right is None and answer is not None:
        right = len(items)
        items.append(answer)
    words = f'<p class="delta" dir="auto">{escape(text)}</p>' if text else ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    ask = f'<div class="ask">{figure(image, label, 300, "query")}</div>'
    return Html(f'<div class="panel">{ask}<div class="found">{words}{below}{strip(items, right)}</div></div>')


def delta_panel(
    images: ImageStore, reference: str, target: str, delta: str, notes: list[str], beside: str = "", linked=False
) -> Html:
    """One triplet: reference and target of equal size, between them the text that leads from one to the other.

    images: where the two names are looked up; notes: joined by a dot; an empty delta shows as (nothing). linked: the
    pictures are not embedded but read from their files when they come into view, for pages of very many."""

    before, after = (figure(images.path(name), name, 300, "query", beside, linked) for name in (reference, target))
    words = f'<p class="delta" dir="auto">{escape(delta or "(nothing)")}</p>'
    below = f'<p class="note">{escape(" · ".join(notes))}</p>' if notes else ""
    return Html(f'<article class="pair">{before}{words}{after}{below}</article>')


def pairs(panels: list[Html]) -> Html:
    """delta_panels side by side, as many a row as the window has room for."""
    return Html(f'<div class="pairs">{"".join(panels)}</div>')


def marked(pieces: list[tuple[str, bool | None]]) -> Html:
    """A text in pieces: what is right in green, what is wrong struck out, what nobody knows (None) as it is."""
    kinds = {True: ' class="good"', False: ' class="bad"', None: ""}
    return Html(" ".join(f"<span{kinds[good]}>{escape(text)}</span>" for text, good in pieces))


def table(rows: list, headers: list) -> Html:
    """Rows of cells under headers; first column to the left, the others to the right; a float shows two decimals."""

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "" if value is None else escape(value)

    head = "".join(f"<th>{cell(value)}</th>" for value in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def text_table(rows: list[list], headers: list[str]) -> str:
    """Aligned columns for a terminal."""
    cells = [headers, *([f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)) for row in cells)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def _thin(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs, so that a long noisy curve stays readable and the page small."""
    run = -(-len(points) // most)
    if run <= 1:
        return points
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def curve(series: dict[str, list], x_label: str = "step", y_label: str = "") -> Html:
    """Lines with axes and a legend as inline SVG. series: name -> [(x, y), ...] or [y, ...]; gaps where not finite."""
    lines = {}
    for name, values in series.items():
        pairs = [tuple(v) if isinstance(v, tuple | list) else (i + 1, v) for i, v in enumerate(values)]
        finite = [(float(x), float(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if finite:
            lines[name] = _thin(finite)
    if not lines:
        return Html('<p class="note">No values to draw.</p>')
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1 = x1 if x1 > x0 else x0 + 1.0
    margin = (y1 - y0) * 0.06 or max(abs(y0), 1.0) * 0.1  # a flat line still gets an axis around it
    y0, y1 = y0 - margin, y1 + margin
    if min(ys) >= 0:
        y0 = max(y0, 0.0)
    left, top, width, height = 52, 14, 560, 230

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * width, top + (y1 - y) / (y1 - y0) * height

    out = []
    for y in _ticks(y0, y1):
        at = place(x0, y)[1]
        out.append(f'<line class="grid" x1="{left}" y1="{at:.1f}" x2="{left + width}" y2="{at:.1f}"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(x0, x1, 7):
        at = place(x, y0)[0]
        out.append(f'<line class="axis" x1="{at:.1f}" y1="{top + height}" x2="{at:.1f}" y2="{top + height + 4}"/>')
        out.append(f'<text x="{at:.1f}" y="{top + height + 17}" text-anchor="middle">{x:.5g}</text>')
    corner = f"M{left} {top}V{top + height}H{left + width}"
    out.append(f'<path class="axis" fill="none" d="{corner}"/>')
    below = top + height + 34
    out.append(f'<text x="{left + width}" y="{below}" text-anchor="end">{escape(x_label)}</text>')
    out.append(f'<text x="{left + 6}" y="{top + 8}">{escape(y_label)}</text>')
    for i, (name, points) in enumerate(lines.items()):
        dash = "" if i < 6 else f' stroke-dasharray="{2 + i // 6 * 3} 3"'  # six colours; more lines differ by dashes
        spots = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        if len(points) == 1:
            x, y = place(*points[0])
            out.append(f'<circle class="path s{i % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        out.append(f'<polyline class="path s{i % 6}"{dash} points="{spots}"/>')
        column, row = i % 2, i // 2
        x, y = left + column * 280, below + 20 + row * 17
        out.append(f'<line class="path s{i % 6}"{dash} x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}"/>')
        short = name if len(name) <= 40 else f"{name[:20]}…{name[-19:]}"
        out.append(f'<text x="{x + 24}" y="{y}"><title>{escape(name)}</title>{escape(short)}</text>')
    bottom = below + 20 + (len(lines) - 1) // 2 * 17 + 10
    return Html(f'<svg viewBox="0 0 {left + width + 20} {bottom}" role="img">{"".join(out)}</svg>')


def page(title: str, sections: list, linked: bool = False) -> str:
    """A whole page. sections: (heading, part, part, ...), or a part alone; a part is Html or text (a paragraph).

    linked: it may show pictures of its own disk or server, as delta_panel(linked=True) does."""

    def block(part: object) -> str:
        return part if isinstance(part, Html) else f'<p dir="auto">{escape(part)}</p>'

    body = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        heading, *parts = section if isinstance(section, tuple | list) else ("", section)
        inner = "".join(block(part) for part in parts)
        body.append("<section>" + (f"<h2>{escape(heading)}</h2>" if heading else "") + inner + "</section>")
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    pictures = "data: 'self' file:" if linked else "data:"
    policy = f"default-src 'none'; img-src {pictures}; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def contact_sheet(rows: list, path: str | os.PathLike, cell: int = 144, title: str = "", lines: int = 1) -> None:
    """Writes rows of pictures, `lines` lines of text under each; a JPEG if `path` ends in .jpg, else a PNG.
    rows: [[(image, label), ...], ...]."""
    font, big = ImageFont.load_default(12), ImageFont.load_default(17)
    gap, line = 10, 4 + 16 * lines
    columns = max((len(row) for row in rows), default=1)
    head = 34 if title else gap
    size = (columns * (cell + gap) + gap, head + len(rows) * (cell + line + gap) + gap)
    sheet = Image.new("RGB", size, (251, 251, 250))
    draw = ImageDraw.Draw(sheet)

    def write(at: tuple[int, int], text: object, face: ImageFont.FreeTypeFont, width: int, colour: tuple) -> None:
        words = clean(text)[:300]
        if face.getlength(words) > width:
            while words and face.getlength(words + "…") > width:
                words = words[:-1]
            words += "…"
        draw.text(at, words, font=face, fill=colour)

    if title:
        write((gap, 8), title, big, size[0] - 2 * gap, (29, 33, 38))
    for r, row in enumerate(rows):
        for c, item in enumerate(row):
            image, label = item if isinstance(item, tuple) else (item, "")
            left, top = gap + c * (cell + gap), head + r * (cell + line + gap)
            small = ImageOps.contain(_open(image), (cell, cell), Image.Resampling.LANCZOS)
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=(240, 241, 242))
            sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
            words = clean(label)[:300].split(" ")
            for n in range(lines):
                fits = len(words) if n == lines - 1 else 1
                while fits < len(words) and font.getlength(" ".join(words[: fits + 1])) <= cell:
                    fits += 1
                write((left, top + cell + 3 + 16 * n), " ".join(words[:fits]), font, cell, (98, 107, 117))
                words = words[fits:]
    with whole(path) as aside:
        sheet.save(aside, "JPEG" if str(path).endswith(".jpg") else "PNG", quality=80)


def write_answer(reference: str | os.PathLike, text: str, found: list, out: str | os.PathLike, where: str) -> None:
    """OUT/query.png and OUT/query.html: a picture, what to change, and what was found as (path, label), best first."""
    cells = [(reference, "reference"), *found]
    contact_sheet([cells[i : i + 6] for i in range(0, len(cells), 6)], f"{out}/query.png", title=text)
    body = page("What the model found", [(where, panel((reference, "reference"), text, found))])
    write_text(f"{out}/query.html", body)
