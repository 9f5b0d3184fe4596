"""Mining against the rule of S3.2 written out with Python floats, and the promises: same bytes, resume, exclusion."""

import json
import math
import os
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file, save_file

import mine_pairs
from common.annotations import cirr_template
from common.console import UserError
from common.files import read_json
from common.flags import constants_of, override
from common.images import Preprocess

REAL_EMBED = mine_pairs.embed
OUTPUTS = ("embeddings.npy", "names.json", "subgroups.jsonl", "pairs.jsonl", "stats.json", "subgroups.html")


def picture(path, seed, shade=0.0):
    """A smooth coloured field; pictures of one seed and other shades resemble each other."""
    base, own = (np.random.default_rng(s).uniform(0, 255, (4, 4, 3)) for s in (seed, list(path.name.encode())))
    small = base * (1 - shade) + own * shade
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize((48, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery")
    for family in range(9):
        for i in range(8):
            picture(root / f"family {family % 3}" / f"pic-{family}-{i}.png", family, 0.05 * i)
    return root


def settings(zoo, images, out, **more):
    given = {"images": images, "encoder": zoo / "resnet", "out": out, "max_score": 0.9995, "min_gap": 0.0001}
    given |= {"workers": 0, "batch": 16, "show": 3, "device": "cpu"} | more
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def mine(zoo, images, out, **more):
    """mine_pairs.main() with these flags, in this process; returns the counts it reports."""
    constants = constants_of(vars(mine_pairs))
    try:
        override(vars(mine_pairs), settings(zoo, images, out, **more))
        mine_pairs.main()
    finally:
        vars(mine_pairs).update(constants)
    stats = Path(out, "stats.json")
    return json.loads(stats.read_text())["counts"] if stats.exists() else {}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rule(rows, top_k, max_score, min_gap, group, max_shared):
    """S3.2 with exact sums (math.fsum) and sorted(): no code in common with the stage."""
    rows = [[float(v) for v in row] for row in rows]
    scores = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    accepted = []
    for anchor in range(len(rows)):
        order = sorted((j for j in range(len(rows)) if j != anchor), key=lambda j: (-scores[anchor][j], j))[:top_k]
        members, last = [anchor], None
        for j in order:
            score = scores[anchor][j]
            if len(members) < group and score <= max_score and (last is None or last - score >= min_gap):
                members.append(j)
                last = score
        if len(members) == group and all(len(set(members) & set(other)) <= max_shared for other in accepted):
            accepted.append(members)
    return accepted, scores


def stage_rule(embeddings, top_k, max_score, min_gap, group, max_shared, cuts=1, lot=10_000):
    n = len(embeddings)
    found = []
    for cut in range(cuts):
        rows = range(n * cut // cuts, n * (cut + 1) // cuts)
        neighbours = mine_pairs.nearest(embeddings, rows, top_k, lot, embeddings.device)
        found += mine_pairs.candidates(neighbours, max_score, min_gap, group)[0]
    return mine_pairs.drop_overlapping(found, max_shared)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "arguments", [(20, 0.94, 0.002, 6, 3), (20, 0.9, 0.01, 6, 0), (7, 2.0, 0.0, 4, 4), (12, 0.8, 0.05, 3, 1)]
)
def test_rule_equals_brute_force(seed, arguments, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 10, generator=generator).repeat_interleave(9, 0)
    embeddings = torch.nn.functional.normalize(centres + 0.45 * torch.randn(108, 10, generator=generator), dim=1)
    embeddings[50:54] = embeddings[5]  # copies: ties, and near duplicates
    wanted, scores = rule(embeddings.tolist(), *arguments)
    for block, cuts, lot in ((1024, 1, 108), (7, 3, 108), (7, 2, 13), (64, 1, 107)):
        monkeypatch.setattr(mine_pairs, "BLOCK", block)
        got = stage_rule(embeddings, *arguments, cuts, lot)
        assert [members for members, _ in got] == wanted
        for members, values in got:
            assert values == pytest.approx([1.0] + [scores[members[0]][m] for m in members[1:]], abs=1e-14)
    assert len(wanted) > 3


def test_gap_is_measured_from_the_last_added_and_duplicates_are_dropped():
    scores = np.array([0.99, 0.95, 0.94, 0.939, 0.9375, 0.9371, 0.93, 0.9281, 0.927, 0.9])
    # 0.94 stays; 0.939 is 0.001 below it; 0.9375 is 0.0025 below 0.94; 0.9371 goes; 0.93; 0.9281 goes; 0.927; 0.9
    assert mine_pairs.choose(scores, 0.94, 0.002, 5) == [2, 4, 6, 8, 9]
    assert mine_pairs.choose(scores, 0.94, 0.002, 2) == [2, 4]
    assert mine_pairs.choose(scores, 0.5, 0.002, 5) == []


def test_template_is_cirrs(shared):
    assert cirr_template(6) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 2), (0, 3), (0, 4)]
    records = json.loads((shared / "data/cirr/captions/cap.rc2.val.json").read_text())
    ranks = {(r["img_set"]["reference_rank"], r["img_set"]["target_rank"]) for r in records}
    assert ranks == set(cirr_template(6))


