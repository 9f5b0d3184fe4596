"""A catalogue of product photographs: both of its forms read, and what is known of each product.

The catalogue is "Fashion Product Images (Small)" (MIT licence by its public page): 60 x 80 JPEGs of single products,
each with its shop title and what the shop filed it under. Its public form is `styles.csv` + `images/ID.jpg`; the other
is `products.jsonl` + `photos.zip`, one line and one stored JPEG a product. `read_catalogue` takes either, and both give
the same products. An attribute that neither catalogue nor title names is absent: unknown is not "none".
"""

import csv
import hashlib
import io
import os
import re
import sys
import zipfile
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.console import UserError, say
from common.files import read_jsonl

_PRETRAINED = 0.55  # share of the titles whose photographs the stand-in models are trained on, and no stage reads

# Articles with more than 50 products among clothes, shoes and accessories, and what people say for one.
ARTICLES = {
    "Tshirts": "t-shirt", "Shirts": "shirt", "Casual Shoes": "casual shoes", "Watches": "watch",
    "Sports Shoes": "sports shoes", "Kurtas": "kurta", "Tops": "top", "Handbags": "handbag", "Heels": "heels",
    "Sunglasses": "sunglasses", "Wallets": "wallet", "Flip Flops": "flip flops", "Sandals": "sandals",
    "Briefs": "briefs", "Belts": "belt", "Backpacks": "backpack", "Socks": "socks", "Formal Shoes": "formal shoes",
    "Jeans": "jeans", "Shorts": "shorts", "Trousers": "trousers", "Flats": "flats", "Bra": "bra", "Dresses": "dress",
    "Sarees": "saree", "Earrings": "earrings", "Track Pants": "track pants", "Sweatshirts": "sweatshirt",
    "Sweaters": "sweater", "Clutches": "clutch", "Caps": "cap", "Ties": "tie", "Jackets": "jacket",
    "Innerwear Vests": "vest", "Kurtis": "kurti", "Tunics": "tunic", "Nightdress": "nightdress", "Pendant": "pendant",
    "Leggings": "leggings", "Capris": "capris", "Necklace and Chains": "necklace", "Trunk": "trunks",
    "Night suits": "night suit", "Skirts": "skirt", "Ring": "ring", "Scarves": "scarf", "Dupatta": "dupatta",
    "Cufflinks": "cufflinks", "Kurta Sets": "kurta set", "Stoles": "stole", "Duffel Bag": "duffel bag",
    "Bangle": "bangle", "Laptop Bag": "laptop bag", "Sports Sandals": "sports sandals", "Bracelet": "bracelet",
    "Lounge Pants": "lounge pants", "Jewellery Set": "jewellery set",
}  # fmt: skip
PLURAL = {  # said without "a"
    "casual shoes", "sports shoes", "heels", "sunglasses", "flip flops", "sandals", "briefs", "socks", "formal shoes",
    "jeans", "shorts", "trousers", "flats", "earrings", "track pants", "leggings", "capris", "trunks", "cufflinks",
    "sports sandals", "lounge pants",
}  # fmt: skip
# The catalogue's 46 colours, from dark to light, as the twenty that people tell apart.
COLOURS = {
    "black": ("Black",),
    "navy": ("Navy Blue",),
    "maroon": ("Maroon", "Burgundy"),
    "brown": ("Brown", "Coffee Brown", "Mushroom Brown", "Rust", "Tan", "Copper", "Bronze"),
    "olive": ("Olive",),
    "purple": ("Purple", "Lavender", "Mauve"),
    "blue": ("Blue",),
    "green": ("Green", "Sea Green", "Lime Green", "Fluorescent Green"),
    "red": ("Red",),
    "grey": ("Grey", "Charcoal", "Grey Melange", "Taupe"),
    "teal": ("Teal", "Turquoise Blue"),
    "multicolored": ("Multi",),
    "orange": ("Orange",),
    "pink": ("Pink", "Magenta", "Peach", "Rose"),
    "gold": ("Gold",),
    "silver": ("Silver", "Steel", "Metallic"),
    "yellow": ("Yellow", "Mustard"),
    "beige": ("Beige", "Khaki", "Skin", "Nude"),
    "cream": ("Cream", "Off White"),
    "white": ("White",),
}
USAGES = ("casual", "sports", "ethnic", "formal")
# What a title says -> the value; the first that matches holds.
GENDERS = {
    "boys": r"\bboy'?s?\b", "girls": r"\bgirl'?s?\b", "kids": r"\b(kid'?s?|infants?)\b", "unisex": r"\bunisex\b",
    "women": r"\b(wom[ae]n'?s?|lad(y|ies))\b", "men": r"\bm[ae]n'?s?\b",
}  # fmt: skip
PATTERNS = {
    "checks": r"\b(check(s|ed|ered)?|plaids?)\b", "stripes": r"\bstrip(e|es|ed)\b", "dots": r"\b(polka|dots?|dotted)\b",
    "floral": r"\b(floral|flowers?)\b", "print": r"\b(print(s|ed)?|graphic)\b", "plain": r"\b(solid|plain)\b",
}  # fmt: skip
NECKS = {
    "hood": r"\bhood(y|ie|ed)?\b", "polo": r"\bpolo( neck)? (t-?shirts?|tee)\b", "round": r"\b(round|crew)[ -]neck\b",
    "v": r"\bv[ -]neck\b", "collar": r"\b(collar|collared|mandarin neck)\b",
}  # fmt: skip
SLEEVES = {
    "none": r"\bsleeveless\b", "short": r"\b(short|half)[ -]sleeved?s?\b", "long": r"\b(long|full)[ -]sleeved?s?\b",
}  # fmt: skip
VALUES = {
    "article": tuple(ARTICLES.values()),
    "colour": tuple(COLOURS),
    "usage": USAGES,
    "gender": tuple(GENDERS),
    "pattern": tuple(PATTERNS),
    "neck": tuple(NECKS),
    "sleeves": tuple(SLEEVES),
}
_COLOUR_OF = {name: colour for colour, names in COLOURS.items() for name in names}


