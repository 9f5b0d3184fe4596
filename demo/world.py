"""The embedded world: garments drawn with Pillow, with captions, human-like deltas and an unlabelled gallery.

A garment is a dict of eight attributes (`VALUES`); place, size, tilt and light are nuisance. One command writes the
whole world to disk in the layouts the stages read from real data sets:

    python demo/world.py --out out/demo/world --seed 0

writes OUT/cirr/{captions,image_splits,img_raw} (splits train, dev, val, test1), OUT/fashioniq, OUT/chat/{chat.json,
images} (captions), OUT/aux (unlabelled pictures) and OUT/attributes.json (what was drawn: for judging deltas only, no
stage reads it). The same seed gives the same bytes; different seeds give different garments, texts and pictures.
"""

import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.annotations import cirr_template
from common.console import progress, run
from common.files import write_json
from common.flags import override
from common.seeds import seeded_rng

# ---- what is written ----
OUT = "out/demo/world"  # folder of the world
SEED = 0  # another seed, another world
TRAIN = 300  # human triplets of the train split
DEV_GROUPS = 60  # subgroups of 6 in the dev split (for choosing the number of steps)
VAL_GROUPS = 250  # subgroups of 6 in the val split (the reported one): 1,500 pictures
TEST_GROUPS = 20  # subgroups of 6 in the test1 split (targets hidden, as CIRR hides them)
QUERIES = 4  # queries a subgroup in dev, val and test1
CHAT = 2000  # captioned pictures for alignment (none of them is in another part)
AUX = 400  # families of 7 in the unlabelled auxiliary gallery
FASHIONIQ = 12  # families of 6 per FashionIQ category and split

COLOURS = {
    "red": (196, 44, 52),
    "orange": (232, 126, 44),
    "yellow": (238, 200, 64),
    "green": (58, 142, 76),
    "teal": (28, 148, 152),
    "blue": (52, 88, 190),
    "purple": (124, 68, 164),
    "pink": (238, 138, 174),
    "brown": (122, 80, 52),
    "grey": (136, 139, 146),
}
PRINT_COLOURS = {
    "white": (250, 250, 248),
    "black": (24, 24, 28),
    "navy": (26, 36, 98),
    "lime": (172, 228, 60),
    "aqua": (96, 226, 236),
    "magenta": (214, 24, 132),
}
BACKGROUNDS = {
    "snow": (247, 247, 249),
    "cream": (247, 234, 200),
    "sky": (196, 222, 248),
    "mint": (196, 238, 212),
    "rose": (248, 206, 214),
    "charcoal": (70, 73, 82),
    "sand": (210, 184, 142),
    "lilac": (214, 200, 240),
}
VALUES = {
    "category": ("dress", "shirt", "skirt", "trousers", "coat"),
    "colour": tuple(COLOURS),
    "pattern": ("plain", "stripes", "dots", "checks"),
    "print": tuple(PRINT_COLOURS),
    "sleeves": ("none", "short", "long"),
    "length": ("mini", "knee", "ankle"),
    "neck": ("round", "v", "collar"),
    "background": tuple(BACKGROUNDS),
}
# How often each attribute is the one that differs between two pictures of a family.
CHANGE = {
    "category": 0.08,
    "colour": 0.24,
    "pattern": 0.18,
    "print": 0.08,
    "sleeves": 0.14,
    "length": 0.13,
    "neck": 0.12,
    "background": 0.17,
}
RING = cirr_template(6)  # CIRR's nine pairs of a subgroup
_SIZE = 128  # side of a written picture in pixels; drawn at twice that


# ---- garments ----
def applies(garment: dict, attribute: str) -> bool:
    """Whether an attribute can be seen on this garment (a skirt has no sleeves, a plain shirt no print colour)."""
    if attribute in ("sleeves", "neck"):
        return garment["category"] in ("dress", "shirt", "coat")
    if attribute == "length":
        return garment["category"] != "shirt"
    return attribute != "print" or garment["pattern"] != "plain"


def random_garment(rng) -> dict:
    return {key: values[rng.integers(len(values))] for key, values in VALUES.items()}


