"""search.py: the index against one-by-one encoding, answers against a brute-force oracle, the server against a foe."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo as writer
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("starlette", reason="the page needs requirements-search.txt")
pytest.importorskip("uvicorn", reason="the page needs requirements-search.txt")

from search_server import index, serving, site_of
from test_real_pictures import run_stage

import common.notes as notes_module
import search
import train_cir
from common.annotations import read_triplets, training_triplets
from common.console import UserError
from common.encoding import Compute
from common.files import lock_folder, read_jsonl, write_jsonl
from common.gallery import Engine, Query, find, recall_of, vectors, vision_digest
from common.notes import is_held_out, respected
from common.pixels import open_image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plain(zoo):
    return search.load_model("", str(zoo / "clip"), "cpu")[0]


@pytest.fixture
def folder(tmp_path):
    writer.draw(tmp_path / "pictures", 11)
    return tmp_path / "pictures"


@pytest.fixture
def site(zoo, folder, tmp_path):
    return site_of(zoo / "clip", folder, tmp_path / "out")


@pytest.fixture
def server(site):
    with serving(site) as running:
        yield running


def one_by_one(model, folder: Path, names) -> torch.Tensor:
    """The independent truth: each picture alone through the model."""
    clip = model.model
    rows = [clip.image(clip.preprocess(open_image(folder / name))[None])[1][0] for name in names]
    return F.normalize(torch.stack(rows).float(), dim=1)


def encoded(monkeypatch, model) -> list[int]:
    """Counts the pictures that go through the vision encoder from now on."""
    counts, before = [], model.model.image
    monkeypatch.setattr(model.model, "image", lambda pixels: (counts.append(len(pixels)), before(pixels))[1])
    return counts


# ---- index ----
def test_features_are_those_of_each_picture_alone(plain, folder, tmp_path):
    gallery = index(plain, folder, tmp_path / "out")
    names = sorted(path.name for path in folder.iterdir())
    assert list(gallery.names.values()) == names and gallery.live.tolist() == list(gallery.names)
    assert torch.allclose(gallery.features[gallery.live], one_by_one(plain, folder, names), atol=1e-5)
    (file,) = (tmp_path / "out").glob("index-*/features.npy")
    assert np.array_equal(np.load(file, mmap_mode="r"), gallery.features.numpy())


def test_only_what_is_new_is_encoded_and_ids_stay(plain, folder, tmp_path, monkeypatch):
    first = index(plain, folder, tmp_path / "out")
    counts = encoded(monkeypatch, plain)
    assert index(plain, folder, tmp_path / "out").names == first.names and counts == []

    (folder / "0-003.png").rename(folder / "a new name.png")  # the same content
    (folder / "0-004.png").unlink()
    writer.draw(folder, 2, seed=1)  # two new ones
    shutil.copy(folder / "0-000.png", folder / "copy.png")
    Image.new("RGB", (30, 30), "red").save(folder / "0-005.png")  # another content
    second = index(plain, folder, tmp_path / "out")
    assert sum(counts) == 3
    assert second.of_name["a new name.png"] == first.of_name["0-003.png"]
    assert second.of_name["copy.png"] == second.of_name["0-000.png"] == first.of_name["0-000.png"]
    assert first.of_name["0-004.png"] not in second.names and second.of_name["0-005.png"] >= 11
    kept = [name for name in first.of_name if name not in ("0-003.png", "0-004.png", "0-005.png")]
    assert [second.of_name[name] for name in kept] == [first.of_name[name] for name in kept]
    names = list(second.names.values())
    assert names == sorted(names) and "copy.png" not in names and len(names) == 12
    assert torch.allclose(second.features[second.live], one_by_one(plain, folder, names), atol=1e-5)


@pytest.mark.parametrize("own", ["", "out/search/pictures"])
def test_what_the_page_writes_is_not_searched(zoo, folder, monkeypatch, own):
    """Of --gallery . the usual --out lies in the gallery: its thumbnails were pictures of the next start."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(search, "listen", None)  # it comes next: a page that is served after all would wait for ever
    given = {"gallery": ".", "backbone": zoo / "clip", "device": "cpu", "port": 0, "out": own}
    with pytest.raises(UserError, match="--out out/search/pictures is in --gallery .: .* move --out"):
        run_stage(search, **given)
    (folder / "queries.jsonl").write_text('{"delta": "red"}')
    with pytest.raises(UserError, match="--index .*/index is in --gallery .: .* move --index"):
        run_stage(search, **given | {"queries": "queries.jsonl", "index": folder / "index", "out": "results.jsonl"})
    assert not (folder / "out").exists() and not (folder / "index").exists()
    run_stage(search, **given | {"queries": "queries.jsonl", "index": "../index", "out": "results.jsonl"})


def test_what_is_written_is_of_one_folder(zoo, folder, tmp_path, monkeypatch):
    """Two folders of one name, one usual --out: marks and features of the one were taken for the other's."""
    other = tmp_path / "b/pictures"
    writer.draw(other, 11, seed=3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"delta": "red"}')
    given = {"backbone": zoo / "clip", "device": "cpu", "port": 0, "queries": "queries.jsonl", "out": "results.jsonl"}
    with pytest.raises(UserError, match="image folder picturse not found"):
        run_stage(search, **given | {"gallery": "picturse", "index": "out/search/pictures"})
    run_stage(search, **given, gallery="pictures", index="")  # a mistyped name is not what is remembered
    first = (tmp_path / "results.jsonl").read_bytes()
    where = f"out/search/pictures belongs to --gallery {folder}; name another"
    with pytest.raises(UserError, match=f"^--index {where} --index, or, .* moved to {other}, delete out/search/pic"):
        run_stage(search, **given, gallery="b/pictures", index="")
    page = {name: value for name, value in given.items() if name not in ("queries", "out")}
    with pytest.raises(UserError, match=f"^--out {where} --out"):
        run_stage(search, **page, gallery="b/pictures", out="")

    # by a link, and moved: it goes on with what there is
    (tmp_path / "link").symlink_to(folder)
    run_stage(search, **given, gallery="link", index="out/search/pictures")
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"moved to {tmp_path}/moved, delete out/search/pictures/gallery.json"):
        run_stage(search, **given, gallery="moved", index="out/search/pictures")
    (tmp_path / "out/search/pictures/gallery.json").unlink()
    (log,) = tmp_path.glob("out/search/pictures/index-*/index.jsonl")
    written = log.read_bytes()
    run_stage(search, **given, gallery="moved", index="out/search/pictures")
    assert log.read_bytes() == written and (tmp_path / "results.jsonl").read_bytes() == first


