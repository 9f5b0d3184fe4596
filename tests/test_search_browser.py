"""The page of search.py in a real Chromium: by mouse, by keys, on a phone; what it writes is read from the disk."""

import json
import re
import shutil
from pathlib import Path

import pytest
import zoo as writer

pytest.importorskip("starlette", reason="the page needs requirements-search.txt")
pytest.importorskip("uvicorn", reason="the page needs requirements-search.txt")
pytest.importorskip("playwright", reason="needs playwright (requirements-dev.txt)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs chromium (apt-get install chromium)", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright
from search_server import serving, site_of

from common.annotations import read_triplets
from common.files import read_jsonl, write_jsonl

FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
FLAGS += " disable-sync"
expect.set_options(timeout=30_000)
HOSTILE = "<img src=x onerror='window.hacked=1'>"  # a name cannot hold "/"
HOSTILE_TEXT = HOSTILE + "</p><script>window.hacked=1</script>\"'&amp;"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        args = [f"--{flag}" for flag in FLAGS.split()]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=args, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def site(zoo, tmp_path):
    folder = tmp_path / "pictures"
    names = writer.draw(folder, 40)
    (folder / names[0]).rename(folder / f"{HOSTILE}.png")  # the last of all names
    ends = [(names[i], names[i + 1]) for i in range(1, 13)]
    lines = [{"id": i, "reference": a, "target": b, "delta": f"text {i}"} for i, (a, b) in enumerate(ends)]
    lines[1]["delta"] = HOSTILE_TEXT
    write_jsonl(tmp_path / "pseudo.jsonl", lines)
    return site_of(zoo / "clip", folder, tmp_path / "out", str(tmp_path / "pseudo.jsonl"))


@pytest.fixture
def server(site):
    with serving(site) as running:
        yield running


def open_page(browser, address: str, **how):
    """A page of a fresh context; what it complains of is kept in page.faults (a refused inline script too)."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | how))
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.faults = []
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(address)
    return page


@pytest.fixture
def page(browser, server):
    page = open_page(browser, server.address)
    expect(page.locator(".tile img").first).to_be_visible()
    yield page
    assert page.faults == [] and page.evaluate("window.hacked") is None
    page.context.close()


def names_of(page) -> list[str]:
    return page.locator(".tile .line span").evaluate_all("all => all.map(one => one.title)")


def searched(page) -> None:
    expect(page.locator("#status")).to_contain_text("nearest first")
    expect(page.locator("#grid")).to_have_attribute("aria-busy", "false")


def test_search_go_on_back_and_reload(page, server):
    expect(page.locator("#count")).to_contain_text("40 pictures")
    page.locator(".tile .shot").nth(5).click()  # a reference: the pictures like it
    searched(page)
    like = names_of(page)
    page.locator("#text").fill("make it red")
    page.keyboard.press("Enter")
    searched(page)
    expect(page.locator(".chip")).to_have_text(["make it red×"])
    page.locator("#text").fill("and larger")
    page.locator("#go").click()
    expect(page.locator(".chip")).to_have_count(2)
    searched(page)
    found, asked = names_of(page), page.url
    oracle = server.ask("api/search", {"reference": 5, "texts": ["make it red", "and larger"]}).json["results"]
    assert found == [result["name"] for result in oracle][: len(found)] and found != like

    page.reload()
    searched(page)
    assert page.url == asked and names_of(page) == found, "reload keeps the state"
    expect(page.locator(".chip")).to_have_count(2)

    page.locator(".tile .shot").nth(2).click()  # go on from the third
    expect(page.locator("#trail li")).to_have_count(3)
    searched(page)
    assert page.locator("#reference button").first.get_attribute("title") == found[2]
    page.locator("#trail a").nth(1).click()  # back by one click
    expect(page.locator(".chip")).to_have_count(2)
    searched(page)
    assert names_of(page) == found
    page.go_back()
    expect(page.locator("#trail li")).to_have_count(3)

    page.goto(asked)
    for mode, ask in (("Picture", {"reference": 5}), ("Text", {"texts": ["make it red", "and larger"]})):
        page.get_by_role("radio", name=mode, exact=True).click()
        searched(page)
        oracle = server.ask("api/search", ask).json["results"]
        expect(page.locator(".tile .line span").first).to_have_attribute("title", oracle[0]["name"])
    page.locator(".chip .away").first.click()
    expect(page.locator(".chip")).to_have_count(1)
    page.locator("#trail .start").click()
    expect(page.locator("#trail")).to_be_hidden()


def test_upload_of_a_picture(page, server, tmp_path):
    (name,) = writer.draw(tmp_path / "mine", 1, seed=3)
    page.locator("#file").set_input_files(tmp_path / "mine" / name)
    searched(page)
    expect(page.locator("#reference img")).to_be_visible()
    token = re.search(r"r=([0-9a-f]{64})", page.url)[1]
    page.locator("#text").fill("red")
    page.keyboard.press("Enter")
    searched(page)
    expect(page.locator(".chip")).to_have_count(1)
    oracle = server.ask("api/search", {"reference": token, "texts": ["red"]}).json["results"]
    assert names_of(page)[0] == oracle[0]["name"]

    (tmp_path / "no.png").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "no.png")
    expect(page.locator("#problem")).to_contain_text("readable")
    assert page.faults and "400" in page.faults.pop()  # the browser's own line for the refused upload


def test_a_dropped_picture(page, tmp_path):
    (name,) = writer.draw(tmp_path / "mine", 1, seed=4)
    data = list((tmp_path / "mine" / name).read_bytes())
    moved = page.evaluate_handle(
        """data => { const moved = new DataTransfer();
        moved.items.add(new File([new Uint8Array(data)], "mine.png", {type: "image/png"})); return moved; }""",
        data,
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": moved})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": moved})
    searched(page)
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#reference img")).to_be_visible()


def test_marks_by_mouse_and_keys_and_undo(page, tmp_path):
    page.goto(page.url + "#search/r=5&t=red")
    searched(page)
    names, out = names_of(page), tmp_path / "out"
    page.locator(".tile").nth(0).hover()
    page.locator(".tile .tool.right").nth(0).click()
    expect(page.locator(".tile.is-right")).to_have_count(1)
    page.locator(".tile .shot").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    expect(page.locator(".tile.is-wrong")).to_have_count(1)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("y")
    expect(page.locator(".tile.is-right")).to_have_count(2)
    reference = page.locator("#reference button").first.get_attribute("title")
    assert [(t.reference, t.target, t.delta) for t in read_triplets(out / "marks.jsonl")] == [
        (reference, names[0], "red"),
        (reference, names[2], "red"),
    ]
    assert [line["target"] for line in read_jsonl(out / "wrong.jsonl")] == [names[1]]
    page.keyboard.press("u")
    expect(page.locator(".tile.is-right")).to_have_count(1)
    page.locator("#toast").wait_for()
    assert len(read_jsonl(out / "marks.jsonl")) == 1
    page.reload()
    searched(page)
    expect(page.locator(".tile.is-right")).to_have_count(1)
    page.locator(".tile .shot").nth(0).focus()
    page.keyboard.press("o")  # the same in the large view
    expect(page.locator("#look")).to_be_visible()
    expect(page.locator("#look .yes")).to_have_attribute("aria-pressed", "true")
    sizes = page.locator("#look .frame").evaluate_all("all => all.map(one => [one.clientWidth, one.clientHeight])")
    assert len(sizes) == 2 and sizes[0] == sizes[1], "reference and result are equally large"
    page.keyboard.press("n")
    expect(page.locator("#look .no")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    assert read_jsonl(out / "marks.jsonl") == [] and len(read_jsonl(out / "wrong.jsonl")) == 2


def test_all_by_keys(page):
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("a red box")
    page.keyboard.press("Enter")
    searched(page)
    page.keyboard.press("ArrowDown")
    first = page.evaluate("document.activeElement.title")
    assert first == names_of(page)[0]
    page.keyboard.press("End")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("grid.columns")
    assert page.evaluate("grid.at") == 1 + columns
    name = page.evaluate("document.activeElement.title")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    page.keyboard.press("Enter")
    expect(page.locator("#reference button").first).to_have_attribute("title", name)
    expect(page.locator("#trail li")).to_have_count(3)
    page.keyboard.press("b")
    expect(page.locator("#trail li")).to_have_count(2)
    page.keyboard.press("2")
    expect(page.locator("#label h2")).to_be_visible()
    page.keyboard.press("1")
    expect(page.locator(".chip")).to_have_count(1)


def test_label_ten_pairs_by_keys(page, tmp_path):
    page.keyboard.press("2")
    expect(page.locator("#delta")).to_have_text("text 0")
    sizes = page.locator("#label .frame").evaluate_all("all => all.map(one => [one.clientWidth, one.clientHeight])")
    assert sizes[0] == sizes[1] and sizes[0][0] > 300, "two equally large pictures"
    page.keyboard.press("a")
    expect(page.locator("#delta")).to_have_text(HOSTILE_TEXT)  # as text
    page.keyboard.press("r")
    expect(page.locator("#delta")).to_have_text("text 2")
    page.keyboard.press("e")
    page.locator("#edited").fill("a better text")
    page.keyboard.press("Enter")
    expect(page.locator("#delta")).to_have_text("text 3")
    page.keyboard.press("s")
    expect(page.locator("#delta")).to_have_text("text 4")
    page.keyboard.press("u")
    expect(page.locator("#delta")).to_have_text("text 3")
    for i in range(3, 10):
        expect(page.locator("#delta")).to_have_text(f"text {i}")
        page.keyboard.press("a" if i % 2 else "r")
    expect(page.locator("#delta")).to_have_text("text 10")
    counts = "10 of 12 pairs: 5 accepted (50 %), 1 edited (10 %), 4 rejected (40 %), 0 skipped"
    expect(page.locator("#counts")).to_have_text(counts)
    deltas = [t.delta for t in read_triplets(tmp_path / "out/accepted.jsonl")]
    assert deltas == ["text 0", "a better text", "text 3", "text 5", "text 7", "text 9"]
    page.reload()
    expect(page.locator("#delta")).to_have_text("text 10")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#delta")).to_have_text("text 9")
    page.keyboard.press("e")
    page.keyboard.press("Escape")
    expect(page.locator("#edited")).to_have_count(0)


def test_teach_few_steps(page, server):
    for reference in (5, 6, 7, 8, 9, 10):
        for target in (11, 12):
            server.ask("api/mark", {"reference": reference, "texts": ["red"], "target": target, "right": True})
    page.keyboard.press("3")
    page.locator("#teach-it").click()
    expect(page.locator("progress")).to_be_visible()
    expect(page.locator("#teach tbody tr")).to_have_count(2, timeout=240_000)
    expect(page.locator("#progress")).to_contain_text("It ")
    row = page.locator("#teach tbody tr").nth(1)
    expect(row).to_contain_text("→")
    page.locator("#use-0").check()
    expect(page.locator("#count")).not_to_contain_text("taught")
    page.locator("#use-1").check()
    expect(page.locator("#count")).to_contain_text("taught (1)")
    page.reload()
    expect(page.locator("#use-1")).to_be_checked()


def test_hostile_names_are_text(page):
    tile = page.locator(".tile").last
    tile.scroll_into_view_if_needed()
    expect(tile.locator(".line span")).to_have_attribute("title", f"{HOSTILE}.png")
    expect(tile.locator("img")).to_have_count(1)
    tile.locator(".shot").click()
    searched(page)
    page.locator("#text").fill(HOSTILE_TEXT)
    page.keyboard.press("Enter")
    searched(page)
    expect(page.locator(".chip span").first).to_have_text(HOSTILE_TEXT)
    expect(page.locator("#trail .now b")).to_have_text(HOSTILE_TEXT)
    page.locator("#reference button").first.click()
    expect(page.locator("#look figcaption")).to_have_attribute("title", f"{HOSTILE}.png")
    page.keyboard.press("Escape")
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'data:image/png;base64,AA=='}))")
    page.wait_for_timeout(200)
    assert "Content Security Policy" in page.faults.pop(), "the browser holds to the policy"


def test_a_hundred_thousand_pictures(page, server):
    """Only the tiles in sight exist, and only the blocks of names that are looked at are asked for."""
    first, asked = server.ask("api/gallery?start=0&count=40").json, []

    def answer(route):
        start, count = (int(re.search(rf"{name}=(\d+)", route.request.url)[1]) for name in ("start", "count"))
        asked.append(start)
        items = [{"id": i % 40, "name": f"picture {i}.png"} for i in range(start, start + count)]
        route.fulfill(json=first | {"total": 100_000, "start": start, "items": items})

    page.route("**/api/gallery*", answer)
    page.reload()
    expect(page.locator("#count")).to_contain_text("100,000 pictures")
    page.locator(".tile .shot").first.focus()
    page.keyboard.press("End")
    expect(page.locator(".tile .line span", has_text="picture 99999.png")).to_be_visible()
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    expect(page.locator(".tile .line span", has_text=re.compile(r"picture 5\d{4}")).first).to_be_visible()
    assert page.locator(".tile").count() < 120 and len(set(asked)) < 8
    took = page.evaluate(
        """async () => { const frame = () => new Promise(requestAnimationFrame); let worst = 0;
        for (let i = 0; i < 60; i++) { const start = performance.now(); drawGrid();
          worst = Math.max(worst, performance.now() - start); scrollBy(0, 700); await frame(); }
        return worst; }"""
    )
    assert took < 200, f"{took} ms to draw the tiles of a frame"  # a few ms on an idle machine


def test_states(page, server, site):
    page.goto(server.address + "#search/r=99999&t=red")
    expect(page.locator("#problem")).to_contain_text("no picture 99999")
    page.goto(server.address + "#search/r=5&t=red")
    searched(page)
    page.route("**/api/search", lambda route: route.abort())
    page.locator("#go").click()
    expect(page.locator("#problem")).to_contain_text("does not answer")
    page.unroute("**/api/search")
    page.get_by_role("button", name="Try again").click()
    searched(page)
    expect(page.locator("#problem")).to_be_hidden()
    site.notes.pairs.clear()
    page.goto(server.address + "#label")
    expect(page.locator("#label")).to_contain_text("--label")
    page.faults.clear()  # the browser's own lines for the answers above


def test_on_a_phone(browser, server):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = open_page(browser, server.address, **phone)
    for view in ("", "#search/r=5&t=with+a+very+long+change+that+fills+the+line&t=red", "#label", "#teach"):
        page.goto(server.address + view)
        seen = {"": ".tile", "#label": ".pair", "#teach": ".card"}.get(view, ".tile.result")
        expect(page.locator(seen).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{view} is wider than the phone"
    page.goto(server.address + "#label")
    expect(page.locator("#label .row button").first).to_be_visible()
    bottoms = "[...[...document.querySelectorAll('.frame')].slice(0, 2), document.querySelector('#label .row button')]"
    bottoms += ".map(x => x && x.getBoundingClientRect()).map(box => box && box.height && box.bottom)"
    for _ in range(50):  # the pair is drawn anew when its view comes back: all three are asked at one moment
        if len(seen := page.evaluate(bottoms)) == 3 and all(seen) and max(seen) <= 844:
            break
        page.wait_for_timeout(100)
    assert len(seen) == 3 and all(seen) and max(seen) <= 844, "both pictures and the buttons are seen at once"
    page.goto(server.address + "#search/r=5&t=red")
    searched(page)
    box = page.locator(".tile .tool.right").first.bounding_box()
    assert min(box["width"], box["height"]) >= 40
    page.locator(".tile .tool.right").first.tap()
    expect(page.locator(".tile.is-right")).to_have_count(1)
    page.locator(".tile .shot").nth(1).tap()
    expect(page.locator("#trail li")).to_have_count(3)
    assert page.faults == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_painted(browser, server, scheme):
    page = open_page(browser, server.address, color_scheme=scheme)
    expect(page.locator(".tile img").first).to_be_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(json.loads(re.sub(r"rgb\((.*)\)", r"[\1]", background))) < 200) == (scheme == "dark")
    page.context.close()


def test_a_foreign_page_reads_and_changes_nothing(browser, server, site, tmp_path):
    """A page of another origin in the same browser: its requests are refused, its frame stays empty."""
    foe = Path(tmp_path / "foe")
    foe.mkdir()
    (foe / "index.html").write_text("<!DOCTYPE html><title>foe</title>")
    import functools
    import http.server
    import threading

    quiet = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(foe))
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    page = open_page(browser, f"http://127.0.0.1:{other.server_port}/")
    said = page.evaluate(
        """async address => { const mark = JSON.stringify({reference: 5, texts: ["x"], target: 6, right: true});
        const tries = [fetch(address + "api/gallery"), fetch(address + "api/mark", {method: "POST", body: mark}),
          fetch(address + "api/mark", {method: "POST", mode: "no-cors", body: mark}),
          new Promise((yes, no) => {
            Object.assign(new Image(), {onload: yes, onerror: no, src: address + "thumb/1"}); })];
        return (await Promise.allSettled(tries)).map(one => one.status + ":" + (one.value && one.value.type)); }""",
        server.address,
    )
    assert said[0].startswith("rejected") and said[1].startswith("rejected") and said[3].startswith("rejected")
    assert site.notes.marks == {}
    other.shutdown()
    page.context.close()
