"""The world of product photographs: both forms of the catalogue, disjoint parts, the layouts, texts and verdicts."""

import csv
import hashlib
import io
import json
import re
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_demo import finished_demo

from common import pages
from common.annotations import FASHIONIQ_CATEGORIES, read_chat, read_cirr, read_fashioniq, training_triplets
from common.console import UserError
from common.files import write_jsonl
from common.images import Preprocess
from demo import catalogue, ceiling, photo_models, products, report, wordings

SIZES = catalogue.Sizes(train=20, dev=2, val=4, test=1, queries=4, chat=12, entries=0.5, aux=30, fashioniq=1)
KINDS = {  # article -> the kind it is filed under
    "Tshirts": "Topwear", "Shirts": "Topwear", "Kurtas": "Topwear", "Tops": "Topwear", "Dresses": "Dress",
    "Casual Shoes": "Shoes", "Formal Shoes": "Shoes", "Handbags": "Bags", "Perfume and Body Mist": "Fragrance",
}  # fmt: skip
_DATA = ROOT.parent / "shared" / "data"


def jpeg(rng) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (80, 60, 3), np.uint8)).save(file, "JPEG", quality=50)
    return file.getvalue()


def rows() -> list[dict]:
    """900 made-up products; every tenth stands under another's title and colour."""
    rng, found = np.random.default_rng(0), []
    for number in range(900):
        article = str(rng.choice(list(KINDS)))
        colour = str(rng.choice(["Black", "Navy Blue", "White", "Red", "Grey Melange", "No Such"]))
        who, look = rng.choice(["Men", "Women's", "Boys", ""]), rng.choice(["Printed", "Striped", "Solid", "Check", ""])
        title = f"Maker{number} {who}  {look} {colour} {article}, {rng.choice(['Round Neck', 'Sleeveless', 'with'])}"
        row = {"title": title, "sub": KINDS[article], "article": article, "colour": colour}
        row |= {"image": f"{1000 + number}.jpg", "usage": str(rng.choice(["Casual", "Sports", "NA"]))}
        if number % 10 == 9:
            row |= {key: found[-1][key] for key in ("title", "sub", "article", "colour")}
        found.append(row)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same catalogue in its two forms."""
    root, rng, made = tmp_path_factory.mktemp("catalogue"), np.random.default_rng(1), rows()
    photos = {row["image"]: jpeg(rng) for row in made}
    photos[made[5]["image"]] = photos[made[6]["image"]]  # one photograph under two titles
    photos[made[9]["image"]] = photos[made[8]["image"]]  # ... and twice under one
    zipped, public = root / "zipped", root / "public"
    write_jsonl(zipped / "products.jsonl", made)
    with zipfile.ZipFile(zipped / "photos.zip", "w") as archive:
        for name, photo in photos.items():
            archive.writestr(name, photo)
    (public / "images").mkdir(parents=True)
    for name, photo in photos.items():
        (public / "images" / name).write_bytes(photo)
    with open(public / "styles.csv", "w", newline="") as file:
        columns = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
        file.write(columns + "\r\n")
        for row in made:  # the title's comma unquoted, as in the public file
            fields = [row["image"][:-4], "Men", "Apparel", row["sub"], row["article"], row["colour"], "Fall", "2011"]
            file.write(",".join([*fields, row["usage"], row["title"]]) + "\r\n")
        file.write("7,Men,Apparel\r\n")  # cut short: left out
    return {"zipped": zipped, "public": public}


@pytest.fixture(scope="module")
def small(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("photos")
    catalogue.write_world(str(folders["zipped"]), str(out), 3, SIZES)
    return out


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def part_of(name: str) -> str:
    """The part that a name tells: its split or layout."""
    return re.match(r"train|dev|val|test1|chat|aux|[DST][TV]", name)[0]


# ---- the world ----
def test_both_forms_give_the_same_products_and_bytes(folders, small, tmp_path):
    one, two = (products.read_catalogue(str(folders[form])) for form in ("zipped", "public"))
    assert one.products == two.products and (one.zipped, two.zipped) == (True, False)
    catalogue.write_world(str(folders["public"]), str(tmp_path / "again"), 3, SIZES)
    assert digest(tmp_path / "again") == digest(small)


def test_another_seed_is_another_world(folders, small, tmp_path):
    catalogue.write_world(str(folders["zipped"]), str(tmp_path / "other"), 4, SIZES)
    one, two = (json.loads((out / "products.json").read_text()) for out in (small, tmp_path / "other"))
    assert one.keys() == two.keys() and one != two


def test_a_photograph_under_two_titles_is_left_out_and_a_double_taken_once(folders):
    found = {product.id for product in products.read_catalogue(str(folders["zipped"])).products}
    made = rows()
    usable = {int(row["image"][:-4]) for row in made if row["article"] in products.ARTICLES}
    assert usable - found == usable & {1005, 1006, 1009} and {1005, 1009} & usable and not found - usable


def test_parts_share_no_product_and_no_near_duplicate(folders, small):
    """By the rows themselves, not by the product's own key."""
    made = {int(row["image"][:-4]): row for row in rows()}
    shown = json.loads((small / "products.json").read_text())
    assert len(shown) == 6 * (3 + 2 + 4 + 1) + 12 + 30 + 6 * 6
    ids = [entry["id"] for entry in shown.values()]
    assert len(set(ids)) == len(ids)
    parts: dict[tuple, set] = {}
    for name, entry in shown.items():
        row = made[entry["id"]]
        parts.setdefault((row["title"], row["colour"]), set()).add(part_of(name))
    assert all(len(found) == 1 for found in parts.values())
    # what the committed models may see lies in no world, whatever the seed
    trained = {p.id for p in products.read_catalogue(str(folders["zipped"])).products if products.is_for_pretraining(p)}
    assert 0.4 < len(trained) / len(made) < 0.7 and not trained & set(ids)
    assert not {made[i]["title"] for i in trained} & {made[i]["title"] for i in ids}