def test_a_check_ends_before_the_index(zoo, folder, tmp_path, capsys):
    """What would stop the page is said at once: its flags, a port or a folder in use."""
    given = {"gallery": folder, "backbone": zoo / "clip", "device": "cpu", "out": tmp_path / "out", "check": True}
    run_stage(search, **given, port=0)
    assert "would serve" in capsys.readouterr().out and not list(tmp_path.glob("out/index-*"))
    with search.listen("127.0.0.1", 0) as busy, pytest.raises(UserError, match="in use.*; take another --port"):
        run_stage(search, **given, port=busy.getsockname()[1])
    with pytest.raises(UserError, match="nowhere"):
        run_stage(search, **given, port=0, checkpoint=tmp_path / "nowhere")


def test_a_folder_in_use_names_its_flag(zoo, folder, tmp_path):
    held = tmp_path / "held"
    lock_folder(held)
    (tmp_path / "queries.jsonl").write_text('{"delta": "red"}')
    flags = ["--queries", tmp_path / "queries.jsonl", "--out", tmp_path / "results.jsonl", "--index", held]
    argv = [sys.executable, "search.py", "--gallery", folder, "--backbone", zoo / "clip", "--device", "cpu", *flags]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "wait for it or use another --index" in done.stderr, done.stderr


def test_a_file_of_known_size_and_time_is_not_read_again(plain, folder, tmp_path, monkeypatch):
    import common.gallery as under_test

    index(plain, folder, tmp_path / "out")
    read, before = [], under_test.file_sha256
    monkeypatch.setattr(under_test, "file_sha256", lambda path: (read.append(path), before(path))[1])
    index(plain, folder, tmp_path / "out")
    os.utime(folder / "0-001.png")
    index(plain, folder, tmp_path / "out")
    assert [os.path.basename(path) for path in read] == ["0-001.png"]


def test_unreadable_pictures_are_left_out_counted_and_listed(plain, folder, tmp_path):
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes((folder / "0-000.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("<svg onload=alert(1)>")
    Image.new("RGB", (1, 500)).save(folder / "thin.png")
    os.mkfifo(folder / "pipe.png")
    for name in (b"M\374tze.png", b"b: rot.png"):
        shutil.copy(folder / "0-000.png", os.path.join(os.fsencode(folder), name))
    for _ in range(2):  # the second time from what the first wrote down
        gallery = index(plain, folder, tmp_path / "out")
        assert gallery.unreadable == 7 and len(gallery.names) == 11
        listed = (tmp_path / "out/unreadable.txt").read_text().splitlines()
        wanted = ["M\ufffdtze.png", "b", "cut.png", "empty.jpg", "pipe.png", "text.jpg", "thin.png"]
        assert [line.split(": ")[0] for line in listed] == wanted
    shutil.copy(folder / "0-000.png", folder / "empty.jpg")  # repaired
    assert index(plain, folder, tmp_path / "out").unreadable == 6
    (log,) = (tmp_path / "out").glob("index-*/index.jsonl")
    size = log.stat().st_size
    index(plain, folder, tmp_path / "out")
    assert log.stat().st_size == size, "what is as it was is not written down again"
    for path in folder.glob("0-*"):
        path.unlink()
    (folder / "empty.jpg").unlink()
    with pytest.raises(UserError, match="none of its 6 pictures can be read"):
        index(plain, folder, tmp_path / "out")


def test_a_picture_that_can_be_read_again_comes_back(plain, folder, tmp_path, monkeypatch):
    """A permission that was wrong, a disk that was away: size and time of change of the file stay as they were."""
    import common.gallery as under_test

    closed, real, hashed = {"0-002.png", "0-007.png"}, open_image, []

    def opened(path, *given):
        if os.path.basename(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *given)

    monkeypatch.setattr(under_test, "open_image", opened)
    first = index(plain, folder, tmp_path / "out")
    assert first.unreadable == 2 and len(first.names) == 9
    before = under_test.file_sha256
    monkeypatch.setattr(under_test, "file_sha256", lambda path: (hashed.append(path), before(path))[1])
    assert index(plain, folder, tmp_path / "out").unreadable == 2
    assert hashed == [], "a folder of pictures of a kind that is not read is not hashed at every start"
    closed.clear()
    counts = encoded(monkeypatch, plain)
    second = index(plain, folder, tmp_path / "out")
    assert second.unreadable == 0 and sum(counts) == 2 and (tmp_path / "out/unreadable.txt").read_text() == ""
    names = list(second.names.values())
    assert names == sorted(path.name for path in folder.iterdir())
    assert torch.allclose(second.features[second.live], one_by_one(plain, folder, names), atol=1e-5)
    assert all(second.of_name[name] == first.of_name[name] for name in first.of_name), "ids stay"


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "torn line", "rows without a line"])
def test_damage_is_seen_and_encoded_again(plain, folder, tmp_path, monkeypatch, capsys, damage):
    whole = index(plain, folder, tmp_path / "out")  # chunks of 4, 4 and 3
    expected = whole.features.clone()
    (file,) = (tmp_path / "out").glob("index-*/features.npy")
    del whole
    log = file.with_name("index.jsonl")
    data = bytearray(file.read_bytes())
    row = 24 * 4
    if damage == "bit":
        data[128 + 5 * row] ^= 1  # in the second chunk
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "gone":
        file.unlink()
    elif damage == "torn line":
        log.write_bytes(log.read_bytes()[:-40])
    else:
        file.write_bytes(data + bytes(3 * row))
    counts = encoded(monkeypatch, plain)
    again = index(plain, folder, tmp_path / "out")
    assert sum(counts) == {"bit": 7, "cut": 3, "gone": 11, "torn line": 3, "rows without a line": 0}[damage]
    assert torch.equal(again.features, expected) and len(file.read_bytes()) == 128 + 11 * row
    said = capsys.readouterr().err
    assert ("damaged" in said) == (damage in ("bit", "cut", "gone"))


