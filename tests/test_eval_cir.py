"""Recall against a brute-force oracle, protocols against the real annotations, server files against mutations."""

import dataclasses
import hashlib
import json
import os
import random
import re
import sys

import numpy as np
import pytest
import torch
import transformers
import zoo as writer
from PIL import Image
from ranks import run_ranks

import eval_cir
import train_cir
from common.annotations import (
    Benchmark,
    Triplet,
    read_benchmarks,
    read_circo,
    read_cirr,
    require_official,
)
from common.console import UserError
from common.encoding import Compute, encode
from common.exports import write_cirr_captions
from common.files import read_json, read_jsonl, save_folder, write_jsonl
from common.flags import constants_of, override
from common.images import ImageStore, Preprocess, list_images, load_pixels, open_image
from common.retrieval import (
    NEVER,
    Indices,
    average_precision,
    best,
    embed,
    evaluate,
    index,
    measure,
    rank,
    recall,
    recalls,
    rerank,
    score_blocks,
    shortlist,
)
from common.submission import SERVER_LIMIT, read_submission, score_submission, write_submission

DEFAULTS = constants_of(vars(eval_cir))


# ---- an independent truth ----
def oracle(scores: list[float], target: int, excluded: int = -1) -> float:
    """Rank by Python's sort on (-score, index)."""
    order = sorted((j for j in range(len(scores)) if j != excluded), key=lambda j: (-scores[j], j))
    return order.index(target) + 1 if target in order else float("inf")


def random_case(seed: int) -> tuple[Benchmark, torch.Tensor, torch.Tensor, Indices]:
    """Small integers as embeddings, so that equal scores are common and exactly equal."""
    draw = random.Random(seed)
    dataset = ("cirr", "fashioniq")[seed % 2]
    names = [f"n{i}" for i in draw.sample(range(1000), draw.randint(8, 40))]
    outside = [f"out{i}" for i in range(8)]  # references and members that are not in the gallery
    queries = []
    for i in range(draw.randint(1, 25)):
        members = draw.sample(names + outside, 6)
        reference, target = members[:2]
        draw.shuffle(members)
        if dataset == "fashioniq":
            members, reference, target = None, draw.choice(names + outside), draw.choice(names + outside)
        queries.append(Triplet(reference, target, "words", i, tuple(members) if members else None))
    benchmark = Benchmark(dataset, "val", "dress" if seed % 2 else None, tuple(queries), tuple(names), None)
    at = index(benchmark, keep_reference=draw.random() < 0.5)
    whole = torch.Generator().manual_seed(seed)
    width = draw.randint(1, 4)
    images = torch.randint(-1, 2, (len(at.names), width), generator=whole).float()
    wanted = torch.randint(-1, 2, (len(queries), width), generator=whole).float()
    for i in range(0, len(queries), 3):  # the reference is the best match of every third query
        wanted[i] = images[at.reference[i]] * 5
    return benchmark, wanted, images, at


@pytest.mark.parametrize("dataset", [0, 1], ids=["cirr", "fashioniq"])
def test_recalls_equal_brute_force(dataset):
    ties = never = 0
    for seed in range(dataset, 400, 2):
        benchmark, wanted, images, at = random_case(seed)
        got = recalls(measure(wanted, images, at))
        place = {name: i for i, name in enumerate(at.names)}
        full, subset = [], []
        vectors = images.tolist()
        for query, row in zip(benchmark.queries, wanted.tolist(), strict=True):
            scores = {name: sum(a * b for a, b in zip(row, vectors[i], strict=True)) for name, i in place.items()}
            gallery = [scores[name] for name in benchmark.gallery]
            spot = {name: i for i, name in enumerate(benchmark.gallery)}
            drop = -1 if at.excluded is None else spot.get(query.reference, -1)
            full.append(oracle(gallery, spot.get(query.target, -1), drop))
            ties += query.target in spot and gallery.count(scores[query.target]) > 1
            if benchmark.dataset == "cirr":
                others = sorted(set(query.members) - {query.reference}, key=place.get)
                subset.append(oracle([scores[name] for name in others], others.index(query.target)))
        never += full.count(float("inf"))
        percent = {k: 100 * sum(r <= k for r in full) / len(full) for k in (1, 5, 10, 50)}
        expected = {f"R@{k}": percent[k] for k in ((1, 5, 10, 50) if subset else (10, 50))}
        if subset:
            expected |= {f"Rs@{k}": 100 * sum(r <= k for r in subset) / len(subset) for k in (1, 2, 3)}
            expected["Avg"] = (expected["R@5"] + expected["Rs@1"]) / 2
        assert got == pytest.approx(expected), seed
    assert ties > 500 and never > 100  # the cases are hard enough


def test_rank_ties_exclusion_and_absence():
    scores = torch.tensor([[3.0, 5.0, 3.0, 3.0]])
    for target, expected in enumerate((2, 1, 3, 4)):
        assert rank(scores, torch.tensor([target])).item() == expected
    assert rank(scores, torch.tensor([2]), torch.tensor([1])).item() == 2  # the reference was the best match
    assert rank(scores, torch.tensor([2]), torch.tensor([0])).item() == 2
    assert rank(scores, torch.tensor([-1])).item() == NEVER  # even with K over the gallery's size
    assert rank(scores, torch.tensor([1]), torch.tensor([1])).item() == NEVER
    assert recall(torch.tensor([1, 7, NEVER, 50]), 50) == 75.0


def test_best_agrees_with_rank():
    whole = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 30), generator=whole).float()
    excluded = torch.randint(-1, 30, (50,), generator=whole)
    top = best(scores, 29, excluded)
    for place in range(28):
        assert (rank(scores, top[:, place], excluded) == place + 1).all()
    assert not (top == excluded[:, None]).any()


def test_blocks_cover_every_query_once():
    whole = torch.Generator().manual_seed(1)
    queries, images = torch.randn(1100, 6, generator=whole), torch.randn(70, 6, generator=whole)
    blocks = list(score_blocks(queries, images))
    assert len(blocks) > 1 and torch.get_float32_matmul_precision() == "highest"
    found, exact = torch.cat([scores for _, scores in blocks]), queries.double() @ images.double().T
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5  # bf16 or TF32 would be off by 1e-2


# ---- a tiny drawn CIRR and a model that sees colour ----
SMALL = Preprocess.from_config(
    {"image_processor_type": "BlipImageProcessor", "size": {"height": 2, "width": 2}, "do_normalize": False}
)