def test_photographs_are_the_catalogues_own(folders, small):
    shown = json.loads((small / "products.json").read_text())
    for name, entry in shown.items():
        file = next(small.rglob(name if name.endswith(".jpg") else f"{name}.jpg"))
        assert file.read_bytes() == (folders["public"] / "images" / f"{entry['id']}.jpg").read_bytes()


def test_layouts_read_like_the_real_ones(small):
    attributes = json.loads((small / "attributes.json").read_text())
    val = read_cirr(str(small / "cirr"), "val")
    assert len(val.queries) == 16 and len(val.gallery) == 24 and not val.images.missing(val.gallery)
    ranks = {(q.members.index(q.reference), q.members.index(q.target)) for q in val.queries}
    assert ranks <= set(catalogue.RING)
    assert all(q.target is None for q in read_cirr(str(small / "cirr"), "test1").queries)
    triplets, images = training_triplets("cirr", str(small / "cirr"), "train")
    assert len(triplets) == 20 and not images.missing([t.target for t in triplets])
    for category in FASHIONIQ_CATEGORIES:
        benchmark = read_fashioniq(str(small / "fashioniq"), "val", category)
        assert len(benchmark.gallery) == 6 and not benchmark.images.missing(benchmark.gallery)
        articles = {attributes[name]["article"] for name in benchmark.gallery}
        assert articles <= set(catalogue.FASHIONIQ_ARTICLES[category])
    captions = read_chat(str(small / "chat" / "chat.json"))
    assert len(captions) == 12 and {c.image_first for c in captions} == {True, False}
    titles = {" ".join(row["title"].split()) for row in rows()}
    attributes = json.loads((small / "attributes.json").read_text())
    entries = {wordings.entry(known) for name, known in attributes.items() if name.startswith("chat_")}
    assert {caption.text in titles for caption in captions} == {True, False}
    assert all((caption.text in titles) != (caption.text in entries) for caption in captions)
    pairids = [record["pairid"] for split in ("train", "dev", "val", "test1") for record in captions_of(small, split)]
    assert len(set(pairids)) == len(pairids)


def captions_of(out: Path, split: str) -> list[dict]:
    return json.loads((out / f"cirr/captions/cap.rc2.{split}.json").read_text())