def test_killed_while_indexing_goes_on(plain, tmp_path, zoo, monkeypatch):
    folder = tmp_path / "pictures"
    writer.draw(folder, 400)
    program = "import sys; sys.path[:0] = ['tests', '.']; import search; from pathlib import Path\n"
    program += "from search_server import index\n"
    program += f"model = search.load_model('', {str(zoo / 'clip')!r}, 'cpu')[0]\n"
    program += f"index(model, Path({str(folder)!r}), Path(sys.argv[1]))"
    run = subprocess.Popen([sys.executable, "-c", program, tmp_path / "out"], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not any(path.stat().st_size > 3000 for path in (tmp_path / "out").glob("index-*/index.jsonl")):
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    counts = encoded(monkeypatch, plain)
    resumed = index(plain, folder, tmp_path / "out")
    assert 0 < sum(counts) < 396, "the kill came too late, or nothing was kept"
    whole = index(plain, folder, tmp_path / "whole")
    assert resumed.names == whole.names and torch.allclose(resumed.features, whole.features, atol=1e-6)


def test_training_leaves_the_index_as_it_is(zoo, plain):
    before = vision_digest(plain)
    trained = search.load_model("", str(zoo / "clip"), "cpu")[0]
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(1)
    assert vision_digest(trained) == before
    with torch.no_grad():
        next(p for name, p in trained.named_parameters() if "visual_projection" in name).add_(1)
    assert vision_digest(trained) != before


# ---- answers ----
def engine_of(model, gallery) -> Engine:
    return Engine(model, {}, "test", gallery, Compute(2))


@pytest.mark.parametrize("kind", ["clip", "blip"])
def test_answers_are_those_of_a_brute_force_oracle(zoo, folder, tmp_path, kind):
    model = search.load_model("", str(zoo / kind), "cpu")[0].eval()
    # two files of equal pixels and other bytes: equal scores, in the order of names
    Image.open(folder / "0-002.png").save(folder / "z.png", compress_level=0)
    gallery = index(model, folder, tmp_path / "out")
    names = list(gallery.names.values())
    features = one_by_one(model, folder, names).double().numpy()
    engine, inner = engine_of(model, gallery), model.model
    # on some CPUs the place in a batch rounds a feature: then the last bits of the two say which comes first
    twin = {"z.png": "0-002.png"}
    alike = torch.equal(*(gallery.features[gallery.of_name[name]] for name in ("z.png", "0-002.png")))
    with torch.no_grad():
        for name in names[:5]:
            tokens, own = inner.image(inner.preprocess(open_image(folder / name))[None])
            words = F.normalize(inner.text(["make it red"], "cpu"), dim=1)
            both, two = (
                F.normalize(own + F.normalize(inner.text([text], "cpu"), dim=1), dim=1)[0]
                for text in ("make it red", "make it red and wide")  # plain features: several changes are one text
            )
            truths = {
                ("", ("make it red",)): words[0],
                (name, ()): own[0],
                (name, ("make it red",)): both,
                (name, ("make it red", "wide")): two,
            }
            for (path, texts), vector in truths.items():
                exclude = gallery.of_name[path] if path else -1
                ((*found,),) = find(engine, [Query(str(folder / path) if path else "", texts, exclude)], 5)
                scores = (features @ F.normalize(vector, dim=0).double().numpy()).round(6)
                order = [i for i in np.lexsort((np.arange(len(names)), -scores)) if names[i] != path][:5]
                listed, wanted = [gallery.names[id] for id, _ in found], [names[i] for i in order]
                assert listed == wanted or not alike
                assert [twin.get(name, name) for name in listed] == [twin.get(name, name) for name in wanted]
                assert np.allclose([score for _, score in found], scores[order], atol=1e-5)


def test_several_changes_of_a_trained_model_are_the_mean_of_each(zoo, folder, tmp_path):
    trained = train_cir.build_cir("combiner", str(zoo / "clip")).eval()
    engine = engine_of(trained, index(trained, folder, tmp_path / "out"))
    with torch.no_grad():
        tokens = trained.image(trained.preprocess(open_image(folder / "0-003.png"))[None])[0]
        each = trained.compose(tokens.expand(2, -1), ["red", "wide"]).sum(0)
        words = trained.text(["red and wide"], "cpu")[0]
    found = vectors(engine, [Query(str(folder / "0-003.png"), ("red", "wide"), -1), Query("", ("red", "wide"), -1)])
    assert torch.allclose(found, F.normalize(torch.stack([each, words]), dim=1), atol=1e-5)


def test_many_queries_are_each_one_alone_and_recall_counts_them(plain, folder, tmp_path):
    gallery = index(plain, folder, tmp_path / "out")
    engine, names = engine_of(plain, gallery), list(gallery.names.values())
    queries = [Query(str(folder / name), ("red",) * (i % 2), gallery.of_name[name]) for i, name in enumerate(names)]
    queries += [Query("", ("a blue box",), -1)]
    together = vectors(engine, queries)
    alone = torch.cat([vectors(engine_of(plain, gallery), [query]) for query in queries])
    assert torch.allclose(together, alone, atol=1e-5)
    targets = [gallery.live[(i + 3) % 11].item() for i in range(12)]
    places = [[id for id, _ in found].index(t) for found, t in zip(find(engine, queries, 99), targets, strict=True)]
    wanted = {f"R@{k}": 100 * sum(place < k for place in places) / 12 for k in (1, 5, 10)}
    assert recall_of(engine, queries, targets, (1, 5, 10)) == pytest.approx(wanted)


def test_queries_of_a_file(plain, folder, tmp_path):
    engine = engine_of(plain, index(plain, folder, tmp_path / "out"))
    asked = [{"id": 7, "reference": "0-003.png", "delta": "red"}, {"delta": "a box"}, {"reference": "0-001.png"}]
    write_jsonl(tmp_path / "queries.jsonl", asked)

    def ask():
        file, out = str(tmp_path / "queries.jsonl"), tmp_path / "results.jsonl"
        search.answer(engine, search.read_asked(file, str(folder)), out, 4)

    ask()
    lines = read_jsonl(tmp_path / "results.jsonl")
    assert [{k: v for k, v in line.items() if k != "results"} for line in lines] == asked
    ((*found,),) = find(engine, [Query(str(folder / "0-003.png"), ("red",), engine.gallery.of_name["0-003.png"])], 4)
    assert [r["name"] for r in lines[0]["results"]] == [engine.gallery.names[id] for id, _ in found]
    assert all(len(line["results"]) == 4 for line in lines)
    for bad, says in (
        ({"reference": "../x"}, '".."'),
        ({"reference": "gone.png"}, "not found"),
        ({"id": 1}, "record 0"),
    ):
        write_jsonl(tmp_path / "queries.jsonl", [bad])
        with pytest.raises((UserError, FileNotFoundError), match=says):
            ask()


@pytest.mark.parametrize("name", ["q.jsonl", "q.ndjson", "q.json", "q.csv", "q.tsv"])
def test_queries_are_read_as_triplets_are(folder, tmp_path, name):
    file = tmp_path / name
    row = {"reference": "0-003.png", "target": "0-001.png", "caption": "red"}
    if file.suffix in (".csv", ".tsv"):
        between = "\t" if file.suffix == ".tsv" else ","
        file.write_text("\n".join(between.join(line) for line in (map(str.title, row), row.values())))
    else:
        file.write_text(json.dumps([row]) if file.suffix == ".json" else json.dumps(row))
    (one,), (triplet,) = search.read_asked(str(file), str(folder)), read_triplets(file)
    assert (one.path, one.text, one.record) == (str(folder / triplet.reference), triplet.delta, row)


def test_a_query_in_misspelt_keys_stops(folder, tmp_path):
    def read(record: dict) -> list[tuple[str, str]]:
        write_jsonl(tmp_path / "q.jsonl", [{"delta": "red"}, record])
        return [(Path(path).name, text) for _, path, text in search.read_asked(str(tmp_path / "q.jsonl"), str(folder))]

    name = "0-003.png"
    for bad, says in (
        ({"refernce": name, "delta": "red"}, "record 1: has no \"reference\", but 'refernce'"),
        ({"reference": name, "text": "red"}, "record 1: has no \"delta\", but 'text'"),
        ({"reference": name, "delta": None, "caption": "red"}, "has no \"delta\", but 'caption'"),
        ({"reference": 0, "delta": "red"}, '"reference": found 0'),
        ({"reference": name, "delta": 3}, "wanted a text or a list of texts"),
    ):
        with pytest.raises(UserError, match=says):
            read(bad)
    for good in ({"id": 4, "target": "x"}, {"members": [name], "negatives": [], "target": ["x"]}, {"results": []}):
        assert read({"reference": name} | good)[1] == (name, "") and read({"delta": "red"} | good)[1] == ("", "red")
    assert read({"reference": name, "delta": ["", "red"], "brand": "X"})[1] == (name, "red")


# ---- the JSON interface ----
def test_gallery_pages_and_pictures(server, site, folder):
    page = server.ask("api/gallery?start=4&count=3").json
    assert page["total"] == 11 and [item["name"] for item in page["items"]] == ["0-004.png", "0-005.png", "0-006.png"]
    id = page["items"][0]["id"]
    image = server.ask(f"image/{id}")
    assert image.headers["Content-Type"] == "image/jpeg"
    shown, truth = Image.open(io.BytesIO(image.body)), Image.open(folder / "0-004.png")
    assert shown.size == truth.size and np.abs(np.asarray(shown, int) - np.asarray(truth)).mean() < 8
    thumb = server.ask(f"thumb/{id}?v=x")
    assert thumb.headers["Content-Type"] == "image/jpeg" and "immutable" in thumb.headers["Cache-Control"]
    assert server.ask("api/gallery?start=99").json["items"] == []
    for path in ("api/gallery?start=-1", "api/gallery?count=501", "api/gallery?start=x"):
        assert server.ask(path).status == 400
    (folder / "0-004.png").write_bytes((folder / "0-005.png").read_bytes())
    assert "has changed" in server.ask(f"image/{id}").json["error"]


@pytest.mark.parametrize("path", ["thumb/99", "thumb/-1", "image/0-001.png", "image/..%2f..%2fetc%2fpasswd",
                                  "search.py", "image/%2fetc%2fpasswd", "..%2fsearch.py", "web/app.js", "thumb/٣",
                                  "image/1e0", "thumb/" + "a" * 64, "thumb/" + "9" * 30, "api/"])  # fmt: skip
def test_only_ids_lead_to_files(server, path):
    from urllib.parse import quote

    answer = server.ask(quote(path, safe="/%"))
    assert answer.status in (400, 404) and b"root:" not in answer.body and b"import" not in answer.body


def test_search_by_both_by_picture_and_by_text(server, site):
    both = server.ask("api/search", {"reference": 2, "texts": ["red", " ", "bigger"], "top": 3}).json
    assert len(both["results"]) == 3 and both["text"] == "red and bigger" and both["reference"]["name"] == "0-002.png"
    alone = server.ask("api/search", {"reference": 2}).json["results"]
    assert len(alone) == 10 and 2 not in [r["id"] for r in alone]
    assert len(server.ask("api/search", {"texts": ["red"]}).json["results"]) == 11
    assert server.ask("api/search", {"texts": ["red " * 100]}).json["cut"]
    found = server.ask("api/search", {"texts": ["red \U0001f534"]}).json
    assert not found["cut"] and not found["unknown"]  # CLIP knows every byte; what BERT lacks is in test_train_cir.py
    for bad in ({}, {"texts": []}, {"reference": 99}, {"reference": True}, {"reference": "0-002.png"}, {"texts": "red"},
                {"texts": [1]}, {"texts": ["x" * 501]}, {"texts": ["x"] * 9}, {"reference": 2, "top": 0},
                {"reference": -1}, {"reference": 2.0}, {"texts": ["red"], "top": "3x"}, [], "x"):  # fmt: skip
        answer = server.ask("api/search", bad)
        assert answer.status == 400 and answer.json["error"].count("\n") == 0


def test_a_key_that_nobody_reads_is_named(server):
    for path in ("search", "mark"):
        answer = server.ask(f"api/{path}", {"reference": 0, "text": "make it red"})
        assert answer.status == 400 and "'text': unknown" in answer.json["error"]


def test_requests_that_are_no_json(server):
    assert server.ask("api/search", b"{", Content_Type="application/json").status == 400
    assert server.ask("api/search", b"{}", Content_Type="text/plain").status == 400  # what a form may send anywhere
    assert "more than" in server.ask("api/search", b" " * 70_000, Content_Type="application/json").json["error"]
    assert server.ask("api/search", b"[" * 60_000, Content_Type="application/json").status == 400
    assert server.ask("api/search").status == 405


def test_upload(server, site, folder, tmp_path, monkeypatch):
    data = (folder / "0-003.png").read_bytes()
    token = server.ask("api/upload", data).json["token"]
    found = server.ask("api/search", {"reference": token, "texts": ["red"]}).json
    assert found["reference"] == {"name": f"{token}.png", "id": site.engine.gallery.of_name["0-003.png"]}
    assert len(found["results"]) == 10, "the reference itself is not found again, by content"
    assert server.ask(f"image/{token}").status == 200 and server.ask(f"thumb/{token}").status == 200
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20000).to_bytes(4) * 2 + b"\x08\x02\0\0\0" + bytes(20)
    for bad in (b"", b"%PDF-1.7", b"GIF89a", b"<svg onload=alert(1)>", data[:50], bomb):
        answer = server.ask("api/upload", bad, Content_Type="image/png")
        assert answer.status == 400 and str(tmp_path) not in answer.json["error"]
    monkeypatch.setattr(search, "_UPLOAD", 100)
    assert "more than 100 bytes" in server.ask("api/upload", data).json["error"]
    assert [path.name for path in (tmp_path / "out/uploads").iterdir()] == [f"{token}.png"]


