"""Data sets as they exist: peers' layouts, missing pictures, blank captions, others' triplet files, one's own split."""

import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mixed
import pytest
from test_field import drawn_cirr
from test_real_pictures import run_stage

import eval_cir
import train_cir
from common import streams
from common.annotations import (
    FASHIONIQ_CATEGORIES,
    Benchmark,
    all_without_missing,
    check_benchmarks,
    names_of,
    read_benchmarks,
    read_cirr,
    read_fashioniq,
    read_own,
    training_triplets,
    without_missing,
)
from common.batches import drop_missing
from common.console import UserError
from common.exports import write_cirr_captions, write_exports
from common.files import read_json, read_jsonl
from common.images import ImageStore, list_images
from common.retrieval import index
from common.streams import Item, Source, human_deltas, human_items
from common.streams import draw as draw_items
from common.trained_on import note_of_overlap, note_of_seen, trained_pairs
from common.triplets import Triplet, held_out, read_triplets
from common.validation import begin_validation, read_validation


def put(path: Path, value) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def jsonl(path: Path, records: list) -> str:
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mixed.picture(seed, 12, 9).save(path, "PNG")


# ---- CIRR as peers keep it ----
NAMES = [f"{split}-{i}-img0" for i in range(3) for split in ("train", "dev")]


def cirr_annotations(folder: Path) -> dict[str, str]:
    """Six images of which three lie in numbered folders; one query -> the table of image_splits."""
    table = {n: f"./train/{n[6]}/{n}.png" if n.startswith("train") else f"./dev/{n}.png" for n in NAMES}
    query = {"pairid": 1, "reference": NAMES[0], "target_hard": NAMES[1], "caption": "redder"}
    put(folder / "captions/cap.rc2.val.json", [{**query, "img_set": {"members": NAMES}}])
    put(folder / "image_splits/split.rc2.val.json", table)
    return table


@pytest.mark.parametrize(
    "annotations, pictures, root, images",
    [
        ("cirr", "img_raw/{path}", "", ""),
        ("cirr_dataset/cirr", "cirr_dataset/{path}", "cirr_dataset", ""),  # CLIP4Cir, SPRC
        ("cirr_dataset/cirr", "cirr_dataset/{path}", "", ""),
        ("cirr_dataset", "cirr_dataset/img_raw/{path}", "", ""),
        ("CIRR", "images/{path}", "", ""),  # CoVR
        ("cirr", "img_raw/{flat}", "", ""),  # NLVR2's train/ without the numbered folders
        ("cirr", "nlvr2/train/{below}", "", "nlvr2/train"),  # --images names the folder of a split
        ("cirr", "one/{name}.png", "", "one"),
        ("cirr", "img_raw/{capitals}", "", ""),
        ("cirr", "img_raw/{converted}", "", ""),
        ("cirr", "{half}/{path}", "", "a:b"),
    ],
)
def test_cirr_pictures_are_found_where_peers_keep_them(tmp_path, annotations, pictures, root, images):
    table = cirr_annotations(tmp_path / annotations)
    for i, (name, path) in enumerate(table.items()):
        path = path.removeprefix("./")
        parts = path.split("/")
        forms = {"name": name, "path": path, "flat": "/".join([parts[0], parts[-1]]), "below": "/".join(parts[1:])}
        stem = path.removesuffix(".png")
        forms |= {"capitals": f"{stem}.PNG", "converted": f"{stem}.JPG", "half": "ab"[i % 2]}
        save(tmp_path / pictures.format(**forms), i)
    given = os.pathsep.join(str(tmp_path / part) for part in images.split(":") if part)
    benchmark = read_cirr(str(tmp_path / root), "val", given or None)
    assert benchmark.images.missing(benchmark.gallery) == []
    for i, name in enumerate(table):
        assert benchmark.images.open(name).tobytes() == mixed.picture(i, 12, 9).tobytes()
    assert benchmark.images.find("train-9-img0") is None


@pytest.mark.parametrize(
    "annotations, pictures, root, images",
    [
        ("fashioniq", "fashioniq/images/{name}.jpg", "", ""),
        ("fashionIQ_dataset", "fashionIQ_dataset/images/{name}.png", "", ""),  # CLIP4Cir, SPRC
        ("fashionIQ_dataset", "fashionIQ_dataset/images/{name}.png", "fashionIQ_dataset", ""),
        ("fashion-iq", "fashion-iq/images/{kind}/{name}.png", "", ""),  # CoVR
        ("fashion-iq", "elsewhere/{kind}/{name}.JPG", "", "elsewhere"),
        ("fashioniq", "fashioniq/images/{name}.JPG", "", ""),
    ],
)
def test_fashioniq_pictures_are_found_where_peers_keep_them(tmp_path, annotations, pictures, root, images):
    names = ["B001", "B002", "B003"]
    query = {"candidate": "B001", "target": "B002", "captions": ["is red", "is long"]}
    put(tmp_path / annotations / "captions/cap.shirt.val.json", [query])
    put(tmp_path / annotations / "image_splits/split.shirt.val.json", names)
    for i, (name, kind) in enumerate(zip(names, ("shirt", "shirt", "toptee"), strict=True)):
        save(tmp_path / pictures.format(name=name, kind=kind), i)
    benchmark = read_fashioniq(str(tmp_path / root), "val", "shirt", str(tmp_path / images) if images else None)
    for i, name in enumerate(names):
        assert benchmark.images.open(name).tobytes() == mixed.picture(i, 12, 9).tobytes()


# ---- FashionIQ's captions ----
def test_blank_captions_of_the_real_files(shared, capsys):
    root = str(shared / "data/fashioniq")
    for split, blank in (("train", 13), ("val", 3), ("test", 1)):
        found = 0
        for kind in FASHIONIQ_CATEGORIES:
            records = json.loads((shared / f"data/fashioniq/captions/cap.{kind}.{split}.json").read_text())
            queries = read_fashioniq(root, split, kind).queries
            for record, query in zip(records, queries, strict=True):
                said = [text.strip(".?, ") for text in record["captions"]]
                if all(said):
                    assert query.delta == f"{said[0].capitalize()} and {said[1]}"
                    one, two = said
                    swapped = f"{two.capitalize()} and {one}"
                    alone = (one.capitalize(), two.capitalize())
                    assert human_deltas(query, "fashioniq") == (query.delta, swapped, *alone)
                else:  # the other one alone, in evaluation and in training
                    (alone,) = {text.capitalize() for text in said if text}
                    assert query.delta == alone and set(human_deltas(query, "fashioniq")) == {alone}
                    found += 1
                assert query.delta.strip() and not query.delta.startswith(" and") and not query.delta.endswith(" and ")
        assert found == blank
        counts = [int(line.split(": ")[1].split(" of ")[0]) for line in capsys.readouterr().out.splitlines()]
        assert sum(counts) == blank


