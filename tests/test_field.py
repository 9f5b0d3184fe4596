"""Yardsticks of others: readers and metrics against a brute-force oracle, forwards against Hugging Face's modules."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from ranks import run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import eval_cir
import train_cir
from common import audit as audits
from common import streams
from common.annotations import Benchmark, read_circo, read_cirr
from common.console import UserError
from common.encoding import Compute, TrainingImages
from common.files import read_json, read_jsonl, save_folder
from common.flags import constants_of, override
from common.images import ImageStore, Preprocess
from common.queries import read_ids, reversed_queries, select_queries
from common.retrieval import NEVER, Ranks, best_rank, embed_ways, index, measure, recalls, soft_recall, whole_query
from common.sessions import read_sessions
from common.submission import score, score_circo, score_submission
from common.towers import siglip_spelling
from common.triplets import Triplet

DEFAULTS = {stage: constants_of(vars(stage)) for stage in (eval_cir, train_cir)}


def run_flags(monkeypatch, stage, *argv) -> None:
    """main() by its command line; the constants are put back after the test."""
    for name, value in DEFAULTS[stage].items():
        monkeypatch.setattr(stage, name, value)
    override(vars(stage), [*map(str, argv), "--device", "cpu", "--workers", "1"])
    stage.main()


# ---- soft targets ----
def soft_by_hand(order: list[str], query: Triplet, k: int) -> float:
    """The best value among the first k of the subset; order: all images, best first, the reference among them."""
    within = [name for name in order if name in query.members and name != query.reference][:k]
    return max([0.0, *(value for name, value in query.extra["target_soft"].items() if name in within)])


def random_cirr(seed: int) -> tuple[Benchmark, torch.Tensor, torch.Tensor]:
    """Small integers as embeddings: equal scores are common. Soft targets lie in the subset, outside, or are absent."""
    draw = random.Random(seed)
    names, queries = [f"n{i}" for i in range(30)], []
    for i in range(20):
        members = draw.sample(names, 6)
        soft = {name: draw.choice([1.0, 0.5, 0.2, -1.0]) for name in draw.sample(names, draw.randint(1, 4))}
        soft |= {members[1]: 1.0} if draw.random() < 0.8 else {}
        queries.append(Triplet(members[0], members[1], "words", i, tuple(members), extra={"target_soft": soft}))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-1, 2, (30, 3), generator=generator).float()
    wanted = torch.randint(-1, 2, (20, 3), generator=generator).float()
    return Benchmark("cirr", "val", None, tuple(queries), tuple(names), None), wanted, images


def test_soft_recall_equals_counting_by_hand():
    parts = 0
    for seed in range(30):
        benchmark, wanted, images = random_cirr(seed)
        found = recalls(measure(wanted, images, index(benchmark, True)))
        scores = (wanted @ images.T).tolist()
        orders = [[benchmark.gallery[j] for j in sorted(range(30), key=lambda j: (-row[j], j))] for row in scores]  # noqa: B023
        for k in (1, 2, 3):
            values = [soft_by_hand(order, q, k) for order, q in zip(orders, benchmark.queries, strict=True)]
            assert found[f"soft-Rs@{k}"] == pytest.approx(100 * sum(values) / 20), (seed, k)
            parts += sum(0 < value < 1 for value in values)
    assert parts > 50  # half-right answers are counted as such
    for ranks, value in ((1, 0.0), (2, 20.0)):  # what is marked wrong takes nothing away
        assert soft_recall(torch.tensor([[ranks, 1]]), torch.tensor([[-1.0, value / 100]]), 1) == pytest.approx(value)
    assert soft_recall(torch.tensor([[1]]), torch.tensor([[-1.0]]), 1) == 0


def test_soft_recall_on_the_real_annotations(shared, tmp_path):
    """A ranking of the real CIRR val by random features, and the same as files of the server."""
    benchmark = read_cirr(shared / "data" / "cirr", "val", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(len(benchmark.gallery), 8, generator=generator), dim=1)
    wanted = torch.nn.functional.normalize(torch.randn(len(benchmark.queries), 8, generator=generator), dim=1)
    found = recalls(measure(wanted, images, index(benchmark, True)))
    values = {k: 0.0 for k in (1, 2, 3)}
    record = {"version": "rc2", "metric": "recall_subset"}
    rows = {name: row for name, row in zip(benchmark.gallery, images.double().numpy(), strict=True)}
    for query, row in zip(benchmark.queries, wanted.double().numpy(), strict=True):
        order = sorted(set(query.members) - {query.reference}, key=lambda name: -float(row @ rows[name]))  # noqa: B023
        record[str(query.id)] = order[:3]
        for k in values:
            values[k] += soft_by_hand(order, query, k)
    (tmp_path / "subset.json").write_text(json.dumps(record, separators=(",", ":")))
    scored = score_submission(str(tmp_path / "subset.json"), benchmark, "recall_subset")
    for k, value in values.items():
        assert found[f"soft-Rs@{k}"] == scored[f"soft-Rs@{k}"] == pytest.approx(100 * value / 4181)
        assert scored[f"Rs@{k}"] == found[f"Rs@{k}"] != found[f"soft-Rs@{k}"]


def test_reversed_queries_have_no_soft_targets():
    benchmark = reversed_queries(random_cirr(0)[0], "")
    assert not any("target_soft" in query.extra for query in benchmark.queries)
    assert index(benchmark, True).soft is None


# ---- a list of queries ----
def test_only_listed_queries_are_measured(tmp_path):
    benchmark = random_cirr(0)[0]
    for name, text in (("a.json", "[3, 7, 11]"), ("b.json", '["3", "7", "11"]'), ("c.txt", "7\n\n3 \n11\n")):
        (tmp_path / name).write_text(text)
        (kept,), note = select_queries([benchmark], str(tmp_path / name))
        assert [query.id for query in kept.queries] == [3, 7, 11] and kept.gallery == benchmark.gallery
        assert "3 of 20 queries" in note and name in note
    other = dataclasses.replace(benchmark, queries=(dataclasses.replace(benchmark.queries[0], id="dress-0"),))
    kept, note = select_queries([benchmark, other], str(tmp_path / "a.json"))
    assert [len(one.queries) for one in kept] == [3] and "3 of 21" in note


def test_an_id_of_several_queries_chooses_none(tmp_path):
    benchmark = random_cirr(0)[0]
    first, second, third, *others = benchmark.queries
    twice = dataclasses.replace(benchmark, queries=(first, dataclasses.replace(second, id=third.id), third, *others))
    (tmp_path / "ids").write_text(json.dumps([first.id, third.id]))
    with pytest.raises(UserError, match=f"--queries .*: 1 ids name several queries .* first '{third.id}';"):
        select_queries([twice], str(tmp_path / "ids"))
    for text in (json.dumps([first.id]), f"\ufeff{first.id}\r\n"):
        (tmp_path / "ids").write_text(text)
        assert len(select_queries([twice], str(tmp_path / "ids"))[0][0].queries) == 1


@pytest.mark.parametrize(
    "text, words",
    [("[3, 99]", "1 of 2 ids are not queries"), ("3\n3", "stand twice"), ("", "lists no query"), ("[]", "no query")]
    + [('{"3": 1}', "JSON list"), ("[true]", "JSON list"), ("[[3]]", "JSON list")],
)
def test_a_wrong_list_of_queries_stops(tmp_path, text, words):
    (tmp_path / "ids").write_text(text)
    with pytest.raises(UserError, match=f"--queries .*{words}"):
        select_queries([random_cirr(0)[0]], str(tmp_path / "ids"))
    with pytest.raises(UserError, match="--queries .*no such file"):
        read_ids(str(tmp_path / "gone"))


# ---- audit ----
def brute_ranks(scores: np.ndarray, benchmark: Benchmark) -> list[int]:
    """Rank of each target by Python's sort, the reference left out."""
    found = []
    for row, query in zip(scores.tolist(), benchmark.queries, strict=True):
        order = [name for _, name in sorted(zip([-x for x in row], benchmark.gallery, strict=True))]
        order.remove(query.reference)
        found.append(order.index(query.target) + 1)
    return found


