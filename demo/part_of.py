"""Fewer pseudo triplets, worse ones or better ones: for the claims about how many there are and how right they must be.

    python demo/part_of.py --of out/demo/pseudo --share 0.125 --out out/eighth
    python demo/part_of.py --of out/demo/pseudo --shuffled 0.5 --out out/shuffled
    python demo/part_of.py --of out/demo/pseudo --true out/demo/world --out out/true
    python demo/part_of.py --of out/demo/pseudo --also out/demo/world/cirr --out out/both

Writes OUT/pseudo.jsonl: triplets of gen_deltas.py, all of them or those of a share of the subgroups (SHARE). A share
of them has its texts dealt out anew among themselves (SHUFFLED), or they get the world's own, human-like texts where it
knows a change between the two pictures (TRUE). With ALSO the human triplets of CIRR's layout are added once each, as if
they were more of them; their pictures are named by their paths below ALSO/img_raw.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.annotations import training_triplets
from common.console import run, say
from common.files import read_json, read_jsonl, write_jsonl
from common.flags import one_of, override, within
from common.seeds import seeded_rng
from demo.report import JUDGES

OF = "out/demo/pseudo"  # folder that gen_deltas.py wrote
OUT = "out/part"  # folder written
SHARE = 1.0  # of the subgroups that are kept, at random
SHUFFLED = 0.0  # share of the triplets that get the text of another of them, at random
TRUE = ""  # folder of the world whose own texts replace the generated ones
KIND = "drawn"  # what kind of world TRUE is: "drawn" or "photos"
ALSO = ""  # folder in CIRR's layout whose train triplets are added
SEED = 0  # of what is drawn


def told_truly(record: dict, attributes: dict, rng) -> dict:
    """A triplet with the text that the world itself has for its two pictures."""
    a, b = attributes[record["reference"]], attributes[record["target"]]
    by = JUDGES[KIND]
    return record | {"delta": by.delta(a, b, rng)} if by.changed(a, b) else record


def main() -> None:
    within(globals(), SHARE=(0, 1), SHUFFLED=(0, 1))
    one_of(globals(), KIND=tuple(JUDGES))
    records, rng = read_jsonl(f"{OF}/pseudo.jsonl"), seeded_rng("part", SEED)
    groups = sorted({record["subgroup"] for record in records})
    kept = set(rng.permutation(groups)[: round(SHARE * len(groups))].tolist())
    records = [record for record in records if record["subgroup"] in kept]
    dealt = rng.permutation(len(records))[: round(SHUFFLED * len(records))]
    texts = [records[i]["delta"] for i in dealt]
    for i, text in zip(dealt, texts[1:] + texts[:1], strict=True):  # each the next one's, so none its own place's
        records[i] = records[i] | {"delta": text}
    own = 0
    if TRUE:
        attributes, before = read_json(f"{TRUE}/attributes.json"), records
        records = [told_truly(record, attributes, rng) for record in records]
        own = sum(record is not old for record, old in zip(records, before, strict=True))
    triplets, images = training_triplets("cirr", ALSO, "train") if ALSO else ([], None)
    for triplet in triplets:
        names = (os.path.relpath(images.path(name), f"{ALSO}/img_raw") for name in (triplet.reference, triplet.target))
        records.append(dict(zip(("reference", "target", "delta"), (*names, triplet.delta), strict=True)))
    write_jsonl(f"{OUT}/pseudo.jsonl", records)
    told = f"{len(dealt):,} with the text of another" + f", {own:,} with the world's own" * bool(TRUE)
    say(f"wrote {OUT}/pseudo.jsonl: {len(records):,} triplets, {told}")


if __name__ == "__main__":
    override(globals())
    run(main)
