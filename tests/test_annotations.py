"""common/annotations.py against the real annotation files, small handmade ones, and damaged ones."""

import json

import pytest
from pictures import noise, put

from common.annotations import (
    FASHIONIQ_CATEGORIES,
    OFFICIAL,
    Caption,
    names_of,
    read_chat,
    read_cirr,
    read_fashioniq,
    read_triplets,
    training_triplets,
)
from common.console import UserError
from common.exports import write_cirr_captions
from common.images import (
    check_report,
)


# ---- the real files ----
def test_cirr_as_published(shared):
    for root in (shared / "data" / "cirr", shared / "data"):
        val = read_cirr(str(root), "val")
        assert (len(val.queries), len(val.gallery)) == OFFICIAL["cirr", "val"] == (4181, 2297)
    query = val.queries[0]
    assert query.id == 12060 and query.reference == "dev-244-0-img0" and query.target == "dev-1028-1-img1"
    assert query.delta == "show three bottles of soft drink" and len(query.members) == 6
    assert val.images.table["dev-244-0-img0"] == "./dev/dev-244-0-img0.png"
    test = read_cirr(str(root), "test1")
    assert (len(test.queries), len(test.gallery)) == OFFICIAL["cirr", "test1"] == (4148, 2315)
    assert all(query.target is None for query in test.queries)
    text, ok = check_report(names_of(val), val.images)
    assert not ok and "2,297 expected, 0 present" in text and "2,297 missing" in text and "'dev-244-0-img0'" in text
    with pytest.raises(UserError, match="cap.rc2.train.json not found"):
        training_triplets("cirr", str(root), "train")
    with pytest.raises(UserError, match="hidden"):
        training_triplets("cirr", str(root), "test1")


def test_fashioniq_as_published(shared):
    root, queries = str(shared / "data" / "fashioniq"), 0
    for category in FASHIONIQ_CATEGORIES:
        for protocol, key in (("original", ()), ("val", ("val",))):
            found = read_fashioniq(root, "val", category, protocol=protocol)
            assert (len(found.queries), len(found.gallery)) == OFFICIAL["fashioniq", "val", category, *key]
            assert {q.target for q in found.queries} <= set(found.gallery)
        queries += len(found.queries)
        assert all(query.target is None for query in read_fashioniq(root, "test", category).queries)
    assert queries == 6016
    counts = [OFFICIAL["fashioniq", "val", c][1] for c in FASHIONIQ_CATEGORIES]
    assert counts == [3817, 6346, 5373]
    counts = [OFFICIAL["fashioniq", "val", c, "val"][1] for c in FASHIONIQ_CATEGORIES]
    assert counts == [2628, 3089, 2902]
    triplets, _ = training_triplets("fashioniq", root, "train")
    assert len(triplets) == 5985 + 5988 + 6027 and len({triplet.id for triplet in triplets}) == len(triplets)
    first = triplets[0]
    assert (first.reference, first.target) == ("B003FGW7MK", "B008BHCT58")  # the candidate is the reference
    assert first.alternatives == ("is solid black with no sleeves", "is black with straps")
    assert first.delta == "Is solid black with no sleeves and is black with straps"
    assert len(training_triplets("fashioniq", root, "train", "dress")[0]) == 5985


# ---- handmade files ----
def cirr_record(**changes) -> dict:
    members = [f"m{i}" for i in range(6)]
    record = {"pairid": 5, "reference": "m0", "target_hard": "m1", "target_soft": {"m1": 1.0}, "caption": "make it red"}
    return {**record, "img_set": {"id": 1, "members": members, "reference_rank": 0, "target_rank": 1}, **changes}


def write_cirr(root, records, split="val", names=None):
    table = {name: f"./dev/{name}.png" for name in names or [f"m{i}" for i in range(8)]}
    put(root / f"captions/cap.rc2.{split}.json", records)
    put(root / f"image_splits/split.rc2.{split}.json", table)


