"""The demo's result: the table in the shape of the paper's Table 2, what the deltas are worth, and a page to look at.

    python demo/report.py --out out/demo --world out/demo/world
    python demo/report.py --out out/demo-photos --world out/demo-photos/world --kind photos

Reads the folders that demo.sh wrote; writes OUT/metrics.json, OUT/index.html and OUT/deltas.png. On photographs a shop
has many right answers: beside the recall of the one target stands mAP@10, as CIRCO has it, where every picture of the
gallery counts that is of the target's article and has all that the text asks for; and OUT/heldout.jpg shows 48 deltas
for held-out pairs with the catalogue's verdict.
"""

import os
import sys
from collections.abc import Iterator

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import pages
from common.annotations import read_cirr
from common.console import UserError, run
from common.files import read_json, read_jsonl, write_json, write_text
from common.flags import override
from common.images import ImageStore
from demo import wordings, world

OUT = "out/demo"  # folder of the demo
WORLD = "out/demo/world"  # folder written by demo/world.py or demo/catalogue.py
KIND = "drawn"  # "drawn", or "photos": a delta is judged by what was drawn, or by the catalogue

_MODELS = ("combiner", "blip_tdm")
ROWS = {
    "supervised": "supervised",
    "same": "supervised + VDG deltas",
    "auxiliary": "supervised + VDG deltas + auxiliary",
    "only": "auxiliary only",
}
JUDGES = {"drawn": world, "photos": wordings}  # both have VALUES, changed, delta and judged
_TITLES = {"drawn": "VDG on the embedded world", "photos": "VDG on product photographs"}
_INTRO = (
    "A language model looked at pairs of pictures and wrote what turns one into the other; retrieval models were then "
    "trained with and without these texts. Below are the tables, then texts between their two pictures, then what the "
    "models found: all taken evenly, nobody picked."
)
RECALLS = (*(f"R@{k}" for k in (1, 5, 10, 50)), "Rs@1")
_SHOWN = 8  # deltas, and queries of each model, on the page


# ---- numbers ----
def judge(records: list[dict], attributes: dict, by=world) -> dict:
    """Precision: of what the deltas name, the share that truly changed and is named with the right value. Recall: of
    what changed, the share rightly named. Percent; a human delta names one or two changes on purpose. What a catalogue
    does not know (by = wordings) counts in neither."""
    named = changed = unknown = 0
    of = {key: [0, 0] for key in (*by.VALUES, "?")}  # attribute -> claims that are right, claims
    for record in records:
        a, b = attributes[record["reference"]], attributes[record["target"]]
        verdicts = by.judged(record["delta"], a, b)
        for key, good in verdicts:
            if good is None:
                unknown += 1
                continue
            of[key][0] += good
            of[key][1] += 1
        named += len({key for key, good in verdicts if good})
        changed += len(by.changed(a, b))
    right, said = map(sum, zip(*of.values(), strict=True))
    return {
        "pairs": len(records),
        "claims": said,
        "not known": unknown,
        "precision": 100 * right / max(said, 1),
        "recall": 100 * named / max(changed, 1),
        "right of claims": of,
    }


def average_precision(top: list[str], right: set[str], k: int = 10) -> float:
    """CIRCO's AP@k: the precision at each place of a right one, over as many as could stand in k places."""
    found, total = 0, 0.0
    for place, name in enumerate(top[:k], 1):
        if name in right:
            found += 1
            total += found / place
    return total / min(len(right), k)


def wished_ap(run: str, queries: list, gallery: list[str], attributes: dict) -> float:
    """mAP@10 of a run, percent; the reference itself is no answer."""
    top = {line["id"]: line["top"] for line in read_jsonl(f"{OUT}/eval/{run}/found.jsonl")}
    scores = []
    for query in queries:
        fits = wordings.wished(query.delta, attributes[query.reference], attributes[query.target])
        right = {name for name in gallery if name != query.reference and fits(attributes[name])}
        scores.append(average_precision(top[query.id], right))
    return 100 * sum(scores) / len(scores)


def row_of(model: str, key: str) -> dict:
    """A row of the table: one model on one training set."""
    metrics = read_json(f"{OUT}/eval/{model}-{key}/metrics.json")["metrics"]
    config = read_json(f"{OUT}/cir/{model}-{key}/config.json")
    row = {"model": model, "key": key, "name": ROWS[key]} | {name: metrics[name] for name in RECALLS}
    return row | {"mean": sum(metrics[name] for name in RECALLS[:3]) / 3, "step": config.get("step")}