def test_members_of_a_set_are_alike_and_every_text_is_true(small):
    attributes = json.loads((small / "attributes.json").read_text())
    kinds = {products.ARTICLES[article]: kind for article, kind in KINDS.items() if article in products.ARTICLES}
    for split in ("train", "dev", "val"):
        for record in captions_of(small, split):
            members = [attributes[name] for name in record["img_set"]["members"]]
            assert len({kinds[member["article"]] for member in members}) == 1
            one, other = attributes[record["reference"]], attributes[record["target_hard"]]
            verdicts = wordings.judged(record["caption"], one, other)
            assert verdicts and all(good is True for _, good in verdicts), (record["caption"], one, other)


@pytest.mark.parametrize(
    "sizes, told",
    [
        (SIZES._replace(aux=5000), r"--aux 5000: the catalogue has \d+ products left"),
        (SIZES._replace(val=500), r"--val_groups: 506 sets of six, and \d+ products left"),
        (SIZES._replace(val=24), r"--(train|dev_groups|val_groups): cirr/\w+ has photographs for \d+ sets of six"),
        (SIZES._replace(fashioniq=30), r"--fashioniq: fashioniq/dress/train has photographs for \d+ sets of six"),
    ],
)
def test_too_small_a_catalogue_names_the_flag(folders, tmp_path, sizes, told):
    with pytest.raises(UserError, match=told):
        catalogue.write_world(str(folders["zipped"]), str(tmp_path), 3, sizes)


def test_a_folder_that_is_no_catalogue_is_told(folders, tmp_path):
    with pytest.raises(UserError, match="wanted styles.csv with images/"):
        products.read_catalogue(str(tmp_path))
    write_jsonl(tmp_path / "products.jsonl", rows())
    with pytest.raises(UserError, match="photos.zip: not there"):
        products.read_catalogue(str(tmp_path))
    zipfile.ZipFile(tmp_path / "photos.zip", "w").close()
    with pytest.raises(UserError, match="no photograph of the"):
        products.read_catalogue(str(tmp_path))
    write_jsonl(tmp_path / "products.jsonl", [{"image": "1.jpg"}])
    with pytest.raises(UserError, match=r"products.jsonl:1: no text under title"):
        products.read_catalogue(str(tmp_path))
    (tmp_path / "csv" / "images").mkdir(parents=True)
    with open(tmp_path / "csv" / "styles.csv", "w", newline="") as file:
        csv.writer(file).writerow(["id", "articleType"])
    with pytest.raises(UserError, match="styles.csv: no column productDisplayName"):
        products.read_catalogue(str(tmp_path / "csv"))


# ---- what a title says ----
@pytest.mark.parametrize(
    "title, known",
    [
        ("Puma Men Polo T-shirt", {"gender": "men", "neck": "polo"}),
        ("U.S. Polo Assn. Women Striped Shirt", {"gender": "women", "pattern": "stripes"}),
        ("Gini and Jony Kids Boy\u2019s Printed Tee", {"gender": "boys", "pattern": "print"}),
        ("Stripper Mentor Printer", {}),
        ("Jealous 21 Womens V-Neck Half Sleeve Top", {"gender": "women", "neck": "v", "sleeves": "short"}),
        ("Nike Unisex Sleeveless Hoodie", {"gender": "unisex", "neck": "hood", "sleeves": "none"}),
    ],
)
def test_titles_name_what_the_catalogue_does_not(title, known):
    wanted = {"article": "t-shirt", "colour": "navy", "usage": "casual"} | known
    assert products.attributes_of(title, "Tshirts", "Navy Blue", "Casual") == wanted
    assert products.attributes_of(title, "Tshirts", "No Such", "Smart Casual") == {"article": "t-shirt"} | known


# ---- texts and verdicts ----
def product(rng) -> dict[str, str]:
    """Some attributes of a made-up product."""
    keys = [key for key in products.VALUES if key == "article" or rng.random() < 0.8]
    return {key: str(rng.choice(products.VALUES[key])) for key in keys}