class Colours(torch.nn.Module):
    """An image is its mean colour; the text "+r" adds red. Counts the images it encodes."""

    def __init__(self):
        super().__init__()
        self.frozen, self.seen = torch.nn.Dropout(), 0
        self.frozen.eval()
        self.preprocess, self.asked = SMALL, []
        self.say_losses = self.asked.extend

    def image(self, pixels):
        self.seen += len(pixels)
        tokens = pixels.mean((2, 3)) - 0.4
        return tokens, torch.nn.functional.normalize(tokens, dim=1)

    def compose(self, tokens, texts, backward=False):
        assert not self.training and len(tokens) == len(texts)
        steps = torch.tensor([[0.3 * ("+r" in t), 0.3 * ("+g" in t), 0.3 * ("+b" in t)] for t in texts])
        return torch.nn.functional.normalize(tokens + steps.to(tokens), dim=1)


HOSTILE = "<script>alert('x')</script>\x1b[31m"


def write_world(root, split="val", labelled=True, subgroups=4):
    """CIRR's layout: subgroups of six colours, two queries each; the text says which channel rises."""
    draw = random.Random(5)
    table, records = {}, []
    (root / "img_raw" / split).mkdir(parents=True)
    for g in range(subgroups):
        members = [f"{split}-{g}-img{i}" for i in range(6)]
        for name in members:
            table[name] = f"./{split}/{name}.png"
            shade = tuple(draw.randint(0, 255) for _ in range(3))
            Image.new("RGB", (24, 16), shade).save(root / "img_raw" / split / f"{name}.png")
        for i in range(2):
            record = {"pairid": 100 + len(records), "reference": members[i], "target_hard": members[i + 2]}
            record |= {"target_soft": {members[i + 2]: 1.0}, "caption": draw.choice(["+r", "+g", "+b"]) + HOSTILE}
            record["img_set"] = {"id": g, "members": members, "reference_rank": i, "target_rank": i + 2}
            if not labelled:
                record = {k: v for k, v in record.items() if not k.startswith("target")}
            records.append(record)
    for folder, name, value in (("captions", "cap", records), ("image_splits", "split", table)):
        (root / "cirr" / folder).mkdir(parents=True, exist_ok=True)
        (root / "cirr" / folder / f"{name}.rc2.{split}.json").write_text(json.dumps(value))
    return root


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "world")


def brute(benchmark: Benchmark, model: Colours) -> dict[str, float]:
    """R@1 and Rs@1 one image and one query at a time, in float64."""
    model.eval()
    at = {name: model.image(model.preprocess(benchmark.images.open(name))[None]) for name in benchmark.gallery}
    full, subset = [], []
    for query in benchmark.queries:
        c = model.compose(at[query.reference][0], [query.delta])[0].double()
        scores = {name: float(c @ target[0].double()) for name, (_, target) in at.items() if name != query.reference}
        order = sorted(scores, key=lambda name: -scores[name])
        full.append(order[0] == query.target)
        subset.append([name for name in order if name in query.members][0] == query.target)
    return {"R@1": 100 * sum(full) / len(full), "Rs@1": 100 * sum(subset) / len(subset)}


def test_evaluate_on_a_drawn_cirr(world):
    benchmark, model = read_cirr(world / "cirr", "val"), Colours()
    model.train()
    model.frozen.eval()
    compose, graphs = model.compose, []
    model.compose = lambda *given: graphs.append(torch.is_grad_enabled()) or compose(*given)
    got = evaluate(model, benchmark, Compute(5))
    assert graphs and not any(graphs)  # a gallery's worth of graphs would not fit in memory
    assert model.seen == 24  # every image once, although references stand in two roles
    assert model.training and not model.frozen.training  # modes as they were, part by part
    expected = brute(benchmark, model)
    assert {key: got[key] for key in expected} == pytest.approx(expected)
    assert 0 < got["Rs@1"] and got["Avg"] == pytest.approx((got["R@5"] + got["Rs@1"]) / 2)
    for batch, workers in ((1, 0), (64, 2)):
        assert evaluate(Colours(), benchmark, Compute(batch, workers=workers)) == pytest.approx(got)


def test_two_ranks_give_the_same_numbers(world):
    benchmark = read_cirr(world / "cirr", "val")
    alone = evaluate(Colours(), benchmark, Compute(5))
    for batch in (5, 64):  # with 64, the second rank has no image to encode
        results = run_ranks(2, lambda batch=batch: evaluate(Colours(), benchmark, Compute(batch)))
        assert results[0] == results[1] == alone


def test_a_missing_gallery_image_stops(world):
    benchmark, model = read_cirr(world / "cirr", "val"), Colours()
    (world / "img_raw" / "val" / "val-3-img5.png").unlink()  # in no query: only the gallery needs it
    with pytest.raises(UserError, match="1 of 24 images missing: 'val-3-img5' .looked in .* --missing"):
        evaluate(model, benchmark, Compute(5))
    assert model.seen == 0


def test_a_damaged_gallery_image_stops(world):
    benchmark = read_cirr(world / "cirr", "val")
    (world / "img_raw" / "val" / "val-3-img5.png").write_bytes(b"")
    with pytest.raises(UserError, match="val-3-img5"):
        evaluate(Colours(), benchmark, Compute(5))


def test_not_finite_stops(world):
    class Broken(Colours):
        def compose(self, tokens, texts, backward=False):
            return super().compose(tokens, texts) * float("nan")

    with pytest.raises(UserError, match="8 query embeddings are not finite"):
        evaluate(Broken(), read_cirr(world / "cirr", "val"), Compute(5))


def test_odd_img_set_and_doubled_gallery_stop(world):
    benchmark = read_cirr(world / "cirr", "val")
    first = benchmark.queries[0]
    for members in (first.members[1:], first.members[:5] + first.members[:1], None):
        odd = Triplet(first.reference, first.target, first.delta, first.id, members)
        changed = Benchmark("cirr", "val", None, (odd,), benchmark.gallery, benchmark.images)
        with pytest.raises(UserError, match="pairid 100"):
            index(changed, True)
    double = Benchmark("cirr", "val", None, benchmark.queries, ("val-0-img0",) * 2, benchmark.images)
    with pytest.raises(UserError, match="twice"):
        index(double, True)