def test_cirr_from_a_small_folder(tmp_path):
    write_cirr(tmp_path / "cirr", [cirr_record(), cirr_record(pairid=6, caption="")], "mine")
    for name in range(8):
        path = tmp_path / f"img_raw/dev/m{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(8, 8).save(path)
    benchmark = read_cirr(str(tmp_path), "mine")  # images lie beside cirr/, as CLIP4Cir keeps them
    assert [query.id for query in benchmark.queries] == [5, 6] and len(benchmark.gallery) == 8
    assert check_report(names_of(benchmark), benchmark.images)[1]
    (tmp_path / "img_raw/dev/m3.png").unlink()
    (tmp_path / "img_raw/dev/m4.png").write_bytes(b"")
    benchmark = read_cirr(str(tmp_path / "cirr"), "mine")
    text, ok = check_report(names_of(benchmark), benchmark.images)
    assert not ok and "8 expected, 6 present, 1 unreadable, 1 missing" in text and "'m3'" in text and "m4.png" in text
    assert "\n" not in text
    with pytest.raises(UserError, match="nowhere"):
        read_cirr(str(tmp_path), "mine", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="captions/"):
        read_cirr(str(tmp_path / "img_raw"), "mine")
    (tmp_path / "own.jsonl").write_text("{}")
    with pytest.raises(UserError, match="own.jsonl is a file, CIRR a folder .* --dataset jsonl"):
        read_cirr(str(tmp_path / "own.jsonl"), "mine")
    with pytest.raises(UserError, match="split.rc2.val.json not found.*split.rc2.mine.json"):
        read_cirr(str(tmp_path), "val")


@pytest.mark.parametrize(
    "records, wanted",
    [
        ({"a": 1}, "a list of records"),
        ([[1]], "record 0"),
        ([cirr_record(), {}], 'record 1: has no "'),
        ([cirr_record(caption=3)], 'record 0: "caption" is 3'),
        ([cirr_record(caption=None)], 'record 0: "caption"'),
        ([cirr_record(pairid="x")], 'record 0: "pairid"'),
        ([cirr_record(pairid=True)], 'record 0: "pairid"'),
        ([cirr_record(), cirr_record()], "pairid 5 occurs twice"),
        ([cirr_record(reference="../m0")], 'record 0: "reference"'),
        ([cirr_record(reference="absent")], "'absent' is not in"),
        ([cirr_record(target_hard="absent")], "'absent' is not in"),
        ([cirr_record(img_set={"members": ["m0", 4]})], "record 0: member"),
        ([cirr_record(img_set={"members": ["m0", "absent"]})], "'absent' is not in"),
        ([cirr_record(img_set=[])], 'record 0: "img_set"'),
        ("[1, 2", "cap.rc2.val.json"),
        ('[{"pairid": NaN}]', "cap.rc2.val.json"),
        ('[{"pairid": 1, "pairid": 2}]', "cap.rc2.val.json"),
        ("\ufeff[]", "cap.rc2.val.json"),
        ("[" * 100000, "cap.rc2.val.json"),
        ("", "cap.rc2.val.json"),
    ],
    ids=str,
)
def test_bad_cirr_files_are_named_with_record_and_field(tmp_path, records, wanted):
    write_cirr(tmp_path, records)
    with pytest.raises(UserError) as error:
        read_cirr(str(tmp_path), "val")
    assert wanted in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("table", [[], {}, {"m0": 3}, {"m0": "../m0.png"}, {"m0": "/m0.png"}, {"../m0": "m0.png"}])
def test_bad_cirr_tables_are_named(tmp_path, table):
    write_cirr(tmp_path, [cirr_record()])
    put(tmp_path / "image_splits/split.rc2.val.json", table)
    with pytest.raises(UserError, match="split.rc2.val.json"):
        read_cirr(str(tmp_path), "val")


def test_fashioniq_from_a_small_folder(tmp_path):
    def write(records, names):
        put(tmp_path / "fashioniq/captions/cap.hat.val.json", records)
        put(tmp_path / "fashioniq/image_splits/split.hat.val.json", names)

    good = {"target": "b", "candidate": "a", "captions": [" Is Red. ", "has dots?, "]}
    write([good], ["a", "b", "c"])
    benchmark = read_fashioniq(str(tmp_path), "val", "hat")
    assert benchmark.gallery == ("a", "b", "c") and benchmark.queries[0].delta == "Is red and has dots"
    assert read_fashioniq(str(tmp_path), "val", "hat", protocol="val").gallery == ("a", "b")
    with pytest.raises(UserError, match="protocol"):
        read_fashioniq(str(tmp_path), "val", "hat", protocol="VAL")
    for record, names, wanted in (
        ({**good, "captions": ["one"]}, ["a", "b"], "1 captions"),
        ({**good, "captions": "one"}, ["a", "b"], "captions are 'one'"),
        ({**good, "captions": ["one", None]}, ["a", "b"], "list of strings"),
        ({**good, "target": "z"}, ["a", "b"], "'z' is not in"),
        ({**good, "candidate": "/a"}, ["a", "b"], "absolute"),
        (good, ["a", "b", "a"], "'a' occurs twice"),
        (good, {"a": 1}, "list of names"),
        (good, ["a", 3], "entry 1"),
    ):
        write([record], names)
        with pytest.raises(UserError) as error:
            read_fashioniq(str(tmp_path), "val", "hat")
        assert wanted in str(error.value)