def test_end_to_end(zoo, gallery, tmp_path):
    counts = mine(zoo, gallery, tmp_path / "out")
    names = json.loads((tmp_path / "out/names.json").read_text())
    assert names == sorted(str(p.relative_to(gallery)) for p in gallery.rglob("*.png")) and len(names) == 72
    embeddings = np.load(tmp_path / "out/embeddings.npy")
    assert embeddings.dtype == np.float32 and np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)

    from transformers import ResNetModel

    encoder = Preprocess.from_folder(zoo / "resnet")
    pixels = torch.stack([encoder(Image.open(gallery / name).convert("RGB")) for name in names])
    with torch.no_grad():
        features = ResNetModel.from_pretrained(zoo / "resnet").eval()(pixel_values=pixels).pooler_output[:, :, 0, 0]
    assert np.abs(torch.nn.functional.normalize(features, dim=1).numpy() - embeddings).max() < 1e-5

    wanted, scores = rule(embeddings.tolist(), 20, 0.9995, 0.0001, 6, 3)
    subgroups, pairs = lines(tmp_path / "out/subgroups.jsonl"), lines(tmp_path / "out/pairs.jsonl")
    assert len(subgroups) > 3
    assert [s["members"] for s in subgroups] == [[names[m] for m in members] for members in wanted]
    assert [s["id"] for s in subgroups] == list(range(len(wanted)))
    expected = []
    for id, members in enumerate(wanted):
        for a, b in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 2), (0, 3), (0, 4)]:
            expected.append((len(expected), id, names[members[a]], names[members[b]]))
            assert pairs[expected[-1][0]]["score"] == pytest.approx(scores[members[a]][members[b]], abs=1e-6)
    assert [(p["id"], p["subgroup"], p["reference"], p["target"]) for p in pairs] == expected
    assert counts["images"] == counts["anchors"] == 72
    assert counts["subgroups"] == len(wanted) and counts["pairs"] == 9 * len(wanted)
    assert counts["subgroups"] + sum(n for name, n in counts.items() if name.startswith("discarded")) == 72
    assert Image.open(tmp_path / "out/subgroups.png").size[0] > 6 * 100
    page = (tmp_path / "out/subgroups.html").read_text()
    assert page.count("<img") == 18 and "<script" not in page


def test_no_grouping_pairs_random_pictures(zoo, gallery, tmp_path):
    """The ablation: as many subgroups and pairs, of pictures drawn from the whole gallery."""
    usual = mine(zoo, gallery, tmp_path / "usual")
    counts = mine(zoo, gallery, tmp_path / "random", grouping=False)
    assert counts == usual
    groups, pairs = lines(tmp_path / "random/subgroups.jsonl"), lines(tmp_path / "random/pairs.jsonl")
    assert all(len(set(group["members"])) == 6 for group in groups) and len(pairs) == 9 * len(groups)
    score = [np.mean([p["score"] for p in lines(tmp_path / name / "pairs.jsonl")]) for name in ("usual", "random")]
    assert score[0] > score[1]  # neighbours are alike, random pictures are not
    names, embeddings = read_json(tmp_path / "random/names.json"), np.load(tmp_path / "random/embeddings.npy")
    rows = embeddings[[names.index(name) for name in groups[0]["members"]]]
    assert groups[0]["scores"] == pytest.approx((rows[0] @ rows.T).tolist(), abs=1e-5)
    mine(zoo, gallery, tmp_path / "again", grouping=False)
    assert lines(tmp_path / "again/pairs.jsonl") == pairs