# ---- the stage itself ----
def run_stage(monkeypatch, tmp_path, **constants) -> None:
    """main() with constants set as the command line sets them, and a colour model in place of a checkpoint's."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(eval_cir, "load_cir", lambda folder, device, backbone: Colours())
    for name, value in ({"CHECKPOINT": str(checkpoint), "OUT": str(tmp_path / "out")} | constants).items():
        assert hasattr(eval_cir, name)
        monkeypatch.setattr(eval_cir, name, value)
    eval_cir.main()


def test_main_writes_metrics_and_a_page(monkeypatch, tmp_path, world, capsys):
    run_stage(monkeypatch, tmp_path, ROOT=str(world / "cirr"), OFFICIAL=False, DEVICE="cpu", SHOW=5)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    benchmark = read_cirr(world / "cirr", "val")
    assert found["metrics"] == evaluate(Colours(), benchmark, Compute(64))
    assert (found["parts"][0]["queries"], found["parts"][0]["gallery"]) == (8, 24)
    assert found["sha256"] == hashlib.sha256(b"weights").hexdigest()
    printed = capsys.readouterr().out
    for text in ('protocol "split"', "minus the query's own reference", "not the official data", found["sha256"]):
        assert text in printed
    assert f"{found['metrics']['R@1']:.2f}" in printed
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    shown = [int(place) for place in re.findall(r"the right one is at rank (\d+) of 24", page)]
    assert len(shown) == 5 and shown == sorted(shown, reverse=True) and shown[0] > shown[-1]  # hardest first
    assert page.count('class="panel"') == 5 and page.count('class="right"') == 5
    lines = read_jsonl(tmp_path / "out" / "found.jsonl")
    assert [line["id"] for line in lines] == [q.id for q in benchmark.queries]
    for line in lines:  # the same ranks by hand: where the target stands, and no reference
        assert line["reference"] not in line["top"] and len(line["top"]) == 10
        assert (line["top"].index(line["target"]) + 1 if line["target"] in line["top"] else 11) == min(line["rank"], 11)
    assert found["metrics"]["R@5"] == 100 * sum(line["rank"] <= 5 for line in lines) / 8


def test_other_data_is_not_the_official_set(monkeypatch, tmp_path, world):
    with pytest.raises(UserError, match="8 queries and 24 gallery.*4,181 and 2,297"):
        run_stage(monkeypatch, tmp_path, ROOT=str(world / "cirr"), DEVICE="cpu")
    assert not (tmp_path / "out").exists()


def test_references_protocol_is_a_smaller_gallery(monkeypatch, tmp_path, world):
    smaller = {"CIRR_PROTOCOL": "references", "OFFICIAL": False, "SHOW": 4}
    run_stage(monkeypatch, tmp_path, ROOT=str(world / "cirr"), DEVICE="cpu", **smaller)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["parts"][0]["gallery"] == 8 and "references" in found["protocol"]
    assert found["metrics"]["R@50"] == 0  # no target of this world is anybody's reference
    assert found["metrics"]["Rs@1"] == evaluate(Colours(), read_cirr(world, "val"), Compute(9))["Rs@1"]
    assert "not in the gallery" in (tmp_path / "out" / "index.html").read_text()


def test_hidden_split_writes_the_servers_files(monkeypatch, tmp_path, capsys):
    world = write_world(tmp_path / "world", "test1", labelled=False, subgroups=10)
    run_stage(monkeypatch, tmp_path, ROOT=str(world / "cirr"), OFFICIAL=False, DEVICE="cpu", SPLIT="test")
    benchmark = read_cirr(world / "cirr", "test1")
    model = Colours().eval()
    at = {name: model.image(model.preprocess(benchmark.images.open(name))[None]) for name in benchmark.gallery}
    full = json.loads((tmp_path / "out" / "recall.json").read_text())
    subset = json.loads((tmp_path / "out" / "recall_subset.json").read_text())
    assert (full.pop("version"), full.pop("metric")) == ("rc2", "recall")
    assert (subset.pop("version"), subset.pop("metric")) == ("rc2", "recall_subset")
    assert list(full) == list(subset) == [str(q.id) for q in benchmark.queries]
    for query in benchmark.queries:
        c = model.compose(at[query.reference][0], [query.delta])[0]
        order = sorted(benchmark.gallery, key=lambda name: -float(c @ at[name][1][0]))  # noqa: B023
        order.remove(query.reference)
        assert full[str(query.id)][:10] == order[:10] and len(full[str(query.id)]) == 50
        assert subset[str(query.id)] == [name for name in order if name in query.members][:3]
    said = capsys.readouterr().out
    assert "has no labels" in said and not (tmp_path / "out" / "metrics.json").exists()
    origin = json.loads((tmp_path / "out/submission.json").read_text())
    assert origin["protocol"] in said and 'protocol "split"' in origin["protocol"] and origin["split"] == "test1"
    assert origin["sha256"] == hashlib.sha256(b"weights").hexdigest() and origin["sha256"] in said
    assert origin["files"].keys() == {"recall.json", "recall_subset.json"}
    for name, digest in origin["files"].items():
        assert digest == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()


# ---- the server's files ----
@pytest.fixture
def sent(tmp_path):
    """A labelled benchmark of 10 queries over 60 images, and a valid file of each kind as (path, record)."""
    draw = random.Random(3)
    names = [f"dev-{i}" for i in range(60)]
    queries = []
    for i in range(10):
        members = draw.sample(names, 6)
        queries.append(Triplet(members[0], members[1], "words", i + 7, tuple(members)))
    benchmark = Benchmark("cirr", "val", None, tuple(queries), tuple(names), None)
    files = {}
    for metric, count in (("recall", 50), ("recall_subset", 3)):
        record = {"version": "rc2", "metric": metric}
        for query in queries:
            pool = set(names if count == 50 else query.members) - {query.reference}
            record[str(query.id)] = draw.sample(sorted(pool), count)
        path = tmp_path / f"{metric}.json"
        path.write_text(json.dumps(record))
        files[metric] = (path, record)
    return benchmark, files


def mutate(record: dict, benchmark: Benchmark, how: str) -> str:
    query = benchmark.queries[4]
    names = record[str(query.id)]
    outsider = next(n for n in benchmark.gallery if n not in query.members)
    if how == "version":
        record["version"] = "rc1"
    elif how == "metric":
        record["metric"] = "recall_subset" if record["metric"] == "recall" else "recall"
    elif how == "lost query":
        del record[str(query.id)]
    elif how == "unknown query":
        record["999"] = names
    elif how == "too few":
        names.pop()
    elif how == "too many":
        names.append(next(n for n in benchmark.gallery if n not in names and n != query.reference))
    elif how == "doubled":
        names[0] = names[1]
    elif how == "reference":
        names[2] = query.reference
    elif how == "not in the gallery":
        names[0] = "dev-999" if len(names) == 50 else outsider
    elif how == "not text":
        names[0] = 3
    elif how == "not a list":
        record[str(query.id)] = "dev-1"
    elif how == "too large":
        return json.dumps(record) + " " * SERVER_LIMIT
    elif how == "cut":
        return json.dumps(record)[:-20]
    elif how == "a list":
        return json.dumps([record])
    return json.dumps(record)


MUTATIONS = "version,metric,lost query,unknown query,too few,too many,doubled,reference,not in the gallery,not text"
MUTATIONS += ",not a list,too large,cut,a list"


@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
@pytest.mark.parametrize("how", MUTATIONS.split(","))
def test_validator_refuses(sent, metric, how):
    benchmark, files = sent
    path, record = files[metric]
    assert read_submission(path, benchmark, metric)  # valid before
    path.write_text(mutate(record, benchmark, how))
    says = "own reference" if how == "reference" else ""
    with pytest.raises(UserError, match=f"{metric}.json.*{says}"):
        read_submission(path, benchmark, metric)


def test_scoring_a_file(sent):
    benchmark, files = sent
    for metric, letter, ks in (("recall", "R", (1, 5, 10, 50)), ("recall_subset", "Rs", (1, 2, 3))):
        path, record = files[metric]
        hits = {k: sum(q.target in record[str(q.id)][:k] for q in benchmark.queries) for k in ks}
        expected = {f"{letter}@{k}": 10.0 * hits[k] for k in ks}
        assert score_submission(path, benchmark, metric) == pytest.approx(expected)


def test_score_of_both_files_of_the_real_split(shared, tmp_path, monkeypatch, capsys):
    """Random rankings of the real CIRR val against counting by hand; one that lists a reference is refused."""
    benchmark, draw = read_cirr(shared / "data" / "cirr", "val"), random.Random(4)
    records = [{"version": "rc2", "metric": metric} for metric in ("recall", "recall_subset")]
    hits: dict[str, int] = {}
    for q in benchmark.queries:
        full = draw.sample([n for n in benchmark.gallery if n != q.reference], 50)
        full[draw.randrange(50)] = q.target if q.target not in full else full[0]
        full = list(dict.fromkeys(full))
        full += [n for n in benchmark.gallery[:60] if n not in full and n != q.reference][: 50 - len(full)]
        subset = draw.sample([n for n in q.members if n != q.reference], 3)
        records[0][str(q.id)], records[1][str(q.id)] = full, subset
        for names, letter, ks in ((full, "R", (1, 5, 10, 50)), (subset, "Rs", (1, 2, 3))):
            for k in ks:
                hits[f"{letter}@{k}"] = hits.get(f"{letter}@{k}", 0) + (q.target in names[:k])
        for k in (1, 2, 3):
            worth = max([0.0, *(value for name, value in q.extra["target_soft"].items() if name in subset[:k])])
            hits[f"soft-Rs@{k}"] = hits.get(f"soft-Rs@{k}", 0) + worth
    files = [tmp_path / "subset.json", tmp_path / "ranks.json"]  # in either order: each says what it is
    for file, record in zip(files, records[::-1], strict=True):
        file.write_text(json.dumps(record))
    argv = ["--score", *map(str, files), "--root", str(shared / "data" / "cirr"), "--split", "val", "--device", "cpu"]
    before = constants_of(vars(eval_cir))
    for name in before:
        monkeypatch.setattr(eval_cir, name, before[name])  # put back after the test
    override(vars(eval_cir), argv)
    eval_cir.main()
    titles, numbers = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    found = dict(zip(titles, numbers[2:], strict=True))
    assert found.pop("queries") == "4181" and found.pop("gallery") == "2297"
    percent = {name: 100 * count / 4181 for name, count in hits.items()}
    percent["Avg"] = (percent["R@5"] + percent["Rs@1"]) / 2
    assert found == {name: f"{value:.2f}" for name, value in percent.items()} and percent["R@50"] > 90
    with pytest.raises(UserError, match="both hold recall;"):
        monkeypatch.setattr(eval_cir, "SCORE", (str(files[1]), str(files[1])))
        eval_cir.main()
    monkeypatch.setattr(eval_cir, "SCORE", tuple(map(str, files)))
    perfect = [{"version": "rc2", "metric": metric} for metric in ("recall_subset", "recall")]
    for q in benchmark.queries:
        for record, names, k in ((perfect[0], q.members, 3), (perfect[1], benchmark.gallery[:60], 50)):
            record[str(q.id)] = [q.target, *(n for n in names if n not in (q.target, q.reference))][:k]
    for file, record in zip(files, perfect, strict=True):
        file.write_text(json.dumps(record))
    eval_cir.main()
    perfect = capsys.readouterr().out.splitlines()[-1].split()[2:-2]
    assert perfect[:3] + perfect[6:] == ["100.00"] * 8
    assert all(99 < float(soft) < 100 for soft in perfect[3:6])  # of 42 queries the soft targets leave the target out
    records[0][str(benchmark.queries[7].id)][3] = benchmark.queries[7].reference
    files[1].write_text(json.dumps(records[0]))
    with pytest.raises(UserError, match=f"pairid {benchmark.queries[7].id}: lists the query's own reference"):
        eval_cir.main()


def test_full_size_submission_fits_the_limit(shared, tmp_path):
    """4,148 queries x 50 of the longest names: compact fits, indented would not."""
    benchmark = read_cirr(shared / "data" / "cirr", "test1")
    at = index(benchmark, True)
    whole = torch.Generator().manual_seed(0)
    queries = torch.randn(len(benchmark.queries), 8, generator=whole)
    images = torch.randn(len(at.names), 8, generator=whole)
    write_submission(str(tmp_path), benchmark, queries, images, at, {"protocol": "", "checkpoint": "", "sha256": ""})
    record = read_json(tmp_path / "recall.json")
    assert len(record) == 4148 + 2
    (tmp_path / "recall.json").write_text(json.dumps(record, indent=2))
    with pytest.raises(UserError, match="without indentation"):
        read_submission(tmp_path / "recall.json", benchmark, "recall")


# ---- reversed queries, re-ranking, CIRCO ----
def test_reversed_queries_are_the_swapped_ones(world, tmp_path):
    """Brute force: target + text behind [BACKWARD] -> reference; the target is out of the gallery, as it is shown."""

    class Undo(Colours):
        def compose(self, tokens, texts, backward=False):
            return super().compose(tokens, texts) if not backward else super().compose(-tokens, texts)

    benchmark, model = read_cirr(world / "cirr", "val"), Undo().eval()
    swapped = eval_cir.reversed_queries(benchmark, "")
    at = index(swapped, True)
    got = recalls(measure(*embed(model, swapped, at, Compute(5), backward=True), at))
    seen = {name: model.image(model.preprocess(benchmark.images.open(name))[None]) for name in benchmark.gallery}
    ranks, subset = [], []
    for q in benchmark.queries:
        c = model.compose(seen[q.target][0], [q.delta], True)[0].double()
        order = sorted((n for n in seen if n != q.target), key=lambda n: -float(c @ seen[n][1][0].double()))  # noqa: B023
        ranks.append(order.index(q.reference) + 1)
        subset.append([n for n in order if n in q.members].index(q.reference) + 1)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * np.mean([r <= k for r in ranks]))
    assert got["Rs@1"] == pytest.approx(100 * np.mean([r == 1 for r in subset])) and len(set(ranks)) > 2
    lines = [{"reference": q.reference, "target": q.target, "delta": "x"} for q in benchmark.queries]
    lines = [line | {"reverse_delta": f"back {i}"} for i, line in enumerate(lines)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [q.delta for q in eval_cir.reversed_queries(benchmark, str(tmp_path / "r.jsonl")).queries]
    assert texts == [f"back {i}" for i in range(8)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(UserError, match="no reverse_delta"):
        eval_cir.reversed_queries(benchmark, str(tmp_path / "r.jsonl"))


class Matching(Colours):
    """Also says how well an image fits a text: a little by its blue, a lot by the text's own length."""

    tau = torch.tensor(0.1)

    def match(self, tokens, texts):
        fit = torch.tensor([len(t) for t in texts]).float() % 3 + 7 * tokens[:, 2]
        return torch.stack([torch.zeros_like(fit), fit], dim=1)