def test_a_query_without_any_text_is_left_out_of_training_and_kept_in_evaluation(tmp_path, capsys):
    one = {"candidate": "a", "target": "b", "captions": ["is red", " "]}
    for kind in FASHIONIQ_CATEGORIES:
        put(tmp_path / f"captions/cap.{kind}.val.json", [one, {**one, "captions": ["", ". "]}])
        put(tmp_path / f"image_splits/split.{kind}.val.json", ["a", "b"])
    triplets, _ = training_triplets("fashioniq", str(tmp_path), "val")
    assert [t.delta for t in triplets] == ["Is red"] * 3
    said = capsys.readouterr().out
    assert "3 of 4 captions are blank" in said and "3 queries without any text are left out" in said
    benchmarks = read_benchmarks("fashioniq", str(tmp_path), "val", "all", "", "original")
    assert [[q.delta for q in benchmark.queries] for benchmark in benchmarks] == [["Is red", ""]] * 3
    assert "fashioniq val dress: 1 queries have no text, first 'dress-1'" in capsys.readouterr().out


def test_the_order_of_the_two_captions(tmp_path):
    query = {"candidate": "a", "target": "b", "captions": ["Is Red.", "has dots"]}
    put(tmp_path / "captions/cap.hat.val.json", [query])
    put(tmp_path / "image_splits/split.hat.val.json", ["a", "b"])
    for join, wanted in (("forward", "Is red and has dots"), ("reverse", "Has dots and Is Red")):
        (benchmark,) = read_benchmarks("fashioniq", str(tmp_path), "val", "hat", "", "original", join)
        assert benchmark.queries[0].delta == wanted
    with pytest.raises(UserError, match="--join"):
        read_fashioniq(str(tmp_path), "val", "hat", join="both")


@pytest.mark.parametrize("join, wanted", [("forward", "Is red and has dots"), ("reverse", "Has dots and Is Red")])
def test_validation_joins_as_evaluation_does(tmp_path, monkeypatch, join, wanted):
    for kind in FASHIONIQ_CATEGORIES:
        query = {"candidate": "a", "target": "b", "captions": ["Is Red.", "has dots"]}
        put(tmp_path / f"captions/cap.{kind}.val.json", [query])
        put(tmp_path / f"image_splits/split.{kind}.val.json", ["a", "b"])
    found = read_validation("fashioniq", str(tmp_path), "val", "", join=join)
    assert [q.delta for benchmark in found.benchmarks for q in benchmark.queries] == [wanted] * 3
    assert ("the second caption first" in found.says) == (join == "reverse")

    # and a run hands its --join over
    def measured(*given, **more):
        raise UserError(f"read: {read_validation(*given, **more).benchmarks[0].queries[0].delta}")

    monkeypatch.setattr(train_cir, "read_sources", lambda: [])
    monkeypatch.setattr(train_cir, "read_validation", measured)
    with pytest.raises(UserError, match=f"read: {wanted}"):
        run_stage(train_cir, dataset="fashioniq", root=tmp_path, val_split="val", join=join, device="cpu")


# ---- pictures that are missing ----
def test_missing_pictures_of_real_fashioniq_are_left_out_and_counted(shared, tmp_path):
    folder = shared / "data/fashioniq"
    gallery = json.loads((folder / "image_splits/split.dress.val.json").read_text())
    records = json.loads((folder / "captions/cap.dress.val.json").read_text())
    save(tmp_path / "one.png")
    (tmp_path / "images").mkdir()
    lost = {records[5]["target"], records[9]["candidate"], *gallery[::400]}
    empty, page = gallery[1], gallery[2]
    for name in gallery:
        if name not in lost:
            os.link(tmp_path / "one.png", tmp_path / f"images/{name}.jpg")
    for name, content in ((empty, ""), (page, "<html>404</html>")):
        (tmp_path / f"images/{name}.jpg").unlink()
        (tmp_path / f"images/{name}.jpg").write_text(content)
    gone = lost | {empty, page}
    benchmark = read_fashioniq(str(folder), "val", "dress", str(tmp_path / "images"))

    assert without_missing(benchmark, 0.0) == (benchmark, "", {})  # strict: whoever measures stops
    kept, note, missing = without_missing(benchmark, 0.01)
    assert set(missing) == gone and "is empty" in missing[empty] and "web page" in missing[page]
    wanted = [r for r in records if not gone & {r["target"], r["candidate"]}]
    assert [(q.reference, q.target) for q in kept.queries] == [(r["candidate"], r["target"]) for r in wanted]
    assert kept.gallery == tuple(name for name in gallery if name not in gone)
    lines = f"{len(records) - len(wanted):,} of 2,017 queries and {len(gone):,} of 3,817 gallery images left out"
    assert note == f"fashioniq val dress: {lines}, not comparable with the full protocol"
    assert len(wanted) < len(records) - 1 and kept.images.missing(names_of(kept)) == []
    assert len(index(kept, True).names) == len(kept.gallery)
    with pytest.raises(UserError, match=f"{len(gone)} of 3,817 images.*--missing 0.001"):
        without_missing(benchmark, 0.001)

    (one,), said = all_without_missing([benchmark], 0.01, f"{tmp_path}/missing.txt")
    assert one == kept and said == note
    assert sorted((tmp_path / "missing.txt").read_text().splitlines()) == sorted(missing.values())
    assert check_benchmarks([benchmark], 0.01) == ""
    assert "12 images missing" in check_benchmarks([benchmark], listing=f"{tmp_path}/all.txt")
    assert len((tmp_path / "all.txt").read_text().splitlines()) == len(gone)
    for name in gone:
        (tmp_path / f"images/{name}.jpg").unlink(missing_ok=True)
        os.link(tmp_path / "one.png", tmp_path / f"images/{name}.jpg")
    benchmark = read_fashioniq(str(folder), "val", "dress", str(tmp_path / "images"))
    assert without_missing(benchmark, 0.01) == (benchmark, "", {})


def test_a_cirr_query_needs_its_whole_image_set_and_a_server_every_query(tmp_path):
    members = [f"m{i}" for i in range(8)]
    queries = []
    for i in range(2):
        query = {"pairid": i, "reference": f"m{i}", "target_hard": "m2", "caption": "redder"}
        queries.append({**query, "img_set": {"members": members[i : i + 6]}})
    table = {name: f"./dev/{name}.png" for name in members}
    for split, hidden in (("val", False), ("test1", True)):
        some = [{k: v for k, v in q.items() if k != "target_hard"} for q in queries] if hidden else queries
        put(tmp_path / f"cirr/captions/cap.rc2.{split}.json", some)
        put(tmp_path / f"cirr/image_splits/split.rc2.{split}.json", table)
    for name in members[:6]:  # m6 is a member of the second query, m7 of none
        save(tmp_path / f"img_raw/dev/{name}.png")
    kept, note, missing = without_missing(read_cirr(str(tmp_path), "val"), 0.25)
    assert [q.id for q in kept.queries] == [0] and kept.gallery == tuple(members[:6]) and list(missing) == ["m6", "m7"]
    assert note.startswith("cirr val: 1 of 2 queries and 2 of 8 gallery images left out")
    with pytest.raises(UserError, match="server"):
        without_missing(read_cirr(str(tmp_path), "test1"), 0.25)
    for name in members[:3]:
        (tmp_path / f"img_raw/dev/{name}.png").unlink()
    with pytest.raises(UserError, match="every query"):
        without_missing(read_cirr(str(tmp_path), "val"), 0.9)


