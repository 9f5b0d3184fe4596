"""demo/claims.py without training: its commands are ones the stages take, its intervals are Student's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo as writer

from common.console import UserError
from common.exports import write_cirr_captions
from common.files import read_jsonl, write_json, write_jsonl, write_text
from common.flags import parse_flags, read_flags
from demo import as_released, claims, part_of, report, world
from kernels.contrastive import l_tcc
from kernels.negatives import draw_negatives
from kernels.reversed import reversed_sum

ROOT = Path(__file__).parent.parent
ROWS = [f"{model}-{row}" for model in ("combiner", "blip_tdm") for row in ("supervised", "same", "auxiliary", "only")]
PAGE = (
    "Before.\n<!-- drawn -->\nold\n<!-- end of drawn -->\nBetween.\n<!-- photos -->\n<!-- end of photos -->\nAfter.\n"
)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two finished demos, whose rows have constants; commands are parsed and noted, and leave what is read of them."""
    asked, demos = [], []
    picture = {"category": "dress", "colour": "red"}
    for folder in ("demo", "demo-seed-1"):
        demo = tmp_path / "demos" / folder
        write_json(demo / "world" / "attributes.json", {"a": picture, "b": picture})
        write_json(demo / "vdg" / "manifest.json", {"of": folder})
        row = {"model": "combiner", "name": "supervised"} | dict.fromkeys(report.RECALLS, 20.0 + 10 * len(demos))
        deltas = {"VDG, held-out pairs": {"precision": 80.0 - 5 * len(demos), "recall": 50.0}}
        write_json(demo / "metrics.json", {"rows": [row | {"mean": row["R@1"]}], "deltas": deltas})
        demos.append(folder)
        for name in ("heldout", "pseudo"):
            write_jsonl(demo / name / "pseudo.jsonl", [])
        for row in ROWS:
            constants = {
                "MODEL": row.split("-")[0],
                "STEPS": 7,
                "BETAS": [0.9, 0.99],
                "SEED": 5,
                "OUT": "x",
                "RANKS": 1,
            }
            write_json(demo / "cir" / row / "config.json", {"constants": constants})
            write_json(demo / "cir" / row / "manifest.json", {"of": folder})

    def command(words: list[str], log: str, threads: int = 1) -> None:
        script, given = words[1], words[2:]
        if script == "demo/as_released.py":
            assert given.pop(0) in as_released.WAYS
            script = "train_cir.py"
        flags = parse_flags(read_flags(ROOT / script), given)  # raises for a flag that is none
        asked.append((words[1], flags))
        out = Path(flags["OUT"])
        if words[1] == "eval_cir.py":
            value = len(asked) % 7 + (50.0 if "seed-1" in str(out) else 20.0)
            metrics = {"R@1": value, "R@5": value, "R@10": value + 3, "Rs@1": value}
            write_json(out / "metrics.json", {"metrics": metrics})
        elif words[1] in ("gen_deltas.py", "demo/part_of.py"):
            write_jsonl(out / "pseudo.jsonl", [])

    monkeypatch.setattr(claims, "command", command)
    write_text(tmp_path / "page.md", PAGE)
    for name, value in {
        "SEEDS": 2,
        "DEMOS": tmp_path / "demos",
        "OUT": tmp_path / "out",
        "PAGE": tmp_path / "page.md",
        "DATA": tmp_path / "shop photographs",
        "LLM": tmp_path / "smollm2",
    }.items():
        monkeypatch.setattr(claims, name, str(value) if name != "SEEDS" else value)
    return asked