def test_an_entry_says_all_that_is_known_and_nothing_else():
    """Read back by what judges deltas, and two lines as a person would write them."""
    rng = np.random.default_rng(3)
    for _ in range(500):
        values = {key: str(rng.choice(values)) for key, values in products.VALUES.items()}
        known = {k: v for k, v in values.items() if k in ("article", "colour") or rng.random() < 0.5}
        said = [(claim.attribute, claim.value) for claim in wordings.claims(wordings.entry(known)) if not claim.denied]
        assert sorted(said) == sorted(known.items()), wordings.entry(known)
    known = {"article": "t-shirt", "colour": "red", "usage": "sports", "gender": "men", "pattern": "stripes"}
    assert wordings.entry(known | {"neck": "v", "sleeves": "none"}) == (
        "a red striped t-shirt for men, sporty, v-neck, no sleeves"
    )
    assert wordings.entry({"article": "jeans", "colour": "blue", "gender": "unisex"}) == "blue jeans unisex"


def test_human_like_deltas_are_judged_right():
    """Independent truth: a delta is made from the changes, so every claim parsed from it must be true."""
    rng, said = np.random.default_rng(0), set()
    for _ in range(4000):
        one, other = product(rng), product(rng)
        if rng.random() < 0.5:
            other["article"] = one["article"]
        if products.changed(one, other):
            text = wordings.delta(one, other, rng)
            verdicts = wordings.judged(text, one, other)
            assert verdicts and all(good is True for _, good in verdicts), (text, one, other)
            said |= {key for key, _ in verdicts}
    assert said == set(products.VALUES)


def test_the_rule_is_judged_as_its_text_is(small):
    """demo/ceiling.py against the judge of texts, on the sets' own pairs and probabilities drawn at random."""
    attributes = json.loads((small / "attributes.json").read_text())
    records = [record for split in ("train", "val") for record in captions_of(small, split)]
    pairs = [(record["reference"], record["target_hard"]) for record in records]
    draw = torch.Generator().manual_seed(0)
    seen = {key: torch.rand(2, len(values), generator=draw) for key, values in products.VALUES.items() if key != "neck"}
    verdicts, texts = [], []
    for i, (reference, target) in enumerate(pairs):
        for key, p in seen.items():  # now and then what is true is also what is seen
            for row, name in enumerate((reference, target)):
                if i % 2 and key in attributes[name]:
                    p[row] = 0.1
                    p[row, products.VALUES[key].index(attributes[name][key])] = 0.9
        claims = ceiling.named_by_rule(seen, 0, 1, 3, 0.0)
        assert len(claims) <= 3
        both_same = attributes[reference]["article"] == attributes[target]["article"]
        claims = [(k, v) for k, v in claims if not (k == "article" and both_same)]  # a text may speak of the thing
        words = {"sleeves": "has {} sleeves", "usage": "is {}", "pattern": "is {}"}
        said = [words.get(key, "is {}").format("no" if value == "none" else value) for key, value in claims]
        texts.append({"reference": reference, "target": target, "delta": " and ".join(said)})
        verdicts.append(ceiling.judged(claims, attributes[reference], attributes[target]))
    wanted = report.judge(texts, attributes, wordings)
    right, wrong, named, changes = map(sum, zip(*verdicts, strict=True))
    assert right > 5 and wrong > 5 and wanted["claims"] == right + wrong
    assert wanted["precision"] == pytest.approx(100 * right / (right + wrong))
    assert wanted["recall"] == pytest.approx(100 * named / changes)


def test_verdicts():
    one = {"article": "t-shirt", "colour": "white", "usage": "casual", "gender": "men", "sleeves": "short"}
    other = one | {"colour": "navy", "pattern": "stripes", "usage": "sports", "sleeves": "none"}
    for text, wanted in (
        ("is navy", [True]),
        ("is navy blue", [True]),
        ("is blue", [False]),
        ("is a navy t-shirt", [True]),
        ("is a shirt", [False]),
        ("is striped", [None]),  # the first one's pattern is not known: nothing says that it changed
        ("is plain", [False]),  # but the second one is known to be striped
        ("is darker", [True]),
        ("is lighter in color", [False]),
        ("is less casual and more sporty", [True, True]),
        ("is less sporty", [False]),
        ("is not white", [True]),
        ("is red instead of navy", [False]),
        ("is for men", [False]),  # true of the second, and no change
        ("has a v-neck", [None]),
        ("has shorter sleeves", [True]),
        ("has no sleeves", [True]),
        ("has long sleeves, is sleeveless", [False, True]),
        ("is more revealing", [False]),
        ("is navy and is navy", [True]),
        ("has stripes and navy sleeves", [None, True]),
    ):
        assert [good for _, good in wordings.judged(text, one, other)] == wanted, text
    shoes = {"article": "formal shoes", "colour": "black"}
    assert wordings.judged("the shoes are brown", shoes, shoes | {"colour": "brown"}) == [("colour", True)]
    assert wordings.judged("is shoes", one, shoes) == [("article", True)]
    assert wordings.judged("is casual shoes", one, shoes) == [("article", False)]