# ---- exports ----
@pytest.fixture
def human_pairs(tmp_path):
    """300 pictures as NLVR2 keeps them, in CIRR's layout; the pairs that gen_deltas.py would describe."""
    table, queries, records = {}, [], []
    for i in range(300):
        name = f"train-{i}-img{i % 2}"
        table[name] = f"./train/{i % 7}/{name}.png"
        save(tmp_path / "cirr_dataset" / table[name], i)
    names = list(table)
    for i in range(0, 300, 6):
        query = {"pairid": i, "reference": names[i], "target_hard": names[i + 5], "caption": "human"}
        queries.append({**query, "img_set": {"members": names[i : i + 6]}})
    put(tmp_path / "cirr_dataset/cirr/captions/cap.rc2.train.json", queries)
    put(tmp_path / "cirr_dataset/cirr/image_splits/split.rc2.train.json", table)
    triplets, store = training_triplets("cirr", str(tmp_path / "cirr_dataset"), "train")
    for t in triplets:
        records.append({"id": t.id, "reference": t.reference, "target": t.target, "delta": f"delta {t.id}"})
        records[-1]["members"] = t.members
    return tmp_path / "cirr_dataset", table, records, store


def test_peers_that_join_root_and_path_find_every_exported_picture(human_pairs, tmp_path):
    root, table, records, store = human_pairs
    write_exports(tmp_path / "out", ("cirr",), "cirr", "train", records, store)
    # CLIP4Cir, Bi-Blip4CIR, SPRC: base_path / 'cirr_dataset' / name_to_relpath[name]
    triplets = json.loads((tmp_path / "out/cirr/captions/cap.rc2.train.json").read_text())
    name_to_relpath = json.loads((tmp_path / "out/cirr/image_splits/split.rc2.train.json").read_text())
    assert len(triplets) == 50 and len(name_to_relpath) == 300 and name_to_relpath == table
    for triplet in triplets:
        for name in (triplet["reference"], triplet["target_hard"], *triplet["img_set"]["members"]):
            assert (root / name_to_relpath[name]).is_file()
    assert [t["caption"] for t in triplets] == [f"delta {r['id']}" for r in records]
    # this project's own reader
    again = read_cirr(str(tmp_path / "out/cirr"), "train", str(root))
    assert again.images.missing(again.gallery) == [] and len(again.gallery) == 300
    # a picture that was converted keeps the path of the source annotation: there peers look for it
    (root / table["train-0-img0"]).rename((root / table["train-0-img0"]).with_suffix(".JPG"))
    store = training_triplets("cirr", str(root), "train")[1]
    write_exports(tmp_path / "out", ("cirr",), "cirr", "train", records, store)
    assert json.loads((tmp_path / "out/cirr/image_splits/split.rc2.train.json").read_text()) == table


def test_covr_finds_the_stems_and_the_release_list_is_read_back(human_pairs, tmp_path):
    root, table, records, store = human_pairs
    write_exports(tmp_path / "out", ("stems", "release"), "cirr", "train", records, store)
    # CoVR: {path.stem: path for path in img_dir.glob("*/*.png")}, img_dir is train/
    id2path = {path.stem: path for path in (root / "train").glob("*/*.png")}
    for ann, record in zip(
        json.loads((tmp_path / "out/stems/captions/cap.rc2.train.json").read_text()), records, strict=True
    ):
        assert os.path.samefile(id2path[ann["reference"]], root / table[record["reference"]])
        assert os.path.samefile(id2path[ann["target_hard"]], root / table[record["target"]])
    release = json.loads((tmp_path / "out/release.json").read_text())
    assert set(release[0]) == {"reference", "target", "caption"} and release[0]["caption"] == "delta 0"
    assert all((root / r[side]).is_file() for r in release for side in ("reference", "target"))
    triplets = read_triplets(tmp_path / "out/release.json")
    assert [t.delta for t in triplets] == [r["delta"] for r in records]
    assert ImageStore(str(root)).missing([name for t in triplets for name in (t.reference, t.target)]) == []


def test_exports_of_a_folder_that_was_mined(tmp_path):
    for i, name in enumerate(("a/x.jpg", "a/y.JPG", "b/z.png")):
        save(tmp_path / "images" / name, i)
    store = ImageStore(str(tmp_path / "images"))
    records = [
        {"id": 0, "subgroup": 0, "reference": "a/x.jpg", "target": "b/z.png", "delta": "one"},
        {"id": 1, "subgroup": 0, "reference": "b/z", "target": "a/y", "delta": "two"},  # names without suffix
    ]
    write_exports(tmp_path / "out", ("cirr", "stems", "release"), "cirr", "train", records, store)
    table = json.loads((tmp_path / "out/cirr/image_splits/split.rc2.train.json").read_text())
    assert table == {"a/x.jpg": "./a/x.jpg", "b/z.png": "./b/z.png", "b/z": "./b/z.png", "a/y": "./a/y.JPG"}
    with pytest.raises(UserError, match="--export"):
        write_exports(tmp_path / "out", ("cirr", "covr"), "cirr", "train", records, store)


def test_stems_that_clash_stop(tmp_path):
    for name in ("a/x.jpg", "b/x.jpg"):
        save(tmp_path / name)
    record = {"reference": "a/x.jpg", "target": "b/x.jpg", "delta": "one"}
    with pytest.raises(UserError, match="'./a/x.jpg' and './b/x.jpg' have the same stem 'x'"):
        write_cirr_captions(tmp_path, "train", [record], ImageStore(str(tmp_path)), stems=True)


def test_fashioniq_pairs_keep_their_layout(tmp_path):
    records = [{"id": 0, "category": "dress", "reference": "A", "target": "B", "delta": "is red"}]
    save(tmp_path / "A.jpg")
    write_exports(tmp_path / "out", ("cirr",), "fashioniq", "train", records, ImageStore(str(tmp_path)))
    (query,) = read_fashioniq(str(tmp_path / "out/fashioniq"), "train", "dress").queries
    assert (query.reference, query.target, query.alternatives) == ("A", "B", ("is red", "is red"))


# ---- triplets of others ----
def test_megapairs(tmp_path):
    record = {"q_img": "0/a.jpg", "t_img": "0/b.jpg", "q_text": ["redder", " ", "in red"]}
    record["hns"] = ["0/c.jpg", "1/d.jpg"]
    keys = "reference=q_img,target=t_img,delta=q_text,negatives=hns"
    (one,) = read_triplets(jsonl(tmp_path / "mega.jsonl", [record | {"score": 1}]), keys)
    assert (one.reference, one.target, one.delta, one.alternatives) == ("0/a.jpg", "0/b.jpg", "redder", ("in red",))
    assert one.extra == {"score": 1, "negatives": ("0/c.jpg", "1/d.jpg")} and one.id == 0
    triplets, _ = training_triplets("jsonl", str(tmp_path / "mega.jsonl"), "", keys=keys)
    assert triplets == [one]
    for change, wanted in (
        ({"hns": ["../c.jpg"]}, r'"hns".*contains ".."'),
        ({"t_img": "/b"}, "absolute"),
        ({"q_text": 3}, "'q_text' is 3"),
        ({"q_text": []}, "captions"),
        ({"q_img": []}, "no image"),
    ):
        with pytest.raises(UserError, match=f"bad.jsonl, record 0.*{wanted}"):
            read_triplets(jsonl(tmp_path / "bad.jsonl", [record | change]), keys)


