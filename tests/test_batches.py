"""common/batches.py: the order of an epoch, what ranks share of it, and that reading needs no torch."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from common.batches import epoch_order, rank_batches


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
    code = "import sys, common.batches; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