def drawn_cirr(root, subgroups: int = 4):
    """CIRR's layout with random pictures: subgroups of six, two queries each."""
    draw, table, records = random.Random(5), {}, []
    (root / "img_raw" / "val").mkdir(parents=True)
    for g in range(subgroups):
        members = [f"val-{g}-img{i}" for i in range(6)]
        for i, name in enumerate(members):
            table[name] = f"./val/{name}.png"
            pixels = np.random.default_rng(6 * g + i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 30)).save(root / "img_raw" / "val" / f"{name}.png")
        for i in range(2):
            text = " ".join(draw.choice(["red", "a", "hat", "dog"]) for _ in range(3))
            record = {"pairid": 2 * g + i, "reference": members[i], "target_hard": members[i + 2], "caption": text}
            record |= {"target_soft": {members[i + 2]: 1.0, members[5]: 0.5}}
            record["img_set"] = {"id": g, "members": members, "reference_rank": i, "target_rank": i + 2}
            records.append(record)
    for folder, name, value in (("captions", "cap", records), ("image_splits", "split", table)):
        (root / "cirr" / folder).mkdir(parents=True)
        (root / "cirr" / folder / f"{name}.rc2.val.json").write_text(json.dumps(value))
    return root / "cirr"


def checkpoint_of(folder, **build):
    """A checkpoint of train_cir.py whose trained weights are moved from where they started."""
    torch.manual_seed(3)
    model = train_cir.build_cir(**build)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    constants = {"FROZEN_SHA256": train_cir.frozen_sha256(model)}
    config = {"stage": "cir", "build": build, "tau": 0.01, "constants": constants}
    save_folder(str(folder), {"model.safetensors": train_cir.get_trained(model)}, {"config.json": config})
    return model.eval()