def test_marks_follow_the_verdicts_clause_by_clause():
    one = {"article": "t-shirt", "colour": "white", "usage": "casual"}
    other = one | {"colour": "navy", "pattern": "stripes"}
    text = "Is navy, is plain and is striped with a red v-neck"
    wanted = [("Is navy", True), (",", None), ("is plain", False), ("and", None), ("is striped", None)]
    assert wordings.marks(text, one, other) == [*wanted, ("with", None), ("a red v-neck", False)]
    shown = pages.marked([("is <navy>", True), ("is plain", False), ("and", None)])
    wanted = '<span class="good">is &lt;navy&gt;</span> <span class="bad">is plain</span> <span>and</span>'
    assert isinstance(shown, pages.Html) and shown == wanted


def test_wished_pictures_have_what_is_asked():
    one = {"article": "t-shirt", "colour": "white", "gender": "men"}
    other = {"article": "shirt", "colour": "navy", "gender": "men"}
    for text, product, wanted in (
        ("is navy", other, True),
        ("is navy", other | {"gender": "women"}, True),  # not asked
        ("is navy", other | {"article": "t-shirt"}, False),
        ("is a shirt", other | {"colour": "red"}, True),
        ("is navy", other | {"colour": "blue"}, False),
        ("is darker", other | {"colour": "black"}, True),
        ("is navy and is for women", other, False),
        ("is navy with a v-neck", other, False),  # not known to have one
    ):
        assert wordings.wished(text, one, other)(product) == wanted, (text, product)


def test_average_precision_is_circos():
    """By its definition, a sum over all K places, in fractions."""
    rng = np.random.default_rng(5)
    names = [str(i) for i in range(30)]
    for _ in range(200):
        top = [str(name) for name in rng.permutation(names)[:10]]
        right = {str(name) for name in rng.permutation(names)[: rng.integers(1, 20)]}
        hits = [name in right for name in top]
        terms = [Fraction(sum(hits[: k + 1]), k + 1) for k in range(10) if hits[k]]
        assert report.average_precision(top, right) == pytest.approx(float(sum(terms) / min(10, len(right))))


