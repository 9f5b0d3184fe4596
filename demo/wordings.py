"""How people ask for a change of one product photograph into another, in FashionIQ's manner, and how such a text is
judged by the catalogue.

Frames and their weights are learnt from FashionIQ's 36,000 training captions (its annotations, not its texts: a weight
is the number of captions that are the frame, with any value in its place; tests/test_catalogue.py counts them again
where the annotations are there). FashionIQ never names the wearer and seldom the article: weights of these are [ours].
"""

import os
import re
import sys
from typing import NamedTuple

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from demo.products import ARTICLES, COLOURS, PLURAL, VALUES, changed

# {new}, {old}: values as said below; {noun}: the article, where both pictures show the same one.
FRAMES = {
    "article": {"is {new}": 50, "is more of {new}": 6, "{new}": 2, "looks like {new}": 2},
    "colour": {
        "is {new}": 773, "is {new} in color": 252, "is {new} colored": 158, "is more {new}": 131, "{new}": 89,
        "it is {new}": 55, "has more {new}": 53, "is a {new} color": 17, "{new} in color": 13,
        "is a {new} {noun}": 128, "the {noun} is {new} in color": 57, "the {noun} is {new}": 16,
    },
    "darker": {"is darker": 582, "is darker in color": 151, "is a darker color": 52, "is darker colored": 38},
    "lighter": {"is lighter": 464, "is lighter in color": 114, "is a lighter color": 45, "is lighter colored": 39},
    "pattern": {
        "is {adjective}": 43, "is more {adjective}": 32, "has a {adjective} pattern": 16, "{adjective}": 8,
        "has {adjective} pattern": 4, "has a {adjective} design": 3, "has {thing}": 32, "has more {thing}": 23,
        "with {thing}": 1,
    },
    "usage": {
        "is more {new}": 114, "is less {old}": 34, "more {new}": 5, "is {new}": 4, "is more {new} looking": 3,
    },
    "gender": {"is for {new}": 3, "for {new}": 1},
    "neck": {"has a {new}": 30, "{new}": 8, "with a {new}": 1},
    "no sleeves": {
        "has no sleeves": 108, "is sleeveless": 36, "sleeveless": 18, "no sleeves": 4, "does not have sleeves": 3,
        "with no sleeves": 2,
    },
    "sleeves": {
        "has {new} sleeves": 136, "is {new} sleeved": 28, "{new} sleeved": 8, "with {new} sleeves": 4,
        "{new} sleeves": 3,
    },
    "longer": {"has longer sleeves": 286, "is longer sleeved": 9, "longer sleeves": 5},
    "shorter": {"has shorter sleeves": 183, "is shorter sleeved": 6, "shorter sleeves": 6},
}  # fmt: skip
# How often FashionIQ's captions speak of each (of 36,000; a caption may speak of several): what is named first.
SPOKEN_OF = {"colour": 23959, "pattern": 5640, "sleeves": 8495, "neck": 2018, "usage": 684}
_OURS = {"article": 60000, "gender": 6000}  # [ours] another article strikes first; the wearer shows seldom
_TWO = 0.6  # share that names two things: 14,956 with "and" and 7,234 with "with", of 36,000
_WITH = 0.33  # ... of which joined by "with"

SAID = {  # what is said for a value, where it is not the value itself
    "usage": {"sports": "sporty"},
    "neck": {"round": "round neck", "v": "v-neck", "polo": "polo collar"},
}
ADJECTIVES = {"checks": "checkered", "stripes": "striped", "dots": "dotted", "print": "printed", "plain": "plain"}
THINGS = {"dots": "polka dots", "floral": "flowers", "print": "prints"}

# Tone is told apart where it is plain: "darker" is true from a light or middling colour to a dark one, and so on.
_TONES = {
    "dark": ("black", "navy", "maroon", "brown", "olive"),
    "light": ("white", "cream", "beige", "yellow", "silver"),
}