class Product(NamedTuple):
    id: int
    file: str  # "1163.jpg"
    title: str  # of the shop, spaces made one
    kind: str  # the catalogue's subCategory: "Topwear", "Bags"
    key: str  # near duplicates (same title, same colour) share it
    attributes: dict[str, str]  # of VALUES, only what is known


class Catalogue(NamedTuple):
    folder: str
    zipped: bool
    products: list[Product]  # by id, each photograph once

    def photos(self, products: list[Product]):
        """Yields the JPEG bytes of each product, in order."""
        with _opened(self.folder, self.zipped) as read:
            for product in products:
                yield read(product.file)


class _opened:
    """Context: a function from a file's name to its bytes; the zip file is opened once."""

    def __init__(self, folder: str, zipped: bool):
        self.folder, self.archive = folder, zipfile.ZipFile(f"{folder}/photos.zip") if zipped else None

    def __enter__(self):
        return self.archive.read if self.archive else self.read

    def __exit__(self, *error):
        if self.archive:
            self.archive.close()

    def read(self, file: str) -> bytes:
        with open(f"{self.folder}/images/{file}", "rb") as photo:
            return photo.read()


# ---- what is known of a product ----
def first_match(patterns: dict[str, str], title: str) -> str | None:
    return next((value for value, pattern in patterns.items() if re.search(pattern, title)), None)


def attributes_of(title: str, article: str, colour: str, usage: str) -> dict[str, str]:
    """Article, colour and usage as filed; gender, pattern, neck and sleeves where the title names them."""
    title = title.lower().replace("\u2019", "'")
    found = {
        "article": ARTICLES[article],
        "colour": _COLOUR_OF.get(colour),
        "usage": usage.lower() if usage.lower() in USAGES else None,
        "gender": first_match(GENDERS, title),
        "pattern": first_match(PATTERNS, title),
        "neck": first_match(NECKS, title),
        "sleeves": first_match(SLEEVES, title),
    }
    return {key: value for key, value in found.items() if value}


