"""The fuzzer's short form: three hundred mutations in all."""

import fuzz
import pytest


@pytest.mark.parametrize(
    "kind, count", [("annotations", 80), ("pairs", 60), ("model", 30), ("checkpoint", 30), ("picture", 100)]
)
def test_some_mutations_of_each_kind(kind, count):
    counts, faults = fuzz.fuzz(kind, 1, range(count))
    assert not faults, "\n".join(faults)
    assert sum(counts.values()) == count and counts["refused"] > count // 20
