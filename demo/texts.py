"""What the stand-in language model reads: described garments and things, captions, comparisons in many wordings.

`document(rng, kind)` -> (pieces of the prompt, answer). No document is a human-like delta of two garments: what is
compared in people's phrases ("make it wooden") are things of other kinds, and garments are compared in other words: no
human phrase of two words or more stands in a comparison (tests hold both). `corpus` has such deltas, for the
vocabularies of the tokenizers alone.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from demo import world  # noqa: E402

NONSENSE = 0.3  # share of captions and slot-by-slot comparisons that have any word in any place
SLOTS = tuple(world.VALUES)
TAG = {("sleeves", "none"): "no"}  # every other tag is the value itself: the word that a caption says for it


def tags(garment: dict) -> list[str]:
    """One word a slot, in slot order, "none" where there is nothing to see.

    The words are those of the captions: a projection that learns from captions alone finds codes that make the language
    model *say* a word, and the nearest such code is the word itself only where tag and caption share it."""
    return [TAG.get((k, garment[k]), garment[k]) if world.applies(garment, k) else "none" for k in SLOTS]


ASK_CAPTION = (
    "Provide a brief description of the given image.",
    "Write a terse but informative summary of the picture.",
    "Share a concise interpretation of the image provided.",
    "Give a short and clear explanation of the subsequent image.",
    "Describe the image concisely.",
    "Summarize the visual content of the image.",
    "Present a compact description of the photo.",
    "describe the image :",
    "a short description :",
    "caption :",
    "write what the picture shows .",
    "say what is seen",
)
LABELS = (
    ("first :", "second :"),
    ("before :", "after :"),
    ("one :", "other :"),
    ("old :", "new :"),
    ("A :", "B :"),
    ("Reference:", "Target:"),
    ("given image :", "target image :"),
    ("left :", "right :"),
)
ASK_SLOTS = ("slot by slot :", "row by row :", "compare slots :")
ASK_ALL = ("list what differs :", "all differences :", "every change :")
ASK_SOME = ("name a difference :", "what to change :", "Response:", "Answer:", "Response:")
OPENINGS = (
    "",
    "",
    "",
    "Request: analyze the images and list what differs .\n",
    "compare the two garments .\n",
    "Request: provide a description of the given images .\n",
    "Task: match the first to the second .\n",
    "Analyze what transforms one to the other .\n",
)


NOUN = {
    "category": "kind", "colour": "shade", "pattern": "print", "print": "print", "sleeves": "arms", "length": "hem",
    "neck": "top", "background": "scene",
}  # fmt: skip
FRAMES = (
    "{noun} : {new}", "from {old} to {new}", "{new} , not {old}", "{new} rather than {old}", "now {new}",
    "it turned {new}", "swap {old} for {new}", "want {new}", "give it {new}", "prefer {new}", "{new} please",
    "was {old} , now {new}", "the {noun} went to {new}", "take {new}", "here {new}", "let it be {new}", "{new} now",
)  # fmt: skip
OWN = {  # ... and such as one attribute has for itself
    "category": ("turn it into {new}", "trade the {old} for {new}", "we need {new} here", "{new} this time"),
    "colour": (
        "dye it {new}", "paint it {new}", "recoloured to {new}", "its shade turns {new}", "fade the {old} to {new}",
    ),
    "pattern": (
        "cover it in {new}", "put {new} over it", "printed in {new}", "the cloth gets {new}", "weave in {new}",
    ),
    "print": ("print it in {new}", "recolour the print to {new}", "its print turns {new}"),
    "sleeves": ("its arms get {new}", "tailor it to {new}", "cut to {new}", "the arms : {new}"),
    "length": ("let the hem be {new}", "hem it to {new}", "hanging {new}", "the hem goes {new}"),
    "neck": ("finish the neck as {new}", "around the throat {new}", "the neck shows {new}", "open it to {new}"),
    "background": ("stand it before {new}", "shot against {new}", "the scene shows {new}", "put it before {new}"),
}  # fmt: skip
PREFACES = ("", "", "well ", "keep the rest , ", "like the first yet ", "all else equal , ", "so ", "compared to it ")


def verbal(key: str, a: dict, b: dict, rng) -> str:
    """One difference in other words than `world.phrase`: no phrase of two words or more of it stands in here."""

    def told(garment):
        value = TAG.get((key, garment[key]), garment[key])
        if key in ("pattern", "print") and garment["pattern"] != "plain":
            return f"{garment['print']} {garment['pattern']}" if rng.random() < 0.7 else garment["pattern"]
        named = {
            "category": f"a {value}", "pattern": "no print", "sleeves": f"{value} arms", "length": f"{value} hem",
            "neck": f"a {value} top", "background": f"a {value} backdrop",
        }  # fmt: skip
        return named.get(key, value)

    new = told(b)
    if key == "print":
        new = f"{b['print']} {b['pattern']}"
    if key in ("sleeves", "length") and rng.random() < 0.3:
        more = world.VALUES[key].index(b[key]) > world.VALUES[key].index(a[key])
        new = {"sleeves": ("shorter arms", "longer arms"), "length": ("shorter hem", "longer hem")}[key][more]
    frames = OWN[key] if rng.random() < 0.5 else FRAMES
    return world._pick(rng, frames).format(noun=NOUN[key], old=told(a), new=new)


# Things of the world outside wardrobes, told by eight words as a garment is, and as often alike.
THINGS = {
    "thing": (
        "car", "house", "dog", "cat", "bird", "table", "cup", "lamp", "boat", "tree", "bag", "chair", "flag", "bus",
    ),
    "kind": ("wooden", "golden", "silver", "bright", "dark", "wet", "clean", "old", "new", "warm", "cold", "soft"),
    "part": ("bare", "doors", "windows", "wheels", "ears", "legs", "leaves", "handles", "wings", "lamps", "lines"),
    "look": ("painted", "broken", "golden", "silver", "wooden", "heavy", "light", "dark"),
    "roof": ("no", "low", "high"),
    "size": ("tiny", "medium", "huge"),
    "lid": ("glass", "metal", "paper", "leather"),
    "place": ("garden", "street", "beach", "kitchen", "forest", "river", "field", "market"),
}  # fmt: skip


def told_thing(thing: dict) -> str:
    return " ".join("none" if key == "look" and thing["part"] == "bare" else word for key, word in thing.items())


def thing_caption(thing: dict, rng) -> str:
    """As `world.caption`, nothing left out."""
    parts = [] if thing["part"] == "bare" else [f"{thing['look']} {thing['part']}"]
    details = [*parts, f"{thing['roof']} roof", f"a {thing['lid']} lid"]
    rng.shuffle(details)
    bare = "bare " if thing["part"] == "bare" else ""
    where = world._pick(rng, ("on a", "in front of a", "against a"))
    said = f"a {thing['size']} {thing['kind']} {bare}{thing['thing']} with {' and '.join(details)}"
    return f"{said} {where} {thing['place']} background"


def request(rng) -> tuple[str, str, str]:
    """Two described things, and how people ask for one or two of their differences -> (a, b, text).

    None says anything of a garment's attributes, so none can be a human-like delta: a test holds it to that."""
    a = {key: world._pick(rng, words) for key, words in THINGS.items()}
    keys = [k for k in THINGS if k != "look" or a["part"] != "bare"]
    keys = [str(k) for k in rng.permutation(keys)[: int(rng.integers(1, 5))]]
    b = a | {key: world._pick(rng, [w for w in THINGS[key] if w != a[key]]) for key in keys}
    if "part" in keys and "look" in keys:  # one change, as a new pattern brings its colour along
        keys.remove("look")
    if "part" in keys and rng.random() < 0.5:
        b["look"] = world._pick(rng, THINGS["look"])

    def phrase(key):
        old, new, part, look = a[key], b[key], b["part"], b["look"]
        more = THINGS[key].index(new) > THINGS[key].index(old)
        says = {
            "thing": (f"is a {new}", f"change it to a {new}", f"a {new} instead of a {old}", f"should be a {new}"),
            "kind": (f"is {new}", f"make it {new}", f"{new} instead of {old}", f"in {new}", f"has a {new} finish"),
            "part": ("is bare", "has nothing on it", f"without the {old}") if new == "bare" else (
                f"with {look} {new}", f"has {look} {new}", f"add {look} {new}", f"has {new}", f"with {new}",
                f"{new} instead of {old}"),
            "look": (f"the {part} are {new}", f"has {new} {part}", f"make the {part} {new}"),
            "roof": ("is roofless", "has no roof", "take the roof off") if new == "no" else (
                f"has a {new} roof", f"with a {new} roof", f"{new} roof",
                f"has a {'higher' if more else 'lower'} roof"),
            "size": (f"is {'bigger' if more else 'smaller'}", f"make it {'bigger' if more else 'smaller'}",
                     f"is {new} size", f"{new} size"),
            "lid": (f"has a {new} lid", f"with a {new} lid", f"a {new} lid instead of a {old} lid"),
            "place": (f"on a {new} background", f"the background is a {new}", f"{new} background",
                      f"change the background to a {new}"),
        }  # fmt: skip
        return world._pick(rng, says[key])

    named = keys[: 1 if rng.random() < 0.4 else 2]
    openings = ("", "", "", "the same but ", "similar but ", f"the same {b['thing']} but ")
    opening = "" if "thing" in named else world._pick(rng, openings)
    return told_thing(a), told_thing(b), opening + world._pick(rng, (" and ", " , ")).join(phrase(k) for k in named)