def test_lasco(tmp_path):
    record = {"qid": 7, "query-image": [1, "train2014/COCO_1.jpg"], "query-text": "a dog"}
    record["target-image"] = [2, "val2014/2.jpg"]
    keys = "reference=query-image.1,target=target-image.1,delta=query-text,id=qid"
    (one,) = read_triplets(put(tmp_path / "lasco_train.json", [record]), keys)
    assert (one.reference, one.target, one.delta, one.id) == ("train2014/COCO_1.jpg", "val2014/2.jpg", "a dog", 7)
    for wrong in ("query-image.2", "query-image.x", "query_image.1", "query-image.1.0"):
        with pytest.raises(UserError, match="record 0: has no"):
            read_triplets(tmp_path / "lasco_train.json", keys.replace("query-image.1", wrong))


def test_mbeir_with_its_pool(tmp_path):
    query = {"qid": "7:1", "query_txt": "redder", "query_img_path": "mbeir_images/q.jpg"}
    query |= {"query_modality": "image,text", "pos_cand_list": ["7:5", "7:6"], "neg_cand_list": ["7:8"]}
    keys = "reference=query_img_path,target=pos_cand_list,delta=query_txt,negatives=neg_cand_list,id=qid"
    pool = [{"did": f"7:{i}", "img_path": f"mbeir_images/{i}.jpg", "txt": None} for i in (5, 8)]
    other = [{"did": "7:6", "img_path": "p/6.jpg"}]
    pools = [jsonl(tmp_path / "one.jsonl", pool), jsonl(tmp_path / "two.jsonl", other)]
    path = jsonl(tmp_path / "query.jsonl", [query])
    (one,) = read_triplets(path, keys, ",".join(pools))
    assert (one.reference, one.target, one.id) == ("mbeir_images/q.jpg", "mbeir_images/5.jpg", "7:1")
    assert one.extra["negatives"] == ("mbeir_images/8.jpg",)
    with pytest.raises(UserError, match="'7:6' is no image of --pool"):
        read_triplets(path, keys, pools[0])
    with pytest.raises(UserError, match="--pool.*no image"):
        read_triplets(path, keys, jsonl(tmp_path / "text.jsonl", [{"did": "7:5", "img_path": None, "txt": "a"}]))


def test_several_files_and_keys_that_are_wrong(tmp_path):
    line = {"reference": "a.jpg", "target": "b.jpg", "delta": "x"}
    paths = [jsonl(tmp_path / f"{i}/t.jsonl", [line | {"delta": str(i)}]) for i in range(2)]
    triplets, store = training_triplets("jsonl", ",".join(paths), "")
    assert [(t.delta, t.id) for t in triplets] == [("0", 0), ("1", 1)]
    assert store.roots == [str(tmp_path / "0"), str(tmp_path / "1")] and store.own
    comma = jsonl(tmp_path / "a,b.jsonl", [line])
    assert len(read_triplets(comma)) == 1
    for keys in ("reference", "reference=", "query=a", "reference=a,reference=b", "=a"):
        with pytest.raises(UserError, match="--keys"):
            read_triplets(paths[0], keys)
    with pytest.raises(UserError, match="has no 'x'"):
        read_triplets(paths[0], "delta=x")
    assert read_triplets(paths[0], "delta=delta")[0].delta == "0"  # what is not named stays where it is


# ---- one's own triplets ----
@pytest.fixture
def own(tmp_path):
    """40 pictures, 60 triplets, of which some share their two images; -> (file, folder of pictures)."""
    for i in range(40):
        save(tmp_path / f"pictures/{i % 3}/{i}.png", i)
    records = []
    for i in range(60):
        a, b = i % 20, 20 + i % 20  # each pair three times
        records.append({"reference": f"{a % 3}/{a}.png", "target": f"{b % 3}/{b}", "delta": f"text {i}"})
    return jsonl(tmp_path / "own.jsonl", records), str(tmp_path / "pictures")


def test_one_s_own_triplets_held_out_of_training_are_what_is_evaluated(own, tmp_path):
    path, folder = own
    trained, _ = training_triplets("jsonl", path, "", images=folder, hold_out=10)
    benchmark = read_own(path, folder, hold_out=10)
    assert (benchmark.dataset, benchmark.split, len(benchmark.queries)) == ("jsonl", "held", 10)
    assert len(benchmark.gallery) == 40
    held, kept = {q.delta for q in benchmark.queries}, {t.delta for t in trained}
    assert not held & kept
    number = lambda delta: int(delta.split()[1]) % 20  # noqa: E731  which pair it is
    assert not {number(d) for d in held} & {number(d) for d in kept}  # nor another text of the same two images
    assert len(held) == 10 and 60 - 10 - 3 < len(kept) <= 50 and len({number(d) for d in held}) == 4
    # a name without suffix is the gallery's picture, so that the target is found among its rows
    rows = index(benchmark, True)
    assert rows.target.min() >= 0 and rows.target.max() < 40
    assert all(query.target in benchmark.gallery for query in benchmark.queries)
    # the order of the lines does not matter
    lines = Path(path).read_text().splitlines(True)
    put(tmp_path / "own.jsonl", "".join(lines[::-1]))
    assert {q.delta for q in read_own(path, folder, hold_out=10).queries} == held
    assert {q.delta for q in read_own(path, folder, hold_out=10, part="train").queries} == kept
    assert len(read_own(path, folder).queries) == 60
    share = read_own(path, folder, hold_out=0.1)
    assert len(share.queries) == 6 and {q.delta for q in share.queries} < held
    for count in (61, -1, 0.001):
        with pytest.raises(UserError, match="--hold_out"):
            held_out(read_triplets(path), count)


@pytest.mark.parametrize("flag, value", [("hold_out", 10), ("keys", "reference=q_img"), ("pool", "pool.jsonl")])
def test_a_flag_of_own_triplets_is_refused_with_a_benchmark(zoo, tmp_path, flag, value):
    """It would change nothing, and whoever gave it would believe that it did."""
    for stage in (eval_cir, *([train_cir] if flag != "pool" else [])):  # training reads ids of --pseudo from a pool too
        given = {"dataset": "cirr", "root": tmp_path, flag: value, "out": tmp_path / "out"}
        given |= {"baseline": "sum", "backbone": zoo / "clip"} if stage is eval_cir else {}
        with pytest.raises(UserError, match=f"--{flag} .* is of --dataset jsonl alone, and this is cirr"):
            run_stage(stage, **given)