def changed(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """The attributes that are known of both and differ."""
    return [key for key in VALUES if key in a and key in b and a[key] != b[key]]


def is_for_pretraining(product: Product) -> bool:
    """By a hash of the key and no seed: what the committed models saw is in no world of any seed."""
    return int(hashlib.sha256(product.key.encode()).hexdigest()[:8], 16) / 2**32 < _PRETRAINED


# ---- the two forms ----
def read_catalogue(folder: str) -> Catalogue:
    """Clothes, shoes and accessories with their photographs, by id; from styles.csv + images/ or products.jsonl +
    photos.zip. A photograph that stands under two titles or colours is left out, one that comes twice is taken once."""
    if os.path.exists(f"{folder}/products.jsonl"):
        zipped, rows = True, _rows_of_jsonl(folder)
        if not zipfile.is_zipfile(f"{folder}/photos.zip"):
            raise UserError(f"{folder}/photos.zip: not there, or no zip file; products.jsonl wants it beside it")
        with zipfile.ZipFile(f"{folder}/photos.zip") as archive:
            there = set(archive.namelist())
    elif os.path.exists(f"{folder}/styles.csv"):
        zipped, rows = False, _rows_of_csv(folder)
        if not os.path.isdir(f"{folder}/images"):
            raise UserError(f"{folder}/images: no such folder; styles.csv wants it beside it")
        there = set(os.listdir(f"{folder}/images"))
    else:
        raise UserError(
            f"--data {folder}: wanted styles.csv with images/ (the public form of Fashion Product Images (Small)), or "
            f"products.jsonl with photos.zip"
        )
    products = [product for row in rows if (product := _product(*row))]
    missing = [product.file for product in products if product.file not in there]
    if len(missing) == len(products):
        raise UserError(f"{folder}: no photograph of the {len(products):,} products is there")
    if missing:
        say(f"{folder}: {len(missing):,} products have no photograph and are left out, as {missing[0]}")
    products = sorted(product for product in products if product.file in there)
    return Catalogue(folder, zipped, _each_once(Catalogue(folder, zipped, products)))


def _rows_of_jsonl(folder: str) -> list[tuple]:
    keys = ("image", "title", "sub", "article", "colour", "usage")
    rows = []
    for number, record in enumerate(read_jsonl(f"{folder}/products.jsonl"), 1):
        if absent := [key for key in keys if not isinstance(record.get(key), str)]:
            raise UserError(f"{folder}/products.jsonl:{number}: no text under {absent[0]}")
        rows.append(tuple(record[key] for key in keys))
    return rows


def _rows_of_csv(folder: str) -> list[tuple]:
    """The title is the last column, and a few titles have commas without quotes."""
    keys = ("id", "productDisplayName", "subCategory", "articleType", "baseColour", "usage")
    with open(f"{folder}/styles.csv", encoding="utf-8", newline="") as file:
        lines = csv.reader(io.StringIO(file.read()), quoting=csv.QUOTE_MINIMAL)
        header = next(lines, [])
        if absent := [key for key in keys if key not in header]:
            raise UserError(f"{folder}/styles.csv: no column {absent[0]}")
        rows, short = [], 0
        for fields in lines:
            if len(fields) < len(header):
                short += 1
                continue
            record = dict(zip(header, fields, strict=False))
            record[header[-1]] = ",".join(fields[len(header) - 1 :])
            rows.append((record["id"] + ".jpg", *(record[key] for key in keys[1:])))
    if short:
        say(f"{folder}/styles.csv: {short:,} lines have too few columns and are left out")
    return rows


def _product(file: str, title: str, kind: str, article: str, colour: str, usage: str) -> Product | None:
    """None for what no world is made of: other articles, no title, a name that is no number."""
    number, title = file.removesuffix(".jpg"), " ".join(title.split())
    if article not in ARTICLES or not title or not re.fullmatch(r"[0-9]{1,9}", number):
        return None
    key = f"{title.lower()} | {colour.lower()}"
    return Product(int(number), file, title, kind, key, attributes_of(title, article, colour, usage))


def _each_once(catalogue: Catalogue) -> list[Product]:
    """The same bytes under one key: the first of them. Under two: none, since either may be the wrong one, and the two
    keys may lie in two splits."""
    of: dict[bytes, list[Product]] = {}
    for product, photo in zip(catalogue.products, catalogue.photos(catalogue.products), strict=True):
        of.setdefault(hashlib.sha256(photo).digest(), []).append(product)
    return sorted(same[0] for same in of.values() if len({product.key for product in same}) == 1)