def test_report_on_photographs_marks_deltas_and_counts_all_right_answers(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    val = finished_demo(out, small)
    for name, value in (("OUT", str(out)), ("WORLD", str(small)), ("KIND", "photos")):
        monkeypatch.setattr(report, name, value)
    report.main()
    found = json.loads((out / "metrics.json").read_text())
    attributes = json.loads((small / "attributes.json").read_text())
    deltas = found["deltas"]
    assert deltas["VDG, held-out pairs"]["precision"] == 100 and deltas["VDG, auxiliary pairs"]["precision"] < 100
    scores = []
    for (
        query
    ) in val.queries:  # as report.py, by another road: every claim of the text about each picture of the gallery
        top = [query.target] + [name for name in val.gallery if name not in (query.target, query.reference)][:9]
        one, other = attributes[query.reference], attributes[query.target]
        right = []
        for name in set(val.gallery) - {query.reference}:
            verdicts = [good for key, good in wordings.judged(query.delta, one, attributes[name]) if key != "article"]
            if attributes[name]["article"] == other["article"] and all(good is True for good in verdicts):
                right.append(name)
        hits = [name in right for name in top]
        scores.append(sum(sum(hits[: k + 1]) / (k + 1) for k in range(10) if hits[k]) / min(10, len(right)))
    assert found["rows"][0]["mAP@10"] == pytest.approx(100 * np.mean(scores)) and "mAP@10" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert page.count('<span class="good">') >= 8 and '<span class="bad">is red</span>' in page


def test_frames_have_fashioniqs_frequencies():
    """Counted again from its own captions, where they are: each weight is how many of them are the frame."""
    files = sorted((_DATA / "fashioniq" / "captions").glob("cap.*.train.json"))
    if not files:
        pytest.skip(f"no FashionIQ captions in {_DATA}")
    captions = [text for file in files for record in json.loads(file.read_text()) for text in record["captions"]]
    captions = [" ".join(re.sub("[.,]", " ", text.lower()).split()) for text in captions]
    assert len(captions) == 36_000
    nouns = "dress|shirt|top|t-shirt|tshirt|tee|blouse|tank|skirt|jacket|sweater|polo shirt|tank top"
    new = {
        "article": f"an? ({nouns})",
        "colour": "black|white|navy|navy blue|blue|brown|grey|gray|red|green|pink|purple|silver|gold|yellow|beige|"
        "maroon|orange|olive|cream|teal",
        "usage": "casual|formal|sporty|ethnic|dressy",
        "neck": "v-neck|v neck|round neck|crew neck|collar|hood|polo collar",
        "sleeves": "long|short",
    }
    values = {
        "adjective": "checkered|checked|plaid|striped|dotted|floral|printed|plain|solid",
        "thing": "checks|stripes|dots|polka dots|flowers|prints|a print|no pattern|no print",
        "noun": nouns,
    }
    for key, frames in wordings.FRAMES.items():
        for frame, weight in frames.items():
            told = values | {"new": new.get(key, ""), "old": new.get(key, "")}
            pattern = re.escape(frame)
            for slot, words in told.items():
                pattern = pattern.replace(rf"\{{{slot}\}}", f"({words})")
            if key != "gender":  # FashionIQ does not name the wearer
                assert sum(bool(re.fullmatch(pattern, text)) for text in captions) == weight, (key, frame)
    spoken = {key: 0 for key in wordings.SPOKEN_OF}
    words = {
        "colour": rf"\b({new['colour']}|darker|lighter|brighter|colou?r(ed|ful)?)\b",
        "pattern": rf"\b(pattern(ed)?|prints?|{values['adjective']}|{values['thing']})\b",
        "sleeves": "sleeve",
        "neck": "neck|collar|hood",
        "usage": rf"\b({new['usage']})\b",
    }
    for text in captions:
        for key in spoken:
            spoken[key] += bool(re.search(words[key], text))
    assert spoken == wordings.SPOKEN_OF


# ---- the committed stand-ins ----
MODELS = ROOT / "demo" / "models_photos"


@pytest.mark.parametrize("name", ["instructblip", "clip", "blip", "resnet"])
def test_committed_models_are_ordinary_folders(name):
    import torch
    import transformers
    from safetensors.torch import load_file

    folder = MODELS / name
    config = transformers.AutoConfig.from_pretrained(folder)
    _, info = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, output_loading_info=True, use_safetensors=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    kinds = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values() if tensor.is_floating_point()}
    assert kinds == {torch.float16}  # in half precision: one saved in fp32 by mistake would be twice as large
    facts = json.loads((folder / "pretraining.json").read_text())
    assert facts["seconds"] > 60 and facts["pictures"] == 19_221 and facts["held_out"]


@pytest.mark.parametrize("name", ["instructblip", "clip", "blip", "resnet"])
def test_the_whole_photograph_is_seen_and_as_hugging_face_sees_it(name):
    """60 x 80 and other shapes are squashed, none is cropped; pixels equal transformers' own."""
    import transformers

    picture = Image.open(io.BytesIO(jpeg(np.random.default_rng(2))))
    ours = Preprocess.from_folder(str(MODELS / name), name)
    assert (ours.size, ours.keep_ratio) == (photo_models.PIXELS, False)
    kind = json.loads((MODELS / name / "preprocessor_config.json").read_text())["image_processor_type"]
    theirs = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    wanted = theirs.from_pretrained(MODELS / name)(picture, return_tensors="pt")["pixel_values"][0]
    assert float((ours(picture) - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_a_word_of_a_delta_is_a_token(name):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / name)
    text = "is a purple sweatshirt and has more stripes with a hood for women and less casual"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids).strip() == text and len(ids) <= len(text.split()) + 2


