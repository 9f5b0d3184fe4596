"""The world of product photographs: a catalogue's pictures in the layouts that the stages read, with human-like deltas.

    python demo/catalogue.py --data FOLDER --out out/demo-photos/world --seed 0

FOLDER holds "Fashion Product Images (Small)" in either of its forms (demo/products.py). Written are OUT/cirr/{captions,
image_splits,img_raw} (splits train, dev, val, test1: sets of six similar photographs), OUT/fashioniq, OUT/chat/
{chat.json,images} (captions: shop titles or catalogue entries), OUT/aux (unlabelled photographs), OUT/attributes.json
(what the catalogue knows of each: for judging deltas only, no stage reads it) and OUT/products.json (which product each
name is). None of them is a photograph that the stand-ins of demo/models_photos were trained on. The same seed and
catalogue give the same bytes. Products are disjoint between parts and splits, and near duplicates (same title and
colour) lie in one of them.
"""

import os
import sys
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.annotations import cirr_template
from common.console import UserError, progress, run, say
from common.files import write_json
from common.flags import override
from common.seeds import seeded_rng
from demo.products import Catalogue, Product, changed, is_for_pretraining, read_catalogue
from demo.texts import ASK_CAPTION
from demo.wordings import delta, entry

# ---- what is written ----
DATA = ""  # folder of the catalogue: styles.csv + images/, or products.jsonl + photos.zip
OUT = "out/demo-photos/world"  # folder of the world
SEED = 0  # another seed, other photographs in each part, other texts
TRAIN = 300  # human-like triplets of the train split
DEV_GROUPS = 60  # sets of 6 in the dev split (for choosing the number of steps)
VAL_GROUPS = 250  # sets of 6 in the val split (the reported one): 1,500 pictures
TEST_GROUPS = 20  # sets of 6 in the test1 split (targets hidden, as CIRR hides them)
QUERIES = 4  # queries a set in dev, val and test1
CHAT = 2000  # captioned pictures for alignment (none of them is in another part)
ENTRIES = 0.0  # share of them whose caption is the catalogue's entry ("a red t-shirt for men"), not the shop's title
AUX = 3000  # pictures of the unlabelled auxiliary gallery
FASHIONIQ = 12  # families of 6 per FashionIQ category and split

RING = cirr_template(6)  # CIRR's nine pairs of a set
FASHIONIQ_ARTICLES = {
    "dress": ("dress", "kurta", "kurti", "tunic", "nightdress", "saree"),
    "shirt": ("shirt", "sweater", "jacket", "sweatshirt"),
    "toptee": ("t-shirt", "top"),
}
# How often each attribute is the one that a new member of a set is chosen by, where it is known.
CHANGE = {
    "article": 0.18,
    "colour": 0.28,
    "usage": 0.08,
    "gender": 0.14,
    "pattern": 0.22,
    "neck": 0.05,
    "sleeves": 0.05,
}
_SPARE = 20  # sets that a split could have besides its own: the more to choose from, the more alike are six
_FLAGS = {"train": "train", "dev": "dev_groups", "val": "val_groups", "test1": "test_groups"}
_LOOKED_AT = 400  # candidates tried for a place in a set


class Sizes(NamedTuple):
    """How much of each part is written; as the flags say."""

    train: int
    dev: int
    val: int
    test: int
    queries: int
    chat: int
    entries: float
    aux: int
    fashioniq: int


class Shelf:
    """What is written, gathered: a photograph under its path, and what is known of it under its name."""

    def __init__(self):
        self.files: dict[str, Product] = {}
        self.products: dict[str, Product] = {}

    def put(self, path: str, name: str, product: Product) -> None:
        self.files[path] = self.products[name] = product