# ---- saying it ----
def tone(colour: str) -> int:
    """0 dark, 1 middling, 2 light."""
    return 0 if colour in _TONES["dark"] else 2 if colour in _TONES["light"] else 1


def a(article: str) -> str:
    """ "a shirt", "an ...", "jeans"."""
    if article in PLURAL:
        return article
    return f"an {article}" if article[0] in "aeiou" else f"a {article}"


def frames_of(key: str, one: dict[str, str], other: dict[str, str]) -> dict[str, int]:
    """The frames that fit a change of one into other, with their weights."""
    old, new = one[key], other[key]
    frames = dict(FRAMES[key])
    if key == "colour":
        same = one["article"] == other["article"] and one["article"] not in PLURAL
        frames = {frame: weight for frame, weight in frames.items() if same or "{noun}" not in frame}
        if new == "multicolored":
            frames = {"is {new}": 1}
        elif tone(new) != tone(old) and old != "multicolored":
            frames |= FRAMES["darker" if tone(new) < tone(old) else "lighter"]
    elif key == "article" and new in PLURAL:
        frames = {frame: weight for frame, weight in frames.items() if frame != "is more of {new}"}
    elif key == "gender" and new == "unisex":
        frames = {"is {new}": 1}
    elif key == "pattern" and new == "plain":
        frames = {frame: weight for frame, weight in frames.items() if "{thing}" not in frame}
    elif key == "sleeves":
        lengths = VALUES["sleeves"]
        frames = dict(FRAMES["no sleeves"]) if new == "none" else frames
        longer = lengths.index(new) > lengths.index(old)
        if new != "none":
            frames |= FRAMES["longer" if longer else "shorter"]
    return frames


def phrase(key: str, one: dict[str, str], other: dict[str, str], rng) -> str:
    """How an annotator might ask for one change. Parsed back by `claims`."""
    frames = frames_of(key, one, other)
    weights = np.array(list(frames.values()), float)
    frame = str(rng.choice(list(frames), p=weights / weights.sum()))
    old, new = (SAID.get(key, {}).get(known[key], known[key]) for known in (one, other))
    if key == "article":
        old, new = a(old), a(new)
    return frame.format(
        old=old,
        new=new,
        noun=other["article"],
        adjective=ADJECTIVES.get(new, new),
        thing=THINGS.get(new, new),
    )


def delta(one: dict[str, str], other: dict[str, str], rng) -> str:
    """A human-like modification text: one or two of the attributes that differ, the striking ones more often."""
    keys = changed(one, other)
    weight = np.array([(SPOKEN_OF | _OURS)[key] for key in keys], float)
    count = min(len(keys), 2 if rng.random() < _TWO else 1)
    named = [str(key) for key in rng.choice(keys, size=count, replace=False, p=weight / weight.sum())]
    said = [phrase(key, one, other, rng) for key in named]
    if count == 1:
        return said[0]
    if said[1].startswith("has ") and rng.random() < _WITH:
        return f"{said[0]} with {said[1].removeprefix('has ')}"
    return " and ".join(said)


def entry(known: dict[str, str]) -> str:
    """A product's catalogue entry in a line: "a red striped t-shirt for men, sporty, v-neck, short sleeves".

    What the catalogue does not know is not there. Parsed back by `claims`."""
    said = {key: SAID.get(key, {}).get(value, value) for key, value in known.items()}
    pattern = ADJECTIVES.get(said.get("pattern", ""), said.get("pattern", ""))
    thing = " ".join(filter(None, (said.get("colour"), pattern, said["article"])))
    text = a(thing) if known["article"] not in PLURAL else thing
    if "gender" in said:
        text += " unisex" if known["gender"] == "unisex" else f" for {said['gender']}"
    sleeves = {"": "", "none": "no sleeves"}.get(known.get("sleeves", ""), f"{known.get('sleeves')} sleeves")
    return ", ".join(filter(None, (text, said.get("usage"), said.get("neck"), sleeves)))