def test_ranks_and_blocks_change_no_byte(zoo, gallery, tmp_path):
    mine(zoo, gallery, tmp_path / "one")
    mine(zoo, gallery, tmp_path / "blocks", block=5)
    run_ranks(2, lambda: (mine(zoo, gallery, tmp_path / "two"), 0)[1])
    run_ranks(3, lambda: (mine(zoo, gallery, tmp_path / "three", at_once=5), 0)[1])  # nor how many are searched at once
    for name in OUTPUTS:
        for other in ("blocks", "two", "three"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / other / name).read_bytes(), (other, name)


def test_ranks_wait_for_the_one_that_writes(zoo, gallery, tmp_path, monkeypatch):
    """One that leaves ends the process group under the rank that still works."""
    real = mine_pairs.write_results
    monkeypatch.setattr(mine_pairs, "write_results", lambda *given: time.sleep(2) or real(*given))

    def work():
        mine(zoo, gallery, tmp_path / "out")
        return (tmp_path / "out/subgroups.html").exists()

    assert run_ranks(2, work) == [True, True]


def embedded(monkeypatch, fail_after=math.inf):
    """Records the names that are embedded; raises after that many batches, as a kill would."""
    seen = []

    def embed(encoder, images, names, *rest):
        if len(seen) // 16 >= fail_after:
            raise KeyboardInterrupt
        seen.extend(names)
        return REAL_EMBED(encoder, images, names, *rest)

    monkeypatch.setattr(mine_pairs, "embed", embed)
    return seen