def print_tables(rows: list[dict], deltas: dict[str, dict]) -> None:
    names = [name for name in (*RECALLS, "mAP@10") if name in rows[0]]
    print(f"{'model':10s}{'trained on':38s}" + "".join(f"{k:>8s}" for k in names) + "    mean of R@1, 5, 10")
    for row in rows:
        recalls = "".join(f"{row[name]:8.1f}" for name in names)
        print(f"{row['model']:10s}{row['name']:38s}{recalls}{row['mean']:14.1f}   (step {row['step']})")
    print("\ndeltas: precision = named changes that are true, recall = true changes that are named (percent)")
    for name, score in deltas.items():
        shares = f"precision {score['precision']:5.1f}   recall {score['recall']:5.1f}"
        print(f"  {name:28s} {shares}   {score['pairs']:,} pairs")


# ---- the page ----
def evenly(records: list[dict], count: int = _SHOWN) -> list[dict]:
    """`count` of them, or all where they are fewer, spread evenly: nobody picked."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def number_sections(rows: list[dict], deltas: dict[str, dict]) -> Iterator[tuple]:
    names = [name for name in (*RECALLS, "mAP@10") if name in rows[0]]
    numbers = [[row["model"], row["name"], *(float(row[k]) for k in names), float(row["mean"])] for row in rows]
    told = "One backbone, four training sets. Recall in percent on val; the step was chosen on dev."
    if "mAP@10" in names:
        told += " mAP@10 counts every picture of the target's article that has all that the text asks for."
    headers = ["model", "trained on", *names, "mean R@1, 5, 10"]
    yield "What the generated deltas are worth", told, pages.table(numbers, headers)

    numbers = [[name, float(s["precision"]), float(s["recall"]), s["pairs"]] for name, s in deltas.items()]
    yield "Precision and recall of the deltas", pages.table(numbers, ["", "precision", "recall", "pairs"])


def shown(record: dict, attributes: dict) -> str | pages.Html:
    """A delta; of photographs with the catalogue's verdict: right in green, wrong struck out."""
    if KIND == "drawn" or not record["delta"]:
        return record["delta"]
    a, b = attributes[record["reference"]], attributes[record["target"]]
    return pages.marked(wordings.marks(record["delta"], a, b))


def delta_sections(
    held_out: list[dict], human: list[dict], auxiliary: list[dict], images, gallery, attributes: dict
) -> Iterator[tuple]:
    """Deltas beside their two pictures; held-out pairs with what a human-like text says of them."""
    spoken = {(r["reference"], r["target"]): r["delta"] for r in human}
    told = [] if KIND == "drawn" else ["Green: the catalogue says so. Struck out: it says otherwise. Plain: not known."]
    panels = []
    for r in evenly(held_out):
        notes = ["human: " + spoken.get((r["reference"], r["target"]), "")]
        panels.append(pages.delta_panel(images, r["reference"], r["target"], shown(r, attributes), notes))
    yield "Deltas for held-out pairs", *told, pages.pairs(panels)

    panels = []
    for r in evenly(auxiliary):
        panels.append(pages.delta_panel(gallery, r["reference"], r["target"], shown(r, attributes), []))
    yield "Deltas for pairs mined from unlabelled pictures", *told, pages.pairs(panels)


def retrieval_section(model: str, images: ImageStore) -> tuple:
    """What a model trained on everything found for some of the human queries, the right picture framed."""
    panels = []
    for r in evenly(read_jsonl(f"{OUT}/eval/{model}-auxiliary/found.jsonl")):
        names = r["top"][:6]
        panels.append(
            pages.panel(
                (images.path(r["reference"]), "reference"),
                r["delta"],
                [(images.path(name), str(place)) for place, name in enumerate(names, 1)],
                right=names.index(r["target"]) if r["target"] in names else None,
                note=f"the right one is at rank {r['rank']:,}",
                answer=(images.path(r["target"]), "right"),
            )
        )
    return f"Retrievals of {model}, {ROWS['auxiliary']}: human queries, taken evenly", *panels


def log_of(folder: str, value: str) -> list[tuple[int, float]]:
    """(step, value) of a run's log, where a line has the value."""
    return [(line["step"], line[value]) for line in read_jsonl(f"{OUT}/{folder}/log.jsonl") if value in line]