@pytest.mark.parametrize("kind", ["combiner", "blip_tdm"])
@torch.no_grad()
def test_audit_equals_one_query_at_a_time(kind, zoo, tmp_path, monkeypatch, capsys):
    root = drawn_cirr(tmp_path / "world")
    backbone = str(zoo / ("blip" if kind == "blip_tdm" else "clip"))
    model = checkpoint_of(tmp_path / "cir", model=kind, backbone=backbone)
    flags = ["--root", root, "--official", "false", "--show", 1, "--out", tmp_path / "out"]
    run_flags(monkeypatch, eval_cir, "--checkpoint", tmp_path / "cir", "--audit", "true", *flags)
    record, lines = read_json(tmp_path / "out/metrics.json"), read_jsonl(tmp_path / "out/found.jsonl")
    printed = capsys.readouterr().out

    # the same one query at a time, with the modules themselves
    benchmark = read_cirr(str(root), "val")
    plain = train_cir.build_cir("blip_tdm" if kind == "blip_tdm" else "sum", backbone).eval()
    normal = torch.nn.functional.normalize
    pixels = {name: model.preprocess(benchmark.images.open(name))[None] for name in benchmark.gallery}
    tokens = {name: model.tokens(x) for name, x in pixels.items()}
    images = torch.cat([model.target(tokens[name]) for name in benchmark.gallery])
    rows = {way: [] for way in ("whole", *audits.HALVES, "frozen sum")}
    for q in benchmark.queries:
        seen, text = tokens[q.reference], normal(plain.text([q.delta], "cpu"), dim=1)
        rows["whole"].append(model.compose(seen, [q.delta]))
        rows["frozen image"].append(model.target(seen))
        rows["frozen text"].append(text)
        rows["frozen sum"].append(normal(model.target(seen) + text, dim=1))
        rows["trained image"].append(model.compose(seen, [""]))
        without = model.text([q.delta], "cpu") if kind == "blip_tdm" else None
        none = torch.zeros_like(seen)
        rows["trained text"].append(model.compose(none, [q.delta]) if without is None else normal(without, dim=1))
    ranks = {way: brute_ranks((torch.cat(c) @ images.T).numpy(), benchmark) for way, c in rows.items()}
    assert len({str(found) for found in ranks.values()}) == 6  # six ways, six orders
    assert [line["rank"] for line in lines] == ranks.pop("whole")
    assert [line["alone"] for line in lines] == [{w: ranks[w][i] for w in lines[0]["alone"]} for i in range(8)]

    # shares and the rest, by counting
    found = record["audit"]
    assert found["rule"] == audits.RULE and "one modality" in printed
    for k in (1, 5, 10):
        share = found["share"][str(k)]
        assert {way: share[way] for way in ranks} == {way: 12.5 * sum(r <= k for r in ranks[way]) for way in ranks}
        hit = [any(ranks[way][i] <= k for way in audits.HALVES) for i in range(8)]
        assert share["one modality"] == 12.5 * sum(hit)
        rest = [line["rank"] for line, answered in zip(lines, hit, strict=True) if not answered]
        assert found["rest"][str(k)]["queries"] == len(rest)
        if rest:
            percent = 100 * sum(r <= 5 for r in rest) / len(rest)
            assert found["rest"][str(k)]["metrics"]["R@5"] == pytest.approx(percent)
        else:
            assert found["rest"][str(k)]["metrics"] == {}
    assert 0 < found["rest"]["1"]["queries"] < 8


def test_the_rest_is_every_metric_of_its_queries():
    draw = torch.Generator().manual_seed(0)
    ranks = torch.randint(1, 30, (40,), generator=draw)
    truths = torch.stack([ranks, *(torch.randint(1, 90, (40,), generator=draw) for _ in range(3))], dim=1)
    truths[::3, 2:] = -1
    alone = {way: torch.randint(1, 25, (40,), generator=draw) for way in audits.HALVES}
    found = audits.audit([audits.Audited("", Ranks(ranks, truths=truths), alone)], "circo")
    for k in (1, 5, 10):
        left = [i for i in range(40) if all(int(alone[way][i]) > k for way in audits.HALVES)]
        total = 0.0
        for i in left:
            right = sorted(int(r) for r in truths[i] if r > 0)
            total += sum((n + 1) / r for n, r in enumerate(right) if r <= 10) / min(10, len(right))
        assert found["rest"][str(k)]["metrics"]["mAP@10"] == pytest.approx(100 * total / len(left))
    assert best_rank(Ranks(ranks, truths=torch.tensor([[9, 4, -1]]))).tolist() == [4]
    assert best_rank(Ranks(ranks, truths=torch.tensor([[-1, -1, -1]]))).tolist() == [NEVER]


def test_a_category_without_a_rest_gives_no_mean():
    easy, hard = torch.ones(3), torch.full((3,), 20)
    parts = [audits.Audited("", Ranks(hard), dict.fromkeys(audits.HALVES, ranks)) for ranks in (easy, hard)]
    found = audits.audit(parts, "fashioniq")
    assert found["rest"]["1"] == {"queries": 3, "metrics": {}} and found["share"]["1"]["one modality"] == 50


