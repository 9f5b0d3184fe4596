"""What 60 marks teach: search.py's own search, marks and teaching, with a person replaced by the truth.

    python bench/teach.py --gallery out/demo/world/aux --truth out/demo/world/attributes.json --checkpoint out/cir
    python bench/teach.py --gallery catalogue --truth products.jsonl --backbone CLIP --seeds 3

--truth: what each picture shows, {"name": {attribute: value}} (attributes.json of a world), or .jsonl of {"image",
"article", "colour", "usage"} (a catalogue). --pseudo: deltas of gen_deltas.py over the gallery, taught beside the
marks. A query is a picture and a text that changes one attribute; right is whatever else equals the picture in all
others. The person looks at the first 48 answers of each query and marks two right ones at most, until there are
--marks. Then it is taught, as by the button on the page, and two things are measured before and after: the page's own
recall on the marks it held out, and whether a right picture is among the first K of fresh queries about pictures that
were never marked.
"""

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import measure

KS = (1, 5, 10)


def read_truth(path: str) -> dict[str, dict]:
    if path.endswith(".jsonl"):
        lines = [json.loads(line) for line in open(path, encoding="utf-8")]
        return {line["image"]: {key: line[key] for key in ("article", "colour", "usage")} for line in lines}
    truth = json.loads(Path(path).read_text())
    if all("category" in picture for picture in truth.values()):  # the drawn world
        return truth
    keys = ("article", "colour", "usage")  # of the photographs these are known of all
    return {name: {key: known[key] for key in keys} for name, known in truth.items() if known.keys() >= set(keys)}


def text_of(before: dict, key: str, value: str, rng) -> str:
    """A change of one attribute in words; "" where nothing would be seen of it."""
    if "category" in before:  # the drawn world speaks for itself
        from demo.world import changed, delta

        after = before | {key: value}
        return delta(before, after, rng) if changed(before, after) else ""  # a print's colour on plain cloth
    return {"colour": "in {}", "article": "{} in place of it", "usage": "for {} wear"}[key].format(value.lower())


def queries_of(truth: dict, names: list[str], rng, count: int) -> list[tuple[str, str, set]]:
    """(reference, text, right pictures), as many as wanted, each about another picture."""
    alike: dict[tuple, set] = {}
    for name in names:
        alike.setdefault(tuple(sorted(truth[name].items())), set()).add(name)
    values = {key: sorted({truth[name][key] for name in names}) for key in truth[names[0]]}
    found = []
    for i in rng.permutation(len(names)):
        reference = names[i]
        changes = []
        for key, choices in values.items():
            for value in choices:
                wanted = truth[reference] | {key: value}
                right = alike.get(tuple(sorted(wanted.items())), set()) - {reference}
                if value != truth[reference][key] and right:
                    changes.append((key, value, right))
        if changes:
            key, value, right = changes[rng.integers(len(changes))]
            if text := text_of(truth[reference], key, value, rng):
                found.append((reference, text, right))
        if len(found) == count:
            break
    return found


def fresh_recall(engine, queries: list) -> dict[str, float]:
    """Percent of the queries with a right picture among the first K."""
    from common.gallery import Query, find

    gallery, places = engine.gallery, []
    asked = [Query(f"{gallery.folder}/{name}", (text,), gallery.of_name[name]) for name, text, _ in queries]
    for start in range(0, len(asked), 64):
        part = slice(start, start + 64)
        for (_, _, right), found in zip(queries[part], find(engine, asked[part], max(KS)), strict=True):
            places.append(next((i for i, (id, _) in enumerate(found, 1) if gallery.names[id] in right), 10**9))
    return {f"R@{k}": 100 * sum(place <= k for place in places) / len(places) for k in KS}


def one_seed(args, truth: dict, out: Path, seed: int) -> tuple[dict, dict, dict, dict, int]:
    """-> page's recall before and after, fresh recall before and after, marks made."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    import search
    from common.annotations import read_triplets
    from common.encoding import Compute
    from common.gallery import Engine, Query, find, index_folder
    from common.notes import is_held_out, note, read_notes
    from common.seeds import seeded_rng

    device, base = torch.device(args.device), (args.checkpoint, "" if args.checkpoint else args.backbone)
    model, settings = search.load_model(*base, device)
    compute = Compute(64, device, workers=4)
    gallery = index_folder(model, args.gallery, out, compute)
    engine = Engine(model, settings, search.model_name(base, 0), gallery, compute)
    flags = {"TOP": 48, "TEACH_STEPS": args.steps, "TEACH_BATCH": 32, "TEACH_LR": args.lr, "TEACH_TAU": 0.05}
    for path in [*out.glob("teach-*"), *out.glob("*.jsonl"), *out.glob("using.json")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pairs = read_triplets(args.pseudo) if args.pseudo else []  # as --label of search.py: nobody judged them yet
    notes = read_notes(out, 5, pairs, gallery.of_name)
    pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    site = search.Site(out, engine, notes, base, flags | {"SEED": seed}, *pools, contents=list(gallery.ids))

    names = [name for name in gallery.names.values() if name in truth]
    asked = queries_of(truth, names, seeded_rng("teach", seed), 300 + 20 * args.marks)
    fresh, rest = asked[:300], asked[300:]
    for name, text, right in rest:
        found = find(engine, [Query(f"{gallery.folder}/{name}", (text,), gallery.of_name[name])], 48)[0]
        for target in [gallery.names[id] for id, _ in found if gallery.names[id] in right][:2]:
            mark = {"right": True, "held_out": is_held_out(notes, name), "texts": (text,)}
            note(notes, "marks", (name, target, text), mark)
        if len(notes.marks) >= args.marks:
            break
    before = fresh_recall(engine, fresh)
    search.teach(site, 1)
    if site.teaching["state"] != "done":
        sys.exit(f"not taught: {site.teaching}")
    if not site.using:
        search.use(site, 1)
    return site.teaching["before"], site.teaching["after"], before, fresh_recall(engine, fresh), len(notes.marks)


def main() -> None:
    args = measure.arguments(
        __doc__, gallery="", truth="", checkpoint="", backbone="demo/models/clip", marks=60, seeds=3, steps=100,
        lr=1e-4, pseudo="", out="",
    )  # fmt: skip
    truth = read_truth(args.truth)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.out or folder)
        results = [one_seed(args, truth, out, seed) for seed in range(args.seeds)]
    print(f"{results[0][4]} marks, {args.seeds} seeds: mean, (each)")
    for what, a, b in (("marks held out", 0, 1), ("300 fresh queries", 2, 3)):
        for k in results[0][0]:
            pairs = [(result[a][k], result[b][k]) for result in results]
            means = [statistics.mean(side) for side in zip(*pairs, strict=True)]
            each = ", ".join(f"{x:.0f} -> {y:.0f}" for x, y in pairs)
            print(f"{what:18} {k:5} {means[0]:5.1f} -> {means[1]:5.1f} %   ({each})")


if __name__ == "__main__":
    main()
