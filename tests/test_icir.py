"""i-CIR: its csv files, its average precision as the authors define it, and a whole evaluation by brute force."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_field import run_flags

import eval_cir
import train_cir
from common.console import UserError
from common.files import read_json, read_jsonl
from common.icir import average_precision, icir_maps, read_icir
from common.retrieval import Ranks

TEXTS = ("at night", "in snow, from afar", "as a drawing")


def area(correct: list[bool]) -> float:
    """The definition, place by place: precision before and after each right image, over steps of recall."""
    total = sum(correct)
    ap = hits = 0
    for place, right in enumerate(correct):  # from 0
        if right:
            before = 1.0 if place == 0 else hits / place
            hits += 1
            ap += (before + hits / (place + 1)) / 2 / total
    return ap


def drawn_icir(root, prefix: str = "icir/") -> list[list[str]]:
    """Three instances in i-CIR's layout: databases of 15 to 17 pictures, 2 x 2 queries each -> rows of the database."""
    draw, queries, database = random.Random(4), [], []
    for folder in ("query", "database"):
        (root / "icir" / folder).mkdir(parents=True)

    def picture(name: str, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(root / "icir" / name)

    for n, instance in enumerate(("temple", "homer", "mug")):
        for i in range(15 + n):
            name = f"database/{instance}-{i}.png"
            picture(name, 100 * n + i)
            text = TEXTS[i % 2] if i < 5 else draw.choice(["", "another", TEXTS[2]])
            database.append([prefix + name, text, instance])
        for i in range(2):
            picture(f"query/{instance}-{i}.png", 900 + 10 * n + i)
            queries += [[f"{prefix}query/{instance}-{i}.png", text, instance] for text in TEXTS[:2]]
    for name, rows in (("query", queries), ("database", database)):
        lines = [",".join(f'"{part}"' if "," in part else part for part in row) for row in rows]
        (root / "icir" / f"{name}_files.csv").write_text("\n".join(lines) + "\n")
    return database


def test_average_precision_is_the_area_under_the_curve():
    draw = random.Random(0)
    for _ in range(50):
        correct = [draw.random() < 0.2 for _ in range(40)]
        correct[draw.randrange(40)] = True
        places = [i + 1 for i, right in enumerate(correct) if right]
        draw.shuffle(places)
        ranks = torch.tensor([places + [-1] * (40 - len(places)), [1, 2] + [-1] * 38])
        found = average_precision(ranks)
        assert found[0].item() == pytest.approx(area(correct), abs=1e-12) and found[1] == 1
    one, two = Ranks(torch.tensor([1]), truths=torch.tensor([[1]])), torch.tensor([[2], [4], [4]])
    maps = icir_maps([one, Ranks(two[:, 0], truths=two)])
    # at place 2: (0 + 1/2) / 2, at place 4: (0 + 1/4) / 2
    assert maps == pytest.approx({"mAP": 100 * (1 + 0.25 + 0.25) / 4, "mmAP": 100 * (1 + 0.5 / 3) / 2, "minmAP": 56.25})


@pytest.mark.parametrize("prefix", ["icir/", "", "ilcir202_censored/"])
@torch.no_grad()
def test_an_evaluation_equals_brute_force(prefix, zoo, tmp_path, monkeypatch, capsys):
    database = drawn_icir(tmp_path, prefix)
    flags = ["--dataset", "icir", "--root", tmp_path / "icir", "--official", "false", "--show", 6]
    flags += ["--baseline", "sum", "--backbone", zoo / "clip", "--out", tmp_path / "out"]
    run_flags(monkeypatch, eval_cir, *flags)
    record = read_json(tmp_path / "out/metrics.json")
    assert "3 instances" in capsys.readouterr().out and "database of the query's instance" in record["protocol"]
    assert [(part["queries"], part["gallery"]) for part in record["parts"]] == [(4, 15), (4, 16), (4, 17)]

    model, normal = train_cir.build_cir("sum", str(zoo / "clip")).eval(), torch.nn.functional.normalize

    def image(name: str) -> torch.Tensor:
        picture = Image.open(tmp_path / "icir" / name.removeprefix(prefix)).convert("RGB")
        return model.target(model.tokens(model.preprocess(picture)[None]))[0]

    features, by_instance = {row[0]: image(row[0]) for row in database}, {}
    for line in read_jsonl(tmp_path / "out/found.jsonl"):
        instance = line["id"].rpartition("-")[0]
        text = normal(model.text([line["delta"]], "cpu"), dim=1)[0]
        wanted = normal(image(f"{prefix}query/{line['reference'].rpartition('/')[2]}") + text, dim=0)
        rows = [row for row in database if row[2] == instance]
        rows.sort(key=lambda row: -float(features[row[0]] @ wanted))  # noqa: B023
        by_instance.setdefault(instance, []).append(area([row[1] == line["delta"] for row in rows]))
    every = [ap for aps in by_instance.values() for ap in aps]
    assert len(every) == 12 and len(set(every)) > 6
    wanted = {"mAP": np.mean(every), "mmAP": np.mean([np.mean(aps) for aps in by_instance.values()])}
    wanted["minmAP"] = np.mean([min(aps) for aps in by_instance.values()])
    assert record["metrics"] == pytest.approx({name: 100 * value for name, value in wanted.items()}, abs=1e-9)


def test_an_image_that_stands_twice_is_searched_once(tmp_path, capsys):
    drawn_icir(tmp_path)
    path = tmp_path / "icir/database_files.csv"
    path.write_text(path.read_text() + "icir/database/temple-9.png,at night,temple\n")
    temple = read_icir(str(tmp_path / "icir"), official=False)[0]
    assert len(temple.gallery) == 15 and "1 lines name an image of their instance again" in capsys.readouterr().out
    assert temple.queries[0].truths[-1] == "icir/database/temple-9.png"


@pytest.mark.parametrize(
    "file, line, words",
    [
        ("query", "icir/query/temple-0.png,at night", "line 13: found .* wanted image,text,instance"),
        (
            "query",
            "icir/query/temple-0.png,in rain,temple",
            "line 13: .* no image of 'in rain' of 'temple'",
        ),
        ("query", "icir/query/temple-0.png,at night,cat", "no image of 'at night' of 'cat'"),
        ("database", "../../etc/passwd,at night,temple", "database_files.csv, line 49: "),
        ("database", "icir/a.png,in snow, from afar,temple", "line 49: found"),
        ("query", "icir/query/temple-0.png, ,temple", "line 13: .* no image of '' of 'temple'"),
        ("database", 'icir/a.png,"red" car,temple', "after line 48: .* wanted image,text,instance in UTF-8"),
        ("query", f"icir/a.png,{'long ' * 30_000},temple", "after line 12: field larger than field limit"),
    ],
)
def test_a_wrong_line_stops(file, line, words, tmp_path):
    drawn_icir(tmp_path)
    path = tmp_path / f"icir/{file}_files.csv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=words):
        read_icir(str(tmp_path / "icir"), official=False)


def test_another_encoding_is_named(tmp_path):
    drawn_icir(tmp_path)
    path = tmp_path / "icir/query_files.csv"
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(UserError, match="query_files.csv, after line 0: .* in UTF-8"):
        read_icir(str(tmp_path / "icir"), official=False)


def test_other_counts_shards_and_flags_stop(zoo, tmp_path, monkeypatch):
    drawn_icir(tmp_path)
    with pytest.raises(UserError, match="12 queries of 3 instances, published are 1,883 of 202; --official"):
        read_icir(str(tmp_path / "icir"))
    with pytest.raises(UserError, match="no query_files.csv"):
        read_icir(str(tmp_path))
    (tmp_path / "icir/webdataset").mkdir()
    with pytest.raises(UserError, match="holds shards; extract them"):
        read_icir(str(tmp_path / "icir"), official=False)
    flags = ["--dataset", "icir", "--root", tmp_path / "icir", "--baseline", "sum", "--backbone", zoo / "clip"]
    with pytest.raises(UserError, match="--dataset icir is measured as it is: no --audit"):
        run_flags(monkeypatch, eval_cir, *flags, "--audit", "true")