def mutate(garment: dict, rng, changes: int) -> dict:
    """A copy with `changes` visible attributes redrawn."""
    keys = [k for k in CHANGE if applies(garment, k)]
    weight = np.array([CHANGE[k] for k in keys])
    new = dict(garment)
    for key in rng.choice(keys, size=changes, replace=False, p=weight / weight.sum()):
        new[str(key)] = str(rng.choice([v for v in VALUES[key] if v != garment[key]]))
    return new


def family(rng, size: int) -> list[dict]:
    """`size` garments that differ from each other in one to four attributes, like a CIRR subgroup."""
    first = random_garment(rng)
    members = [first]
    while len(members) < size:
        source = first if rng.random() < 0.6 else members[rng.integers(len(members))]
        new = mutate(source, rng, 1 if rng.random() < 0.45 else 2)
        if all(changed(new, old) for old in members):
            members.append(new)
    return members


def changed(a: dict, b: dict) -> list[str]:
    """The attributes a viewer sees differ between two garments."""
    keys = []
    for key in VALUES:
        if a[key] == b[key] or not (applies(a, key) and applies(b, key)):
            continue
        if key == "print" and a["pattern"] != b["pattern"]:
            continue  # a new pattern brings its colour along: one change, not two
        keys.append(key)
    return keys


# ---- pictures ----
def _mirror(right):
    return right + [(-x, y) for x, y in right[::-1]]


def _smooth(points):
    """Chaikin corner cutting: cloth has no sharp corners."""
    points = np.asarray(points, float)
    for share in (0.9, 0.75):
        following = np.roll(points, -1, 0)
        points = np.stack([share * points + (1 - share) * following, (1 - share) * points + share * following], 1)
        points = points.reshape(-1, 2)
    return points


def _outline(garment):
    """-> (polygons, cut-out polygon or None, seam lines, collar flaps, top y, hem y); unit coordinates, y down."""
    category, level = garment["category"], VALUES["length"].index(garment["length"])
    if category == "skirt":
        hem = (-0.04, 0.4, 0.9)[level]
        seams = [[(-0.37, -0.66), (0.37, -0.66)], [(-0.12, -0.66), (-0.2, hem)], [(0.13, -0.66), (0.22, hem)]]
        return [_mirror([(0.36, -0.8), (0.38, -0.64), (0.58 + 0.08 * level, hem)])], None, seams, [], -0.8, hem
    if category == "trousers":
        hem = (-0.1, 0.38, 0.94)[level]
        legs = [
            [
                (0, -0.88),
                (q * 0.4, -0.88),
                (q * 0.48, -0.4),
                (q * (0.5 - 0.05 * level), hem),
                (q * (0.15 - 0.03 * level), hem),
                (0, -0.4),
            ]
            for q in (1, -1)
        ]
        return legs, None, [[(-0.4, -0.76), (0.4, -0.76)], [(0, -0.88), (0, -0.4)]], [], -0.88, hem
    half = {"dress": 0.34, "shirt": 0.42, "coat": 0.46}[category]
    shoulder = half - (0.1 if garment["sleeves"] == "none" else 0)
    top = -0.84
    if category == "shirt":
        hem = 0.56
        body = [(0.15, top), (shoulder, top + 0.08), (half - 0.03, top + 0.4), (half - 0.05, 0), (half, hem)]
    elif category == "dress":
        hem = (0.2, 0.58, 0.96)[level]
        body = [(0.15, top), (shoulder, top + 0.08), (half - 0.03, top + 0.4), (0.25, -0.1), (0.42 + 0.12 * level, hem)]
    else:
        hem = (0.2, 0.58, 0.96)[level]
        body = [(0.15, top), (shoulder, top + 0.08), (half, top + 0.4), (half - 0.03, 0), (half + 0.1, hem)]
    shapes, seams = [_mirror(body)], []
    for q in (1, -1):
        if garment["sleeves"] == "short":
            arm = [
                (shoulder - 0.08, top + 0.05),
                (shoulder + 0.07, top + 0.13),
                (shoulder + 0.3, top + 0.46),
                (shoulder + 0.1, top + 0.61),
                (half - 0.08, top + 0.42),
            ]
        elif garment["sleeves"] == "long":
            arm = [
                (shoulder - 0.08, top + 0.05),
                (shoulder + 0.07, top + 0.13),
                (shoulder + 0.28, top + 0.62),
                (shoulder + 0.37, 0.32),
                (shoulder + 0.17, 0.36),
                (shoulder + 0.08, top + 0.76),
                (half - 0.08, top + 0.42),
            ]
        else:
            continue
        shapes.append([(q * x, y) for x, y in arm])
        seams.append([(q * (half - 0.02), top + 0.2), (q * (half - 0.04), top + 0.44)])
    flaps = []
    if garment["neck"] == "round":
        cut = [(0.23 * math.cos(t), top + 0.25 * math.sin(t)) for t in np.linspace(-0.4, math.pi + 0.4, 20)]
    elif garment["neck"] == "v":
        cut = [(-0.2, top - 0.06), (0, top + 0.52), (0.2, top - 0.06)]
    else:
        cut = [(-0.1, top - 0.06), (0, top + 0.13), (0.1, top - 0.06)]
        flaps = [
            [(0, top + 0.13), (q * 0.18, top - 0.06), (q * 0.34, top + 0.12), (q * 0.15, top + 0.36)] for q in (1, -1)
        ]
    if category == "coat":
        seams.append([(0, top + 0.3), (0, hem)])
    if category == "dress":
        seams += [[(-0.25, -0.1), (0.25, -0.1)], [(-0.1, 0), (-0.18, hem)], [(0.1, 0), (0.18, hem)]]
    return shapes, cut, seams, flaps, top, hem


