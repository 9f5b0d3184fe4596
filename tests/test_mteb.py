"""bench/mteb_cir.py: the adapter alone, and, where MTEB is installed, a task through MTEB itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_field import checkpoint_of, drawn_cirr

import train_cir
from common.annotations import read_cirr
from common.encoding import Compute

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import mteb_cir  # noqa: E402


def ndcg_by_hand(scores: torch.Tensor, benchmark) -> float:
    """The definition, with gains over discounts: scores (N, M) -> mean over the queries."""
    total = 0.0
    for row, query in zip(scores.tolist(), benchmark.queries, strict=True):
        order = sorted(benchmark.gallery, key=lambda name: -row[benchmark.gallery.index(name)])  # noqa: B023
        gains = [float(name == query.target) for name in order[:10]]
        total += sum(gain / torch.log2(torch.tensor(place + 1.0)).item() for place, gain in enumerate(gains, 1))
    return total / len(benchmark.queries)


@pytest.mark.parametrize("kind", ["combiner", "blip_tdm"])
@torch.no_grad()
def test_the_adapter_encodes_as_the_model(kind, zoo, tmp_path):
    model = train_cir.build_cir(kind, str(zoo / ("blip" if kind == "blip_tdm" else "clip"))).eval()
    benchmark = read_cirr(str(drawn_cirr(tmp_path / "world")), "val")
    encoder = mteb_cir.CirEncoder(model, Compute(4))
    opened = {name: benchmark.images.open(name) for name in benchmark.gallery}
    corpus = [{"image": [opened[name]]} for name in benchmark.gallery]
    asked = [{"image": [opened[q.reference]], "text": [q.delta]} for q in benchmark.queries]
    images, queries = encoder.encode(corpus, prompt_type="document"), encoder.encode(asked, prompt_type="query")
    tokens = {name: model.tokens(model.preprocess(picture)[None]) for name, picture in opened.items()}
    torch.testing.assert_close(images, torch.cat([model.target(tokens[name]) for name in benchmark.gallery]))
    torch.testing.assert_close(
        queries, torch.cat([model.compose(tokens[q.reference], [q.delta]) for q in benchmark.queries])
    )
    scores = encoder.similarity(queries, images)
    ours = mteb_cir.our_ndcg(model, benchmark, Compute(4))
    assert ours == pytest.approx(ndcg_by_hand(scores, benchmark), abs=1e-6) and 0 < ours < 1


def command(*argv) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "bench/mteb_cir.py"), *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True)


def test_flags_are_checked(tmp_path):
    pytest.importorskip("mteb")
    done = command("--checkpoint", tmp_path)
    assert done.returncode == 1 and "either --tasks of the hub or the --root" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["combiner", "blip_tdm"])
def test_mteb_gives_the_number_of_our_ranking(kind, zoo, tmp_path):
    """The whole command, through MTEB's own loader, search and pytrec_eval."""
    pytest.importorskip("mteb")
    root = drawn_cirr(tmp_path / "world")
    checkpoint_of(tmp_path / "cir", model=kind, backbone=str(zoo / ("blip" if kind == "blip_tdm" else "clip")))
    done = command("--checkpoint", tmp_path / "cir", "--root", root, "--batch", 5)
    assert done.returncode == 0, done.stderr
    theirs, ours = map(float, re.search(r"nDCG@10 ([\d.]+) by MTEB .*, ([\d.]+) here", done.stdout).groups())
    benchmark = read_cirr(str(root), "val")
    model = train_cir.load_cir(str(tmp_path / "cir"))
    encoder = mteb_cir.CirEncoder(model, Compute(8))
    opened = {name: benchmark.images.open(name) for name in benchmark.gallery}
    images = encoder.encode([{"image": list(opened.values())}])
    asked = {"image": [opened[q.reference] for q in benchmark.queries], "text": [q.delta for q in benchmark.queries]}
    queries = encoder.encode([asked], prompt_type="query")
    wanted = 100 * ndcg_by_hand(encoder.similarity(queries, images), benchmark)
    assert theirs == pytest.approx(wanted, abs=2e-3) and ours == pytest.approx(wanted, abs=1e-3)


def test_the_tasks_of_the_hub_are_known_to_mteb():
    mteb = pytest.importorskip("mteb")
    found = mteb.get_tasks(tasks=["CIRRIT2IRetrieval", "FashionIQIT2IRetrieval"])
    assert [task.metadata.main_score for task in found] == ["ndcg_at_10", "ndcg_at_10"]
    assert all(task.metadata.category == "it2i" for task in found)
