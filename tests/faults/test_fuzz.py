"""The fuzzer's short form: three hundred mutations in all."""

import os
import time

import fuzz
import pytest

from common.console import UserError


@pytest.mark.parametrize(
    "kind, count", [("annotations", 80), ("pairs", 60), ("model", 30), ("checkpoint", 30), ("picture", 100)]
)
def test_some_mutations_of_each_kind(kind, count):
    counts, faults = fuzz.fuzz(kind, 1, range(count))
    assert not faults, "\n".join(faults)
    assert sum(counts.values()) == count and counts["refused"] > count // 20


def test_each_kind_of_fault_is_seen(monkeypatch):
    """Readers that believe everything, that break, that never end, that die: none passes for a good one."""

    def made_up(read):
        def targets(root):
            (root / "a.json").write_text('{"a": [1, 2, 3], "b": "words"}')
            return [fuzz.Target((root / "a.json",), lambda: read(root / "a.json"))]

        return targets

    def when_harmed(does):
        return made_up(lambda path: 1 if b"words" in path.read_bytes() else does())

    def refuse():
        raise UserError("no")

    readers = {"refused": when_harmed(refuse), "changed": made_up(lambda path: path.read_bytes())}
    readers |= {"traceback": when_harmed(lambda: {}["a"]), "hang": when_harmed(lambda: time.sleep(60))}
    monkeypatch.setattr(fuzz, "HANG", 1)
    for outcome, reader in readers.items():
        monkeypatch.setitem(fuzz.KINDS, outcome, reader)
        counts, faults = fuzz.fuzz(outcome, 0, range(8 if outcome == "hang" else 30))
        assert counts[outcome] and bool(faults) == (outcome != "refused"), (outcome, counts)
    monkeypatch.setitem(fuzz.KINDS, "dies", when_harmed(lambda: os._exit(1)))
    counts, faults = fuzz.fuzz("dies", 0, range(8))
    assert counts["traceback"] and "the process died" in faults[0]