def test_chat(tmp_path):
    def record(question, **changes):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a red hat"}]
        return {"id": "x7", "image": "x7.jpg", "conversations": turns, **changes}

    path = put(tmp_path / "chat.json", [record("Describe it.\n<image>"), record("<image>\nDescribe it.")])
    after, before = read_chat(path)
    assert after == Caption("x7.jpg", "Describe it.", "a red hat", False, "x7")
    assert before == Caption("x7.jpg", "Describe it.", "a red hat", True, "x7")
    questions = [record(question) for question in ("Describe it.", "<image> a <image>", "a <image> b", "", 3)]
    for bad in (
        *questions,
        *(
            record("<image>", **change)
            for change in (
                {"image": "/x"},
                {"image": None},
                {"conversations": []},
                {"conversations": [1, 2]},
                {"conversations": None},
            )
        ),
    ):
        with pytest.raises(UserError, match="chat.json, record 0"):
            read_chat(put(tmp_path / "chat.json", [bad]))


def test_triplet_files(tmp_path):
    line = {"reference": "a.jpg", "target": "b.jpg", "delta": "make it\u2028red", "score": 0.8, "id": 4}
    path = put(tmp_path / "t.jsonl", json.dumps(line, ensure_ascii=False) + "\n" + json.dumps(line) + "\n")
    triplets, store = training_triplets("jsonl", path, "")
    assert len(triplets) == 2 and triplets[0].delta == "make it\u2028red" and triplets[0].extra == {"score": 0.8}
    assert triplets[0].id == 4 and triplets[0].alternatives == () and store.roots == [str(tmp_path)]
    release = [
        {"reference": "a.jpg", "target": "b.jpg", "caption": ["human", "generated"]},
        {"reference": "c.jpg", "target": "d.jpg", "caption": "one"},
    ]
    both, one = read_triplets(put(tmp_path / "vdg.json", release))
    assert (both.delta, both.alternatives) == ("human", ("generated",)) and (one.delta, one.alternatives) == ("one", ())
    for bad in (
        {"reference": "a", "target": "b"},
        {**line, "target": None},
        {**line, "reference": "../a"},
        {**line, "delta": []},
        {**line, "delta": [1]},
    ):
        with pytest.raises(UserError, match="record 0"):
            read_triplets(put(tmp_path / "bad.jsonl", json.dumps(bad)))
    with pytest.raises(UserError, match="dataset"):
        training_triplets("coco", path, "")


def test_pseudo_triplets_in_cirr_format_are_read_back(tmp_path):
    ring = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 2), (0, 3), (0, 4)]
    records = []
    for subgroup in range(3):
        for a, b in ring:
            names = {"reference": f"g{subgroup}/{a}", "target": f"g{subgroup}/{b}", "delta": f"from {a} to {b} ü"}
            records.append({"id": len(records) + 100, "subgroup": subgroup, **names, "score": 0.5})
    path = tmp_path / "captions/cap.rc2.train.json"
    write_cirr_captions(tmp_path, "train", records)
    assert set(read_cirr(str(tmp_path), "train").gallery) == {record["reference"] for record in records}
    queries = read_cirr(str(tmp_path), "train").queries
    assert [(q.id, q.reference, q.target, q.delta) for q in queries] == [
        (r["id"], r["reference"], r["target"], r["delta"]) for r in records
    ]
    for query, written, pair in zip(queries, json.loads(path.read_text()), ring * 3, strict=True):
        assert list(query.members) == [f"g{query.extra['img_set']['id']}/{i}" for i in range(6)]
        assert (written["img_set"]["reference_rank"], written["img_set"]["target_rank"]) == pair
        assert written["target_soft"] == {query.target: 1.0}
    given = [{**record, "members": [f"g{record['subgroup']}/{i}" for i in range(6)]} for record in records[7:8]]
    write_cirr_captions(tmp_path, "train", given)  # one pair of a subgroup: the members given are kept
    assert json.loads(path.read_text())[0]["img_set"]["members"] == [f"g0/{i}" for i in range(6)]
    write_cirr_captions(tmp_path, "train", [{"reference": "a", "target": "b", "delta": "x"}] * 2)
    assert [record["pairid"] for record in json.loads(path.read_text())] == [0, 1]