def test_cache_is_reused_only_while_it_is_true(zoo, gallery, tmp_path, monkeypatch):
    copy, out = tmp_path / "gallery", tmp_path / "out"
    shutil.copytree(gallery, copy)
    fresh = mine(zoo, copy, out)
    before = {name: (out / name).read_bytes() for name in OUTPUTS}
    seen = embedded(monkeypatch)
    assert mine(zoo, copy, out) == fresh and seen == []
    mine(zoo, copy, out, max_score=0.999)  # another rule, same embeddings
    assert seen == []

    picture(copy / "family 0/pic-0-3.png", 99)  # same name, other content
    mine(zoo, copy, out)
    assert len(seen) == 72
    shutil.copy(gallery / "family 0/pic-0-3.png", copy / "family 0/pic-0-3.png")
    seen.clear()
    damaged = bytearray((out / "embeddings.npy").read_bytes())
    damaged[-1] ^= 1
    mine(zoo, copy, out)
    assert len(seen) == 72 and before == {name: (out / name).read_bytes() for name in OUTPUTS}
    seen.clear()
    (out / "embeddings.npy").write_bytes(damaged)
    mine(zoo, copy, out)
    assert len(seen) == 72
    seen.clear()
    other = tmp_path / "zoo/resnet"
    shutil.copytree(zoo / "resnet", other)
    weights = load_file(other / "model.safetensors")
    weights["resnet.embedder.embedder.convolution.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="written with other settings"):
        mine(zoo, copy, out, encoder=other)
    assert len(seen) == 0


def everything(folder):
    """Path and bytes of each file; a run that was refused may only have locked the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_what_another_folder_or_encoder_gave_is_not_overwritten(zoo, gallery, tmp_path, monkeypatch):
    """The usual --out is one for all: hours of embeddings were overwritten without a word."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(gallery, copy)
    embedded(monkeypatch, fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        mine(zoo, gallery, out)
    seen = embedded(monkeypatch)
    for finished in (False, True):  # what a killed run embedded is not lost either
        before = everything(out)
        where = rf"{out} was written with other settings \(images: .*{gallery}. there, .*{copy}. now\); .*another --out"
        with pytest.raises(UserError, match=f"^{where}.* delete {out}/settings.json$"):
            mine(zoo, copy, out)
        with pytest.raises(UserError, match="other settings .encoder: .*resnet. there, .*clip. now; encoder_sha256: "):
            mine(zoo, gallery, out, encoder=zoo / "clip")
        with pytest.raises(UserError, match="other settings .dtype: .fp32. there, .bf16. now; "):
            mine(zoo, gallery, out, dtype="bf16")
        run_ranks(2, lambda: refused(lambda: mine(zoo, copy, out)))
        assert everything(out) == before and len(seen) == (24 if finished else 0)
        mine(zoo, gallery, out)

    # the same pictures by a link, the same encoder elsewhere, more pictures, fewer
    seen.clear()
    (tmp_path / "link").symlink_to(gallery)
    shutil.copytree(zoo / "resnet", tmp_path / "zoo/resnet")
    mine(zoo, tmp_path / "link", out, encoder=tmp_path / "zoo/resnet")
    mine(zoo, gallery, out)
    assert seen == []
    mine(zoo, copy, tmp_path / "new")
    for change in (lambda: picture(copy / "more.png", 5), (copy / "more.png").unlink):
        change()
        mine(zoo, copy, tmp_path / "new")
    assert (tmp_path / "new/embeddings.npy").read_bytes() == (out / "embeddings.npy").read_bytes()

    # a folder that moved, once the file is gone; one of an earlier version, which tells nothing
    copy.rename(tmp_path / "moved")
    seen.clear()
    (tmp_path / "new/settings.json").unlink()
    mine(zoo, tmp_path / "moved", tmp_path / "new")
    assert seen == [] and read_json(tmp_path / "new/settings.json")["images"] == str(tmp_path / "moved")


def refused(work) -> str:
    with pytest.raises(UserError, match="other settings") as fault:
        work()
    return str(fault.value)


def test_where_nothing_was_embedded_another_folder_is_welcome(zoo, gallery, tmp_path, monkeypatch):
    embedded(monkeypatch, fail_after=0)
    with pytest.raises(KeyboardInterrupt):
        mine(zoo, gallery, tmp_path / "out")
    embedded(monkeypatch)
    picture(tmp_path / "g/x.png", 0)
    assert mine(zoo, tmp_path / "g", tmp_path / "out")["anchors"] == 1


def test_killed_while_embedding(zoo, gallery, tmp_path, monkeypatch):
    mine(zoo, gallery, tmp_path / "whole")
    seen = embedded(monkeypatch, fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        mine(zoo, gallery, tmp_path / "out")
    assert len(seen) == 48
    (tmp_path / "out/embeddings.parts/000000000-torn.npy.tmp").write_bytes(b"torn")
    embedded(monkeypatch)
    run_ranks(2, lambda: (mine(zoo, gallery, tmp_path / "out"), 0)[1])  # goes on with another number of ranks
    assert not (tmp_path / "out/embeddings.parts").exists()
    for name in OUTPUTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    embedded(monkeypatch, fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        mine(zoo, gallery, tmp_path / "again")
    seen = embedded(monkeypatch)
    mine(zoo, gallery, tmp_path / "again")
    assert len(seen) == 72 - 48


def test_exclusion_by_name_and_by_content(zoo, gallery, tmp_path, capsys):
    bench = tmp_path / "bench"
    (bench / "dev").mkdir(parents=True)
    shutil.copy(gallery / "family 0/pic-0-0.png", bench / "dev/renamed.png")  # content
    Image.open(gallery / "family 1/pic-1-1.png").save(bench / "dev/pic-1-1.jpg")  # re-encoded: by name
    files = {
        "split.json": {"pic-2-0": "./dev/2/pic-2-0.png"},
        "list.json": ["pic-3-0", "pic-3-1"],
        "cap.json": [
            {
                "pairid": 1,
                "reference": "pic-4-0",
                "target_hard": "pic-4-1",
                "target_soft": {"pic-4-2": 1.0},
                "caption": "pic-8-0",
                "img_set": {"id": 1, "members": ["pic-4-3"], "reference_rank": 0},
            }
        ],
    }
    for name, value in files.items():
        (bench / name).write_text(json.dumps(value))
    (bench / "triplets.jsonl").write_text('{"reference": "a/pic-5-0.webp", "target": "pic-5-1", "delta": "pic-8-1"}\n')
    (bench / "names.txt").write_text("x/pic-6-0.jpg\n\npic-6-1\n")
    sources = [bench / "dev", *(bench / name for name in files), bench / "triplets.jsonl", bench / "names.txt"]
    counts = mine(zoo, gallery, tmp_path / "out", exclude=",".join(map(str, sources)))
    gone = {"0-0", "1-1", "2-0", "3-0", "3-1", "4-0", "4-1", "4-2", "4-3", "5-0", "5-1", "6-0", "6-1"}
    names = json.loads((tmp_path / "out/names.json").read_text())
    assert {Path(name).stem for name in names} == {f"pic-{f}-{i}" for f in range(9) for i in range(8)} - {
        f"pic-{name}" for name in gone
    }
    assert counts["images"] == 72 and counts["anchors"] == 72 - len(gone)
    assert counts["excluded by name"] == len(gone) - 1 and counts["excluded by content"] == 1
    mined = {name for pair in lines(tmp_path / "out/pairs.jsonl") for name in (pair["reference"], pair["target"])}
    assert mined <= set(names)
    assert "family 0/pic-0-0.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="are excluded"):
        mine(zoo, gallery, tmp_path / "none", exclude=gallery)
    (tmp_path / "empty.json").write_text('[{"caption": "a dress"}]')
    for source, words in ((tmp_path / "nowhere", "not found"), (tmp_path / "empty.json", "names no picture")):
        with pytest.raises(UserError, match=words):
            mine(zoo, gallery, tmp_path / "none", exclude=source)


@pytest.mark.parametrize("disk, listed", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_excludes_however_it_was_saved(zoo, tmp_path, capsys, disk, listed, encoding):
    """With a byte order mark, as Notepad writes it; with accents apart, as macOS does; with paths of Windows."""
    for name in ("M\u00fctze", "caf\u00e9", "hat", "scarf"):
        picture(tmp_path / "g" / f"{unicodedata.normalize(disk, name)}.png", 0)
    text = unicodedata.normalize(listed, "M\u00fctze.png\r\nC:\\dev\\caf\u00e9.jpg\r\n\r\n hat \r\n")
    (tmp_path / "names.txt").write_bytes(text.encode(encoding))
    mine(zoo, tmp_path / "g", tmp_path / "out", check="true", exclude=tmp_path / "names.txt")
    assert "4 expected, 4 present, 0 unreadable, 0 missing; 3 excluded by name" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, encoding, words",
    [("m\u00fctze", "latin-1", "byte 1"), ("hat", "utf-16", "byte 0"), ("hat", "utf-16-le", "zero bytes")],
)
def test_a_list_in_another_encoding_stops(zoo, tmp_path, text, encoding, words):
    picture(tmp_path / "g/x.png", 0)
    (tmp_path / "names.txt").write_bytes(f"{text}.png\n".encode(encoding))
    with pytest.raises(UserError, match=f"^--exclude .*names.txt: .*{words}.*UTF-8$"):
        mine(zoo, tmp_path / "g", tmp_path / "out", check="true", exclude=tmp_path / "names.txt")


def test_pictures_with_odd_names_are_left_out_and_exclude_by_content(zoo, gallery, tmp_path):
    copy, bench = tmp_path / "gallery", tmp_path / "bench"
    shutil.copytree(gallery, copy)
    bench.mkdir()
    for i, name in enumerate((b"M\374tze.png", b"b: rot.png")):
        for folder in (copy, bench):  # of the benchmark they still are known
            shutil.copy(gallery / f"family 0/pic-0-{i}.png", os.path.join(os.fsencode(folder), name))
    mine(zoo, gallery, tmp_path / "plain")
    counts = mine(zoo, copy, tmp_path / "out")
    assert (counts["images"], counts["unreadable"], counts["anchors"]) == (74, 2, 72)
    assert (tmp_path / "out/unreadable.txt").read_text().count("rename it") == 2
    for name in ("embeddings.npy", "pairs.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert mine(zoo, gallery, tmp_path / "less", exclude=bench)["excluded by content"] == 2


def test_circo_ids_meet_coco_names():
    assert "000000012345" in set(mine_pairs.names_in([{"id": 7, "reference_img_id": 12345, "gt_img_ids": [1]}]))


@pytest.mark.parametrize("count, alike", [(1, False), (2, False), (5, False), (30, True)])
def test_small_and_identical_galleries(zoo, tmp_path, capsys, count, alike):
    for i in range(count):
        picture(tmp_path / "g" / f"{i}.png", 0 if alike else i)
    counts = mine(zoo, tmp_path / "g", tmp_path / "out")
    assert counts["subgroups"] == counts["pairs"] == 0 and counts["anchors"] == count
    assert (tmp_path / "out/pairs.jsonl").read_text() == (tmp_path / "out/subgroups.jsonl").read_text() == ""
    assert np.load(tmp_path / "out/embeddings.npy").shape == (count, 32)
    assert (tmp_path / "out/subgroups.png").exists() and "no subgroup" in capsys.readouterr().out
    if alike:
        assert counts["discarded: all neighbours are near duplicates"] == count


def test_no_pictures(zoo, tmp_path):
    (tmp_path / "g").mkdir()
    with pytest.raises(UserError, match="holds no"):
        mine(zoo, tmp_path / "g", tmp_path / "out")


@pytest.mark.parametrize("value, word", [(0.0, "zero"), (math.nan, "NaN"), (math.inf, "infinite")])
def test_useless_embedding_is_named(zoo, gallery, tmp_path, monkeypatch, value, word):
    real = mine_pairs.Encoder.forward

    def forward(self, pixels):
        features = real(self, pixels)
        features[3] = value
        return features

    monkeypatch.setattr(mine_pairs.Encoder, "forward", forward)
    with pytest.raises(UserError, match=f"pic-0-3.png: its embedding is .*{word}"):
        mine(zoo, gallery, tmp_path / "out")


def test_clip_folder(zoo, gallery, tmp_path):
    from transformers import CLIPModel

    mine(zoo, gallery, tmp_path / "out", encoder=zoo / "clip")
    name = json.loads((tmp_path / "out/names.json").read_text())[0]
    pixels = Preprocess.from_folder(zoo / "clip")(Image.open(gallery / name).convert("RGB"))[None]
    model = CLIPModel.from_pretrained(zoo / "clip").eval()
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
    wanted = torch.nn.functional.normalize(wanted, dim=0).numpy()
    assert np.abs(np.load(tmp_path / "out/embeddings.npy")[0] - wanted).max() < 1e-5


def test_wrong_encoders_are_one_line(zoo, gallery, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(zoo / "resnet", broken)
    weights = load_file(broken / "model.safetensors")
    del weights["resnet.embedder.embedder.convolution.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    torn = tmp_path / "torn"
    shutil.copytree(zoo / "resnet", torn)
    (torn / "model.safetensors").write_bytes((zoo / "resnet/model.safetensors").read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for encoder, words in (
        (broken, "weights are missing"),
        (torn, "damaged"),
        (zoo / "llama", "llama model; wanted a ResNet or CLIP"),
        (tmp_path / "empty", "save_pretrained"),
        (tmp_path / "nowhere", "--encoder .*nowhere cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            mine(zoo, gallery, tmp_path / "out", encoder=encoder)


def test_other_mistakes(zoo, gallery, tmp_path, capsys):
    mine(zoo, gallery, tmp_path / "out", check="true")
    assert "72 expected, 72 present" in capsys.readouterr().out and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--exclude nowhere: not found"):
        mine(zoo, gallery, tmp_path / "out", check="true", exclude="nowhere")
    with pytest.raises(UserError, match="all 72 pictures of .* are excluded; check --exclude"):
        mine(zoo, gallery, tmp_path / "out", check="true", exclude=gallery)
    copy = tmp_path / "gallery"
    shutil.copytree(gallery, copy)
    (copy / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 unreadable"):
        mine(zoo, copy, tmp_path / "out", check="true")
    mine(zoo, copy, tmp_path / "out")  # a folder of one's own: left out, counted and listed
    assert "bad.png: is empty" in (tmp_path / "out" / "unreadable.txt").read_text()
    counts = read_json(tmp_path / "out" / "stats.json")["counts"]
    assert (counts["images"], counts["unreadable"], counts["anchors"]) == (73, 1, 72)
    with pytest.raises(UserError, match="--out .* is in --images .* read next time; move --out"):
        mine(zoo, copy, copy / "out")
    for flag in ("workers", "max_shared"):
        with pytest.raises(UserError, match=f"--{flag} -1: wanted 0 or more"):
            mine(zoo, gallery, tmp_path / "out", **{flag: -1})
    with pytest.raises(UserError, match="group of 3 or more"):
        mine(zoo, gallery, tmp_path / "out", top_k=4)


def test_a_plan_says_what_so_many_pictures_take(monkeypatch, capsys):
    monkeypatch.setattr(mine_pairs, "PLAN", 100_000_000)
    mine_pairs.main()
    told = capsys.readouterr().out
    assert "762.9 GiB  embeddings on disk" in told  # 1e8 x 2048 x 4 bytes
    hours = 2 * 1e16 * 2048 / (102_436**2 * 2048 / 0.094) / 3600  # each pair twice
    assert f"{hours:.3f} h    search on 1 GPU" in told and f"{hours / 64:.3f} h    search on 64 GPUs" in told
