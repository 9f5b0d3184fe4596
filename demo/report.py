"""The demo's result: the table in the shape of the paper's Table 2, what the deltas are worth, and a page to look at.

    python demo/report.py --out out/demo --world out/demo/world

Reads the folders that demo.sh wrote; writes OUT/metrics.json, OUT/index.html and OUT/deltas.png.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import pages  # noqa: E402
from common.console import run
from common.files import read_json, read_jsonl, write_json, write_text
from common.flags import override
from demo import world  # noqa: E402

OUT = "out/demo"  # folder of the demo
WORLD = "out/demo/world"  # folder written by demo/world.py

MODELS = ("combiner", "blip_tdm")
ROWS = {
    "supervised": "supervised",
    "same": "supervised + VDG deltas",
    "auxiliary": "supervised + VDG deltas + auxiliary",
    "only": "auxiliary only",
}
RECALLS = ("R@1", "R@5", "R@10", "R@50", "Rs@1")


def judge(records: list[dict], attributes: dict) -> dict:
    """Precision: of what the deltas name, the share that truly changed and is named with the right value. Recall: of
    what changed, the share rightly named. Percent; a human delta names one or two changes on purpose."""
    named = changed = 0
    of = {key: [0, 0] for key in (*world.VALUES, "?")}  # attribute -> claims that are right, claims
    for record in records:
        a, b = attributes[record["reference"]], attributes[record["target"]]
        verdicts = world.judged(record["delta"], a, b)
        for key, good in verdicts:
            of[key][0] += good
            of[key][1] += 1
        named += len({key for key, good in verdicts if good})
        changed += len(world.changed(a, b))
    right, said = map(sum, zip(*of.values(), strict=True))
    return {
        "pairs": len(records),
        "claims": said,
        "precision": 100 * right / max(said, 1),
        "recall": 100 * named / max(changed, 1),
        "right of claims": of,
    }


def table(rows: list[dict]) -> str:
    lines = [f"{'model':10s}{'trained on':38s}" + "".join(f"{k:>8s}" for k in RECALLS) + "    mean of R@1, 5, 10"]
    for row in rows:
        lines.append(
            f"{row['model']:10s}{row['name']:38s}"
            + "".join(f"{row[k]:8.1f}" for k in RECALLS)
            + f"{row['mean']:14.1f}   (step {row['step']})"
        )
    return "\n".join(lines)


def main() -> None:
    attributes = read_json(f"{WORLD}/attributes.json")
    rows, curves = [], {model: {} for model in MODELS}
    for model in MODELS:
        for key, name in ROWS.items():
            metrics = read_json(f"{OUT}/eval/{model}-{key}/metrics.json")["metrics"]
            config = read_json(f"{OUT}/cir/{model}-{key}/config.json")
            log = read_jsonl(f"{OUT}/cir/{model}-{key}/log.jsonl")
            curves[model][name] = [(r["step"], r["score"]) for r in log if "score" in r]
            rows.append(
                {
                    "model": model,
                    "name": name,
                    **{k: metrics[k] for k in RECALLS},
                    "mean": sum(metrics[k] for k in RECALLS[:3]) / 3,
                    "step": config.get("step"),
                }
            )
    held_out = read_jsonl(f"{OUT}/heldout/pseudo.jsonl")
    auxiliary = read_jsonl(f"{OUT}/pseudo/pseudo.jsonl")
    same = read_jsonl(f"{OUT}/same/pseudo.jsonl")
    human = [
        {"reference": r["reference"], "target": r["target_hard"], "delta": r["caption"]}
        for r in read_json(f"{WORLD}/cirr/captions/cap.rc2.val.json")
    ]
    deltas = {
        name: judge(records, attributes)
        for name, records in (
            ("VDG, held-out pairs", held_out),
            ("VDG, auxiliary pairs", auxiliary),
            ("VDG, the human train pairs", same),
            ("human-like, held-out pairs", human),
        )
    }
    write_json(f"{OUT}/metrics.json", {"rows": rows, "deltas": deltas}, indent=1)
    print(table(rows))
    print("\ndeltas: precision = named changes that are true, recall = true changes that are named (percent)")
    for name, score in deltas.items():
        print(
            f"  {name:28s} precision {score['precision']:5.1f}   recall {score['recall']:5.1f}"
            f"   {score['pairs']:,} pairs"
        )

    root = f"{WORLD}/cirr/img_raw"
    places = read_json(f"{WORLD}/cirr/image_splits/split.rc2.val.json")

    def sample(records, place):
        parts = []
        for record in records:
            parts.append(
                pages.panel(
                    (place(record["reference"]), "reference"),
                    record["delta"],
                    [(place(record["target"]), "target")],
                    note=record.get("note", ""),
                )
            )
        return parts

    spoken = {(r["reference"], r["target"]): r["delta"] for r in human}
    shown = [
        {**r, "note": "human: " + spoken.get((r["reference"], r["target"]), "")}
        for r in held_out[:: max(1, len(held_out) // 8)]
    ]
    sections = [
        (
            "What the generated deltas are worth",
            "One backbone, four training sets. Recall in percent on val; the step was chosen on dev.",
            pages.table(
                [[r["model"], r["name"], *(float(r[k]) for k in RECALLS), float(r["mean"])] for r in rows],
                ["model", "trained on", *RECALLS, "mean R@1, 5, 10"],
            ),
        ),
        (
            "Precision and recall of the deltas",
            pages.table(
                [[name, float(s["precision"]), float(s["recall"]), s["pairs"]] for name, s in deltas.items()],
                ["", "precision", "recall", "pairs"],
            ),
        ),
        ("Deltas for held-out pairs", *sample(shown, lambda name: os.path.join(root, places[name]))),
        (
            "Deltas for pairs mined from unlabelled pictures",
            *sample(auxiliary[:: max(1, len(auxiliary) // 8)], lambda name: os.path.join(WORLD, "aux", name)),
        ),
    ]
    picked = auxiliary[:: max(1, len(auxiliary) // 8)][:8]
    cells = []
    for record in picked:
        for key in ("reference", "target"):
            text = record["delta"] if key == "target" else "turn this into"
            cells.append((os.path.join(WORLD, "aux", record[key]), text))
    pages.contact_sheet([cells[:8], cells[8:]], f"{OUT}/deltas.png", cell=200, lines=2)
    for model in MODELS:
        found = read_jsonl(f"{OUT}/eval/{model}-auxiliary/found.jsonl")
        shown = []
        for r in found[:: max(1, len(found) // 8)][:8]:
            names = r["top"][:6]
            top = [(os.path.join(root, places[name]), str(n)) for n, name in enumerate(names, 1)]
            shown.append(
                pages.panel(
                    (os.path.join(root, places[r["reference"]]), "reference"),
                    r["delta"],
                    top,
                    right=names.index(r["target"]) if r["target"] in names else None,
                    note=f"the right one is at rank {r['rank']:,}",
                    answer=(os.path.join(root, places[r["target"]]), "right"),
                )
            )
        sections.append((f"Retrievals of {model}, {ROWS['auxiliary']}: human queries, taken evenly", *shown))

    def losses_of(runs: dict[str, str]) -> dict:
        logs = {name: read_jsonl(f"{OUT}/{folder}/log.jsonl") for name, folder in runs.items()}
        return {name: [(r["step"], r["loss"]) for r in log if "loss" in r] for name, log in logs.items()}

    sections.append(("Alignment and tuning", pages.curve(losses_of({"align": "align", "vdg": "vdg"}), y_label="loss")))
    for model in MODELS:
        runs = {name: f"cir/{model}-{key}" for key, name in ROWS.items()}
        sections.append((f"{model}: loss", pages.curve(losses_of(runs), y_label="loss")))
        sections.append(
            (f"{model}: recall on dev while training", pages.curve(curves[model], y_label="mean of R@1, 5, 10"))
        )
    sections.append(
        (
            "More retrievals",
            pages.Html(
                "<p>"
                + " · ".join(
                    f'<a href="eval/{m}-{k}/index.html">{m}, {pages.escape(n)}</a>'
                    for m in MODELS
                    for k, n in ROWS.items()
                )
                + ' · <a href="mined/subgroups.html">mined subgroups</a></p>'
            ),
        )
    )
    write_text(f"{OUT}/index.html", pages.page("VDG on the embedded world", sections))
    print(f"\n{OUT}/index.html is the page to look at; {OUT}/metrics.json holds the table")


if __name__ == "__main__":
    override(globals())
    run(main)
