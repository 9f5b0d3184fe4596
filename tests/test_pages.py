"""Pages: nothing from a caption becomes markup, pictures are embedded, curves and sheets hold what they should."""

import base64
import io
import os
import re
import urllib.parse
from html.parser import HTMLParser

import pytest
from PIL import Image

from common import browse, pages
from common.images import ImageStore

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title></head><body onload=alert(1)>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    "&lt;script&gt; &amp; &#60;",
    "\x1b[31mred\x1b[0m \x00 \x07 \x9b5n",
    "left \u202eright to left\u202c \u2066x\u2069",
    "lone \ud800 surrogate",
    "x" * 10_000,
    "مرحبا 👩‍👩‍👧 émoji \u2028 line",
]


class Elements(HTMLParser):
    """All tags with their attributes, and all text, as a browser's tokenizer would see them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def colour(*rgb: int, size=(40, 30)) -> Image.Image:
    return Image.new("RGB", size, rgb)


def full_page(text: str) -> str:
    image = colour(200, 30, 30)
    panel = pages.panel((image, text), text, [(image, text), (image, text)], right=1, note=text, answer=(image, text))
    parts = [text, pages.table([[text, 1.0]], [text, text]), pages.figure(image, text), panel]
    drawn = pages.curve({text: [1.0, 2.0], text + "2": [(1, 3.0)]}, text, text)
    return pages.page(text, [(text, *parts, drawn), text])


ALLOWED = set("html head meta title style body h1 h2 section p div figure img figcaption".split())
ALLOWED |= set("table thead tbody tr th td svg line text path circle polyline article span title".split())


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text):
    seen = Elements(full_page(text))
    assert not seen.open
    assert {tag for tag, _ in seen.tags} <= ALLOWED
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "href")], tag
        if "src" in attributes:
            assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"])
    tags = [tag for tag, _ in seen.tags if tag != "span"]  # the tooltip of a long name
    assert tags == [tag for tag, _ in Elements(full_page("plain")).tags]  # same structure
    assert pages.clean(text)[:20] in re.sub(r"\s+", " ", seen.text)  # and the words are still there


def test_control_characters_are_gone():
    bad = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
    for text in HOSTILE:
        assert not bad.search(full_page(text).replace(pages.STYLE, ""))
        full_page(text).encode("utf-8")


def test_a_long_text_is_cut_and_says_so():
    assert pages.escape("x" * 10_000) == "x" * pages.CUT + f"… ({10_000 - pages.CUT:,} more characters)"


def test_policy_names_the_only_stylesheet():
    import hashlib

    text = full_page("plain")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] for t, a in Elements(text).tags if t == "meta" and "http-equiv" in a)
    assert f"style-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "script" not in policy and "unsafe" not in policy


def test_thumbnail_is_a_small_jpeg(tmp_path):
    colour(10, 200, 10, size=(900, 300)).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), colour(10, 200, 10, size=(900, 300))):
        data = base64.b64decode(pages.thumbnail(image, 90).split(",")[1])
        small = Image.open(io.BytesIO(data))
        assert small.format == "JPEG" and small.size == (90, 30)
        assert abs(small.getpixel((45, 15))[1] - 200) < 8


def test_panel_frames_the_right_one():
    shades = [colour(i * 20, 0, 0) for i in range(5)]
    figures = [a["class"] for t, a in Elements(pages.panel(shades[0], "redder", shades, right=3)).tags if t == "figure"]
    assert figures == ["query", "small", "small", "small", "right", "small"]
    apart = pages.panel(shades[0], "redder", shades[:2], answer=(shades[4], "right"))
    assert [a["class"] for t, a in Elements(apart).tags if t == "figure"] == ["query", "small", "small", "right"]
    assert "right" not in str(pages.panel(shades[0], "redder", shades[:2]))


def test_table_cells():
    seen = Elements(pages.table([["a", 28.714, 3, None]], ["name", "R@1", "n", "x"]))
    assert "28.71" in seen.text and [t for t, _ in seen.tags].count("td") == 4


def test_curve_places_points():
    drawn = pages.curve({"loss": [(0, 4.0), (10, 2.0), (20, 0.0)], "other": [(0, 1.0), (20, 1.0)]}, "step", "loss")
    lines = [a["points"] for t, a in Elements(drawn).tags if t == "polyline"]
    xs, ys = zip(*[map(float, p.split(",")) for p in lines[0].split()], strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11) and xs[0] < xs[1]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.11) and ys[0] < ys[1]  # SVG's y points down: loss falls
    assert len(lines) == 2 and all(word in Elements(drawn).text for word in ("loss", "other", "step"))


ODD_CURVES = [[], [float("nan")] * 3, [1.0], [0.0, 0.0], [float("inf"), 1.0], [-1e9, 1e9], [1e-12] * 4]


@pytest.mark.parametrize("values", ODD_CURVES, ids=str)
def test_curve_takes_any_values(values):
    drawn = pages.curve({"x": values})
    assert "nan" not in drawn.lower() and "inf" not in drawn.lower()


def test_long_curves_are_thinned_by_means():
    drawn = pages.curve({"x": [float(i % 2) for i in range(10_000)]})
    (line,) = [a["points"] for t, a in Elements(drawn).tags if t == "polyline"]
    heights = {point.split(",")[1] for point in line.split()}
    assert len(line.split()) <= 400 and len(heights) <= 2  # every run has about as many zeros as ones


def test_contact_sheet(tmp_path):
    tall = colour(0, 250, 0, size=(30, 300))
    rows = [[(colour(250, 0, 0), "<b>a</b> \x1b[1m"), (tall, "b" * 500)], [colour(0, 0, 250)]]
    pages.contact_sheet(rows, tmp_path / "deep" / "sheet.png", cell=100, title="مرحبا sheet 👩")
    sheet = Image.open(tmp_path / "deep" / "sheet.png").convert("RGB")
    colours = {c for _, c in sheet.getcolors(1 << 20)}
    assert {(250, 0, 0), (0, 250, 0), (0, 0, 250)} <= colours
    assert sheet.width == 2 * 110 + 10 and [p.name for p in (tmp_path / "deep").iterdir()] == ["sheet.png"]
    pages.contact_sheet([], tmp_path / "empty.png")
    pages.contact_sheet(rows, tmp_path / "sheet.jpg", cell=100)
    assert Image.open(tmp_path / "sheet.jpg").format == "JPEG"


def test_delta_panel_shows_reference_delta_target_and_notes(tmp_path):
    for name, shade in (("a", 10), ("b<i>", 200)):
        colour(shade, 0, 0).save(tmp_path / f"{name}.png")
    images = ImageStore(str(tmp_path))
    seen = Elements(pages.delta_panel(images, "a", "b<i>", "is <b>red</b>", ["pair 3", "human: 'x' & y"]))
    assert seen.text == "ais <b>red</b>b<i>pair 3 · human: 'x' & y" and not seen.open
    assert {tag for tag, _ in seen.tags} <= ALLOWED
    shades = []
    for tag, attributes in seen.tags:
        if tag == "img":
            data = base64.b64decode(attributes["src"].split(",")[1])
            shades.append(Image.open(io.BytesIO(data)).getpixel((5, 5))[0])
    assert shades == pytest.approx([10, 200], abs=4)
    silent = Elements(pages.delta_panel(images, "a", "a", "", []))
    assert silent.text == "a(nothing)a" and not [a for _, a in silent.tags if a.get("class") == "note"]
    with pytest.raises(FileNotFoundError, match="'c'"):
        pages.delta_panel(images, "a", "c", "is red", [])


def test_long_names_keep_their_ends_and_the_whole_in_a_tooltip():
    name = "dresses-" + "x" * 60 + "<b>-0013.jpg"
    seen = Elements(pages.shortened(name))
    (span,) = [a for tag, a in seen.tags if tag == "span"]
    assert span["title"] == name and len(seen.text) == pages.NAME + 1
    assert seen.text.startswith("dresses-xxx") and seen.text.endswith("xx<b>-0013.jpg"[-15:])
    assert pages.shortened("short.jpg") == "short.jpg"


def test_every_pair_is_reached_from_the_overview(tmp_path):
    """Follow the links as a browser does; every record is met once, with its two pictures' files."""
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b #%<'>?"):
        colour(9, 9, 9).save(folder / f"{name}.png")
    images = ImageStore(str(folder))
    records = [{"id": str(n), "reference": "a", "target": "b #%<'>?", "delta": f"text {n}"} for n in range(450)]
    (out / "browse").mkdir(parents=True)
    (out / "browse" / "0009.html").write_text("of an older run")
    browse.write_pages(out, records, [3, 5], {"pairs": 450}, images, most=430)
    met, todo, texts = set(), [out / "deltas.html"], []
    while todo:
        page = todo.pop().resolve()
        if page in met:
            continue
        met.add(page)
        seen = Elements(page.read_text())
        assert "20 more are in pseudo.jsonl" in seen.text or page.name != "deltas.html"
        links = [urllib.parse.unquote(a["href"]) for tag, a in seen.tags if tag == "a"]
        todo += [page.parent / link for link in links if link.endswith(".html")]
        assert all((page.parent / link).exists() for link in links)
        if page.name != "deltas.html":
            texts += re.findall(r"text (\d+)", seen.text)
            shown = [a["src"] for tag, a in seen.tags if tag == "img"]
            assert {(page.parent / urllib.parse.unquote(src)).resolve() for src in shown} == set(folder.iterdir())
    assert sorted(map(int, texts)) == list(range(430)) and len(met) == 4
    assert not (out / "browse" / "0009.html").exists()


def test_an_answer_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "out"
    pages.write_answer(colour(9, 9, 9), "is <red>", [(colour(250, 0, 0), "1 · a.jpg")], out, "In pictures")
    assert sorted(path.name for path in out.iterdir()) == ["query.html", "query.png"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert b"is &lt;red&gt;" in before["query.html"] and "1 · a.jpg".encode() in before["query.html"]
    replace = os.replace
    for part in ("query.png", "query.html"):  # the disk is full when this one is to be replaced

        def full(source, target, part=part):
            if str(target).endswith(part):
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            pages.write_answer(colour(9, 9, 9), "another", [], out, "In pictures")
        assert (out / part).read_bytes() == before[part]
