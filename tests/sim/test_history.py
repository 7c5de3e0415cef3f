"""What a history keeps of a run: averages over any number of looks and nodes, in a bounded number of cells."""

from __future__ import annotations

import random

import pytest

from infinillm.core.ledger import Report, rebuild
from infinillm.core.types import Ledger, Loan, Node
from infinillm.sim.history import COLUMNS, ROWS, History


def ledger(used: list[int], waiting: int = 0, loans: tuple[tuple[int, int, int, int], ...] = ()) -> Ledger:
    """Nodes of 100 blocks with so many in use; loans are (lender, borrower, blocks, in use)."""
    reports = [
        Report(
            Node(f"n{i:03}", "1", "", 100, 90, used=count, running=1, waiting=waiting),
            tuple(Loan(f"{i}>{b}", f"n{i:03}", f"n{b:03}", n, 1.0, inside) for a, b, n, inside in loans if a == i),
        )
        for i, count in enumerate(used)
    ]
    return rebuild(1, reports)


def test_each_look_is_a_column_while_there_are_few() -> None:
    history = History(0.5)
    history.look(0.0, ledger([10, 20], waiting=3))
    history.look(0.5, ledger([30, 0], waiting=1, loans=((1, 0, 40, 15),)))
    assert history.names == ["n000", "n001"]
    assert history.times == [0.0, 0.5]
    assert history.memory(lent=False) == [[0.1, 0.3], [0.2, 0.15]]
    assert history.memory(lent=True) == [[0.0, 0.0], [0.0, 0.15]]
    assert history.lending() == [[0.0, 0.0], [20.0, 0.0]], "40 blocks, half of the time"
    assert history.queue() == [6.0, 2.0]


@pytest.mark.parametrize("looks", [COLUMNS - 1, COLUMNS, COLUMNS + 1, 5 * COLUMNS + 7])
def test_however_long_a_run_columns_are_bounded_and_sums_are_kept(looks: int) -> None:
    draw = random.Random(looks)
    used = [draw.randint(0, 100) for _ in range(looks)]
    history = History(2.0)
    for k, count in enumerate(used):
        history.look(2.0 * k, ledger([count], waiting=count))
    weights = [column.looks for column in history.columns]
    assert min(COLUMNS // 2, looks) <= len(weights) <= COLUMNS and sum(weights) == looks
    assert len(set(weights[:-1])) == 1 and weights[-1] <= weights[0]
    times = history.times
    for k, at in enumerate(times):
        seen = used[round(at / 2.0) :][: weights[k]]
        assert history.memory(lent=False)[0][k] == pytest.approx(sum(seen) / len(seen) / 100)
        assert history.queue()[k] == pytest.approx(sum(seen) / len(seen))


def test_many_nodes_share_rows() -> None:
    nodes = 5 * ROWS + 3
    history = History(1.0)
    history.look(0.0, ledger([50] * nodes, loans=((nodes - 1, 0, 7, 7),)))
    assert len(history.names) <= ROWS and history.names[0] == "n000 to n005"
    assert sum(history.blocks) == 100 * nodes
    assert history.memory(lent=False)[0] == [0.5]
    assert history.memory(lent=True)[-1] == [pytest.approx(7 / history.blocks[-1])]
    assert history.lending()[-1][0] == 7.0 and sum(map(sum, history.lending())) == 7.0