def test_reranking_orders_the_first_k_anew(monkeypatch, tmp_path, world):
    benchmark, model = read_cirr(world / "cirr", "val"), Matching().eval()
    at = index(benchmark, True)
    queries, images = embed(model, benchmark, at, Compute(5))
    deltas = [q.delta for q in benchmark.queries]
    top = shortlist(queries, images, at, 12)
    model.seen = 0
    first = rerank(model, benchmark.images, at.names, deltas, top, 2.0, Compute(4))
    assert model.seen == len(set(top.columns.flatten().tolist()))  # each candidate once
    tokens = model.image(load_pixels(benchmark.images, at.names, model.preprocess))[0]
    full = []
    for i, query in enumerate(benchmark.queries):
        scores = {j: float(queries[i] @ images[j]) for j in range(24) if at.names[j] != query.reference}
        order = sorted(scores, key=lambda j: -scores[j])  # noqa: B023
        logs = {j: float(model.match(tokens[j : j + 1], [query.delta]).log_softmax(1)[0, 1]) for j in order[:12]}
        order = sorted(order[:12], key=lambda j: -(scores[j] / 0.1 + 2 * logs[j])) + order[12:]  # noqa: B023
        assert first[i].tolist() == order[:12]
        full.append(order.index(at.names.index(query.target)) + 1)
    ranks = measure(queries, images, at, first).target
    assert ranks.tolist() == full and full != measure(queries, images, at).target.tolist()
    results = run_ranks(2, lambda: rerank(Matching(), benchmark.images, at.names, deltas, top, 2.0, Compute(4)))
    assert torch.equal(results[0], first) and torch.equal(results[1], first)
    with pytest.raises(UserError, match="only it has a tdm head"):
        run_stage(monkeypatch, tmp_path, ROOT=str(world / "cirr"), OFFICIAL=False, DEVICE="cpu", RERANK=5)