@pytest.mark.parametrize("baseline, ways", [("sum", 3), ("image", 0)])
def test_audit_of_a_plain_backbone(baseline, ways, zoo, tmp_path, monkeypatch):
    root = drawn_cirr(tmp_path / "world")
    (tmp_path / "ids.txt").write_text("1\n6\n")
    flags = ["--root", root, "--official", "false", "--show", 0, "--out", tmp_path / "out", "--audit"]
    flags += ["--baseline", baseline, "--backbone", zoo / "clip", "--queries", tmp_path / "ids.txt"]
    if not ways:
        with pytest.raises(UserError, match="--audit asks forward queries.*--baseline sum"):
            run_flags(monkeypatch, eval_cir, *flags)
        return
    run_flags(monkeypatch, eval_cir, *flags)
    lines, record = read_jsonl(tmp_path / "out/found.jsonl"), read_json(tmp_path / "out/metrics.json")
    assert [line["id"] for line in lines] == [1, 6] and len(lines[0]["alone"]) == ways
    assert all(line["alone"]["frozen sum"] == line["rank"] for line in lines)
    assert "only the 2 of 8 queries that" in record["protocol"] and record["parts"][0]["gallery"] == 24


# ---- CIRCO ----
ASPECTS = ("cardinality", "addition", "viewpoint")


def drawn_circo(root, labelled: bool = True, queries: int = 7) -> Benchmark:
    draw, ids = random.Random(1), list(range(100, 170))
    (root / "annotations").mkdir(parents=True)
    (root / "COCO2017_unlabeled/annotations").mkdir(parents=True)
    listing = root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    listing.write_text(json.dumps({"images": [{"id": i} for i in ids]}))
    records = []
    for i in range(queries):
        truths = draw.sample(ids, draw.randint(1, 6))
        record = {"id": i, "reference_img_id": draw.choice(ids), "relative_caption": "words", "shared_concept": "c"}
        if labelled:
            aspects = draw.sample(ASPECTS, draw.randint(0, 2))
            record |= {"target_img_id": truths[0], "gt_img_ids": truths, "semantic_aspects": aspects}
        records.append(record)
    split = "val" if labelled else "test"
    (root / f"annotations/{split}.json").write_text(json.dumps(records))
    return read_circo(str(root), split, str(root))


def circo_file(path, benchmark: Benchmark) -> dict[str, list[int]]:
    """A file in the server's format that finds some right answers; written at path."""
    draw, ids = random.Random(2), [int(name) for name in benchmark.gallery]
    record = {str(query.id): draw.sample(ids, 50) for query in benchmark.queries}
    path.write_text(json.dumps(record))
    return record


def test_circo_file_is_scored_as_by_hand(tmp_path):
    benchmark = drawn_circo(tmp_path / "circo")
    record = circo_file(tmp_path / "p.json", benchmark)
    found, by_aspect = score_circo(str(tmp_path / "p.json"), benchmark)
    truths = json.loads((tmp_path / "circo/annotations/val.json").read_text())

    def precision(query: dict, k: int) -> float:
        right, total = 0, 0.0
        for place, i in enumerate(record[str(query["id"])][:k], 1):
            if i in query["gt_img_ids"]:
                right += 1
                total += right / place
        return total / min(k, len(query["gt_img_ids"]))

    for k in (5, 10, 25, 50):
        assert found[f"mAP@{k}"] == pytest.approx(100 * sum(precision(q, k) for q in truths) / 7, rel=1e-6)
        hits = sum(q["target_img_id"] in record[str(q["id"])][:k] for q in truths)
        assert found[f"R@{k}"] == pytest.approx(100 * hits / 7)
    assert set(by_aspect) == set(ASPECTS)
    for aspect, value in by_aspect.items():
        mine = [precision(q, 10) for q in truths if aspect in q["semantic_aspects"]]
        assert value == pytest.approx(100 * sum(mine) / len(mine), rel=1e-6)