@pytest.mark.parametrize("hold_out, split, count", [(10, "held-out", 10), (0, "all", 60)])
def test_the_report_names_what_was_measured(own, zoo, tmp_path, capsys, hold_out, split, count):
    """Not --split, which of one's own triplets nobody asked."""
    given = {"dataset": "jsonl", "root": own[0], "images": own[1], "hold_out": hold_out, "baseline": "sum"}
    run_stage(eval_cir, **given, backbone=zoo / "clip", out=tmp_path / "out", workers=0, show=2, device="cpu")
    said = capsys.readouterr().out
    assert f"jsonl {split}, one's own triplets" in said and re.search(rf"(?m)^ *{split} .* {count} +40$", said), said
    assert json.loads((tmp_path / "out/metrics.json").read_text())["split"] == split
    page = (tmp_path / "out/index.html").read_text()
    assert f"jsonl {split}" in page and "jsonl val" not in page


def test_a_report_on_what_was_trained_on_says_so(own, zoo, tmp_path, monkeypatch, capsys):
    """Training with --hold_out 10, then these, four of them, all 60; --check wants the checkpoint that is named."""
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    how = {"dataset": "jsonl", "root": own[0], "images": own[1], "device": "cpu", "workers": 0}
    trained = {
        "model": "sum",
        "backbone": zoo / "clip",
        "batch": 4,
        "steps": 1,
        "hold_out": 10,
        "out": tmp_path / "cir",
    }
    run_stage(train_cir, **how, **trained)
    for hold_out in (10, 4, 0):
        capsys.readouterr()
        run_stage(eval_cir, **how, checkpoint=tmp_path / "cir", hold_out=hold_out, show=2, out=tmp_path / "out")
        said, report = capsys.readouterr().out, json.loads((tmp_path / "out/metrics.json").read_text())
        seen = "the checkpoint was trained on the pairs of 48 of these 60 queries"
        assert (seen in said) == (seen in report["protocol"]) == ("trained on" in said) == (hold_out == 0)
        assert f"wrote {tmp_path}/out/metrics.json, found.jsonl and index.html" in said
    run_stage(eval_cir, **how, checkpoint=tmp_path / "cir", check="true")
    with pytest.raises(UserError, match="wanted a finished checkpoint of train_cir.py"):
        run_stage(eval_cir, **how, checkpoint=tmp_path / "nowhere", check="true")
    with pytest.raises(UserError, match="--backbone .*: no config.json"):
        run_stage(eval_cir, **how, baseline="sum", backbone=tmp_path, check="true")


def test_a_copy_of_the_triplets_from_a_mac_is_known(tmp_path):
    """Its names have letters and accents apart, and its pictures lie elsewhere."""
    names = [(f"{letter}.png", f"{i}.png") for letter in "\u00f6\u00e5" for i in range(2)]
    apart = [(unicodedata.normalize("NFD", a), b) for a, b in names]
    trained = [Item((0, a), (0, b), (("red",),)) for a, b in apart]
    queries = tuple(Triplet(a, b, "red", i) for i, (a, b) in enumerate([*names, ("o.png", "0.png")]))
    asked = Benchmark("jsonl", "all", None, queries, (), ImageStore(tmp_path))
    assert "on the pairs of 4 of these 5 queries" in note_of_overlap([Source(ImageStore([]), trained)], [asked])


def test_held_out_queries_that_training_saw_by_another_way_are_counted(own, zoo, tmp_path, capsys, monkeypatch):
    """Ten are held out. A checkpoint knows four of their pairs from another file, by other texts; a model that starts
    from that one has seen them too; and a part of the triplets is known in a copy of both file and pictures."""
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    path, folder = own
    held = read_own(path, folder, hold_out=10).queries
    pairs = list(dict.fromkeys((q.reference, q.target) for q in held))[:2]
    back = [{"reference": a, "target": b, "delta": "generated"} for a, b in pairs] * 4  # a batch wants several
    way = [{"reference": b, "target": a, "delta": q.delta} for q in held for a, b in [(q.reference, q.target)]]
    other = jsonl(tmp_path / "other.jsonl", back + way)  # the other way round is another query
    how = {"dataset": "jsonl", "root": path, "images": folder, "hold_out": 10}
    train = {
        "dataset": "jsonl",
        "images": folder,
        "device": "cpu",
        "workers": 0,
        "model": "sum",
        "batch": 4,
        "steps": 1,
    }
    run_stage(train_cir, **train, root=other, backbone=zoo / "clip", out=tmp_path / "one")
    run_stage(train_cir, **train, root=path, hold_out=10, start_from=tmp_path / "one", out=tmp_path / "two")

    copy, part = tmp_path / "copy", tmp_path / "part.jsonl"
    shutil.copytree(folder, copy)
    shown = [q for q in read_own(path, folder).queries if int(q.delta.split()[1]) < 20]
    jsonl(part, [{"reference": q.reference, "target": q.target, "delta": f" {q.delta.title()}"} for q in shown])
    elsewhere = {"root": part, "images": copy, "hold_out": 0}
    seen = sum((q.reference, q.target) in pairs for q in held)
    trained = sum((q.reference, q.target) not in {(h.reference, h.target) for h in held} for q in shown)
    for checkpoint, other, count, of in (("one", {}, seen, 10), ("two", {}, seen, 10), ("two", elsewhere, trained, 20)):
        given = how | other
        asked = read_own(str(given["root"]), str(given["images"]), hold_out=given["hold_out"])
        note = note_of_seen(str(tmp_path / checkpoint), [asked])
        assert note == f"the checkpoint was trained on the pairs of {count} of these {of} queries"
    capsys.readouterr()
    os.remove(tmp_path / "one/trained_on.safetensors")
    assert "is not known" in note_of_seen(str(tmp_path / "one"), [read_own(path, folder)])
    assert trained_pairs([], str(tmp_path / "one")) == {}
    assert "has no trained_on.safetensors: what this checkpoint" in capsys.readouterr().out


def test_a_name_of_two_pictures_stops_training_and_evaluation(own, tmp_path):
    """Cameras count from 1 in each folder: the first folder's picture would be taken for both. A copy is no other."""
    path, folder = own
    one, two = tmp_path / "one", tmp_path / "two"
    for i in range(6):
        save(one / f"IMG_{i}.png", i)
        save(two / f"IMG_{i if i < 4 else i + 2}.png", i if i < 3 else i + 40)
    lines = [{"reference": f"IMG_{i}.png", "target": f"IMG_{i + 1}", "delta": "x"} for i in range(2)]
    a, b = jsonl(tmp_path / "a.jsonl", lines), jsonl(tmp_path / "b.jsonl", [lines[0] | {"target": "IMG_6.png"}])
    both = f"{one}{os.pathsep}{two}"
    training_triplets("jsonl", f"{a},{b}", "", images=both)
    c = jsonl(tmp_path / "c.jsonl", [lines[0] | {"target": "IMG_3"}])
    words = rf"'IMG_3' is one picture in {one}/IMG_3.png and another in {two}/IMG_3.png; name a folder above both"
    with pytest.raises(UserError, match=words):
        training_triplets("jsonl", f"{a},{c}", "", images=both)
    with pytest.raises(UserError, match="'IMG_3.png' is one picture in"):
        read_own(a, both)

    # a name that another folder has as it is leads there, not to what may have been converted
    shutil.copy(one / "IMG_0.png", one / "x.jpg")
    shutil.copy(two / "IMG_7.png", two / "x.png")
    store = ImageStore([str(one), str(two)])
    assert store.find("x.png") == str(two / "x.png") and store.find("x.jpg") == str(one / "x.jpg")
    store.require_one_each(["x.png", "x.jpg", "b: x.jpg"])  # an odd name is left out elsewhere


