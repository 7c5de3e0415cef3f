"""Cells of a large cluster: whole servers, and requests where least waits."""

from __future__ import annotations

from itertools import chain

import pytest

from infinillm.core.cells import WHOLE, Load, choose, split


@pytest.mark.parametrize(
    ("instances", "of_server", "sizes"),
    [
        (8, 8, [8]),
        (WHOLE, 8, [WHOLE]),
        (40, 8, [16, 16, 8]),
        (64, 12, [12, 12, 12, 12, 12, 4]),
        (100, 64, [16] * 6 + [4]),
    ],
)
def test_cells_are_of_whole_servers(instances: int, of_server: int, sizes: list[int]) -> None:
    found = split(instances, of_server, 16)
    assert [len(each) for each in found] == sizes
    assert list(chain(*found)) == list(range(instances))


def test_a_request_goes_where_least_waits_then_where_most_is_free() -> None:
    loads = [Load(100, 2.0, 90), Load(100, 1.0, 10), Load(100, 1.0, 20), Load(50, 0.0, 50)]
    assert choose(100, loads) == 2
    assert choose(50, loads) == 3
    assert choose(101, loads) is None