def test_a_wrong_circo_file_is_refused(tmp_path):
    benchmark, path = drawn_circo(tmp_path / "circo"), tmp_path / "p.json"
    record = circo_file(path, benchmark)
    for change, words in (
        (record | {"3": record["3"][:49]}, "query 3: 49 image ids, wanted 50"),
        (record | {"3": record["3"][:49] * 2}, "query 3: 98 image ids"),
        (record | {"3": record["3"][:49] + record["3"][:1]}, "query 3: an image id stands twice"),
        (record | {"3": record["3"][:49] + [5]}, "query 3: 000000000005 is not in the gallery"),
        (record | {"3": record["3"][:49] + ["105"]}, "wanted a list of image ids"),
        (record | {"9": record["3"]}, "has unknown 1 of the 7 ids"),
        ({k: v for k, v in record.items() if k != "2"}, "lacks 1 of the 7 ids"),
        ([record], "wanted an object"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(UserError, match=words):
            score_circo(str(path), benchmark)


def test_files_of_a_hidden_split_are_looked_through(tmp_path, monkeypatch, capsys):
    benchmark = drawn_circo(tmp_path / "circo", labelled=False)
    record = circo_file(tmp_path / "p.json", benchmark)
    flags = ["--dataset", "circo", "--root", tmp_path / "circo", "--images", tmp_path, "--split", "test"]
    flags += ["--official", "false", "--score", tmp_path / "p.json"]
    run_flags(monkeypatch, eval_cir, *flags)
    assert "as the server of circo test wants it" in capsys.readouterr().out
    (tmp_path / "p.json").write_text(json.dumps(record | {"0": []}))
    with pytest.raises(UserError, match="query 0: 0 image ids"):
        run_flags(monkeypatch, eval_cir, *flags)


# ---- padding ----
def padded_by_hand(picture: np.ndarray, ratio: float) -> np.ndarray:
    """Black rows or columns, the same number on both sides, until the longer side is `ratio` times the shorter."""
    height, width = picture.shape[:2]
    wanted = max(height, width) / ratio
    rows, columns = (max(int((wanted - side) / 2), 0) for side in (height, width))
    return np.pad(picture, ((rows, rows), (columns, columns), (0, 0)))


@pytest.mark.parametrize("folder", ["clip", "blip"])
def test_padding_is_black_bars_and_then_the_usual(folder, zoo):
    plain = Preprocess.from_folder(zoo / folder)
    assert plain.with_pad(0) is plain
    draw = np.random.default_rng(0)
    for ratio in (1.25, 1.0, 2.5):
        ours = plain.with_pad(ratio)
        assert repr(ours) != repr(plain) and str(ratio) in repr(ours)  # a hash of it tells them apart
        for width, height in ((40, 40), (41, 40), (50, 40), (51, 40), (90, 31), (31, 90), (640, 97)):
            picture = draw.integers(1, 256, (height, width, 3), dtype=np.uint8)
            wide = padded_by_hand(picture, ratio)
            torch.testing.assert_close(ours(Image.fromarray(picture)), plain(Image.fromarray(wide)), rtol=0, atol=0)
            again = ours.padded(ours.padded(Image.fromarray(picture)))
            assert again.size == wide.shape[1::-1]  # twice is once: a picture that is not augmented goes through twice
    assert plain.with_pad(1).padded(Image.new("RGB", (90, 30))).size == (90, 90)  # SquarePad
    assert plain.with_pad(1.25).padded(Image.new("RGB", (90, 30))).size == (90, 72)  # TargetPad


def test_bars_around_a_panorama_stay_small(zoo, monkeypatch):
    monkeypatch.setattr("common.images.MAX_PIXELS", 10_000)
    size = Preprocess.from_folder(zoo / "clip").with_pad(1).padded(Image.new("RGB", (1000, 50), "red")).size
    assert max(size) <= 100 and abs(size[0] - size[1]) <= 1


def trained(monkeypatch, tmp_path, zoo, *flags, out="cir"):
    """train_cir.py for two steps on the drawn CIRR's eight queries -> its checkpoint's folder."""
    root = tmp_path / "world" / "cirr"
    if not root.exists():
        drawn_cirr(tmp_path / "world")
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    argv = ["--root", root, "--split", "val", "--steps", 2, "--batch", 4, "--out", tmp_path / out]
    run_flags(monkeypatch, train_cir, *argv, *flags)
    return tmp_path / out


def test_a_checkpoint_pads_as_it_was_trained(zoo, tmp_path, monkeypatch, capsys):
    flags = ["--model", "combiner", "--backbone", zoo / "clip", "--pad", 1.25]
    folder = trained(monkeypatch, tmp_path, zoo, *flags)
    assert read_json(folder / "config.json")["build"]["pad"] == 1.25
    model = train_cir.load_cir(str(folder))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    plain = Preprocess.from_folder(zoo / "clip")
    assert torch.equal(model.preprocess(picture), plain.with_pad(1.25)(picture))
    argv = ["--root", tmp_path / "world/cirr", "--official", "false", "--show", 0, "--out", tmp_path / "out"]
    run_flags(monkeypatch, eval_cir, "--checkpoint", folder, *argv)
    assert "pictures padded to a ratio of 1.25" in read_json(tmp_path / "out/metrics.json")["protocol"]
    with pytest.raises(UserError, match="--pad 1.0 is of a --baseline"):
        run_flags(monkeypatch, eval_cir, "--checkpoint", folder, *argv, "--pad", 1)

    # a config whose ratio was changed by hand, and a start that pads otherwise
    before = (folder / "config.json").read_bytes()
    config = json.loads(before)
    (folder / "config.json").write_text(json.dumps(config | {"build": config["build"] | {"pad": 1.0}}))
    with pytest.raises(UserError, match="was edited"):
        train_cir.load_cir(str(folder))
    (folder / "config.json").write_bytes(before)
    with pytest.raises(UserError, match="--start_from .* and --pad as there"):
        trained(monkeypatch, tmp_path, zoo, "--model", "combiner", "--start_from", folder, out="two")
    with pytest.raises(UserError, match="--pad 0.5: wanted a ratio"):
        trained(monkeypatch, tmp_path, zoo, *flags[:4], "--pad", 0.5, out="two")


def test_training_sees_padded_pictures(zoo, tmp_path):
    """Without augmentation the pixels of a step are those of the model's own preprocessing."""
    root = drawn_cirr(tmp_path / "world")
    benchmark = read_cirr(str(root), "val")
    model = train_cir.build_cir("sum", str(zoo / "clip"), pad=1.1)
    source = streams.Source(benchmark.images)
    seen = []

    def augmented(picture, key, size):
        seen.append(picture.size)
        return picture

    images = TrainingImages(model, [source], augmented, Compute(2))
    pixels = images._pixels([((0, name), ("key",)) for name in benchmark.gallery[:3]])
    wanted = torch.stack([model.preprocess(benchmark.images.open(name)) for name in benchmark.gallery[:3]])
    assert torch.equal(images._normalised(pixels), wanted)
    assert seen == [(40, 36)] * 3  # 40 x 30, with bars


# ---- BLIP as the backbone of sum and combiner ----
TEXTS = ["a red hat", "dog", "two of a dog, 2 hats"]


def test_blip_towers_are_hugging_faces_modules(zoo):
    hf = transformers.BlipForImageTextRetrieval.from_pretrained(zoo / "blip").eval()
    words = transformers.AutoTokenizer.from_pretrained(zoo / "blip")
    model = train_cir.build_cir("sum", str(zoo / "blip")).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.manual_seed(0))
    with torch.no_grad():
        image = hf.vision_proj(hf.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
        text = []
        for words_of_one in TEXTS:  # one by one: no padding
            states = hf.text_encoder(input_ids=words(words_of_one, return_tensors="pt").input_ids).last_hidden_state
            text.append(hf.text_proj(states[0, 0]))
        text, normal = torch.stack(text), torch.nn.functional.normalize
        tokens, target = model.image(pixels)
        torch.testing.assert_close(tokens, image, atol=1e-6, rtol=0)
        torch.testing.assert_close(target, normal(image, dim=1), atol=1e-6, rtol=0)
        torch.testing.assert_close(model.text(TEXTS, "cpu"), text, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.compose(tokens, TEXTS), normal(image + text, dim=1), atol=1e-6, rtol=0)
    trains = set(train_cir.get_trained(model))
    assert {"backbone.text_proj.weight", "backbone.text_encoder.embeddings.word_embeddings.weight"} < trains
    assert not any("crossattention" in name or "vision" in name or "itm" in name for name in trains)


@pytest.mark.parametrize("model", ["sum", "combiner"])
def test_bi_directional_training_on_blip(model, zoo, tmp_path, monkeypatch):
    """Stage I, then stage II on it: the model of [Bi]; the checkpoint gives the same queries again."""
    flags = ["--backbone", zoo / "blip", "--bidirectional", 0.1]
    folder = trained(monkeypatch, tmp_path, zoo, "--model", "sum", "--text_proj_lr", 100, *flags)
    if model == "combiner":
        more = ["--model", "combiner", "--start_from", folder, "--train_text", "false", "--bidirectional", 0.1]
        folder = trained(monkeypatch, tmp_path, zoo, *more, out="two")
    found = train_cir.load_cir(str(folder))
    plain = train_cir.build_cir("sum", str(zoo / "blip"))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.manual_seed(0))
    with torch.no_grad():
        tokens, target = found.image(pixels)
        assert torch.equal(target, plain.eval().image(pixels)[1])  # the gallery is the frozen encoder's
        forth, back = (found.compose(tokens, TEXTS, backward) for backward in (False, True))
    assert (forth - back).abs().max() > 1e-4
    moved = (found.backbone.text_proj.weight - plain.backbone.text_proj.weight).abs().max().item()
    assert moved > 1e-3  # about 100 x 1e-4 a step of AdamW


def test_text_proj_learns_a_hundred_times_as_fast(zoo, monkeypatch):
    monkeypatch.setattr(train_cir, "TEXT_PROJ_LR", 100.0)
    monkeypatch.setattr(train_cir, "LR", 1e-5)
    model = train_cir.build_cir("sum", str(zoo / "blip"))
    optimizer = train_cir.make_optimizer(model)
    assert train_cir.set_rate(optimizer, 0, 10) == 1e-5
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(rates) == len(train_cir.get_trained(model))
    for name in train_cir.get_trained(model):
        wanted = 1e-3 if name.startswith("backbone.text_proj.") else 1e-5
        assert rates[id(named[name])] == pytest.approx(wanted)
    with pytest.raises(UserError, match="--text_proj_lr: the model trains no text_proj"):
        train_cir.make_optimizer(train_cir.build_cir("sum", str(zoo / "clip")))


def test_flags_of_towers_are_checked(zoo, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a resnet model, wanted clip, blip, siglip"):
        train_cir.build_cir("combiner", str(zoo / "resnet"))
    with pytest.raises(UserError, match="--text_proj_lr is for --model sum or combiner on BLIP"):
        trained(monkeypatch, tmp_path, zoo, "--model", "blip_tdm", "--backbone", zoo / "blip", "--text_proj_lr", 9)


# ---- SigLIP as the backbone of sum and combiner ----
@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A tiny random SigLIP as an ordinary folder: texts of 12 tokens, ended and padded by </s>."""
    folder = tmp_path_factory.mktemp("models") / "siglip"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = sizes | {"vocab_size": 60, "max_position_embeddings": 12, "projection_size": 32}
        text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        vision = sizes | {"image_size": 32, "patch_size": 16}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(folder)
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *letters]
    words += [("▁" + word, -1.0) for word in ("a", "red", "hat", "dog", "two", "make", "it", "of", "is", "blue")]
    words += [(word, -4.0) for word in ("ed", "re", "do", "og", "ha", "at", "ma", "ke", "wo", "bl")]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    end = ("</s>", 1)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 12}))
    pictures = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3}
    pictures |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def test_siglip_towers_are_hugging_faces_modules(siglip):
    hf = transformers.SiglipModel.from_pretrained(siglip).eval()
    words = transformers.PreTrainedTokenizerFast.from_pretrained(siglip)
    model = train_cir.build_cir("sum", str(siglip)).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.manual_seed(0))
    plain = ["a red hat", "dog", "two of a dog 2 hats"]
    ids = words(plain, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    assert ids.shape == (3, 12) and (ids[1, -8:] == 1).all()
    with torch.no_grad():
        whole = hf(input_ids=ids, pixel_values=pixels)  # its embeds are normalised
        tokens, target = model.image(pixels)
        normal = torch.nn.functional.normalize
        torch.testing.assert_close(target, whole.image_embeds, atol=1e-6, rtol=0)
        spelled = ["A  red hat!", "dog.", TEXTS[2]]  # capitals, punctuation and spaces are nothing to SigLIP
        torch.testing.assert_close(normal(model.text(spelled, "cpu"), dim=1), whole.text_embeds, atol=1e-6, rtol=0)
        raw = hf.vision_model(pixel_values=pixels).pooler_output + hf.text_model(input_ids=ids).pooler_output
        torch.testing.assert_close(model.compose(tokens, plain), normal(raw, dim=1), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="--text_length 8: a SigLIP reads texts of 12 tokens only"):
        train_cir.build_cir("sum", str(siglip), text_length=8)


def test_siglip_spelling_is_that_of_its_tokenizer(siglip, tmp_path):
    texts = ["Is RED -- and  blue!", "a b"]
    assert siglip_spelling(texts) == ["is red and blue", "a b"]
    assert siglip_spelling(texts, punctuation=True) == ["is red -- and blue!", "a b"]
    assert not train_cir.build_cir("sum", str(siglip)).punctuation
    shutil.copytree(siglip, tmp_path / "two")
    config = read_json(siglip / "tokenizer_config.json") | {"tokenizer_class": "GemmaTokenizer"}
    (tmp_path / "two/tokenizer_config.json").write_text(json.dumps(config))
    assert train_cir.build_cir("sum", str(tmp_path / "two")).punctuation


def test_siglip_pictures_are_hugging_faces(siglip):
    ours, theirs = Preprocess.from_folder(siglip), transformers.SiglipImageProcessorPil.from_pretrained(siglip)
    for width, height in ((32, 32), (50, 40), (31, 90)):
        picture = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = theirs(Image.fromarray(picture), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(ours(Image.fromarray(picture)), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["sum", "combiner"])
def test_siglip_has_a_direction_in_front_of_its_text(model, siglip, zoo, tmp_path, monkeypatch):
    folder = trained(monkeypatch, tmp_path, zoo, "--model", model, "--backbone", siglip, "--bidirectional", 0.1)
    found = train_cir.load_cir(str(folder))
    assert "backbone.text_model.embeddings.token_embedding.directions" in train_cir.get_trained(found)
    for backward, way in ((False, -1), (True, -2)):
        ids, _ = found.tokenize(TEXTS, "cpu", backward)
        assert ids.shape == (3, 12) and (ids[:, 0] == way).all() and (ids[:, 1:] >= 0).all()
    with torch.no_grad():
        tokens = torch.zeros(3, 32)
        assert (found.compose(tokens, TEXTS) - found.compose(tokens, TEXTS, True)).abs().max() > 1e-4
    argv = ["--root", tmp_path / "world/cirr", "--official", "false", "--show", 0, "--out", tmp_path / "out"]
    run_flags(monkeypatch, eval_cir, "--checkpoint", folder, *argv, "--audit")
    assert len(read_jsonl(tmp_path / "out/found.jsonl")[0]["alone"]) == 5


# ---- sessions of several turns ----
def drawn_sessions(folder) -> list[dict]:
    """Twelve pictures and five sessions in CIRCLED's format, in folder/sessions.json and .jsonl."""
    draw, names = random.Random(9), [f"p{i}" for i in range(12)]
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(folder / "images" / f"{name}.png")
    records = []
    for i in range(5):
        turns = [
            {"turn": n + 1, "reference_image_id": draw.choice(names[:8]), "relative_caption": draw.choice(TEXTS)}
            for n in range(draw.randint(1, 4))
        ]
        truths = draw.sample(names[8:], draw.randint(1, 2))
        records.append({"session_id": f"s{i}", "ground_truth_ids": truths, "num_turns": len(turns), "turns": turns})
    (folder / "sessions.json").write_text(json.dumps(records))
    (folder / "sessions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@torch.no_grad()
def test_sessions_are_counted_as_by_hand(zoo, tmp_path, monkeypatch):
    records = drawn_sessions(tmp_path)
    for file in ("sessions.json", "sessions.jsonl"):
        flags = ["--dataset", "sessions", "--root", tmp_path / file, "--images", tmp_path / "images", "--show", 2]
        flags += ["--baseline", "sum", "--backbone", zoo / "clip", "--out", tmp_path / "out"]
        run_flags(monkeypatch, eval_cir, *flags)
        record = read_json(tmp_path / "out/metrics.json")
        assert record["parts"][0]["queries"] == sum(len(r["turns"]) for r in records)
        assert "each turn asked alone" in record["protocol"]

        model = train_cir.build_cir("sum", str(zoo / "clip")).eval()
        store = ImageStore(tmp_path / "images")
        tokens = {f"p{i}": model.tokens(model.preprocess(store.open(f"p{i}"))[None]) for i in range(12)}
        turns = {}
        for session in records:
            for turn in session["turns"]:
                seen = tokens[turn["reference_image_id"]]
                text = torch.nn.functional.normalize(model.text([turn["relative_caption"]], "cpu"), dim=1)
                c = torch.nn.functional.normalize(model.target(seen) + text, dim=1)
                scores = {n: float(c[0] @ model.target(t)[0]) for n, t in tokens.items()}
                order = sorted(scores.keys() - {turn["reference_image_id"]}, key=lambda n: -scores[n])  # noqa: B023
                best = min(order.index(name) + 1 for name in session["ground_truth_ids"])
                turns.setdefault(session["session_id"], []).append(best)
        for k in (1, 5, 10, 50):
            for name, pick in (("first", lambda t: t[0]), ("last", lambda t: t[-1]), ("any", min)):
                wanted = 100 * sum(pick(t) <= k for t in turns.values()) / 5
                assert record["metrics"][f"{name}@{k}"] == pytest.approx(wanted), (name, k)
    assert len(set(record["metrics"].values())) > 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ground_truth_ids": ["gone"]}, "right image 'gone' is not in the gallery"),
        ({"ground_truth_ids": []}, "ground_truth_ids"),
        ({"session_id": "s1"}, "stands twice"),
        ({"turns": []}, "has no turn"),
        ({"turns": [{"turn": 2, "reference_image_id": "p1", "relative_caption": "a"}]}, "is turn 2, wanted 1"),
        ({"turns": [{"turn": 1, "reference_image_id": "p1"}]}, "relative_caption"),
    ],
)
def test_a_wrong_session_stops(change, words, tmp_path):
    records = drawn_sessions(tmp_path)
    records[0] |= change
    (tmp_path / "sessions.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=words):
        read_sessions(str(tmp_path / "sessions.json"), str(tmp_path / "images"))


def test_files_of_cirrs_hidden_split_are_looked_through(tmp_path, capsys):
    """Labels hidden: a good file passes without a number, a bad one is refused as before."""
    benchmark = random_cirr(0)[0]
    hidden = tuple(dataclasses.replace(q, target=None, extra={"target_soft": None}) for q in benchmark.queries)
    benchmark = dataclasses.replace(benchmark, split="test1", queries=hidden)
    record = {"version": "rc2", "metric": "recall_subset"}
    record |= {str(q.id): [name for name in q.members if name != q.reference][:3] for q in hidden}
    path = tmp_path / "subset.json"
    path.write_text(json.dumps(record))
    score(benchmark, (str(path),), "protocol")
    printed = capsys.readouterr().out
    assert "as the server of cirr test1 wants it; only the server knows the labels" in printed and "Rs@" not in printed
    path.write_text(json.dumps(record | {"3": record["3"][:2]}))
    with pytest.raises(UserError, match="pairid 3: 2 names, wanted 3"):
        score(benchmark, (str(path),), "protocol")


def test_two_ranks_ask_all_ways_alike(zoo, tmp_path):
    benchmark = read_cirr(str(drawn_cirr(tmp_path / "world")), "val")
    at = index(benchmark, True)

    def ranks_of() -> list[list[int]]:
        torch.set_num_threads(1)
        model = train_cir.build_cir("sum", str(zoo / "clip")).eval()
        ways = [whole_query(model), *audits.ways_alone(model, model).values()]
        found, images = embed_ways(model, benchmark, at, Compute(5), ways)
        return [measure(queries, images, at).target.tolist() for queries in found]

    alone = ranks_of()
    assert len(alone) == 6 and run_ranks(2, ranks_of) == [alone, alone]