def test_no_stream_trains_on_a_pair_that_is_held_out(own, tmp_path, capsys):
    """Generated texts of all pairs, under other names of the same pictures, beside human triplets of which ten are
    held out, with the others of their pairs."""
    path, folder = own
    held = {(q.reference, q.target) for q in read_own(path, folder, hold_out=10).queries}
    again = tmp_path / "again"
    shutil.copytree(folder, again, copy_function=os.symlink)
    everything = [(q.reference, q.target) for q in read_own(path, folder).queries]
    file = jsonl(tmp_path / "pseudo.jsonl", [{"reference": a, "target": b, "delta": "new"} for a, b in everything])
    sources = [streams.human_source("jsonl", path, "", folder, hold_out=10), streams.pseudo_source(file, str(again))]
    human, auxiliary = streams.complete_sources(sources, 4, 1, str(tmp_path / "out"), 0)
    assert len(human.items) == len(auxiliary.items) == 48 and len(held) == 4
    for source in (human, auxiliary):
        for item in source.items:
            names = [os.path.relpath(os.path.realpath(sources[s].images.path(n)), folder) for s, n in item[:2]]
            assert tuple(names) not in held
    assert "12 of 60 auxiliary triplets are of pairs that --hold_out keeps" in capsys.readouterr().out


def test_all_targets_of_a_held_out_query_are_kept_from_training(own, tmp_path):
    """Also where the human triplets are not trained on."""
    path, folder = own
    lines = [{"reference": t.reference, "target": t.target, "delta": t.delta} for t in read_triplets(path)[:20]]
    for i, line in enumerate(lines):
        line["target"] = [line["target"], lines[(i + 1) % 20]["reference"]]
    pairs = [(line["reference"], name) for line in lines for name in line["target"]]
    single = [{"reference": one, "target": other, "delta": "new"} for one, other in pairs]
    root, pseudo = jsonl(tmp_path / "several.jsonl", lines), jsonl(tmp_path / "pseudo.jsonl", single)
    (held,) = read_own(root, folder, hold_out=1).queries
    human = streams.human_source("jsonl", root, "", folder, hold_out=1)
    for first, count in ((human, 19), (streams.held_source(root, folder, "", "", 1), 0)):
        sources = [first, streams.pseudo_source(pseudo, folder)]
        sources = streams.complete_sources(sources, 4, 1, str(tmp_path / "out"), 0)
        assert [len(source.items) for source in sources] == [count, 38] and len(held.truths) == 2
        assert note_of_overlap(sources, [read_own(root, folder, hold_out=1)]) == ""

    # a triplet of the second target alone is not trained on either
    also = {"reference": held.reference, "target": held.truths[1], "delta": "x"}
    triplets = read_triplets(jsonl(tmp_path / "more.jsonl", [*lines, also]))
    for count in range(1, 8):
        trained, out = held_out(triplets, count)
        pairs = {(t.reference, name) for t in out for name in t.truths or (t.target,)}
        assert out and not any((t.reference, t.target) in pairs for t in trained)


def test_pictures_of_one_name_in_many_folders_are_told_apart(tmp_path):
    """A shop has a front.jpg and a back.jpg in the folder of each product, and one text for many of them."""
    lines = []
    for i in range(6):
        for j, name in enumerate(("front", "back")):
            (tmp_path / f"shop/{i}").mkdir(parents=True, exist_ok=True)
            mixed.picture(2 * i + j, 20 + i, 9 + j).save(tmp_path / f"shop/{i}/{name}.png")
        lines.append({"reference": f"{i}/front.png", "target": f"{i}/back.png", "delta": "from behind"})
    root, folder = jsonl(tmp_path / "own.jsonl", lines), str(tmp_path / "shop")
    sources = [streams.human_source("jsonl", root, "", folder, hold_out=2), Source()]
    assert len(sources[0].items) == 4
    assert note_of_overlap(sources, [read_own(root, folder, hold_out=2)]) == ""
    assert "the pairs of 4 of these 6 queries" in note_of_overlap(sources, [read_own(root, folder)])


def test_triplets_of_a_table_are_those_of_its_lines(own, tmp_path):
    path, folder = own
    wanted = read_triplets(path)
    rows = [f'{t.target};"{t.delta}";{t.reference};more' for t in wanted]
    table = put(tmp_path / "own.CSV", "\ufefftarget;delta;reference;note\r\n" + "\r\n".join(rows))
    found = read_triplets(table)
    assert [replace(t, extra={}) for t in found] == wanted and found[0].extra == {"note": "more"}
    assert read_own(table, folder).gallery == read_own(path, folder).gallery
    renamed = put(tmp_path / "own.tsv", Path(table).read_text().replace("delta", "says").replace(";", "\t"))
    assert [t.delta for t in read_triplets(renamed, "delta=says")] == [t.delta for t in wanted]
    headless = put(tmp_path / "headless.csv", "a,b,c\nd,e,f")
    with pytest.raises(UserError, match="csv: the first line must name the columns, reference,target,delta .found 'a'"):
        read_triplets(headless)
    assert read_triplets(headless, "reference=a,target=b,delta=c")[0].delta == "f"
    with pytest.raises(UserError, match='"members" is .*, wanted list'):
        read_triplets(jsonl(tmp_path / "m.jsonl", [{"reference": "a", "target": "b", "delta": "c", "members": "def"}]))


def test_a_table_may_write_its_columns_with_capitals_and_blanks(tmp_path):
    table = put(tmp_path / "own.csv", "Reference, Target ,DELTA,Brand\na,b,red,X")
    (one,) = read_triplets(table)
    assert (one.reference, one.target, one.delta, one.extra) == ("a", "b", "red", {"Brand": "X"})
    (one,) = read_triplets(table, "delta=Brand")
    assert (one.reference, one.delta) == ("a", "X")
    (one,) = read_triplets(table, "delta=DELTA")
    assert one.delta == "red"
    both = put(tmp_path / "both.csv", "reference,target,delta,Delta\na,b,red,blue")
    assert read_triplets(both)[0].delta == "red" and read_triplets(both, "delta=Delta")[0].delta == "blue"
    with pytest.raises(UserError, match="names a column twice"):
        read_triplets(put(tmp_path / "twice.csv", "reference,target,Delta,DELTA\na,b,red,blue"))


@pytest.mark.parametrize("name", ["own.txt", "own.json", "own"])
def test_lines_in_a_file_of_another_ending_say_how_endings_are_read(tmp_path, name):
    line = '{"reference": "a", "target": "b", "delta": "red"}\n'
    with pytest.raises(UserError, match="Extra data.*; .jsonl and .ndjson hold a JSON object a line, .csv and .tsv a"):
        read_triplets(put(tmp_path / name, 2 * line))
    assert len(read_triplets(put(tmp_path / "own.ndjson", 2 * line))) == 2


