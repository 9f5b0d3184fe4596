"""The embedded world: what is drawn is what is said, the layouts read as the real ones, the committed models load."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.annotations import FASHIONIQ_CATEGORIES, Benchmark, read_chat, read_cirr, read_fashioniq, training_triplets
from common.files import write_json, write_jsonl, write_text
from common.images import Preprocess
from demo import formats, report, texts, world

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "demo" / "models"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    world.write_world(str(out), 3, train=20, dev=2, val=4, test=2, queries=4, chat=12, aux=3, fashioniq=2)
    return out


def counts(text: str, a: dict, b: dict) -> tuple[int, int]:
    """(claims a delta makes, those that are right)"""
    verdicts = world.judged(text, a, b)
    return len(verdicts), sum(good for _, good in verdicts)


def test_human_deltas_are_judged_right():
    """Independent truth: a human-like delta is made from the changes, so every claim parsed from it must be true."""
    rng = np.random.default_rng(0)
    said = right = 0
    for _ in range(1500):
        a, b = world.family(rng, 2)
        text = world.delta(a, b, rng)
        claims, good = counts(text, a, b)
        assert claims == good >= 1, (text, world.claims(text), a, b)
        assert {key for key, _ in world.judged(text, a, b)} <= set(world.changed(a, b))
        said, right = said + claims, right + good
    assert said > 1500


def test_false_deltas_are_judged_wrong():
    a = dict(
        category="dress", colour="red", pattern="plain", print="lime", sleeves="long", length="mini", neck="v",
        background="snow",
    )  # fmt: skip
    b = a | {"colour": "blue", "pattern": "dots"}
    for text, claims, right in (
        ("is blue", 1, 1),
        ("is green", 1, 0),
        ("has short sleeves", 1, 0),
        ("is blue and has a collar", 2, 1),
        ("with lime dots", 1, 1),
        ("with black dots", 1, 0),
        ("has dots and is longer", 2, 1),
        ("the same dress but in blue , on a mint background", 2, 1),
        ("has a car", 1, 0),
    ):
        assert counts(text, a, b) == (claims, right), text
    c = b | {"print": "navy"}
    assert counts("the dots are navy", b, c) == (1, 1)
    assert counts("has navy dots", b, c) == (1, 1)
    assert counts("has white dots", b, c) == (1, 0)
    stripes = b | {"pattern": "stripes", "print": "navy"}
    assert counts("has white dots", stripes, stripes | {"print": "white"}) == (2, 1)  # no dots are there
    assert counts("with black dots and black dots", a, b) == (2, 0)
    assert counts("is longer", a, a | {"length": "ankle"}) == (1, 1)
    assert counts("is shorter", a, a | {"length": "ankle"}) == (1, 0)


def test_comparisons_never_use_a_human_phrase():
    rng = np.random.default_rng(1)
    compared, human = set(), set()
    for _ in range(6000):
        a, b = texts.pair(rng)
        for key in world.changed(a, b):
            compared.add(texts.verbal(key, a, b, rng))
            human.add(world.phrase(key, a, b, rng))
    assert len(compared) > 400 and len(human) > 200
    assert not compared & human
    whole = [phrase for phrase in human if " " in phrase]  # of one word there is "mini": the value's only name
    for number in range(3000):
        said = " " + texts.document(rng, ("some", "all")[number % 2])[1] + " "
        assert not [phrase for phrase in whole if f" {phrase} " in said], said
    for _ in range(4000):  # what is asked of other things says nothing of a garment
        assert all(key == "?" for key, _ in world.claims(texts.request(rng)[2]))


def test_requests_name_true_differences():
    """What a request wants of the second thing are words at places where the two differ (a part has its look along)."""
    rng = np.random.default_rng(2)
    told = {word for words in texts.THINGS.values() for word in words}
    for _ in range(2000):
        a, b, text = texts.request(rng)
        one, two = a.split(), b.split()
        true = {two[k] for k in range(8) if one[k] != two[k]}
        true |= set(two[2:4]) if one[2:4] != two[2:4] else set()
        for clause in text.replace(" but ", " and ").replace(" , ", " and ").split(" and "):
            if not clause.startswith(("without", "the same ")):
                assert {w for w in clause.split(" instead of ")[0].split() if w in told} <= true, (a, b, text)


def test_committed_llama_compares_described_garments():
    """The gate of the stand-in: asked slot by slot in exact words, on pairs of another seed, it says what differs."""
    import torch
    import transformers

    llama = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "llama")
    rng, right = np.random.default_rng(3), 0

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for _ in range(60):
        one, two = (texts.tags(garment) for garment in texts.pair(rng))
        words = [ids(word) for word in one + two]
        assert all(len(word) == 1 for word in words)  # as many tokens as a picture has
        flat = [word[0] for word in words]
        prompt = [1, *ids("before :"), *flat[:8], *ids("after :"), *flat[8:], *ids("compare slots :")]
        said = llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=2)[0]
        wanted = " ".join("same" if s == t else t for s, t in zip(one, two, strict=True))
        right += tokenizer.decode(said[len(prompt) :], skip_special_tokens=True).strip() == wanted
    assert right >= 54, f"{right} of 60"


def digest(folder: Path) -> dict:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_other_seed_other_pictures(small, tmp_path):
    sizes = dict(train=20, dev=2, val=4, test=2, queries=4, chat=12, aux=3, fashioniq=2)
    world.write_world(str(tmp_path / "again"), 3, **sizes)
    assert digest(tmp_path / "again") == digest(small)
    world.write_world(str(tmp_path / "other"), 4, **sizes)
    pictures = {h for name, h in digest(tmp_path / "other").items() if name.endswith(".jpg")}
    ours = [h for name, h in digest(small).items() if name.endswith(".jpg")]
    assert len(set(ours)) == len(ours) and not pictures & set(ours)  # no picture twice, none shared


def test_layouts_read_like_the_real_ones(small):
    val = read_cirr(str(small / "cirr"), "val")
    assert len(val.queries) == 16 and len(val.gallery) == 24 and not val.images.missing(val.gallery)
    ranks = {(q.members.index(q.reference), q.members.index(q.target)) for q in val.queries}
    assert ranks <= set(world.RING)
    assert all(q.target is None for q in read_cirr(str(small / "cirr"), "test1").queries)
    triplets, images = training_triplets("cirr", str(small / "cirr"), "train")
    assert len(triplets) == 20 and not images.missing([t.target for t in triplets])
    for category in FASHIONIQ_CATEGORIES:
        benchmark = read_fashioniq(str(small / "fashioniq"), "val", category)
        assert len(benchmark.gallery) == 12 and not benchmark.images.missing(benchmark.gallery)
    captions = read_chat(str(small / "chat" / "chat.json"))
    assert len(captions) == 12 and {c.image_first for c in captions} == {True, False}
    attributes = json.loads((small / "attributes.json").read_text())
    for q in val.queries:
        assert world.changed(attributes[q.reference], attributes[q.target])


@pytest.mark.parametrize("name", ["llama", "instructblip", "clip", "blip", "resnet"])
def test_committed_models_are_ordinary_folders(name):
    import transformers

    folder = MODELS / name
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    _, info = kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if name != "llama":
        assert Preprocess.from_folder(str(folder), name).size == formats.PIXELS
    if name in ("llama", "clip", "blip"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = "the same dress but with long sleeves and lime dots instead of checks"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids).strip() == text and len(ids) <= len(text.split()) + 2  # a word is a token


def test_committed_models_are_small():
    """In half precision: one of them saved in fp32 by mistake would go past the sum."""
    import torch
    from safetensors.torch import load_file

    size = sum(os.path.getsize(p) for p in MODELS.rglob("*") if p.is_file())
    assert size < 18e6, f"{size / 1e6:.1f} MB"
    folders = sorted(MODELS.glob("*/model.safetensors"))
    assert [file.parent.name for file in folders] == ["blip", "clip", "instructblip", "llama", "resnet"]
    for file in folders:
        kinds = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert kinds == {torch.float16}, file


def run_demo(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    """demo.sh in another folder, with a python that installs nothing and stops at the first stage with status 7."""
    (folder / "demo.sh").write_text((ROOT / "demo.sh").read_text())
    stop = folder / "bin" / "python"
    write_text(stop, '#!/bin/sh\n[ "$1" = -m ] || exit 7\n')
    stop.chmod(0o755)
    env = os.environ | {"PATH": f"{stop.parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "active"}
    return subprocess.run(["bash", "demo.sh", *argv], cwd=folder, env=env, capture_output=True, text=True)


def test_demo_removes_what_it_wrote_and_nothing_else(tmp_path):
    notes, stale = tmp_path / "out/demo-seed-3/notes.txt", tmp_path / "out/demo-seed-3/world/old.jpg"
    write_text(notes, "mine")
    write_text(stale, "")
    refused = run_demo(tmp_path, "--seed", "3")  # a folder of somebody else
    assert refused.returncode == 1 and refused.stderr.startswith("error: out/demo-seed-3 holds something")
    assert notes.exists() and stale.exists()
    (notes.parent / ".demo").touch()
    assert run_demo(tmp_path, "--seed", "3").returncode == 7
    assert notes.read_text() == "mine" and not stale.parent.exists()
    assert run_demo(tmp_path).returncode == 7 and (tmp_path / "out/demo/.demo").exists()  # a fresh folder is marked
    assert notes.exists()


def finished_demo(out: Path, small: Path) -> Benchmark:
    """A demo's folders as the stages write them, made up: every second run finds the target first. -> its val."""
    val = read_cirr(str(small / "cirr"), "val")
    records = [{"reference": q.reference, "target": q.target, "delta": q.delta} for q in val.queries]
    attributes = json.loads((small / "attributes.json").read_text())
    aux = sorted(name for name in attributes if name.startswith("aux_"))
    pairs = [{"reference": a, "target": b, "delta": "is red"} for a, b in zip(aux, aux[1:], strict=False)]
    for folder, lines in (("heldout", records), ("pseudo", pairs), ("same", records)):
        write_jsonl(out / folder / "pseudo.jsonl", lines)
    for folder in ("align", "vdg"):
        write_jsonl(out / folder / "log.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    for model in report._MODELS:
        for number, key in enumerate(report.ROWS):
            run, found = f"{model}-{key}", []
            for q in val.queries:
                top = [q.target] + [name for name in val.gallery if name not in (q.target, q.reference)][:9]
                line = {"id": q.id, "reference": q.reference, "delta": q.delta, "target": q.target, "rank": 1}
                found.append(line | {"top": top if number % 2 == 0 else top[::-1]})
            write_jsonl(out / "eval" / run / "found.jsonl", found)
            numbers = {"R@1": 10.0 + number, "R@5": 20.0, "R@10": 30.0, "R@50": 40.0, "Rs@1": 50.0}
            write_json(out / "eval" / run / "metrics.json", {"metrics": numbers})
            write_json(out / "cir" / run / "config.json", {"step": 5})
            log = [{"step": 5, "loss": 3.0}, {"step": 5, "score": 1.0}]
            write_jsonl(out / "cir" / run / "log.jsonl", log)
    return val


def test_report_is_one_page_with_table_retrievals_and_losses(small, tmp_path, monkeypatch, capsys):
    """From files as the stages write them: all sections, the right picture framed, the files' numbers."""
    out = tmp_path / "demo"
    val = finished_demo(out, small)
    monkeypatch.setattr(report, "OUT", str(out))
    monkeypatch.setattr(report, "WORLD", str(small))
    report.main()
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert [(r["model"], r["name"]) for r in rows] == [(m, n) for m in report._MODELS for n in report.ROWS.values()]
    assert rows[3]["R@1"] == 13.0 and rows[3]["mean"] == pytest.approx((13 + 20 + 30) / 3)
    assert all("mAP@10" not in row for row in rows)  # a drawn garment's place is told by no catalogue
    page = (out / "index.html").read_text()
    assert "<script" not in page and "Retrievals of combiner" in page and "Retrievals of blip_tdm" in page
    assert page.count('class="right"') == 2 * len(val.queries[::2]) and page.count("<svg") == 5
    assert "VDG, held-out pairs          precision 100.0" in capsys.readouterr().out


def test_demo_of_photographs_says_what_it_wants(tmp_path):
    def said(*argv):
        done = subprocess.run(["bash", ROOT / "demo.sh", "--world", "photos", *argv], capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout
        return done.stderr

    assert said("--nonsense", "1").startswith("usage: ./demo.sh --world photos --data FOLDER")
    assert said("--data", str(tmp_path)).startswith(f"error: --data '{tmp_path}': wanted the folder of the catalogue")
    write_text(tmp_path / "styles.csv", "")
    assert "no language model there" in said("--data", str(tmp_path), "--llm", str(tmp_path))
