"""demo/claims.py without training: its commands are ones the stages take, its table is the mean and the range."""

import json
import os
from pathlib import Path

import pytest

from common.console import UserError
from common.files import write_json, write_text
from common.flags import parse_flags, read_flags
from demo import claims

ROOT = Path(__file__).parent.parent


def test_commands_and_table(tmp_path, monkeypatch):
    demos = [tmp_path / "demo", tmp_path / "demo-seed-1"]
    for demo in demos:
        write_json(demo / "vdg" / "manifest.json", {})
        write_json(demo / "cir" / "blip_tdm-auxiliary" / "manifest.json", {})
        write_json(demo / "world" / "attributes.json", {})
    asked = []

    def stage(words: list[str], log: str) -> None:
        flags = parse_flags(read_flags(ROOT / words[0]), words[1:])  # raises for a flag that is none
        asked.append((words[0], flags))
        out = Path(flags["OUT"])
        if words[0] == "gen_deltas.py":
            write_text(out / "pseudo.jsonl", "")
        elif words[0] == "eval_cir.py":
            value = 10.0 if "seed-1" in str(out) else 40.0
            write_json(out / "metrics.json", {"metrics": {"R@1": value, "R@5": value, "R@10": value + 3}})

    monkeypatch.setattr(claims, "stage", stage)
    monkeypatch.setattr(claims, "DEMOS", tuple(map(str, demos)))
    monkeypatch.setattr(claims, "OUT", str(tmp_path / "out"))
    claims.main()
    trained = [flags for script, flags in asked if script == "train_cir.py"]
    assert len(trained) == 2 * len(claims.RUNS) and {flags["SEED"] for flags in trained} == {0, 1}
    assert sum(flags.get("REVERSED_TEXT") == "delta" for flags in trained) == 4
    assert sum(flags.get("BIDIRECTIONAL", 0) == claims.ALPHA for flags in trained) == 8
    for flags in trained:  # VDG's text leads back, the human's leads forth
        if flags.get("REVERSED_TEXT") == "delta":
            assert os.path.exists(flags["SAME_PAIRS"]) and flags["SAME_DELTAS"] is False
    evaluated = [flags for script, flags in asked if script == "eval_cir.py"]
    assert len(evaluated) == 2 * (len(claims.RUNS) * 3 + 2) and sum("RERANK" in flags for flags in evaluated) == 2
    rows = (tmp_path / "out" / "claims.md").read_text().splitlines()
    assert len(rows) == 2 + len(claims.RUNS) + 2
    assert "| 26.0 (11.0 to 41.0) |" in rows[2]
    assert json.loads((tmp_path / "out" / "claims.json").read_text())["mean of R@1, R@5, R@10"]["sum"]["vdg"] == [
        41,
        11,
    ]
    first = len(asked)
    claims.main()  # nothing changed: only training is asked for again, as the one faked here left no weights
    assert {script for script, _ in asked[first:]} == {"train_cir.py"}
    write_json(demos[0] / "vdg" / "manifest.json", {"another": "VDG"})
    first = len(asked)
    claims.main()
    assert sum(script == "gen_deltas.py" for script, _ in asked[first:]) == 2  # of the demo that is another now
    monkeypatch.setattr(claims, "DEMOS", (str(tmp_path / "nothing"),))
    with pytest.raises(UserError, match="run ./demo.sh"):
        claims.main()