def test_a_query_may_have_several_targets(own, zoo, tmp_path, capsys):
    """R@K of the best ranked one and mAP@K, against the whole ranking that found.jsonl lists; training takes the first.
    A name of several stands once, and one without suffix is the gallery's."""
    path, folder = own
    records = read_triplets(path)[:20]
    also = [f"{(i + 7) % 20 % 3}/{(i + 7) % 20}" for i in range(20)]  # another of the twenty references
    lines = []
    for i, (r, name) in enumerate(zip(records, also, strict=True)):
        targets = [r.target, f"{name}.png", name] if i % 2 else r.target
        lines.append({"reference": r.reference, "target": targets, "delta": r.delta})
    file = jsonl(tmp_path / "several.JSONL", lines)
    how = {"dataset": "jsonl", "root": file, "images": folder, "baseline": "sum", "backbone": zoo / "clip", "top": 39}
    run_stage(eval_cir, **how, out=tmp_path / "out", workers=0, show=20, device="cpu")
    report, found = read_json(tmp_path / "out/metrics.json"), read_jsonl(tmp_path / "out/found.jsonl")
    assert "; of 10 queries that have several targets the best ranked one counts in R@K" in report["protocol"]

    places = []
    for i, (line, record) in enumerate(zip(found, records, strict=True)):
        right = {f"{record.target}.png"} | ({f"{also[i]}.png"} if i % 2 else set())
        assert len(set(line["top"])) == 39 and line["scores"] == sorted(line["scores"], reverse=True)
        places.append(sorted(line["top"].index(name) + 1 for name in right))
        assert line["rank"] == places[-1][0] and (sorted(line["ranks"]) == places[-1] if i % 2 else "ranks" not in line)
    for k in (1, 5, 10, 50):
        assert report["metrics"][f"R@{k}"] == pytest.approx(5 * sum(place[0] <= k for place in places))
    for k in (5, 10, 25, 50):
        kept = [[(n + 1) / at for n, at in enumerate(place) if at <= k] for place in places]
        wanted = [sum(hits) / min(len(place), k) for hits, place in zip(kept, places, strict=True)]
        assert report["metrics"][f"mAP@{k}"] == pytest.approx(100 * sum(wanted) / 20)

    capsys.readouterr()
    trained, _ = training_triplets("jsonl", file, "", images=folder)
    assert [t.target for t in trained] == [r.target for r in records]
    assert "10 of 20 triplets have several targets: the first is trained on" in capsys.readouterr().out
    with pytest.raises(UserError, match='"target" names no image'):
        read_triplets(jsonl(tmp_path / "none.ndjson", [{"reference": "a", "target": [], "delta": "b"}]))
    with pytest.raises(UserError, match="2 targets are not in the gallery"):
        read_own(file, folder, put(tmp_path / "names.txt", "\n".join(list_images(folder)[:-1])))
    listed = put(tmp_path / "names.txt", "\ufeff" + "\r\n".join(list_images(folder)))  # as Notepad saves it
    assert read_own(file, folder, listed).gallery == read_own(file, folder).gallery
    (tmp_path / "names.txt").write_bytes("m\u00fctze.png".encode("latin-1"))
    with pytest.raises(UserError, match="^--gallery .*names.txt: byte 1 is not UTF-8"):
        read_own(file, folder, str(tmp_path / "names.txt"))


def test_training_is_validated_on_another_file(own, zoo, tmp_path, monkeypatch):
    """The score of the step kept is what eval_cir.py finds on that file."""
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    path, folder = own
    lines = Path(path).read_text().splitlines(keepends=True)  # 40 to 59 are texts of pairs that 0 to 19 have
    train, other = put(tmp_path / "train.jsonl", "".join(lines[:15])), put(tmp_path / "val.jsonl", "".join(lines[40:]))
    how = {"dataset": "jsonl", "images": folder, "device": "cpu", "workers": 0}
    asked = {"model": "sum", "backbone": zoo / "clip", "batch": 4, "steps": 2, "val_split": other, "val_every": 1}
    run_stage(train_cir, **how, root=train, **asked, out=tmp_path / "cir")
    measured = [r for r in read_jsonl(tmp_path / "cir/log.jsonl") if "val" in r]
    assert [r["step"] for r in measured] == [1, 2] and all(r["val"] == other for r in measured)
    run_stage(eval_cir, **how, root=other, checkpoint=tmp_path / "cir", out=tmp_path / "out", show=0)
    found = read_json(tmp_path / "out/metrics.json")["metrics"]
    best = max(measured, key=lambda r: r["score"])
    assert {name: best[name] for name in found} == pytest.approx(found)
    protocol = read_json(tmp_path / "cir/config.json")["val"]["protocol"]
    assert protocol.endswith("; the model trains on the pairs of 15 of these 20 queries")
    with pytest.raises(UserError, match="--val_split gone.jsonl: of --dataset jsonl a file, or held"):
        run_stage(train_cir, **how, root=train, **asked | {"val_split": "gone.jsonl"}, out=tmp_path / "none")


def test_the_gallery_of_one_s_own_triplets(own, tmp_path):
    path, folder = own
    names = [f"{i % 3}/{i}.png" for i in range(20, 40)]
    for file in (put(tmp_path / "names.txt", "\n".join(names) + "\n"), put(tmp_path / "names.json", names)):
        benchmark = read_own(path, folder, file)
        assert benchmark.gallery == tuple(names) and index(benchmark, True).target.max() < 20
    with pytest.raises(UserError, match="6 targets are not in the gallery"):
        read_own(path, folder, put(tmp_path / "names.txt", "\n".join(names[2:])))
    for bad, wanted in (("a\na", "occurs twice"), ("../a", "contains")):
        with pytest.raises(UserError, match=wanted):
            read_own(path, folder, put(tmp_path / "names.txt", bad))
    with pytest.raises(UserError, match="--gallery"):
        read_own(path, folder, "names.csv")


def test_unreadable_pictures_of_one_s_own_are_left_out(own, tmp_path, capsys):
    path, folder = own
    broken, gone = Path(folder, "0/21.png"), Path(folder, "1/22.png")
    os.truncate(broken, 90)
    gone.unlink()
    shutil.copy(Path(folder, "0/0.png"), Path(folder, "0/extra.png"))
    shutil.copy(Path(folder, "0/0.png"), Path(folder, os.fsdecode(b"M\374tze.png")))  # its name is not UTF-8
    (benchmark,), note = all_without_missing([read_own(path, folder)], 0, f"{tmp_path}/out/missing.txt")
    assert len(benchmark.queries) == 60 - 6 and len(benchmark.gallery) == 39  # 40, less two, and the copy
    assert note == "jsonl all: 6 of 60 queries and 2 of 41 gallery images left out"
    text = (tmp_path / "out/missing.txt").read_text()
    assert text.count("\n") == 3 and "21.png" in text and "'1/22' not found" in text and "tze.png' contains" in text
    assert "3 pictures cannot be read" in capsys.readouterr().out
    for i in range(23, 33):
        Path(folder, f"{i % 3}/{i}.png").unlink()
    with pytest.raises(UserError, match="more than a tenth: correct --images, or go on by a larger --missing"):
        all_without_missing([read_own(path, folder)], 0, f"{tmp_path}/out/missing.txt")
    _, note = all_without_missing([read_own(path, folder)], 0.5, f"{tmp_path}/out/missing.txt")
    assert " of 60 queries" in note