def test_committed_models_are_small():
    size = sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file())
    assert size < 20e6, f"{size / 1e6:.1f} MB"
    assert sorted(folder.name for folder in MODELS.iterdir()) == ["blip", "clip", "instructblip", "resnet"]


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    """Two runs, the first stopped behind its state, against one."""
    import torch

    def trained(states: Path, stop: int) -> tuple[float, dict]:
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 2)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 6)  # by the step's own seed
            return (model(x).float() - x[:, :2]).pow(2).mean()

        seconds = photo_models.train("linear", str(states), model, 300, 1e-2, loss_at, dict)
        return seconds, {key: value.clone() for key, value in model.state_dict().items()}

    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    _, wanted = trained(tmp_path / "whole", -1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", 250)
    seconds, found = trained(tmp_path / "stopped", -1)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and seconds > 0


def test_every_photograph_is_seen_once_an_epoch():
    rows = np.concatenate([photo_models.batch_of(50, 16, 7, step) for step in range(25)])  # 8 epochs of 50
    assert all(sorted(rows[50 * epoch : 50 * (epoch + 1)]) == list(range(50)) for epoch in range(8))
    assert list(rows[:50]) != list(rows[50:100])


def test_what_is_not_known_teaches_nothing():
    import torch

    logits = torch.randn(4, 5, requires_grad=True)
    labels = torch.tensor([[0, -100], [1, 2], [-100, -100], [1, -100]])
    photo_models.attribute_loss(logits, labels, [2, 3]).backward()
    known = logits.grad.abs().sum(1) > 0
    assert known.tolist() == [True, True, False, True]
    assert (logits.grad[[0, 3], 2:] == 0).all() and (logits.grad[1, 2:] != 0).all()


def test_photographs_trained_on_and_held_out_share_no_title(folders):
    slots, shown, held = photo_models.read_shelves(str(folders["zipped"]))
    assert not set(shown.titles) & set(held.titles) and len(held.titles) >= 30
    stages = {
        product.title
        for product in products.read_catalogue(str(folders["zipped"])).products
        if not products.is_for_pretraining(product)
    }
    assert not stages & (set(shown.titles) | set(held.titles))
    article = slots.values["article"]
    row = next(i for i, title in enumerate(shown.titles) if title.endswith("Kurtas, Sleeveless"))
    assert article[shown.labels[row, 0]] == "kurta" and shown.pictures[row].shape == (80, 60, 3)


def test_how_claims_fail():
    """Worked by hand: right changes, what both pictures have, what is not so, what the catalogue has no word for."""
    known = {
        "a": {"article": "shirt", "colour": "red", "gender": "men", "sleeves": "short"},
        "b": {"article": "shirt", "colour": "blue", "gender": "men", "sleeves": "short", "usage": "sports"},
    }
    texts = ("is blue and is for men", "the shirt is green", "is fluffy with a polo collar", "is sporty")
    texts += ("has longer sleeves", "is not for women", "is not for men", "is darker")
    records = [{"reference": "a", "target": "b", "delta": text} for text in texts]
    found = ceiling.told(records, known)
    assert found == {
        ("colour", "right"): 1, ("gender", "no change"): 2, ("colour", "not true"): 2, ("?", "not true"): 1,
        ("sleeves", "not true"): 1, ("gender", "not true"): 1,
        ("all", "right"): 1, ("all", "no change"): 2, ("all", "not true"): 5,
    }  # fmt: skip


def test_the_verdicts_line():
    a, b = {"article": "shirt", "colour": "red", "usage": "casual"}, {"article": "shirt", "colour": "blue"}
    assert report.verdict_line("is blue and is green", a, b) == "right: colour, wrong: colour"
    assert report.verdict_line("is fluffy and is sporty", a, b) == "wrong: says nothing, not known: usage"
    assert [len(report.evenly(list(range(n)), 48)) for n in (0, 5, 95, 500)] == [0, 5, 48, 48]
    assert report.evenly(list(range(12)), 4) == [0, 3, 6, 9]