def test_the_model_runs_in_the_dtype_asked_for(world):
    """Image, query and tdm head each inside autocast, the ranking outside it."""

    class Watched(Matching):
        def image(self, pixels):
            inside.append(("image", torch.is_autocast_enabled("cpu")))
            return super().image(pixels)

        def compose(self, tokens, texts, backward=False):
            inside.append(("compose", torch.is_autocast_enabled("cpu")))
            return super().compose(tokens, texts)

        def match(self, tokens, texts):
            inside.append(("match", torch.is_autocast_enabled("cpu")))
            return super().match(tokens, texts)

    benchmark, model = read_cirr(world / "cirr", "val"), Watched().eval()
    at, deltas = index(benchmark, True), [q.delta for q in benchmark.queries]
    for dtype, wanted in ((torch.bfloat16, True), (torch.float32, False)):
        inside, compute = [], Compute(5, dtype=dtype)
        queries, images = embed(model, benchmark, at, compute)
        rerank(model, benchmark.images, at.names, deltas, shortlist(queries, images, at, 4), 1.0, compute)
        assert {what for what, _ in inside} == {"image", "compose", "match"}
        assert all(enabled == wanted for _, enabled in inside) and queries.dtype == torch.float32


def write_circo(root, split="val", labelled=True):
    """CIRCO's layout: 12 pictures, 4 queries with one to three right answers."""
    draw = random.Random(2)
    ids = draw.sample(range(1, 10**6), 12)
    pictures = root / "COCO2017_unlabeled" / "unlabeled2017"
    pictures.mkdir(parents=True)
    for i in ids:
        Image.new("RGB", (20, 20), tuple(draw.randint(0, 255) for _ in range(3))).save(pictures / f"{i:012d}.jpg")
    records = []
    for n in range(4):
        reference, *truths = draw.sample(ids, 2 + n % 3)
        record = {"reference_img_id": reference, "relative_caption": draw.choice(["+r", "+g"]), "id": n}
        record |= {"shared_concept": "a colour"}
        records.append(record | ({"target_img_id": truths[0], "gt_img_ids": truths} if labelled else {}))
    info = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids]}
    for folder, name, value in (
        (root / "annotations", split, records),
        (root / "COCO2017_unlabeled" / "annotations", "image_info_unlabeled2017", info),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(value))
    return root


def circos_own(found: list[int], truths: list[int], k: int) -> float:
    """AP@K as CIRCO's server computes it from a list of ids."""
    hits, total = 0, 0.0
    for place, image in enumerate(found[:k], 1):
        hits += image in truths
        total += (hits / place) * (image in truths)
    return total / min(len(truths), k)


def test_average_precision_equals_the_servers():
    draw = random.Random(0)
    for _ in range(200):
        gallery = list(range(draw.randint(6, 80)))
        draw.shuffle(gallery)
        truths = draw.sample(gallery, draw.randint(1, 6))
        ranks = torch.tensor([[gallery.index(t) + 1 for t in truths] + [-1] * (6 - len(truths))])
        for k in (5, 10, 25, 50):
            assert average_precision(ranks, k).item() == pytest.approx(circos_own(gallery, truths, k))