def test_what_a_run_would_find_broken_after_hours_stops_it_at_its_start(tmp_path):
    """A truncated picture of a published val split, and a query whose reference is gone."""
    root = drawn_cirr(tmp_path / "cirr")
    validation = read_validation("cirr", str(root), "val", "")
    benchmark = validation.benchmarks[0]
    begin_validation(validation, "val", 0, f"{tmp_path}/out")
    path = Path(benchmark.images.path(benchmark.gallery[-1]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match=f"--val_split val: 1 images: .*{path.name}.*; replace them, or go on"):
        begin_validation(validation, "val", 0, f"{tmp_path}/out", 2)
    path.write_bytes(whole)
    Path(benchmark.images.path(benchmark.queries[0].reference)).unlink()
    benchmark = read_validation("cirr", str(root), "val", "").benchmarks[0]
    asked = replace(benchmark, gallery=tuple(n for n in benchmark.gallery if n != benchmark.queries[0].reference))
    with pytest.raises(UserError, match="--val_split val: 1 images missing"):
        begin_validation(validation._replace(benchmarks=[asked]), "val", 0, f"{tmp_path}/out")


def test_a_broken_picture_of_one_s_own_stops_no_validation(own, tmp_path, capsys):
    path, folder = own
    (Path(folder) / "0" / "extra.png").write_bytes(b"no picture")
    validation = read_validation("jsonl", path, "held", folder, hold_out=10)
    found = begin_validation(validation, "held", 0, f"{tmp_path}/out")
    assert "0 of 10 queries and 1 of 41 gallery images left out" in found.says
    assert len(found.benchmarks[0].gallery) == 40


def test_a_record_without_its_parts_names_the_flag_that_finds_them(tmp_path):
    path = jsonl(tmp_path / "other.jsonl", [{"reference": "a", "target": "b", "text": "red"}])
    with pytest.raises(UserError, match='has no "delta" .found .reference., .target., .text..; --keys says where'):
        read_triplets(path)
    assert read_triplets(path, "delta=text")[0].delta == "red"


def test_a_picture_that_leads_to_itself_is_no_triplet(own, tmp_path, capsys):
    """It is excluded from its own gallery, so that it could never be found."""
    path, folder = own
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines[3]["target"] = lines[3]["reference"]
    lines[5]["delta"] = " "
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_own(path, folder).queries) == 59
    said = capsys.readouterr().out
    assert "1 of 60 triplets lead from a picture to itself" in said and "1 queries have no text" in said
    assert len(training_triplets("jsonl", path, "", images=folder)[0]) == 59
    Path(path).write_text(json.dumps(lines[3]) + "\n")
    with pytest.raises(UserError, match="wanted a target that is another picture"):
        read_own(path, folder)


# ---- what is trained on ----
def test_training_leaves_broken_pictures_of_one_s_own_out(own, tmp_path, capsys):
    path, folder = own
    os.truncate(Path(folder, "0/21.png"), 90)  # whole in its header
    triplets, store = training_triplets("jsonl", path, "", images=folder)
    names_of_triplet = lambda t: (t.reference, t.target)  # noqa: E731
    kept = drop_missing(triplets, names_of_triplet, store, "triplets", f"{tmp_path}/unreadable.txt", 2)
    assert len(kept) == 57 and not [t for t in kept if t.target == "0/21"]
    assert (tmp_path / "unreadable.txt").read_text().count("\n") == 1
    assert "1 of 40 pictures of the triplets cannot be read" in capsys.readouterr().out
    Path(folder, "0/21.png").unlink()
    for name in ("22", "23"):  # nine of sixty triplets lack a picture: the wrong folder, rather than a broken file
        Path(folder, f"{int(name) % 3}/{name}.png").unlink()
    store = training_triplets("jsonl", path, "", images=folder)[1]
    with pytest.raises(UserError, match="more than 10 %"):
        drop_missing(triplets, names_of_triplet, store, "triplets", f"{tmp_path}/unreadable.txt")
    with pytest.raises(UserError, match="more than 0.1 %"):  # a benchmark's
        drop_missing(triplets, names_of_triplet, ImageStore(folder), "triplets", f"{tmp_path}/unreadable.txt")


def test_of_several_texts_one_is_drawn(tmp_path):
    record = {"q_img": "a.jpg", "t_img": "b.jpg", "q_text": ["one", "two", "three"]}
    triplets = read_triplets(jsonl(tmp_path / "mega.jsonl", [record]), "reference=q_img,target=t_img,delta=q_text")
    (item,) = human_items(triplets, "jsonl", [], alike=True)
    drawn = Counter(draws[0].delta for draws in (draw_items([item], 0, step, 1, 0) for step in range(600)))
    assert set(drawn) == {"one", "two", "three"} and min(drawn.values()) > 150
    (item,) = human_items(triplets, "jsonl", [])  # the release's [human, generated, generated]
    drawn = Counter(draws[0].delta for draws in (draw_items([item], 0, step, 1, 0) for step in range(600)))
    assert 250 < drawn["one"] < 350


# ---- the stage ----
def test_eval_cir_marks_every_number_when_pictures_are_missing(zoo, tmp_path):
    names = [f"B{i:03d}" for i in range(12)]
    for kind in FASHIONIQ_CATEGORIES:
        pairs = zip(names[:-1], names[1:], strict=True)
        queries = [{"candidate": a, "target": b, "captions": ["is red", ""]} for a, b in pairs]
        put(tmp_path / f"fashioniq/captions/cap.{kind}.val.json", queries)
        put(tmp_path / f"fashioniq/image_splits/split.{kind}.val.json", names)
    for i, name in enumerate(names[:-1]):
        save(tmp_path / f"fashioniq/images/{name}.png", i)

    def run(**given) -> None:
        given = {"dataset": "fashioniq", "root": tmp_path, "official": "false", "baseline": "sum"} | given
        run_stage(eval_cir, **given, backbone=zoo / "clip", out=tmp_path / "out", workers=0, show=2, device="cpu")

    with pytest.raises(UserError, match="1 of 12 images missing"):
        run()
    with pytest.raises(UserError, match="more than --missing 0.05 allows"):
        run(missing=0.05)
    run(missing=0.1, join="reverse")
    report = json.loads((tmp_path / "out/metrics.json").read_text())
    for kind in FASHIONIQ_CATEGORIES:
        lost = "1 of 11 queries and 1 of 12 gallery images left out, not comparable with the full protocol"
        assert f"fashioniq val {kind}: {lost}" in report["protocol"]
    assert "the second caption first" in report["protocol"]
    assert [(part["queries"], part["gallery"]) for part in report["parts"]] == [(10, 11)] * 3
    assert (tmp_path / "out/missing.txt").read_text().count("'B011' not found") == 1
    found = (tmp_path / "out/found.jsonl").read_text()
    assert '"delta": "Is red"' in found and "B011" not in found
    run(missing=0.1, check="true", check_decode="true")