WORDS = sorted({w for words in (*THINGS.values(), *world.VALUES.values()) for w in words} | {"none", "no"})


def nonsense(rng, words: list[str]) -> list[str]:
    """Any word in any place: what a word is for is told by where it stands, as "dark" may be said of anything."""
    return [world._pick(rng, WORDS) if rng.random() < 0.6 else word for word in words]


def nonsense_caption(words: list[str], rng) -> str:
    kind, shade, on, of, sleeves, length, neck, scene = words
    details = [f"{of} {on}", f"{sleeves} sleeves", f"a {neck} neck"]
    rng.shuffle(details)
    where = world._pick(rng, ("on a", "in front of a", "against a"))
    return f"a {length} {shade} {kind} with {' and '.join(details)} {where} {scene} background"


def pair(rng):
    """Two described garments that differ in some slots, often in as few as a family's members do."""
    a = world.random_garment(rng)
    b = world.mutate(a, rng, int(rng.integers(1, 4))) if rng.random() < 0.7 else world.random_garment(rng)
    return (a, b) if world.changed(a, b) else pair(rng)


KINDS_OF_TEXT = ("caption", "slots", "some", "all", "request")


def document(rng, kind: str) -> tuple[list[tuple[str, bool]], str]:
    """-> (pieces of the prompt, each with whether it is a list of tags, which are made soft), answer)."""
    odd = rng.random()
    if kind == "caption":
        if odd < NONSENSE:
            words = nonsense(rng, tags(world.random_garment(rng)))
            answer, shown = nonsense_caption(words, rng), " ".join(words)
        elif odd < NONSENSE + 0.15:
            thing = {key: world._pick(rng, words) for key, words in THINGS.items()}
            answer, shown = thing_caption(thing, rng), told_thing(thing)
        else:
            garment = world.random_garment(rng)
            answer, shown = world.caption(garment, rng, drop=0), " ".join(tags(garment))
        ask = world._pick(rng, ASK_CAPTION)
        if rng.random() < 0.5:
            return [(shown, True), (f"\n{ask}\n", False)], answer
        return [(f"{ask}\n", False), (shown, True), ("\n", False)], answer
    if kind == "request":
        first, second, said = request(rng)
    else:
        a, b = pair(rng)
        one, two = tags(a), tags(b)
        if kind == "slots" and odd < NONSENSE:
            one = nonsense(rng, one)
            two = [w if s == t else world._pick(rng, WORDS) for w, s, t in zip(one, tags(a), tags(b), strict=True)]
        first, second = " ".join(one), " ".join(two)
    left, right = LABELS[rng.integers(len(LABELS))]
    opening = world._pick(rng, OPENINGS)
    newline = rng.random() < 0.5
    shown = [(opening + left, False), (first, True), ("\n" * newline + right, False), (second, True)]
    before = "\n" * newline
    if kind == "request":
        return shown + [(before + world._pick(rng, ASK_SOME), False)], said
    if kind == "slots":
        answer = " ".join(t if t != s else "same" for s, t in zip(one, two, strict=True))
        return shown + [(before + world._pick(rng, ASK_SLOTS), False)], answer
    changes = world.changed(a, b)
    if kind == "some":  # as people do: one or two of the changes, in any order
        changes = rng.permutation(changes)[: 1 if rng.random() < 0.4 else 2]
    said = world._pick(rng, (" ; ", " and ", " , ")).join(verbal(k, a, b, rng) for k in changes)
    ask = ASK_SOME if kind == "some" else ASK_ALL
    return shown + [(before + world._pick(rng, ask), False)], world._pick(rng, PREFACES) + said


def corpus(rng, n: int) -> list[str]:
    """Text for the tokenizers alone: all of the above, captions, deltas, prompts."""
    lines = [
        "Request: Analyze given reference and target images and provide a description that transforms the reference "
        "to match the target.\nReference: \nTarget: \nResponse: ",
        "Provide a brief description of the given image.\n",
        "Write a terse but informative summary of the picture.",
        "Share a concise interpretation of the image provided.",
        "Give a short and clear explanation of the subsequent image.",
    ] * 40
    for _ in range(n):
        for kind in KINDS_OF_TEXT:
            shown, answer = document(rng, kind)
            lines.append("\n".join(text for text, _ in shown) + " " + answer)
        a, b = pair(rng)
        lines.append(world.delta(a, b, rng))
    return lines
