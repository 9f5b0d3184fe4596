"""demo/claims.py without training: its commands are ones the stages take, its intervals are Student's."""

import json
from pathlib import Path

import numpy as np
import pytest
import zoo as writer

from common.console import UserError
from common.exports import write_cirr_captions
from common.files import read_jsonl, write_json, write_jsonl, write_text
from common.flags import parse_flags, read_flags
from demo import claims, part_of

ROOT = Path(__file__).parent.parent
ROWS = [f"{model}-{row}" for model in ("combiner", "blip_tdm") for row in ("supervised", "same", "auxiliary", "only")]
PAGE = (
    "Before.\n<!-- drawn -->\nold\n<!-- end of drawn -->\nBetween.\n<!-- photos -->\n<!-- end of photos -->\nAfter.\n"
)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two finished demos, whose rows have constants; commands are parsed and noted, and leave what is read of them."""
    asked = []
    picture = {"category": "dress", "colour": "red"}
    for folder in ("demo", "demo-seed-1"):
        demo = tmp_path / "demos" / folder
        write_json(demo / "world" / "attributes.json", {"a": picture, "b": picture})
        for name in ("metrics.json", "vdg/manifest.json"):
            write_json(demo / name, {"of": folder})
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
        flags = parse_flags(read_flags(ROOT / words[1]), words[2:])  # raises for a flag that is none
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
    }.items():
        monkeypatch.setattr(claims, name, str(value) if name != "SEEDS" else value)
    return asked


def test_every_claim_is_run_by_flags_that_the_stages_take(lab, tmp_path, monkeypatch):
    claims.main()
    trained = [flags for script, flags in lab if script == "train_cir.py"]
    assert {flags["SEED"] for flags in trained} == {0, 1} and all(flags["STEPS"] == 7 for flags in trained)
    assert sum(flags.get("CONCAT") is False for flags in trained) == 2
    for flags in trained:  # VDG's text leads back, the human's leads forth
        if flags.get("REVERSED_TEXT") == "delta":
            assert Path(flags["SAME_PAIRS"]).exists() and flags["SAME_DELTAS"] is False
    outs = [flags["OUT"] for _, flags in lab]
    assert len(outs) == len(set(outs))  # nothing twice
    found = json.loads((tmp_path / "out" / "claims.json").read_text())["less and more of each seed"]
    assert list(found) == list(claims.CLAIMS) and all(len(values) == 2 for values in found.values())
    rows = (tmp_path / "out" / "claims.md").read_text().splitlines()
    assert len(rows) == 2 + len(claims.CLAIMS) and (tmp_path / "out" / "claims.png").stat().st_size > 10_000
    page = (tmp_path / "page.md").read_text()
    assert page == PAGE.replace("old\n", "\n".join(rows) + "\n")
    assert {flags.get("DTYPE", "auto") for _, flags in lab} == {"auto"}

    # nothing is made again, and a claim alone says the same
    first = len(lab)
    monkeypatch.setattr(claims, "ONLY", ("concat",))
    claims.main()
    assert len(lab) == first
    assert (tmp_path / "out" / "claims.md").read_text().splitlines()[2] in rows
    assert (tmp_path / "page.md").read_text() == page  # one claim does not take the others from the page

    # other deltas: all that stands on this demo is made anew
    write_jsonl(tmp_path / "demos" / "demo" / "pseudo" / "pseudo.jsonl", [{"of": "another"}])
    claims.main()
    assert {script for script, _ in lab[first:]} == {"train_cir.py", "eval_cir.py"}
    assert {flags["SEED"] for _, flags in lab[first:]} == {0}


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