def corpus(seed: int, count: int = 3000) -> list[str]:
    """Texts for the tokenizers alone: deltas between made-up products, and every value's words."""
    rng, lines = np.random.default_rng(seed), []
    for _ in range(count):
        one, other = ({key: str(rng.choice(values)) for key, values in VALUES.items()} for _ in range(2))
        if changed(one, other):
            lines.append(delta(one, other, rng))
    return lines


# ---- judging what is said ----
class Claim(NamedTuple):
    attribute: str  # one of VALUES, or "?": a clause that says nothing known
    value: str  # of VALUES; or "darker", "lighter", "longer", "shorter", "shoes"; for "?" the clause
    denied: bool = False  # "less casual", "not red"


def _vocabulary() -> dict[str, tuple[str, str]]:
    """Every phrase that names a value -> (attribute, value)."""
    found = {article: ("article", article) for article in ARTICLES.values()}
    found |= {article.removesuffix("s"): ("article", article) for article in PLURAL if not article.endswith("ss")}
    found |= {f"{article}s": ("article", article) for article in ARTICLES.values() if article not in PLURAL}
    more = {
        "tshirt": "t-shirt", "t shirt": "t-shirt", "tee": "t-shirt", "sari": "saree", "purse": "handbag",
        "shoes": "shoes", "shoe": "shoes", "dresses": "dress", "watches": "watch", "clutches": "clutch",
        "scarves": "scarf", "slippers": "flip flops", "polo shirt": "t-shirt",
    }  # fmt: skip
    found |= {phrase: ("article", article) for phrase, article in more.items()}
    found |= {name.lower(): ("colour", colour) for colour, names in COLOURS.items() for name in names}
    found |= {colour: ("colour", colour) for colour in COLOURS}
    more = {"gray": "grey", "golden": "gold", "multicoloured": "multicolored", "multi colored": "multicolored"}
    found |= {phrase: ("colour", colour) for phrase, colour in more.items()}
    found |= {phrase: ("colour", tone) for phrase, tone in (("darker", "darker"), ("lighter", "lighter"))}
    found |= {usage: ("usage", usage) for usage in VALUES["usage"]}
    found |= {"sporty": ("usage", "sports"), "sport": ("usage", "sports"), "traditional": ("usage", "ethnic")}
    for gender in VALUES["gender"]:
        found |= {gender: ("gender", gender), f"{gender}'s": ("gender", gender)}
    found |= {"man": ("gender", "men"), "woman": ("gender", "women"), "mens": ("gender", "men")}
    found |= {"womens": ("gender", "women"), "girl": ("gender", "girls"), "boy": ("gender", "boys")}
    for pattern in VALUES["pattern"]:
        words = {pattern, ADJECTIVES.get(pattern, pattern), THINGS.get(pattern, pattern)}
        found |= {word: ("pattern", pattern) for word in words}
    more = {
        "check": "checks", "checked": "checks", "plaid": "checks", "stripe": "stripes", "dot": "dots", "solid": "plain",
        "graphic": "print", "no pattern": "plain", "no print": "plain", "no prints": "plain", "flower": "floral",
    }  # fmt: skip
    found |= {phrase: ("pattern", pattern) for phrase, pattern in more.items()}
    more = {
        "v-neck": "v", "v neck": "v", "round neck": "round", "crew neck": "round", "polo collar": "polo",
        "polo": "polo", "collar": "collar", "collared": "collar", "hood": "hood", "hooded": "hood", "hoodie": "hood",
    }  # fmt: skip
    found |= {phrase: ("neck", neck) for phrase, neck in more.items()}
    for said, value in (
        ("no", "none"),
        ("short", "short"),
        ("long", "long"),
        ("longer", "longer"),
        ("shorter", "shorter"),
    ):
        found |= {f"{said} {word}": ("sleeves", value) for word in ("sleeve", "sleeves", "sleeved")}
    return found | {"sleeveless": ("sleeves", "none"), "not have sleeves": ("sleeves", "none")}


