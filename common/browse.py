"""Pages of generated deltas: some at random on one page, and every pair on pages of 200."""

from pathlib import Path

from common import pages
from common.files import write_text
from common.images import ImageStore

PER_PAGE = 200


def notes_of(record: dict) -> list[str]:
    """What is said of a pseudo triplet beside its delta: id, flags, the reversed delta."""
    notes = [f"pair {record['id']}", *record.get("flags", ())]
    if "score" in record:
        notes.append(f"cosine {record['score']:.3f}")
    if "reverse_delta" in record:
        notes.append(f"reversed: {record['reverse_delta']}")
    return notes


def write_pages(out: Path, records: list[dict], shown: list[int], report: dict, images: ImageStore, most: int) -> None:
    """OUT/deltas.html: the records at `shown`, pictures embedded. OUT/browse/0001.html ...: the first `most` records,
    PER_PAGE a page, in order, pictures read from their files; an older run's pages are removed."""
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in report.items())
    panels = [panel_of(records[i], images, out) for i in shown]
    chosen = records[:most]
    for old in (out / "browse").glob("[0-9]*.html"):
        old.unlink()
    links = browse(out / "browse", chosen, images)
    left = f"{len(records) - most:,} more are in pseudo.jsonl." if len(records) > most else ""
    every = ("Every pair", pages.Html(f'<p class="turn">{links}</p>'), *([left] if left else []))
    sections = [("Counts", counts), (f"{len(shown)} pairs at random", pages.pairs(panels))]
    sections += [every] if chosen else []
    write_text(out / "deltas.html", pages.page("Generated deltas", sections))


def panel_of(record: dict, images: ImageStore, beside: Path, linked: bool = False) -> pages.Html:
    pair = record["reference"], record["target"], record["delta"]
    return pages.delta_panel(images, *pair, notes_of(record), str(beside), linked)


def browse(folder: Path, records: list[dict], images: ImageStore) -> str:
    """Writes the pages -> links to them, as seen from the folder above."""
    starts = range(0, len(records), PER_PAGE)
    names = [f"{n:04d}.html" for n in range(1, len(starts) + 1)]
    words = [f"{start + 1:,}–{min(start + PER_PAGE, len(records)):,}" for start in starts]
    for here, start in enumerate(starts):
        near = [i for i in range(len(names)) if abs(i - here) <= 3 or i in (0, len(names) - 1)]
        turn = "".join(f"<b>{words[i]}</b>" if i == here else f'<a href="{names[i]}">{words[i]}</a>' for i in near)
        turn = pages.Html(f'<p class="turn"><a href="../deltas.html">overview</a>{turn}</p>')
        panels = [panel_of(record, images, folder, linked=True) for record in records[start : start + PER_PAGE]]
        sections = [turn, pages.pairs(panels), turn]
        write_text(folder / names[here], pages.page(f"Pairs {words[here]} of {len(records):,}", sections, linked=True))
    return "".join(f'<a href="browse/{name}">{word}</a>' for name, word in zip(names, words, strict=True))