# ---- who may ask ----
def test_every_answer_carries_the_policy_and_the_page_needs_no_other_host(server):
    for path in ("", "app.js", "api/gallery", "thumb/0", "nothing", "api/label"):
        headers = server.ask(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    page = server.ask("").body.decode()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>", page)
    for name in ("index.html", "style.css", "app.js", "judge.js"):
        text = (ROOT / "web" / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|//cdn", text)
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text


def test_a_foreign_host_or_page_is_refused(server):
    body = {"texts": ["red"]}
    here = server.address.removeprefix("http://").rstrip("/")
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "10.0.0.1"):
        assert server.ask("api/gallery", Host=host).status in (400, 421)
        assert server.ask("", Host=host).status in (400, 421)
    for host in (here, "localhost:9", "LOCALHOST", "[::1]:80"):
        assert server.ask("api/gallery", Host=host).status == 200
    foreign = "http://evil.example", "null", "http://127.0.0.1:1", f"https://{here}", f"http://{here}.evil.example"
    for origin in foreign:
        assert server.ask("api/search", body, Origin=origin).status == 403
    assert server.ask("api/search", body, Origin=f"http://{here}", Sec_Fetch_Site="same-origin").status == 200
    for site in ("cross-site", "same-site"):
        assert server.ask("api/search", body, Sec_Fetch_Site=site).status == 403
        assert server.ask("thumb/0", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
        assert server.ask("", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 200  # a link to the page
    mark = {"reference": 0, "texts": ["x"], "target": 1, "right": True}
    assert server.ask("api/mark", mark, Origin="null").status == 403


def test_beyond_this_machine_every_address_begins_with_a_secret(site):
    with serving(site, "0.0.0.0") as open_to_all:
        base, secret = open_to_all.address.rstrip("/").rsplit("/", 1)
        assert len(secret) >= 20
        assert open_to_all.ask("api/gallery").status == 200 and b"<!DOCTYPE" in open_to_all.ask("").body
        assert open_to_all.ask("api/search", {"texts": ["red"]}).status == 200
        assert open_to_all.ask("api/gallery", Host="192.168.1.7:8000").status == 200
        assert open_to_all.ask("api/gallery", Host="evil.example").status == 421
        for wrong in ("", "x", secret[:-1], secret + "x", "%00", secret.lower() + "x"):
            for path in ("api/gallery", "", "thumb/0"):
                assert open_to_all.ask(f"{base}/{wrong}/{path}" if wrong else f"{base}/{path}").status == 404
    with serving(site) as alone:
        assert alone.address.count("/") == 3, "no secret where only this machine can ask"


# ---- marks and labels ----
HOSTILE = "<img src=x onerror=alert(1)>\"'\u2028\u202e</script>"


def test_marks_become_triplets(server, site, zoo, folder, tmp_path):
    def mark(reference, target, right, text="red"):
        answer = server.ask("api/mark", {"reference": reference, "texts": [text], "target": target, "right": right})
        assert answer.status == 200, answer.json

    out = tmp_path / "out"
    mark(0, 1, True)
    mark(0, 2, False)
    mark(3, 4, True, HOSTILE)
    assert read_jsonl(out / "marks.jsonl") == [
        {"reference": "0-000.png", "target": "0-001.png", "delta": "red"},
        {"reference": "0-003.png", "target": "0-004.png", "delta": HOSTILE, "held_out": True},  # every second reference
    ]
    assert read_jsonl(out / "wrong.jsonl") == [
        {"reference": "0-000.png", "target": "0-002.png", "delta": "red", "wrong": True}
    ]
    results = server.ask("api/search", {"reference": 0, "texts": ["red"]}).json["results"]
    assert {r["id"]: r["right"] for r in results if r["right"] is not None} == {1: True, 2: False}
    mark(0, 1, False)
    assert len(read_jsonl(out / "marks.jsonl")) == 1 and len(read_jsonl(out / "wrong.jsonl")) == 2
    undone = server.ask("api/undo", {"what": "marks"}).json
    assert undone == {"reference": "0-000.png", "text": "red", "target": 1, "right": True}
    assert len(read_jsonl(out / "marks.jsonl")) == 2
    mark(0, 2, None)
    assert read_jsonl(out / "wrong.jsonl") == []
    again = site_of(zoo / "clip", folder, out)  # another start
    assert again.notes.marks == site.notes.marks and len(again.notes.marks) == 2
    good = {"reference": 0, "texts": ["x"], "target": 1, "right": True}
    for bad in ({"texts": []}, {"reference": None}, {"target": None}, {"target": 99}, {"right": 1}, {"right": "yes"}):
        assert server.ask("api/mark", good | bad).status == 400
    for _ in range(4):
        assert server.ask("api/undo", {"what": "marks"}).status == 200
    assert server.ask("api/undo", {"what": "marks"}).json["error"] == "nothing to undo"
    mark(5, 6, True)
    triplets, images = training_triplets("jsonl", str(out / "marks.jsonl"), "", "all", str(folder))  # as train_cir.py
    assert triplets[0].delta == "red" and images.path(triplets[0].reference) == str(folder / "0-005.png")


def test_all_marks_of_a_reference_stand_on_one_side(site):
    notes = site.notes
    for i in range(9):
        for name in ("a", "b", "c", "d"):
            notes.marks[name, f"{i}", "x"] = {"right": True, "held_out": is_held_out(notes, name)}
    sides = {name: {mark["held_out"] for (n, _, _), mark in notes.marks.items() if n == name} for name in "abcd"}
    assert sides == {"a": {False}, "b": {True}, "c": {False}, "d": {True}}


def pseudo_file(tmp_path, folder, n=6) -> str:
    ends = [(f"0-00{i}.png", f"0-00{i + 1}.png") for i in range(n)]
    lines = [{"id": f"p{i}", "reference": a, "target": b, "delta": f"text {i}"} for i, (a, b) in enumerate(ends)]
    lines[1]["delta"] = HOSTILE
    write_jsonl(tmp_path / "pseudo.jsonl", lines + [{"reference": "gone.png", "target": "0-001.png", "delta": "x"}])
    return str(tmp_path / "pseudo.jsonl")


def test_labels(zoo, folder, tmp_path, capsys):
    label, out = pseudo_file(tmp_path, folder), tmp_path / "out"
    site = site_of(zoo / "clip", folder, out, label)
    assert "1 of 7 pairs name a picture outside the gallery" in capsys.readouterr().out
    with serving(site) as server:

        def judge(n, verdict, **more):
            return server.ask("api/label", {"n": n, "verdict": verdict, **more})

        first = server.ask("api/label").json
        assert first["total"] == 6 and first["pair"]["delta"] == "text 0" and first["pair"]["reference"]["id"] == 0
        assert judge(0, "accept").json["pair"]["delta"] == HOSTILE
        judge(1, "edit", delta=" better ")
        judge(2, "reject")
        answer = judge(3, "skip").json
        assert answer["counts"] == {"accept": 1, "edit": 1, "reject": 1, "skip": 1} and answer["pair"]["n"] == 4
        assert [line["verdict"] for line in read_jsonl(out / "labels.jsonl")] == ["accept", "edit", "reject", "skip"]
        edited = {"verdict": "edit", "delta": "better", "was": HOSTILE, "id": "p1"}
        assert read_jsonl(out / "labels.jsonl")[1] == {"reference": "0-001.png", "target": "0-002.png"} | edited
        assert [t.delta for t in read_triplets(out / "accepted.jsonl")] == ["text 0", "better"]
        assert server.ask("api/undo", {"what": "labels"}).json == {"n": 3}
        assert server.ask("api/label").json["pair"]["n"] == 3
        judge(0, "reject")  # judged anew
        assert [t.delta for t in read_triplets(out / "accepted.jsonl")] == ["better"]
        assert server.ask("api/label?at=1").json["pair"]["label"] == {"verdict": "edit", "delta": "better"}
        for bad in ((9, "accept"), (-1, "accept"), (0, "maybe"), ("0x", "accept")):
            assert judge(*bad).status == 400
        assert judge(0, "edit", delta="  ").status == 400 and judge(0, "edit", delta=3).status == 400
    again = site_of(zoo / "clip", folder, out, label)
    assert again.notes.labels == site.notes.labels and len(again.notes.labels) == 3
    train, held, pseudo, _ = search.teaching_data(again.notes, search.images_of(again))
    assert [t["delta"] for t in train] == ["better"] and held == []
    assert [t["delta"] for t in pseudo] == ["text 3", "text 4", "text 5"], "a rejected pair is not learned"


def judged_lines(out) -> dict[tuple, tuple]:
    lines = read_jsonl(out / "labels.jsonl")
    return {(line["reference"], line["was"]): (line["verdict"], line["delta"]) for line in lines}


def test_labels_outlive_another_file_of_texts(zoo, folder, tmp_path):
    """The loop of labelling and describing anew: no judgement is lost, and none is asked for twice."""
    label, out = pseudo_file(tmp_path, folder), tmp_path / "out"

    def session(n_to_verdict: dict, label=label):
        site = site_of(zoo / "clip", folder, out, label)
        with serving(site) as server:
            for n, said in n_to_verdict.items():
                assert server.ask("api/label", {"n": n} | said).status == 200
            return site, server.ask("api/label").json

    session({0: {"verdict": "edit", "delta": "mine 0"}, 1: {"verdict": "accept"}, 2: {"verdict": "reject"}})
    wanted = {("0-000.png", "text 0"): ("edit", "mine 0"), ("0-001.png", HOSTILE): ("accept", HOSTILE)}
    wanted |= {("0-002.png", "text 2"): ("reject", "text 2")}
    assert judged_lines(out) == wanted

    # gen_deltas.py --labels: the person's texts stand in the file, the rejected pair does not
    again = str(tmp_path / "again.jsonl")
    write_jsonl(again, respected(read_jsonl(label), out / "labels.jsonl"))
    assert [line["delta"] for line in read_jsonl(again)][:3] == ["mine 0", HOSTILE, "text 3"]
    site, answer = session({2: {"verdict": "accept"}}, again)
    assert answer["counts"] == {"edit": 1, "accept": 2} and answer["pair"]["delta"] == "text 4"
    wanted[("0-003.png", "text 3")] = "accept", "text 3"
    assert judged_lines(out) == wanted
    train, _, pseudo, _ = search.teaching_data(site.notes, search.images_of(site))
    assert [line["delta"] for line in train] == ["mine 0", HOSTILE, "text 3"]
    assert [line["delta"] for line in pseudo] == ["text 4", "text 5"]

    # a picture that is away for a day, and the texts of another VDG
    (folder / "0-000.png").rename(tmp_path / "0-000.png")
    session({3: {"verdict": "skip"}}, again)
    (tmp_path / "0-000.png").rename(folder / "0-000.png")
    other = str(tmp_path / "other.jsonl")
    write_jsonl(other, [line | {"delta": "other " + line["id"]} for line in read_jsonl(label)[:-1]])
    _, answer = session({5: {"verdict": "accept"}}, other)
    assert answer["counts"] == {"accept": 1} and answer["pair"]["delta"] == "other p0"
    wanted |= {("0-005.png", "text 5"): ("skip", "text 5"), ("0-005.png", "other p5"): ("accept", "other p5")}
    assert judged_lines(out) == wanted
    accepted = [triplet.delta for triplet in read_triplets(out / "accepted.jsonl")]
    assert accepted == ["mine 0", HOSTILE, "text 3", "other p5"]

    # and back: everything is judged as it was, and a judgement is taken back by another one
    site, answer = session({0: {"verdict": "reject"}})
    assert answer["counts"] == {"reject": 2, "accept": 2, "skip": 1} and answer["pair"]["delta"] == "text 4"
    assert judged_lines(out) == wanted | {("0-000.png", "text 0"): ("reject", "text 0")}


@pytest.mark.parametrize("full", ["marks.jsonl", "wrong.jsonl", "labels.jsonl", "accepted.jsonl"])
def test_what_cannot_be_written_is_not_remembered(zoo, folder, tmp_path, monkeypatch, full):
    """A disk that takes one of the two files no more: page and files say what they said before."""
    out = tmp_path / "out"
    site = site_of(zoo / "clip", folder, out, pseudo_file(tmp_path, folder))
    mark = {"reference": 0, "texts": ["red"], "target": 1, "right": True}

    def state() -> list:
        files = [(out / name).read_bytes() for name in ("marks.jsonl", "wrong.jsonl", "labels.jsonl", "accepted.jsonl")]
        return [server.ask("api/teach").json, server.ask("api/label").json, *files, dict(site.notes.marks)]

    def refuse(path, records):
        if path.name == full and len(list(records)) != kept:
            raise OSError(28, "No space left on device", str(path))
        write_jsonl(path, records)

    with serving(site) as server:
        assert server.ask("api/mark", mark).status == 200
        assert server.ask("api/mark", mark | {"target": 2}).status == 200
        assert server.ask("api/label", {"n": 0, "verdict": "accept"}).status == 200
        before, kept = state(), len(read_jsonl(out / full))
        monkeypatch.setattr(notes_module, "write_jsonl", refuse)
        if full in ("marks.jsonl", "wrong.jsonl"):
            assert server.ask("api/mark", mark | {"right": False}).status == 400
        elif full == "labels.jsonl":
            assert server.ask("api/label", {"n": 1, "verdict": "reject"}).status == 400
        if full != "wrong.jsonl":
            what = "marks" if full == "marks.jsonl" else "labels"
            assert server.ask("api/undo", {"what": what}).status == 400
        assert state() == before
        monkeypatch.undo()
        assert server.ask("api/undo", {"what": "marks"}).json["target"] == 2
        assert server.ask("api/undo", {"what": "labels"}).json == {"n": 0}
        assert len(site.notes.marks) == 1 and site.notes.labels == {}


def test_half_a_character_is_refused_and_spoils_nothing(server, site):
    mark = {"reference": 0, "texts": ["nice \ud83d"], "target": 1, "right": True}
    for path, body in (("mark", mark), ("search", {"texts": ["\udc00"]}), ("mark", {"\ud83d": 1})):
        answer = server.ask(f"api/{path}", body)  # json.dumps writes it as \ud83d
        assert answer.status == 400 and "half a character" in answer.json["error"]
    assert server.ask("api/undo", {"what": "marks"}).json["error"] == "nothing to undo"
    assert server.ask("api/mark", mark | {"texts": ["nice \U0001f600"]}).status == 200  # a whole one, escaped as two
    assert [key[2] for key in site.notes.marks] == ["nice \U0001f600"]


# ---- teaching ----
def wait_for_teaching(server) -> dict:
    end = time.monotonic() + 300
    while (status := server.ask("api/teach").json)["state"] == "training":
        assert time.monotonic() < end
        time.sleep(0.2)
    return status


def test_teach_switch_and_back(zoo, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    site = site_of(zoo / "clip", folder, out, pseudo_file(tmp_path, folder))
    token = None
    with serving(site) as server:
        assert "wanted" in server.ask("api/teach", {}).json["error"]  # nothing to learn from
        token = server.ask("api/upload", writer_bytes(tmp_path)).json["token"]
        for reference in (0, 1, token, 4, 2, 7):
            for target in (3, 5):
                mark = {"reference": reference, "texts": ["red", "big"], "target": target, "right": True}
                assert server.ask("api/mark", mark).status == 200
        server.ask("api/label", {"n": 0, "verdict": "accept"})
        counts = encoded(monkeypatch, site.engine.model)
        assert server.ask("api/teach", {}).json["state"] == "training"
        assert "already" in server.ask("api/teach", {}).json["error"]
        assert server.ask("api/search", {"texts": ["red"]}).status == 200, "it answers while it is taught"
        status = wait_for_teaching(server)
        assert status["state"] == "done", status
        assert status["right"] == 12 and status["held_out"] == 6 and status["taught"][0]["train"] == 7
        assert status["taught"][0]["pseudo"] == 4, "six, less the accepted one and the one of a held-out mark"
        before, after = status["before"], status["after"]
        assert set(before) == set(after) == {"R@1", "R@5", "R@10"}
        assert status["using"] == (1 if sum(after.values()) > sum(before.values()) else 0)
        assert len(counts) < 10, "the gallery is not encoded again"

        # the checkpoint is an ordinary one, and the figures are its own
        taught = search.load_model(str(out / "teach-1"), "", "cpu")[0]
        held = [line for line in read_jsonl(out / "marks.jsonl") if line.get("held_out")]
        names = site.engine.gallery.of_name
        queries = [Query(str(folder / h["reference"]), ("red", "big"), names[h["reference"]]) for h in held]
        targets = [names[h["target"]] for h in held]
        assert recall_of(engine_of(taught, site.engine.gallery), queries, targets, (1, 5, 10)) == pytest.approx(after)

        server.ask("api/use", {"teach": 0})
        first = scores_of(server)
        assert server.ask("api/use", {"teach": 1}).json["using"] == 1 and scores_of(server) != first
        assert server.ask("api/use", {"teach": 7}).status == 400
    again = site_of(zoo / "clip", folder, out)  # another start answers with the taught model
    assert again.using == 1 and "taught (1)" in again.engine.name

    # what it was taught goes with it into the next teaching, so that an evaluation hears of it
    (tmp_path / "next").mkdir()
    search.teaching_command(again, tmp_path / "next", read_jsonl(out / "teach-1/train.jsonl"), [])
    known, then = (
        load_file(f"{place}/trained_on.safetensors")["pairs"] for place in (out / "teach-1", tmp_path / "next/start")
    )
    assert len(known) and torch.equal(known, then)
    with serving(again) as server:
        assert server.ask("api/use", {"teach": 0}).json["using"] == 0 and scores_of(server) == first
        again.flags["TEACH_LR"] = "abc"  # train_cir.py refuses it: its line reaches the page
        assert server.ask("api/teach", {}).json["state"] == "training"
        failed = wait_for_teaching(server)
        assert failed["state"] == "failed" and "--lr" in failed["error"] and failed["using"] == 0


def mark_all(server, references=(0, 1, 4, 2, 7), targets=(3, 5)) -> None:
    for reference in references:
        for target in targets:
            mark = {"reference": reference, "texts": ["red"], "target": target, "right": True}
            assert server.ask("api/mark", mark).status == 200


def test_teach_in_an_ordinary_folder(zoo, folder, tmp_path):
    """A ":" in the folder's name beside an upload, a copy of a taught model beside it, pictures that were moved."""
    folder, out = folder.rename(tmp_path / "trip 7:12"), tmp_path / "out 7:12"
    site = site_of(zoo / "clip", folder, out)
    with serving(site) as server:
        token = server.ask("api/upload", writer_bytes(tmp_path)).json["token"]
        mark_all(server, (token, 1, 4, 2, 7))
        for name in ("0-004.png", "0-002.png"):  # the references of two learned and of two held-out marks
            (folder / "sub").mkdir(exist_ok=True)
            (folder / name).rename(folder / "sub" / name)
        right = read_jsonl(out / "marks.jsonl")
        moved = [line for line in right if line["reference"] in ("0-004.png", "0-002.png")]
        (out / "teach-1-good").mkdir()
        (out / "teach-1-good/teach.json").write_text("{}")
        assert server.ask("api/teach").json["taught"] == []
        assert server.ask("api/teach", {}).json["state"] == "training"
        status = wait_for_teaching(server)
        assert status["state"] == "done", status
        assert status["gone"] == len(moved) == 4
        (taught,) = status["taught"]
        learned = [line for line in right if line not in moved and "held_out" not in line]
        assert taught["number"] == 1 and taught["train"] == len(learned) and taught["gone"] == 4
        assert read_jsonl(out / "teach-1/train.jsonl") == learned
        assert any(line["reference"].startswith(token) for line in learned)
        (folder / "0-003.png").unlink()
        (folder / "0-005.png").unlink()
        answer = server.ask("api/teach", {})
        assert answer.status == 400 and "10 name pictures that are gone" in answer.json["error"]


def test_a_fault_of_any_kind_ends_a_teaching(zoo, folder, tmp_path, monkeypatch, capfd):
    """A GPU out of memory is a RuntimeError. The page says it, the model of before answers, and it can go on."""
    site = site_of(zoo / "clip", folder, tmp_path / "out")
    calls, real = [], search.recall_of

    def recall_of(*given):
        calls.append(given)
        if len(calls) in (1, 3):  # before the first teaching, after the second
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB\nmore of it")
        return real(*given)

    monkeypatch.setattr(search, "recall_of", recall_of)
    with serving(site) as server:
        mark_all(server)
        first = scores_of(server)
        for trained in (False, True):
            assert server.ask("api/teach", {}).json["state"] == "training"
            status = wait_for_teaching(server)
            assert status["state"] == "failed" and status["error"] == "CUDA out of memory. Tried to allocate 3 GiB"
            assert scores_of(server) == first and server.ask("api/teach").json["using"] == 0
            assert "more of it" in capfd.readouterr().err, "what may be a fault of ours keeps its traceback"
            assert (tmp_path / "out/teach-1/model.safetensors").exists() == trained


def scores_of(server) -> list[float]:
    return [r["score"] for r in server.ask("api/search", {"reference": 9, "texts": ["red"]}).json["results"]]


def writer_bytes(tmp_path) -> bytes:
    (name,) = writer.draw(tmp_path / "mine", 1, seed=9)
    return (tmp_path / "mine" / name).read_bytes()


# ---- command line and look ----
def test_mistakes_are_one_line(folder, tmp_path):
    for flags, says in (
        ((), "--gallery is empty"),
        (("--gallery", str(tmp_path / "none")), "not found"),
        (("--gallery", str(folder), "--queries", "q.jsonl"), "--out results.jsonl"),
        (("--gallery", str(folder), "--queries", "none.csv", "--out", str(tmp_path / "r.jsonl")), "No such file"),
        (("--gallery", str(folder), "--label", str(tmp_path / "none.jsonl")), "No such file"),
    ):
        argv = [sys.executable, "search.py", *flags, "--device", "cpu", "--port", "0"]
        argv += [] if "--queries" in flags else ["--out", str(tmp_path / "out")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert "--queries" not in flags or not done.stdout  # nothing was loaded yet


@pytest.mark.parametrize("times", [1, 2, 4])
def test_ctrl_c_ends_the_server_without_a_word(zoo, folder, tmp_path, times):
    argv = [sys.executable, "search.py", "--gallery", str(folder), "--backbone", str(zoo / "clip"), "--device", "cpu"]
    argv += ["--port", "0", "--out", str(tmp_path / "out")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while "http://" not in (line := running.stdout.readline()):
            assert line, running.stderr.read()
        time.sleep(1)  # until uvicorn listens to signals
        for _ in range(times):
            running.send_signal(signal.SIGINT)
            time.sleep(0.05)
        out, error = running.communicate(timeout=60)
    assert (out, error) == ("", "") and running.returncode in (0, 130, -signal.SIGINT)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_contrast():
    """WCAG AA: 4.5 for text, 3 for the edge of a control."""
    blocks = re.findall(r":root \{(.*?)\}", (ROOT / "web/style.css").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        text = [(front, behind) for front in ("ink", "soft") for behind in ("paper", "card", "well")]
        text += [("accent", "card"), ("accent", "paper"), ("accent", "tint"), ("on-accent", "accent")]
        text += [("wrong", "card"), ("wrong", "paper"), ("wrong", "tint"), ("on-wrong", "wrong"), ("paper", "ink")]
        for front, behind, least in [(*pair, 4.5) for pair in text] + [("edge", "card", 3), ("edge", "paper", 3)]:
            high, low = sorted((luminance(colour[front]), luminance(colour[behind])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, f"{front} on {behind}"


def test_the_interface_is_documented():
    text = (ROOT / "docs/search.md").read_text()
    for name in ("gallery", "search", "upload", "mark", "undo", "label", "teach", "use"):
        assert f"/api/{name}" in text
    assert json.loads(re.search(r"```json\n(\{.*?\})\n```", text, re.S)[1])