_NAMES = _vocabulary()
_NAME = re.compile(r"(?<![\w'-])(" + "|".join(sorted(map(re.escape, _NAMES), key=len, reverse=True)) + r")(?![\w'-])")
_BETWEEN = r"(,|;|\band\b|\bbut\b|\bwith\b)"  # clauses
_REST = re.compile(r"\b(instead of|rather than|as opposed to)\b.*")


def claims(text: str) -> list[Claim]:
    """What a delta says of the target, clause by clause; the longest name wins ("casual shoes" is an article)."""
    found = []
    text = text.lower().replace("\u2019", "'").replace(".", " ")
    for clause in re.split(_BETWEEN, text)[::2]:
        clause = " ".join(_REST.sub("", clause).split())
        if not clause:
            continue
        named = list(_NAME.finditer(clause))
        for match in named:
            denied = bool(re.search(r"\b(less|not|no longer)( a| an| as| so)?$", clause[: match.start()].rstrip()))
            found.append(Claim(*_NAMES[match[1]], denied))
        if not named:
            found.append(Claim("?", clause))
    return found


RELATIVE = ("darker", "lighter", "longer", "shorter")  # values that speak of a change alone


def verdict(claim: Claim, one: dict[str, str], other: dict[str, str]) -> bool | None:
    """Whether a claim is a true change, named with the right value; None where the catalogue does not know."""
    key, value = claim.attribute, claim.value
    if key == "?":
        return False
    if key not in other:
        return None
    old, new = one.get(key), other[key]
    if value in ("darker", "lighter"):
        if old is None or "multicolored" in (old, new):
            return None
        return (tone(new) < tone(old)) if value == "darker" else (tone(new) > tone(old))
    if value in ("longer", "shorter"):
        if old is None:
            return None
        rise = VALUES[key].index(new) - VALUES[key].index(old)
        return rise > 0 if value == "longer" else rise < 0
    meant = [article for article in VALUES["article"] if "shoes" in article] if value == "shoes" else [value]
    if claim.denied:
        return None if old is None else old in meant and new not in meant
    if new not in meant:
        return False
    return None if old is None else old not in meant


def verdicts(text: str, one: dict[str, str], other: dict[str, str]) -> dict[Claim, bool | None]:
    """Each claim of a delta and its verdict. The article that both show is only the thing spoken of, and what is said
    twice is one claim."""
    found = {}
    both = one["article"] == other["article"] and one["article"]
    spoken_of = {both, "shoes" if both and "shoes" in both else both}
    for claim in claims(text):
        if claim.attribute == "article" and claim.value in spoken_of and not claim.denied:
            continue
        found[claim] = verdict(claim, one, other)
    return found


def judged(text: str, one: dict[str, str], other: dict[str, str]) -> list[tuple[str, bool | None]]:
    """The attribute of each claim, and its verdict."""
    return [(claim.attribute, good) for claim, good in verdicts(text, one, other).items()]


def marks(text: str, one: dict[str, str], other: dict[str, str]) -> list[tuple[str, bool | None]]:
    """The text clause by clause, each with its verdict: wrong where any claim is, right where one is and none wrong."""
    pieces = []
    for place, piece in enumerate(re.split(_BETWEEN, text, flags=re.IGNORECASE)):
        found = list(verdicts(piece, one, other).values()) if place % 2 == 0 else []
        if piece.strip():
            pieces.append((piece.strip(), False if False in found else True if True in found else None))
    return pieces


# ---- what else is a right answer ----
def wished(text: str, one: dict[str, str], other: dict[str, str]):
    """A test for the gallery: whether a product is of the target's article and has all that the text asks for of it.

    Which is CIRCO's way: a shop has many right answers, and the benchmark's one target is among them."""
    asked = [claim for claim in claims(text) if claim.attribute not in ("?", "article")]

    def right(product: dict[str, str]) -> bool:
        same = product["article"] == other["article"]
        return same and all(verdict(claim, one, product) is True for claim in asked)

    return right