def draw(garment: dict, rng, size: int = _SIZE) -> Image.Image:
    """One picture, (size, size) RGB; the nuisances (place, scale, tilt, light, folds) come from `rng`."""
    side = 2 * size  # supersampled
    cx, cy = 0.5 + rng.normal(0, 0.022, 2)
    scale, tilt, light = 0.47 * rng.uniform(0.86, 1.03), math.radians(rng.uniform(-6, 6)), rng.uniform(0.9, 1.08)
    fold = rng.uniform(0, 6.28)
    shapes, cut, seams, flaps, top, hem = _outline(garment)
    c, s = math.cos(tilt), math.sin(tilt)

    def place(points):
        return [(side * (cx + scale * (x * c - y * s)), side * (cy + scale * (x * s + y * c))) for x, y in points]

    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    for shape in shapes:
        pen.polygon(place(_smooth(shape)), fill=255)
    if cut is not None:
        pen.polygon(place(cut), fill=0)
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    dx, dy = grid[None, :] - np.float32(cx), grid[:, None] - np.float32(cy)
    u, v = (dx * c + dy * s) / scale, (-dx * s + dy * c) / scale  # garment coordinates of every pixel
    cloth = np.empty((side, side, 3), np.float32)
    cloth[:] = COLOURS[garment["colour"]]
    if garment["pattern"] == "stripes":
        on = (v * 4.0) % 1 < 0.42
    elif garment["pattern"] == "dots":
        row = np.floor(v * 4.2)
        on = ((u * 4.2 + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + ((v * 4.2) % 1 - 0.5) ** 2 < 0.1
    elif garment["pattern"] == "checks":
        on = ((u * 4.2) % 1 < 0.3) | ((v * 4.2) % 1 < 0.3)
    if garment["pattern"] != "plain":
        cloth[on] = PRINT_COLOURS[garment["print"]]
    drape = np.clip((v - top) / (hem - top), 0, 1)  # folds deepen towards the hem
    shade = 1.04 - 0.17 * np.abs(u) ** 1.4 + 0.05 * drape * np.sin(13 * u + fold + 1.5 * v) - 0.04 * v
    edge = np.asarray(mask.resize((size, size)).filter(ImageFilter.MinFilter(3)).resize((side, side)), np.float32) / 255
    cloth *= (shade * (0.7 + 0.3 * edge))[..., None]
    # The shadow is blurred small and enlarged: the same look at a fraction of the time.
    soft = mask.resize((side // 4, side // 4)).filter(ImageFilter.GaussianBlur(2.4)).resize((side, side), 2)
    soft = np.roll(np.asarray(soft, np.float32) / 255, (side // 26, side // 32), (0, 1))
    wall = (1.04 - 0.13 * grid[:, None]) * (1 - 0.3 * soft)
    inside = (np.asarray(mask, np.float32) / 255)[..., None]
    scene = wall[..., None] * np.array(BACKGROUNDS[garment["background"]], np.float32) * (1 - inside) + cloth * inside
    picture = Image.fromarray(np.clip(scene * light, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    dark = tuple(int(0.6 * light * x) for x in COLOURS[garment["colour"]])
    pale = tuple(min(255, int(light * (0.5 * x + 120))) for x in COLOURS[garment["colour"]])
    for seam in seams:
        pen.line(place(seam), fill=dark, width=side // 90)
    for flap in flaps:
        pen.polygon(place(flap), fill=pale, outline=dark, width=side // 110)
    if garment["category"] == "coat":
        for k in range(3):
            (x, y), r = place([(0.1, -0.3 + 0.24 * k)])[0], side / 62
            pen.ellipse((x - r, y - r, x + r, y + r), fill=dark)
    return picture.resize((size, size), Image.Resampling.BOX)


# ---- texts ----
SLEEVES = {"none": "no sleeves", "short": "short sleeves", "long": "long sleeves"}
LENGTH = {"mini": "mini", "knee": "knee length", "ankle": "ankle length"}
NECK = {"round": "a round neck", "v": "a v neck", "collar": "a collar"}


def _pick(rng, options):
    return str(options[rng.integers(len(options))])


def caption(garment: dict, rng, drop: float = 0.12) -> str:
    """A web-like caption; each detail is left out with probability `drop`."""
    words = ["a"]
    if applies(garment, "length") and rng.random() > drop:
        words.append(LENGTH[garment["length"]])
    if rng.random() > drop / 2:
        words.append(garment["colour"])
    if garment["pattern"] == "plain" and rng.random() > 2 * drop:
        words.append("plain")
    words.append(garment["category"])
    details = []
    if garment["pattern"] != "plain" and rng.random() > drop / 2:
        details.append(f"{garment['print']} {garment['pattern']}")
    if applies(garment, "sleeves") and rng.random() > drop:
        details.append(SLEEVES[garment["sleeves"]])
    if applies(garment, "neck") and rng.random() > drop:
        details.append(NECK[garment["neck"]])
    rng.shuffle(details)
    if details:
        words.append("with " + " and ".join(details))
    if rng.random() > drop:
        words.append(f"{_pick(rng, ('on a', 'in front of a', 'against a'))} {garment['background']} background")
    return " ".join(words)


def phrase(key: str, a: dict, b: dict, rng) -> str:
    """How an annotator might ask for one change of a into b. Parsed back by `claims`."""
    old, new = a[key], b[key]
    if key == "category":
        return _pick(rng, (f"is a {new}", f"change it to a {new}", f"a {new} instead of a {old}", f"should be a {new}"))
    if key == "colour":
        return _pick(
            rng, (f"is {new}", f"make it {new}", f"{new} instead of {old}", f"in {new}", f"has a {new} colour")
        )
    if key == "pattern":
        if new == "plain":
            return _pick(rng, ("is plain", "has no pattern", f"remove the {old}"))
        return _pick(
            rng,
            (
                f"with {b['print']} {new}",
                f"has {b['print']} {new}",
                f"add {b['print']} {new}",
                f"has {new}",
                f"{new} instead of {old}" if old != "plain" else f"with {new}",
            ),
        )
    if key == "print":
        return _pick(
            rng, (f"the {b['pattern']} are {new}", f"has {new} {b['pattern']}", f"make the {b['pattern']} {new}")
        )
    if key == "sleeves":
        if new == "none":
            return _pick(rng, ("is sleeveless", "has no sleeves", "remove the sleeves"))
        longer = VALUES[key].index(new) > VALUES[key].index(old)
        return _pick(
            rng,
            (
                f"has {new} sleeves",
                f"with {new} sleeves",
                f"{new} sleeves",
                "has longer sleeves" if longer else "has shorter sleeves",
            ),
        )
    if key == "length":
        longer = VALUES[key].index(new) > VALUES[key].index(old)
        return _pick(
            rng,
            (
                "is longer" if longer else "is shorter",
                "make it longer" if longer else "make it shorter",
                f"is {LENGTH[new]}",
                f"{LENGTH[new]}",
            ),
        )
    if key == "neck":
        return _pick(rng, (f"has {NECK[new]}", f"with {NECK[new]}", f"{NECK[new]} instead of {NECK[old]}"))
    return _pick(
        rng,
        (f"on a {new} background", f"the background is {new}", f"{new} background", f"change the background to {new}"),
    )


def delta(a: dict, b: dict, rng) -> str:
    """A human-like modification text: one or two of the changes, the striking ones first to be named."""
    keys = changed(a, b)
    weight = np.array([{"category": 6, "colour": 2, "pattern": 2}.get(k, 1) for k in keys], float)
    named = rng.choice(
        keys, size=min(len(keys), 1 if rng.random() < 0.4 else 2), replace=False, p=weight / weight.sum()
    )
    opening = (
        ""
        if "category" in named
        else _pick(rng, ("", "", "", "the same but ", "similar but ", f"the same {b['category']} but "))
    )
    return opening + _pick(rng, (" and ", " , ")).join(phrase(k, a, b, rng) for k in named)


# ---- judging a generated delta ----
def claims(text: str) -> list[tuple[str, str]]:
    """What a delta says of the target: [(attribute, value)], value "longer" / "shorter" for relative ones,
    ("?", clause) for a clause that says nothing we know."""
    found = []
    text = text.lower().replace(",", " and ").replace(" but ", " and ")
    for clause in text.split(" and "):
        words = clause.split(" instead of ")[0].replace(".", " ").split()
        if not words or (words[0] in ("the", "similar") and "same" in words[:2]) or words == ["similar"]:
            continue
        before = len(found)
        if "background" in words:
            found += [("background", w) for w in words if w in BACKGROUNDS]
        elif "sleeves" in words or "sleeveless" in words:
            gone = any(w in words for w in ("sleeveless", "no", "remove"))
            value = "none" if gone else next((w for w in words if w in ("short", "long", "longer", "shorter")), None)
            found += [("sleeves", value)] if value else []
        elif "neck" in words or "collar" in words:
            found += [("neck", w) for w in words if w in VALUES["neck"]][:1]
        elif "plain" in words or "pattern" in words or "remove" in words:
            found.append(("pattern", "plain"))
        elif any(w in VALUES["pattern"] for w in words):
            found.append(("pattern", next(w for w in words if w in VALUES["pattern"])))
            found += [("print", w) for w in words if w in PRINT_COLOURS][:1]
        else:
            for w in words:
                key = "category" if w in VALUES["category"] else "colour" if w in COLOURS else None
                if key is None and w in ("longer", "shorter", "mini", "knee", "ankle"):
                    key = "length"
                found += [(key, w)] if key else []
        if len(found) == before:
            found.append(("?", clause.strip()))
    return found


def judged(text: str, a: dict, b: dict) -> list[tuple[str, bool]]:
    """Each claim of a delta: its attribute ("?": a clause that says nothing we know), and whether it is a true change
    named with the right value. A pattern and the colour of its print named together are one claim."""
    truth, verdicts = changed(a, b), []
    found = claims(text)
    spoken = dict(reversed([(k, v) for k, v in found if k in ("pattern", "print")]))  # the first of each
    for key, value in found:
        if key == "pattern" and "pattern" not in truth and "print" in spoken and value == b["pattern"]:
            continue  # "has white dots" where dots stay dots: judged by its print claim
        if key == "print" and "pattern" in truth:
            continue  # the colour of a new pattern is judged with the pattern
        if key == "?" or key not in truth:
            verdicts.append((key, False))
            continue
        if value in ("longer", "shorter"):
            rise = VALUES[key].index(b[key]) - VALUES[key].index(a[key])
            good = (rise > 0) == (value == "longer")
        else:
            good = value == b[key]
        if key == "pattern" and value != "plain":
            good = good and spoken.get("print", b["print"]) == b["print"]
        verdicts.append((key, good))
    return verdicts


# ---- the world on disk ----
def _draw_to(job):
    path, garment, key = job
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draw(garment, seeded_rng(*key)).save(path, quality=92)


def write_world(
    out: str, seed: int, train: int, dev: int, val: int, test: int, queries: int, chat: int, aux: int, fashioniq: int
) -> None:
    """Writes every layout below `out`; see the module docstring."""
    jobs, attributes = [], {}

    def picture(folder, name, garment):
        jobs.append((os.path.join(out, folder, name), garment, ("picture", seed, folder, name)))
        attributes[name] = garment

    pairid = 0
    for split, groups in (("train", -(-train // len(RING))), ("dev", dev), ("val", val), ("test1", test)):
        rng = seeded_rng("cirr", seed, split)
        table, records = {}, []
        for g in range(groups):
            garments = family(rng, 6)
            names = [f"{split}-{g}-{i}-img0" for i in range(6)]
            for name, garment in zip(names, garments, strict=True):
                file = f"{split}/{name}.jpg" if split != "train" else f"train/{g % 100}/{name}.jpg"
                table[name] = f"./{file}"
                picture("cirr/img_raw", file, garment)
                attributes[name] = attributes.pop(file)
            chosen = range(len(RING)) if split == "train" else sorted(rng.permutation(len(RING))[:queries])
            for r, t in (RING[k] for k in chosen):
                record = {
                    "pairid": pairid,
                    "reference": names[r],
                    "caption": delta(garments[r], garments[t], rng),
                    "img_set": {"id": g, "members": names, "reference_rank": r},
                }
                if split != "test1":
                    record |= {"target_hard": names[t], "target_soft": {names[t]: 1.0}}
                    record["img_set"]["target_rank"] = t
                records.append(record)
                pairid += 1
        if split == "train":
            records = records[:train]
        write_json(os.path.join(out, "cirr/captions", f"cap.rc2.{split}.json"), records)
        write_json(os.path.join(out, "cirr/image_splits", f"split.rc2.{split}.json"), table)
    for category, kind in (("dress", "dress"), ("shirt", "shirt"), ("toptee", "coat")):
        for split in ("train", "val"):
            rng = seeded_rng("fashioniq", seed, category, split)
            records, names_all = [], []
            for g in range(fashioniq):
                garments = [dict(garment, category=kind) for garment in family(rng, 6)]
                names = [f"{category[0].upper()}{split[0].upper()}{g:03d}{i}" for i in range(6)]
                for name, garment in zip(names, garments, strict=True):
                    picture("fashioniq/images", f"{name}.jpg", garment)
                for r, t in RING[:3]:
                    if changed(garments[r], garments[t]):
                        captions = [delta(garments[r], garments[t], rng) for _ in range(2)]
                        records.append({"target": names[t], "candidate": names[r], "captions": captions})
                names_all += names
            write_json(os.path.join(out, "fashioniq/captions", f"cap.{category}.{split}.json"), records)
            write_json(os.path.join(out, "fashioniq/image_splits", f"split.{category}.{split}.json"), names_all)
    rng, records = seeded_rng("chat", seed), []
    prompts = (
        "Provide a brief description of the given image.",
        "Write a terse but informative summary of the picture.",
        "Share a concise interpretation of the image provided.",
        "Give a short and clear explanation of the subsequent image.",
    )
    for i in range(chat):
        garment, name = random_garment(rng), f"chat_{i:05d}.jpg"
        picture("chat/images", name, garment)
        prompt = _pick(rng, prompts)
        human = f"{prompt}\n<image>" if rng.random() < 0.5 else f"<image>\n{prompt}"
        records.append(
            {
                "id": name[:-4],
                "image": name,
                "conversations": [
                    {"from": "human", "value": human},
                    {"from": "gpt", "value": caption(garment, rng, drop=0)},
                ],
            }
        )
    write_json(os.path.join(out, "chat/chat.json"), records)
    rng = seeded_rng("aux", seed)
    pile = [garment for _ in range(aux) for garment in family(rng, 7)]
    for i, k in enumerate(rng.permutation(len(pile))):  # shuffled: names tell nothing about families
        picture("aux", f"aux_{i:05d}.jpg", pile[k])
    write_json(os.path.join(out, "attributes.json"), attributes)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for _ in progress(pool.map(_draw_to, jobs, chunksize=64), f"drawing {len(jobs):,} garments", len(jobs)):
            pass


def main() -> None:
    write_world(OUT, SEED, TRAIN, DEV_GROUPS, VAL_GROUPS, TEST_GROUPS, QUERIES, CHAT, AUX, FASHIONIQ)


if __name__ == "__main__":
    override(globals())
    run(main)