# ---- who goes where ----
def parts_of(products: list[Product], seed: int, sizes: Sizes) -> dict[str, list[Product]]:
    """Part -> its products: "chat", "aux", "cirr/train" ..., "fashioniq/dress/train" ...; near duplicates together, in
    an order of the seed. FashionIQ's take three times what they show; CIRR's divide what is left by their sizes."""
    rng = seeded_rng("catalogue", seed)
    of_key: dict[str, list[Product]] = {}
    for product in products:
        of_key.setdefault(product.key, []).append(product)
    keys = sorted(of_key)
    waiting = [of_key[keys[k]] for k in rng.permutation(len(keys))]
    parts: dict[str, list[Product]] = {}

    for category, articles in FASHIONIQ_ARTICLES.items():
        for split in ("train", "val"):
            fitting = [same for same in waiting if same[0].attributes["article"] in articles]
            parts[f"fashioniq/{category}/{split}"] = taken = first_of(fitting, 3 * 6 * sizes.fashioniq)
            waiting = without(waiting, taken)
    for part, count in (("chat", sizes.chat), ("aux", sizes.aux)):
        parts[part] = taken = first_of(waiting, count)
        if len(taken) < count:
            raise UserError(f"--{part} {count}: the catalogue has {len(taken):,} products left for it; take fewer")
        waiting = without(waiting, taken)

    left, groups = sum(map(len, waiting)), groups_of(sizes)
    most = max(groups, key=groups.get)
    if 6 * sum(groups.values()) > left:
        raise UserError(f"--{_FLAGS[most]}: {sum(groups.values())} sets of six, and {left:,} products left; take fewer")
    total = sum(count + _SPARE for count in groups.values())
    for split, count in groups.items():
        parts[f"cirr/{split}"] = taken = first_of(waiting, left * (count + _SPARE) // total)
        waiting = without(waiting, taken)
    return parts


def groups_of(sizes: Sizes) -> dict[str, int]:
    """Sets of six in each of CIRR's splits."""
    return {"train": -(-sizes.train // len(RING)), "dev": sizes.dev, "val": sizes.val, "test1": sizes.test}


def first_of(waiting: list[list[Product]], count: int) -> list[Product]:
    """The first whole keys that make up `count` products, or a few more."""
    taken: list[Product] = []
    for same in waiting:
        if len(taken) >= count:
            break
        taken += same
    return taken


def without(waiting: list[list[Product]], taken: list[Product]) -> list[list[Product]]:
    keys = {product.key for product in taken}
    return [same for same in waiting if same[0].key not in keys]


# ---- six that are alike ----
def families(rng, products: list[Product], count: int, part: str, flag: str) -> list[list[Product]]:
    """`count` sets of six: one kind of thing, each member one or two known attributes from another, no two alike."""
    left: dict[str, list[Product]] = {}
    for product in products:
        left.setdefault(product.kind, []).append(product)
    found = []
    failed = 0
    while len(found) < count:
        kinds = [kind for kind, pool in sorted(left.items()) if len(pool) >= 6]
        if not kinds or failed > 20 * count + 100:
            raise UserError(
                f"--{flag}: {part} has photographs for {len(found)} sets of six and {count} are wanted; take fewer"
            )
        weight = [len(left[kind]) ** 0.5 for kind in kinds]  # else every second set would be of t-shirts
        kind = kinds[rng.choice(len(kinds), p=[w / sum(weight) for w in weight])]
        members = family(rng, left[kind])
        if members is None:
            failed += 1
            continue
        taken = {product.id for product in members}
        left[kind] = [product for product in left[kind] if product.id not in taken]
        found.append(members)
    return found


def family(rng, pool: list[Product]) -> list[Product] | None:
    """Six of one pool, or None where the first one has too few near it."""
    drawn = [pool[k] for k in rng.integers(len(pool), size=4)]
    first = max(drawn, key=lambda product: len(product.attributes))  # of what much is known, more can be asked
    members = [first]
    for _ in range(30):
        source = first if rng.random() < 0.6 else members[rng.integers(len(members))]
        wanted = 1 if rng.random() < 0.45 else 2
        known = [key for key in CHANGE if key in source.attributes]
        weight = sum(CHANGE[key] for key in known)
        sought = rng.choice(known, p=[CHANGE[key] / weight for key in known])
        for k in rng.permutation(len(pool))[:_LOOKED_AT]:
            new = pool[k]
            keys = changed(source.attributes, new.attributes)
            if sought in keys and len(keys) == wanted and fits(new, members):
                members.append(new)
                break
        if len(members) == 6:
            return members
    return None


def fits(new: Product, members: list[Product]) -> bool:
    """Whether it differs from each in something that the catalogue knows of both."""
    return all(new.key != old.key and changed(old.attributes, new.attributes) for old in members)


# ---- the layouts ----
def put_cirr(out: str, shelf: Shelf, seed: int, split: str, sets: list[list[Product]], queries: int, first: int) -> int:
    """One split's captions and images as CIRR lays them out; train takes all nine pairs of a set. -> pairs so far."""
    rng, table, records = seeded_rng("cirr", seed, split), {}, []
    for g, members in enumerate(sets):
        names = [f"{split}-{g}-{i}-img0" for i in range(6)]
        for name, product in zip(names, members, strict=True):
            file = f"train/{g % 100}/{name}.jpg" if split == "train" else f"{split}/{name}.jpg"
            table[name] = f"./{file}"
            shelf.put(f"cirr/img_raw/{file}", name, product)
        chosen = range(len(RING)) if split == "train" else sorted(rng.permutation(len(RING))[:queries])
        for r, t in (RING[k] for k in chosen):
            record = {
                "pairid": first + len(records),
                "reference": names[r],
                "caption": delta(members[r].attributes, members[t].attributes, rng),
                "img_set": {"id": g, "members": names, "reference_rank": r},
            }
            if split != "test1":
                record |= {"target_hard": names[t], "target_soft": {names[t]: 1.0}}
                record["img_set"]["target_rank"] = t
            records.append(record)
    if split == "train":
        records = records[:queries]
    write_json(f"{out}/cirr/captions/cap.rc2.{split}.json", records)
    write_json(f"{out}/cirr/image_splits/split.rc2.{split}.json", table)
    return first + len(records)


def put_fashioniq(out: str, shelf: Shelf, seed: int, category: str, split: str, sets: list[list[Product]]) -> None:
    """Two texts a pair, as FashionIQ has."""
    rng, records, all_names = seeded_rng("fashioniq", seed, category, split), [], []
    for g, members in enumerate(sets):
        names = [f"{category[0].upper()}{split[0].upper()}{g:03d}{i}" for i in range(6)]
        for name, product in zip(names, members, strict=True):
            shelf.put(f"fashioniq/images/{name}.jpg", name, product)
        for r, t in RING[:3]:
            captions = [delta(members[r].attributes, members[t].attributes, rng) for _ in range(2)]
            records.append({"target": names[t], "candidate": names[r], "captions": captions})
        all_names += names
    write_json(f"{out}/fashioniq/captions/cap.{category}.{split}.json", records)
    write_json(f"{out}/fashioniq/image_splits/split.{category}.{split}.json", all_names)


def put_chat(out: str, shelf: Shelf, seed: int, products: list[Product], entries: float) -> None:
    """LLaVA's format: one of its brief requests before or behind the picture, and as the answer the shop's title, or
    for a share `entries` of the pictures the catalogue's entry."""
    rng, records = seeded_rng("chat", seed), []
    takes_entry = seeded_rng("chat", seed, "entries").random(len(products)) < entries
    for i, product in enumerate(products):
        name = f"chat_{i:05d}.jpg"
        shelf.put(f"chat/images/{name}", name, product)
        asked = ASK_CAPTION[rng.integers(4)]
        human = f"{asked}\n<image>" if rng.random() < 0.5 else f"<image>\n{asked}"
        answer = entry(product.attributes) if takes_entry[i] else product.title
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        records.append({"id": name[:-4], "image": name, "conversations": turns})
    write_json(f"{out}/chat/chat.json", records)


def write_photos(out: str, catalogue: Catalogue, shelf: Shelf) -> None:
    """Each photograph as it is, byte for byte."""
    paths = sorted(shelf.files)
    photos = catalogue.photos([shelf.files[path] for path in paths])
    for path, photo in progress(zip(paths, photos, strict=True), "writing photographs", len(paths)):
        os.makedirs(os.path.dirname(f"{out}/{path}"), exist_ok=True)
        with open(f"{out}/{path}", "wb") as file:
            file.write(photo)


def write_world(data: str, out: str, seed: int, sizes: Sizes) -> None:
    """Writes every layout below `out`, attributes.json last; see the module docstring."""
    catalogue = read_catalogue(data)
    unseen = [product for product in catalogue.products if not is_for_pretraining(product)]
    parts, shelf = parts_of(unseen, seed, sizes), Shelf()
    say(f"{len(catalogue.products):,} products; {len(unseen):,} of them were not trained on, and may be shown")

    # sets of six for FashionIQ and CIRR
    for category in FASHIONIQ_ARTICLES:
        for split in ("train", "val"):
            part = f"fashioniq/{category}/{split}"
            sets = families(seeded_rng("families", seed, part), parts[part], sizes.fashioniq, part, "fashioniq")
            put_fashioniq(out, shelf, seed, category, split, sets)
    pairs = 0
    for split, count in groups_of(sizes).items():
        rng = seeded_rng("families", seed, split)
        sets = families(rng, parts[f"cirr/{split}"], count, f"cirr/{split}", _FLAGS[split])
        pairs = put_cirr(out, shelf, seed, split, sets, sizes.train if split == "train" else sizes.queries, pairs)

    # single photographs; those of the gallery in no order, so that names tell nothing
    put_chat(out, shelf, seed, parts["chat"][: sizes.chat], sizes.entries)
    gallery = parts["aux"][: sizes.aux]
    for i, k in enumerate(seeded_rng("aux", seed).permutation(len(gallery))):
        shelf.put(f"aux/aux_{i:05d}.jpg", f"aux_{i:05d}.jpg", gallery[k])

    write_photos(out, catalogue, shelf)
    names = shelf.products
    write_json(f"{out}/products.json", {name: {"id": p.id, "title": p.title} for name, p in names.items()})
    write_json(f"{out}/attributes.json", {name: product.attributes for name, product in names.items()})


def main() -> None:
    if not DATA:
        raise UserError("--data: name the folder of the catalogue, styles.csv + images/ or products.jsonl + photos.zip")
    if not 0 <= ENTRIES <= 1:
        raise UserError(f"--entries {ENTRIES}: wanted a share from 0 to 1")
    sizes = Sizes(TRAIN, DEV_GROUPS, VAL_GROUPS, TEST_GROUPS, QUERIES, CHAT, ENTRIES, AUX, FASHIONIQ)
    write_world(DATA, OUT, SEED, sizes)


if __name__ == "__main__":
    override(globals())
    run(main)