def curve_sections() -> Iterator[tuple]:
    losses = {name: log_of(name, "loss") for name in ("align", "vdg")}
    yield "Alignment and tuning", pages.curve(losses, y_label="loss")
    for model in _MODELS:
        losses = {name: log_of(f"cir/{model}-{key}", "loss") for key, name in ROWS.items()}
        scores = {name: log_of(f"cir/{model}-{key}", "score") for key, name in ROWS.items()}
        yield f"{model}: loss", pages.curve(losses, y_label="loss")
        yield f"{model}: recall on dev while training", pages.curve(scores, y_label="mean of R@1, 5, 10")


def link_section() -> tuple:
    links = []
    for model in _MODELS:
        for key, name in ROWS.items():
            links.append(f'<a href="eval/{model}-{key}/index.html">{model}, {pages.escape(name)}</a>')
    links.append('<a href="mined/subgroups.html">mined subgroups</a>')
    return "More retrievals", pages.Html("<p>" + " · ".join(links) + "</p>")


def write_picture(auxiliary: list[dict], gallery: ImageStore) -> None:
    """OUT/deltas.png: eight mined pairs in two rows, the delta under each target."""
    cells = []
    for r in evenly(auxiliary):
        cells += [(gallery.path(r["reference"]), "turn this into"), (gallery.path(r["target"]), r["delta"])]
    pages.contact_sheet([cells[:8], cells[8:]], f"{OUT}/deltas.png", cell=200, lines=2)


def verdict_line(delta: str, a: dict, b: dict) -> str:
    """ "right: colour, wrong: gender"; what says nothing that the catalogue has words for is wrong too."""
    told = {True: "right", False: "wrong", None: "not known"}
    judged = wordings.judged(delta, a, b)
    return ", ".join(f"{told[good]}: {'says nothing' if key == '?' else key}" for key, good in judged)


def write_verdicts(held_out: list[dict], images: ImageStore, attributes: dict) -> None:
    """OUT/heldout.jpg: 48 held-out pairs, the catalogue's verdict under each reference, the delta under each target.
    Underwear is left out."""
    cells = []
    hidden = {name for name, of in attributes.items() if of["article"] in ("bra", "briefs")}
    for r in evenly([r for r in held_out if hidden.isdisjoint((r["reference"], r["target"]))], 48):
        verdict = verdict_line(r["delta"], attributes[r["reference"]], attributes[r["target"]])
        cells += [(images.path(r["reference"]), verdict), (images.path(r["target"]), r["delta"])]
    rows = [cells[i : i + 12] for i in range(0, len(cells), 12)]
    pages.contact_sheet(rows, f"{OUT}/heldout.jpg", cell=110, lines=3)


def main() -> None:
    if KIND not in JUDGES:
        raise UserError(f"--kind {KIND}: wanted drawn or photos")
    attributes = read_json(f"{WORLD}/attributes.json")
    val, gallery = read_cirr(f"{WORLD}/cirr", "val"), ImageStore(f"{WORLD}/aux")
    held_out, auxiliary, same = (read_jsonl(f"{OUT}/{name}/pseudo.jsonl") for name in ("heldout", "pseudo", "same"))
    human = [{"reference": q.reference, "target": q.target, "delta": q.delta} for q in val.queries]

    # recall of each model on each training set, and how true the deltas are
    rows = [row_of(model, key) for model in _MODELS for key in ROWS]
    if KIND == "photos":
        for row in rows:
            run = f"{row['model']}-{row['key']}"
            row["mAP@10"] = wished_ap(run, val.queries, val.gallery, attributes)
    judged = {
        "VDG, held-out pairs": held_out,
        "VDG, auxiliary pairs": auxiliary,
        "VDG, the human train pairs": same,
        "human-like, held-out pairs": human,
    }
    deltas = {name: judge(records, attributes, JUDGES[KIND]) for name, records in judged.items()}
    write_json(f"{OUT}/metrics.json", {"rows": rows, "deltas": deltas}, indent=1)
    print_tables(rows, deltas)

    # the page to look at, and the picture of the README
    sections = [_INTRO, *number_sections(rows, deltas)]
    sections += delta_sections(held_out, human, auxiliary, val.images, gallery, attributes)
    sections += [retrieval_section(model, val.images) for model in _MODELS]
    sections += [*curve_sections(), link_section()]
    write_text(f"{OUT}/index.html", pages.page(_TITLES[KIND], sections))
    write_picture(auxiliary, gallery)
    if KIND == "photos":
        write_verdicts(held_out, val.images, attributes)
    print(f"\n{OUT}/index.html is the page to look at; {OUT}/metrics.json holds the table")


if __name__ == "__main__":
    override(globals())
    run(main)