def test_circo(monkeypatch, tmp_path, capsys):
    root = write_circo(tmp_path / "circo")
    run_stage(monkeypatch, tmp_path, ROOT=str(root), DATASET="circo", OFFICIAL=False, DEVICE="cpu")
    found = read_json(tmp_path / "out" / "metrics.json")["metrics"]
    benchmark, model = read_circo(str(root), "val"), Colours().eval()
    assert benchmark.queries[0].extra["shared_concept"] == "a colour" and len(benchmark.gallery) == 12
    at = {name: model.image(model.preprocess(benchmark.images.open(name))[None]) for name in benchmark.gallery}
    rankings = []
    for q in benchmark.queries:
        c = model.compose(at[q.reference][0], [q.delta])[0]
        rankings.append(sorted(at, key=lambda name: -float(c @ at[name][1][0])))  # noqa: B023
    for k in (5, 10, 25, 50):
        pairs = list(zip(rankings, benchmark.queries, strict=True))
        wanted = 100 * np.mean([circos_own(order, q.truths, k) for order, q in pairs])
        assert found[f"mAP@{k}"] == pytest.approx(wanted, abs=1e-4)
        assert found[f"R@{k}"] == pytest.approx(100 * np.mean([q.target in order[:k] for order, q in pairs]))
    assert "unlabelled images, the reference kept in it" in capsys.readouterr().out
    with pytest.raises(UserError, match="4 queries and 12 gallery images, the published.* 220 and 123,403"):
        run_stage(monkeypatch, tmp_path, ROOT=str(root), DATASET="circo", OFFICIAL=True, DEVICE="cpu")
    hidden = write_circo(tmp_path / "hidden", "test", labelled=False)
    run_stage(monkeypatch, tmp_path, ROOT=str(hidden), DATASET="circo", SPLIT="test", OFFICIAL=False, DEVICE="cpu")
    sent = read_json(tmp_path / "out" / "circo.json")
    assert sent == {str(n): [int(name) for name in order] for n, order in enumerate(rankings)}
    (root / "annotations" / "val.json").write_text(
        json.dumps([{"reference_img_id": 5, "relative_caption": "", "id": 0}])
    )
    with pytest.raises(UserError, match="000000000005 is not in"):
        read_circo(str(root), "val")


