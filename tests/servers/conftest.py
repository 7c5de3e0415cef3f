"""A gateway before shards whose tokens are known, one for each test file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.fake_shard import Site, sites


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from sites(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def fresh(site: Site) -> None:
    """Nothing was asked, and nothing fails."""
    site.reset()