def test_every_claim_is_run_by_flags_that_the_stages_take(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ONLY", tuple(claims.CLAIMS))
    claims.main()
    assert (tmp_path / "page.md").read_text() == PAGE  # claims that were named do not take the others from the page
    monkeypatch.setattr(claims, "ONLY", ())
    made = len(lab)
    claims.main()
    assert len(lab) == made
    trained = [flags for script, flags in lab if script == "train_cir.py"]
    assert {flags["SEED"] for flags in trained} == {0, 1}
    assert sum(flags["STEPS"] == 240 for flags in trained) == 4  # two arms that train longer; the others as the demo
    assert all(flags["STEPS"] in (7, 240) for flags in trained)
    assert sum(flags.get("CONCAT") is False for flags in trained) == 2
    for flags in trained:  # VDG's text leads back, the human's leads forth
        if flags.get("REVERSED_TEXT") == "delta":
            assert Path(flags["SAME_PAIRS"]).exists() and flags["SAME_DELTAS"] is False
    ways = [script for script, _ in lab if script == "demo/as_released.py"]
    assert len(ways) == 2 * len(as_released.WAYS)
    far = [flags for script, flags in lab if script == "demo/catalogue.py"]
    assert [flags["DATA"] for flags in far] == [str(tmp_path / "shop photographs")] * 2
    outs = [flags["OUT"] for _, flags in lab]
    assert len(outs) == len(set(outs))  # nothing twice
    found = json.loads((tmp_path / "out" / "claims.json").read_text())["less and more of each seed"]
    assert list(found) == [name for name in claims.CLAIMS if name != "augment-long"]
    assert all(len(values) == 2 for values in found.values())
    rows = (tmp_path / "out" / "claims.md").read_text().splitlines()
    assert len(rows) == 2 + len(found) and (tmp_path / "out" / "claims.png").stat().st_size > 10_000
    demos = (tmp_path / "out" / "demos.md").read_text()
    assert "| combiner | supervised | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 (20.0 to 30.0) |\n" in demos
    assert "| VDG, held-out pairs | 77.5 (75.0 to 80.0) | 50.0 (50.0 to 50.0) |\n" in demos
    page = (tmp_path / "page.md").read_text()
    assert page == PAGE.replace("old\n", "\n".join(rows) + "\n")
    assert {flags.get("DTYPE", "auto") for flags in trained} == {"auto"}
    assert [flags["LLM"] for script, flags in lab if script == "vdg_align.py"] == [str(tmp_path / "smollm2")] * 2

    # nothing is made again, and a claim alone says the same
    first = len(lab)
    monkeypatch.setattr(claims, "ONLY", ("concat",))
    claims.main()
    assert len(lab) == first
    assert (tmp_path / "out" / "claims.md").read_text().splitlines()[2] in rows
    assert (tmp_path / "page.md").read_text() == page  # one claim does not take the others from the page

    # the arms of the claims about more human triplets differ in these alone
    tuned = {
        Path(f["OUT"]).name.rpartition("-")[0]: f for script, f in lab if script == "vdg_tune.py" and not f["SEED"]
    }
    for few, many, passes in (("vdg-linears", "vdg-more", (12, 3)), ("vdg-llm", "vdg-llm-more", (8, 2))):
        differ = {name for name in tuned[few] if tuned[few][name] != tuned[many].get(name)}
        assert differ == {"OUT", "ROOT", "EPOCHS"} and tuned[few].keys() == tuned[many].keys()
        assert (tuned[few]["EPOCHS"], tuned[many]["EPOCHS"]) == passes
        assert "/more-" in tuned[many]["ROOT"]

    # without photographs and a language model the claims about them are left out
    monkeypatch.setattr(claims, "ONLY", ("concat", "in-domain", *(name for name in claims.CLAIMS if "llm" in name)))
    monkeypatch.setattr(claims, "DATA", "")
    monkeypatch.setattr(claims, "LLM", "")
    claims.main()
    assert len((tmp_path / "out" / "claims.md").read_text().splitlines()) == 3
    monkeypatch.setattr(claims, "ONLY", ("in-domain",))
    with pytest.raises(UserError, match="--only in-domain: nothing is left to ask"):
        claims.main()
    monkeypatch.setattr(claims, "ONLY", ("concat",))

    # other deltas: all that stands on this demo is made anew
    write_jsonl(tmp_path / "demos" / "demo" / "pseudo" / "pseudo.jsonl", [{"of": "another"}])
    claims.main()
    assert {script for script, _ in lab[first:]} == {"train_cir.py", "eval_cir.py"}
    assert {flags["SEED"] for _, flags in lab[first:]} == {0}


def test_the_claims_of_photographs(lab, tmp_path, monkeypatch):
    """Their usual claims exist, their commands are flags of the stages, and the page's other table stays."""
    for folder in ("demo", "demo-seed-1"):
        (tmp_path / "demos" / folder).rename(tmp_path / "demos" / folder.replace("demo", "demo-photos"))
        attributes = {name: {"article": "shirt", "colour": "red"} for name in "ab"}
        write_json(tmp_path / "demos" / folder.replace("demo", "demo-photos") / "world" / "attributes.json", attributes)
    monkeypatch.setattr(claims, "WORLD", "photos")
    monkeypatch.setattr(claims, "OUT", str(tmp_path / "out"))
    claims.main()
    found = json.loads((tmp_path / "out" / "claims.json").read_text())["less and more of each seed"]
    assert sorted(found) == sorted(claims._WORLDS["photos"]["claims"]) and len(found) > 15
    kinds = [flags["KIND"] for script, flags in lab if script == "demo/part_of.py" and flags.get("TRUE")]
    assert kinds == ["photos"] * 2
    rows = (tmp_path / "out" / "claims.md").read_text()
    between = "<!-- photos -->\n<!-- end"
    assert (tmp_path / "page.md").read_text() == PAGE.replace(between, f"<!-- photos -->\n{rows}<!-- end")


def test_mistakes_are_one_line(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ONLY", ("concat", "no such"))
    with pytest.raises(UserError, match="--only no such: no such claim; there are same, "):
        claims.main()
    monkeypatch.setattr(claims, "ONLY", ())
    monkeypatch.setattr(claims, "SEEDS", 11)
    with pytest.raises(UserError, match="--seeds 11: the table of Student's t ends with 10"):
        claims.main()
    monkeypatch.setattr(claims, "SEEDS", 1)
    write_text(tmp_path / "page.md", "no marks")
    with pytest.raises(UserError, match="wanted the marks <!-- drawn -->"):
        claims.main()


def test_intervals_are_students():
    """The ends by numpy's own quantiles of Student's t, drawn: a mean of n normal numbers lies within in 95 of 100."""
    assert claims.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 8, 10):
        within = [low <= 1 <= high for _, low, high in map(claims.interval, rng.normal(1, 3, (4000, count)).tolist())]
        assert sum(within) / 4000 == pytest.approx(0.95, abs=0.012)
    assert [claims.verdict(*ends) for ends in ((0.1, 2), (-2, -0.1), (-1, 1))] == ["holds", "the contrary", "undecided"]
    assert claims.verdict(*claims.interval([5.0])[1:]) == "undecided"


def test_a_part_of_the_deltas(tmp_path, monkeypatch):
    records = [{"id": i, "subgroup": i // 9, "delta": f"text {i}"} for i in range(720)]
    write_jsonl(tmp_path / "pseudo" / "pseudo.jsonl", records)

    def part(**flags) -> list[dict]:
        for name, value in ({"OF": str(tmp_path / "pseudo"), "OUT": str(tmp_path / "part")} | flags).items():
            monkeypatch.setattr(part_of, name, value)
        part_of.main()
        return read_jsonl(tmp_path / "part" / "pseudo.jsonl")

    eighth = part(SHARE=0.125, SHUFFLED=0.0)
    assert len(eighth) == 90 and all(record in records for record in eighth)
    assert len({record["subgroup"] for record in eighth}) == 10
    half = part(SHARE=1.0, SHUFFLED=0.5)
    assert sum(a["delta"] != b["delta"] for a, b in zip(half, records, strict=True)) == 360
    assert sorted(r["delta"] for r in half) == sorted(r["delta"] for r in records)
    assert [{**r, "delta": ""} for r in half] == [{**r, "delta": ""} for r in records]

    cirr = tmp_path / "cirr"
    names = writer.draw(cirr / "img_raw" / "train", 4, 3)
    human = [{"id": 1, "reference": "a", "target": "b", "delta": "in red", "members": ["a", "b"]}]
    write_cirr_captions(cirr, "train", human)
    split = {name: f"./train/{file}" for name, file in zip("ab", names, strict=False)}
    write_json(cirr / "image_splits" / "split.rc2.train.json", split)
    both = part(SHARE=1.0, SHUFFLED=0.0, ALSO=str(cirr))
    assert both[:-1] == records
    assert both[-1] == {"reference": f"train/{names[0]}", "target": f"train/{names[1]}", "delta": "in red"}


@pytest.mark.parametrize("kind", ["drawn", "photos"])
def test_the_worlds_own_texts(kind, tmp_path, monkeypatch):
    """Each pair gets a text in which the world finds nothing wrong; one without a difference keeps the text it has."""
    rng = np.random.default_rng(0)
    if kind == "drawn":
        things = {f"{i}.jpg": world.random_garment(rng) for i in range(12)}
    else:
        values = {"article": ("shirt", "jeans"), "colour": ("red", "blue"), "gender": ("men", "women")}
        things = {f"{i}.jpg": {key: str(rng.choice(of)) for key, of in values.items()} for i in range(12)}
    records = [{"reference": a, "target": b, "delta": "as it was", "subgroup": 0} for a in things for b in things]
    write_jsonl(tmp_path / "pseudo" / "pseudo.jsonl", records)
    write_json(tmp_path / "attributes.json", things)
    flags = {"OF": tmp_path / "pseudo", "OUT": tmp_path / "part", "TRUE": tmp_path, "KIND": kind}
    for name, value in flags.items():
        monkeypatch.setattr(part_of, name, str(value))
    part_of.main()
    told = read_jsonl(tmp_path / "part" / "pseudo.jsonl")
    assert [record | {"delta": ""} for record in told] == [record | {"delta": ""} for record in records]
    for record in told:
        a, b = things[record["reference"]], things[record["target"]]
        if a == b:
            assert record["delta"] == "as it was"
        else:
            verdicts = [good for _, good in report.JUDGES[kind].judged(record["delta"], a, b)]
            assert verdicts and all(verdicts), record


def test_what_the_releases_compute():
    """The published HN-NCE gives the number that the public code gave on these inputs; without hardness it is ours."""
    c = F.normalize(torch.arange(1, 13).reshape(4, 3).double() % 5 - 2, dim=1)
    x = F.normalize((torch.arange(12).reshape(4, 3) * 3 % 7 - 3).double(), dim=1)
    assert as_released.l_tcc(x, c, 0, 0.07, 1.0, 0.5).item() == pytest.approx(27.271047, abs=2e-5)
    assert l_tcc(x, c, 0, 0.07, 1.0, 0.5).item() == pytest.approx(24.382970, abs=1e-6)
    for human in (0, 2, 4):
        ours = l_tcc(x, c, human, 0.07, 0.5, 0.0)
        assert as_released.l_tcc(x, c, human, 0.07, 0.5, 0.0).item() == pytest.approx(ours.item())

    # their negatives are ours at temperature 1, whatever the temperature
    images, draws = list("abcd"), [torch.Generator().manual_seed(0) for _ in range(2)]
    theirs = as_released.negatives_without_tau(x, c, images, 0.01, draws[0])
    assert all(torch.equal(a, b) for a, b in zip(theirs, draw_negatives(x, c, images, 1.0, draws[1]), strict=True))

    # a target of any length is as good to them
    text, positive = c * 3, torch.arange(4)
    theirs = as_released.reversed_normalised(c, text, 7 * x, positive, 0.07)
    torch.testing.assert_close(theirs, reversed_sum(c, text, x, positive, 0.07).to(theirs.dtype))


def test_a_way_must_be_named():
    done = subprocess.run([sys.executable, "demo/as_released.py", "hn_nce"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: wanted demo/as_released.py WAY, one of hn-nce, ")