# ---- one query, and baselines ----
def test_one_query_over_a_folder_of_pictures(monkeypatch, tmp_path, capsys):
    gallery, draw = tmp_path / "mine", random.Random(1)
    (gallery / "sub").mkdir(parents=True)
    for i in range(9):
        shade = tuple(draw.randint(0, 255) for _ in range(3))
        Image.new("RGB", (20, 30), shade).save(gallery / ("sub" if i % 2 else ".") / f"p{i}.png")
    query = gallery / "p0.png"
    models = []

    def ask(**more):
        capsys.readouterr()
        given = {"REFERENCE": str(query), "TEXT": "+r", "GALLERY": str(gallery)} | more
        run_stage(monkeypatch, tmp_path, DEVICE="cpu", **given)
        models.append(loaded[-1].seen)
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[-1] for line in lines if re.match(r" *\d+  -?\d\.\d{4}  ", line)]

    loaded = []
    colours = Colours
    monkeypatch.setattr(sys.modules[__name__], "Colours", lambda: loaded.append(colours()) or loaded[-1])
    found = ask(TOP=4)
    model = colours().eval()
    features = {}
    for name in list_images(str(gallery)):
        features[name] = model.image(model.preprocess(open_image(gallery / name))[None])
    c = model.compose(features["p0.png"][0], ["+r"])[0]
    order = sorted((n for n in features if n != "p0.png"), key=lambda n: -float(c @ features[n][1][0]))
    assert found == order[:4]  # the reference itself is no answer
    assert Image.open(tmp_path / "out" / "query.png").width > 400
    assert (tmp_path / "out" / "query.html").read_text().count("<figure") == 5
    assert models == [9 + 1]
    assert ask(TOP=99) == order and models[-1] == 1  # only the reference is encoded again
    assert ask(TOP=99, REFERENCE="p0.png") == order  # its name in the gallery will do
    (gallery / "sub" / "p1.png").rename(gallery / "moved.png")
    Image.new("RGB", (20, 30), (1, 2, 250)).save(gallery / "sub" / "p3.png")
    assert len(ask()) == 8 and models[-1] == 1 + 1  # by content: the changed one, not the moved one
    (file,) = tmp_path.glob("mine.*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    assert len(ask()) == 8 and models[-1] == 9 + 1  # a damaged file is made again
    file.unlink()
    whole = encode

    def broken(*given):
        for number, batch in enumerate(whole(*given)):
            if number:
                raise OSError("the power is gone")
            yield batch

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
        patch.setattr(eval_cir, "encode", broken)
        ask(BATCH=4)
    assert len(ask(BATCH=4)) == 8 and models[-1] == 9 - 4 + 1  # what was encoded is kept
    for lack in ({"GALLERY": ""}, {"TEXT": " "}, {"REFERENCE": ""}):
        with pytest.raises(UserError, match="--reference, --text and --gallery together"):
            ask(**lack)
    with pytest.raises(FileNotFoundError, match="typo.png"):  # before anything is encoded
        ask(REFERENCE=str(gallery / "typo.png"))
    (gallery / "torn.png").write_bytes((gallery / "p2.png").read_bytes()[:60])
    (gallery / os.fsdecode(b"M\374tze.png")).write_bytes((gallery / "p2.png").read_bytes())  # its name is not UTF-8
    assert len(ask()) == 8  # a broken picture of one's own is left out, counted and listed
    listed = (tmp_path / "out" / "unreadable.txt").read_text()
    assert "torn.png: is damaged" in listed and "tze.png' contains" in listed
    with pytest.raises(UserError, match="--baseline with its --backbone, or --checkpoint"):
        ask(BASELINE="sum")
    with pytest.raises(UserError, match="--reversed: --score knows"):
        run_stage(monkeypatch, tmp_path, REVERSED=True, RERANK=5, DEVICE="cpu", REFERENCE="", TEXT="", GALLERY="")


@pytest.mark.parametrize("folder", ["clip", "blip"])
def test_baselines_are_the_plain_features(zoo, monkeypatch, tmp_path, world, folder):
    normal = torch.nn.functional.normalize
    model = train_cir.build_cir("sum" if folder == "clip" else "blip_tdm", str(zoo / folder)).eval()
    hf_kind = transformers.CLIPModel if folder == "clip" else transformers.BlipForImageTextRetrieval
    hf, words = hf_kind.from_pretrained(zoo / folder).eval(), transformers.AutoTokenizer.from_pretrained(zoo / folder)
    pixels = torch.randn(2, 3, model.preprocess.size, model.preprocess.size, generator=torch.manual_seed(0))
    ids = words(["a red b", "c"], return_tensors="pt", padding=True)
    with torch.no_grad():
        if folder == "clip":
            image = hf.visual_projection(hf.vision_model(pixel_values=pixels).pooler_output)
            text = hf.text_projection(hf.text_model(**ids).pooler_output)
        else:  # the contrastive half of BLIP: [CLS], no image
            image = hf.vision_proj(hf.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
            text = hf.text_proj(hf.text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state[:, 0])
        image, text = normal(image, dim=1), normal(text, dim=1)
        tokens, target = model.image(pixels)
        torch.testing.assert_close(target, image)
        for what, wanted in (("image", image), ("text", text), ("sum", normal(image + text, dim=1))):
            found = eval_cir.Baseline(model, what).compose(tokens, ["a red b", "c"])
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    flags = {"BASELINE": "sum", "BACKBONE": str(zoo / folder), "ROOT": str(world / "cirr"), "OFFICIAL": False}
    for name, value in ({"OUT": str(tmp_path / "out"), "DEVICE": "cpu", "SHOW": 0} | flags).items():
        monkeypatch.setattr(eval_cir, name, value)
    eval_cir.main()
    record = read_json(tmp_path / "out" / "metrics.json")
    assert record["checkpoint"] == f"plain {zoo / folder}, sum" and 0 <= record["metrics"]["R@1"] <= 100
    assert re.fullmatch("[0-9a-f]{64}", record["sha256"])


# ---- pseudo triplets worth keeping ----
def run_flags(monkeypatch, *argv) -> None:
    """main() by its command line; the constants are put back after the test."""
    for name, value in DEFAULTS.items():
        monkeypatch.setattr(eval_cir, name, value)
    override(vars(eval_cir), [*map(str, argv), "--device", "cpu", "--workers", "0"])
    eval_cir.main()


@pytest.fixture
def deltas(tmp_path):
    """What gen_deltas.py leaves: 4 subgroups of six of 16 pictures, 36 triplets, the same in CIRR's layout."""
    draw_from = random.Random(7)
    names = writer.draw(tmp_path / "aux", 16, 5)
    (tmp_path / "aux" / "copy.png").write_bytes((tmp_path / "aux" / names[0]).read_bytes())
    groups = [[*draw_from.sample(names[1:], 4), names[0], "copy.png"], *(draw_from.sample(names, 6) for _ in range(3))]
    records = []
    for group, members in enumerate(groups):
        pairs = draw_from.sample([(a, b) for a in members for b in members if a != b], 9)
        if group == 0:
            pairs[0] = (members[0], "copy.png")  # a target whose equal is there
        for reference, target in pairs:
            record = {"id": len(records) + 100, "subgroup": group, "reference": reference, "target": target}
            records.append(record | {"delta": draw_from.choice(["make it red", "two dogs", "a ball instead"])})
    write_deltas(tmp_path / "deltas", records, groups)
    return records, groups


def write_deltas(folder, records, groups) -> None:
    write_jsonl(folder / "pseudo.jsonl", records)
    grouped = [record | {"members": groups[record["subgroup"]]} for record in records]
    write_cirr_captions(folder / "cirr", "train", grouped)


def save_plain(folder, zoo, kind, **config):
    """A checkpoint as train_cir.py writes it, of a model that never trained."""
    build = {"model": kind, "backbone": str(zoo / ("clip" if kind == "combiner" else "blip"))}
    build |= {"p": 6, "h": 9} if kind == "combiner" else {}
    torch.manual_seed(0)
    tensors = {"model.safetensors": train_cir.get_trained(train_cir.build_cir(**build))}
    save_folder(folder, tensors, {"config.json": {"build": build} | config})


@pytest.mark.parametrize("kind", ["combiner", "blip_tdm"])
def test_filter_keeps_what_a_cir_model_finds(monkeypatch, tmp_path, zoo, deltas, kind):
    """Against ranks counted here, one query at a time, with the model that load_cir gives; two ranks write the same."""
    records, groups = deltas
    save_plain(tmp_path / "cir", zoo, kind, tau=0.05)
    model = train_cir.load_cir(str(tmp_path / "cir"))
    assert model.tau.item() == pytest.approx(0.05)
    store = ImageStore(tmp_path / "aux")
    see = lambda name: model.image(load_pixels(store, [name], model.preprocess))  # noqa: E731
    kept = []
    for record in records:
        with torch.no_grad():
            c = model.compose(see(record["reference"])[0], [record["delta"]])[0]
            scores = {n: float(see(n)[1][0] @ c) for n in groups[record["subgroup"]] if n != record["reference"]}
        if sum(score >= scores[record["target"]] - 1e-6 for score in scores.values()) <= 2:
            kept.append(record)
    assert 5 < len(kept) < 31

    opened, there = [], ImageStore.open
    monkeypatch.setattr(ImageStore, "open", lambda self, name, *more: opened.append(name) or there(self, name, *more))
    flags = ["--checkpoint", tmp_path / "cir", "--filter", tmp_path / "deltas", "--images", tmp_path / "aux"]
    run_flags(monkeypatch, *flags, "--filter_top", 2, "--out", tmp_path / "kept", "--batch", 5)
    assert read_jsonl(tmp_path / "kept" / "pseudo.jsonl") == kept
    assert len(opened) == len(set(opened)) == len({name for group in groups for name in group})  # each image once
    report = read_json(tmp_path / "kept" / "report.json")
    assert (report["pairs"], report["kept"], report["filter_top"]) == (36, len(kept), 2)
    assert report["share_kept"] == round(len(kept) / 36, 4)
    captions = read_json(tmp_path / "kept" / "cirr" / "captions" / "cap.rc2.train.json")
    assert [c["pairid"] for c in captions] == [record["id"] for record in kept]
    wanted = [groups[record["subgroup"]] for record in kept]
    assert [c["img_set"]["members"] for c in captions] == wanted

    config = (tmp_path / "cir" / "config.json").read_text().replace(str(zoo), "/moved")
    (tmp_path / "cir" / "config.json").write_text(config)
    with pytest.raises(UserError, match="does not match .* manifest.json, or was edited; restore it .for a model that"):
        run_flags(monkeypatch, *flags, "--filter_top", 5, "--out", tmp_path / "all")
    (tmp_path / "cir" / "manifest.json").unlink()  # it vouches for the file that was
    with pytest.raises(UserError, match="stands on the model in /moved/.* name its new place by --backbone"):
        run_flags(monkeypatch, *flags, "--filter_top", 5, "--out", tmp_path / "all")
    flags += ["--backbone", zoo / ("clip" if kind == "combiner" else "blip")]
    run_flags(monkeypatch, *flags, "--filter_top", 5, "--out", tmp_path / "all")
    assert read_jsonl(tmp_path / "all" / "pseudo.jsonl") == records  # five are left without the reference
    two = [*flags, "--filter_top", 2, "--out", tmp_path / "two", "--batch", 5]
    run_ranks(2, lambda: run_flags(monkeypatch, *two))
    for name in ("pseudo.jsonl", "report.json", "cirr/captions/cap.rc2.train.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


class UnevenColours(Colours):
    """Rounds each row of a batch in its own way, as some products of matrices do."""

    def __init__(self, step=0.0):
        super().__init__()
        self.step = step

    def image(self, pixels):
        tokens, found = super().image(pixels)
        return tokens, found + self.step * torch.arange(len(found))[:, None] * torch.tensor([1, 0, 0])


@pytest.mark.parametrize("step", [0, 2e-6, -2e-6])
def test_filter_counts_ties_against_the_target(deltas, tmp_path, step):
    """Against a count one query at a time; a copy of the target is as good as the target however a batch rounds it."""
    records, groups = deltas
    pseudo = eval_cir.read_pseudo(str(tmp_path / "deltas"), str(tmp_path / "aux"))
    ranks = eval_cir.subgroup_ranks(UnevenColours(step), pseudo.benchmark, Compute(64))
    model, wanted = Colours().eval(), []
    see = lambda name: model.image(load_pixels(pseudo.benchmark.images, [name], model.preprocess))  # noqa: E731
    for record in records:
        c = model.compose(see(record["reference"])[0], [record["delta"]])[0]
        scores = {n: float(see(n)[1][0] @ c) for n in groups[record["subgroup"]] if n != record["reference"]}
        wanted.append(sum(score >= scores[record["target"]] - 1e-6 for score in scores.values()))
    assert ranks == wanted
    assert any(record["target"] == "copy.png" for record in records) and len(set(ranks)) > 3


def test_filter_mistakes_are_said_in_one_line(monkeypatch, tmp_path, zoo, deltas):
    records, groups = deltas
    save_plain(tmp_path / "cir", zoo, "combiner", tau=0.05)

    def fails(match, *more, checkpoint=tmp_path / "cir"):
        flags = ["--filter", tmp_path / "deltas", "--images", tmp_path / "aux", "--out", tmp_path / "out"]
        with pytest.raises(UserError, match=match):
            run_flags(monkeypatch, "--checkpoint", checkpoint, *flags, *more)
        assert not (tmp_path / "out" / "pseudo.jsonl").exists()

    fails("--filter_top 0: wanted 1 or more", "--filter_top", 0)
    fails("judges no benchmark", "--rerank", 5)
    fails("wants a folder written by gen_deltas.py", "--filter", tmp_path / "aux")
    fails("--out .* is --filter's folder", "--filter", tmp_path / "out")
    fails("--checkpoint is empty", "--checkpoint", "")
    monkeypatch.setattr("common.pseudo.embed", None)  # nothing long begins before the checkpoint is there
    save_plain(tmp_path / "old", zoo, "combiner")
    fails('old/config.json has no "tau"', checkpoint=tmp_path / "old")
    pair = {"id": 7, "reference": records[0]["reference"], "target": records[0]["target"], "delta": "x"}
    write_deltas(tmp_path / "deltas", records, groups)
    write_jsonl(tmp_path / "deltas" / "pseudo.jsonl", [*records, pair])
    fails("pair 7 is not in .*cap.rc2.train.json")
    write_jsonl(tmp_path / "deltas" / "pseudo.jsonl", [pair])
    write_cirr_captions(tmp_path / "deltas" / "cirr", "train", [pair])  # no members: a subgroup of the two images
    fails("pair 7 has no subgroup; .*subgroups.jsonl")
    write_deltas(tmp_path / "deltas", records, groups)
    (tmp_path / "aux" / groups[1][5]).unlink()
    fails("1 of .* images of the subgroups are missing, first .*--images")
    (tmp_path / "deltas" / "cirr" / "captions" / "cap.rc2.train.json").unlink()
    fails("holds 0 cap.rc2.SPLIT.json")


# ---- the real annotations ----
@pytest.mark.parametrize(
    "dataset, split, protocol, queries, galleries",
    [
        ("cirr", "val", "split", 4181, [2297]),
        ("cirr", "test", "split", 4148, [2315]),
        ("cirr", "test1", "references", 4148, [2178]),
        ("cirr", "val", "references", 4181, [2165]),
        ("fashioniq", "val", "original", 6016, [3817, 6346, 5373]),
        ("fashioniq", "val", "val", 6016, [2628, 3089, 2902]),
    ],
)
def test_published_counts(shared, dataset, split, protocol, queries, galleries):
    found = read_benchmarks(dataset, str(shared / "data" / dataset), split, "all", "", protocol)
    assert sum(len(b.queries) for b in found) == queries and [len(b.gallery) for b in found] == galleries
    for benchmark in found:
        require_official(benchmark, protocol)
        at = index(benchmark, True)
        assert at.gallery == len(benchmark.gallery) and (at.target is None) == split.startswith("test")
        fewer = dataclasses.replace(benchmark, queries=benchmark.queries[1:])
        with pytest.raises(UserError, match="published"):
            require_official(fewer, protocol)


def test_check_counts_and_stops(shared, monkeypatch, capsys):
    monkeypatch.setattr(eval_cir, "load_cir", None)  # calling it would raise: --check loads no model
    for name, value in (("CHECK", True), ("DEVICE", "cpu"), ("ROOT", str(shared / "data" / "cirr"))):
        monkeypatch.setattr(eval_cir, name, value)
    with pytest.raises(UserError, match="2,297 images missing .*'dev-244-0-img0'"):
        eval_cir.main()
    printed = capsys.readouterr().out
    assert "4,181 queries, 2,297 gallery images" in printed and "2,297 missing" in printed
    monkeypatch.setattr(eval_cir, "DATASET", "fashioniq")
    monkeypatch.setattr(eval_cir, "ROOT", str(shared / "data" / "fashioniq"))
    with pytest.raises(UserError, match="15,536 images missing"):
        eval_cir.main()
    printed = capsys.readouterr().out
    for count in ("6,016 queries", "3,817 gallery", "6,346 gallery", "5,373 gallery"):
        assert count in printed


def test_check_passes_when_all_is_there(world, monkeypatch, capsys):
    for name, value in (("CHECK", True), ("DEVICE", "cpu"), ("ROOT", str(world / "cirr")), ("OFFICIAL", False)):
        monkeypatch.setattr(eval_cir, name, value)
    eval_cir.main()
    assert "8 queries, 24 gallery images" in capsys.readouterr().out


def test_unknown_protocol_names_the_choices(monkeypatch):
    monkeypatch.setattr(eval_cir, "CIRR_PROTOCOL", "all")
    with pytest.raises(UserError, match="--cirr_protocol all: wanted split or references"):
        eval_cir.main()
