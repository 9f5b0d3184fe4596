"""common/batches.py: the order of an epoch, what ranks share of it, and that reading needs no torch."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from common import batches
from common.batches import ahead, epoch_order, rank_batches


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    orders = [tuple(epoch_order(101, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(101)) for order in orders) and len(set(orders)) == 9
    assert epoch_order(101, 1, 2) == list(orders[5]) and epoch_order(0, 0, 0) == []
    # another process: no hash randomisation in it
    code = "from common.batches import epoch_order; print(epoch_order(101, 1, 2))"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)
    assert json.loads(found) == list(orders[5])


@pytest.mark.parametrize("n, batch, size", [(100, 8, 1), (100, 8, 2), (101, 8, 3), (2, 8, 4), (33, 7, 4), (0, 4, 2)])
def test_ranks_share_what_one_rank_would_see(n, batch, size):
    order = epoch_order(n, 0, 0)
    alone = rank_batches(order, batch)
    ranks = [rank_batches(order, batch, rank, size) for rank in range(size)]
    for step, items in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(size)]
        assert sum(parts, []) == items
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert {len(rank) for rank in ranks} == {len(alone)}
    assert sum(alone, []) == order and all(len(items) == batch for items in alone[:-1])


def test_importing_data_does_not_import_torch():
    code = (
        "import sys, common.augment, common.images; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_loop_that_waits_for_its_pictures_says_so_once(monkeypatch, capsys):
    """By a clock of its own: `busy` seconds a step go by in the loop and `wait` in loading, while the loop waits."""
    waits = "56% of 90 s went by waiting for pictures"
    for steps, busy, wait, line in [(5, 40, 30, ""), (2, 10, 49, ""), (5, 40, 50, waits)]:
        now = [0.0]
        monkeypatch.setattr(batches, "time", SimpleNamespace(monotonic=lambda now=now: now[0]))

        class Loading:
            def __init__(self, wait=wait, now=now):
                self.wait, self.now = wait, now

            def result(self):
                self.now[0] += self.wait
                return "rows"

        monkeypatch.setattr(batches, "ThreadPoolExecutor", lambda _, made=Loading: SimplePool(made))
        for _, rows in ahead(None, range(steps)):
            assert rows == "rows"
            now[0] += busy
        said = capsys.readouterr().err
        assert said.count("WARNING") == bool(line) and line in said


class SimplePool:
    """A pool whose work is the time that waiting for it takes."""

    def __init__(self, made):
        self.made = made

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *_):
        return self.made()
