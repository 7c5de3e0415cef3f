"""A cluster too large for one planner, in cells."""

from __future__ import annotations

import pytest

from infinillm.core.planners import ELASTIC
from infinillm.core.types import Ledger
from infinillm.errors import BadRequest
from infinillm.sim.cells import Cells
from infinillm.sim.hardware import cluster, read_size
from infinillm.sim.simulation import Ending
from infinillm.sim.traffic import workload

PLACE = cluster("5x8xA100", read_size("Llama-2-7B", 16, "float16"))


def test_cells_share_the_work_and_nothing_is_lost() -> None:
    here, endings, seen = Cells(PLACE, ELASTIC, 16), list[Ending](), list[Ledger]()
    here.play(workload("sharegpt", rate=200, seed=1, count=200), endings.append)
    here.watch(0.1, lambda _, ledger: seen.append(ledger))
    while here.busy and here.clock.step(100.0):
        pass
    here.check()
    assert len(endings) == 200 and here.totals().rows >= sum(each.output for each in endings)
    large, small = (cell.books.asked for cell in here.cells)
    assert large + small == 200 and min(large, small) > 20
    assert {name for each in seen for name in each.nodes} == {site.id for site in PLACE.sites}


def test_what_no_cell_can_hold_is_refused() -> None:
    here, endings = Cells(PLACE, ELASTIC, 16), list[Ending]()
    here.ask(3_000_000, 1, endings.append)
    (only,) = endings
    assert "more than the" in only.refused and "policy elastic" in only.refused and not here.busy


def test_nobody_looks_every_no_seconds() -> None:
    with pytest.raises(BadRequest):
        Cells(PLACE, ELASTIC, 16).watch(0.0, lambda *_: None)
