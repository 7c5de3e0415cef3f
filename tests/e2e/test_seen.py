"""What people are shown while a pool lends, loses a lender, and mends: by `infinillm top`, and in metrics."""

from __future__ import annotations

from typing import Any

from infinillm.console.changes import changes, grown
from tests.e2e import client
from tests.e2e.conftest import truth
from tests.e2e.processes import Cluster, until

LENGTH, COUNT = 420, 280  # tokens: more than one worker holds, and less than two


def homes(look: dict[str, Any], id: str) -> set[str]:
    """Who runs a request, as the ledger has it."""
    return {layout["home"] for layout in look["layouts"] if layout["sequence"] == f"{id}-0"}


def test_a_loan_a_loss_and_its_repair_are_told_as_they_happen(pool: Cluster) -> None:
    looks = [pool.get("/v1/pool")]
    told: list[str] = []

    def look(words: str) -> bool:
        """Look again; whether that was told since the beginning."""
        looks.append(pool.get("/v1/pool"))
        told.extend(changes(looks[-2], looks[-1]))
        return any(words in line for line in told)

    prompt, want = truth(LENGTH, 71, COUNT)
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        sequence = pool.placement(stream.id)
        home = sequence["node"]
        (lender,) = {span["node"] for span in sequence["spans"]} - {home}
        assert sequence["holes"] == sequence["moving"] == []
        until(lambda: look(f"{lender} lent {home} ") and homes(looks[-1], stream.id), "the loan is told", 10)
        assert homes(looks[-1], stream.id) == {home}
        pool.workers[lender].kill()
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    until(lambda: look(f"{lender} left"), "the loss is told", 10)
    lost = int(pool.workers[home].metrics()[f'hole_tokens_total{{node="{home}"}}'])
    until(lambda: grown(looks[0], looks[-1], home, "repaired") == lost or look("never"), "all is told", 10)
    assert lost > 0 and grown(looks[0], looks[-1], home, "lost") == lost
    assert any(line.startswith(f"{home} lost ") for line in told)
    assert any(line.startswith(f"{home} computed ") for line in told)
    assert not any("moved" in line for line in told), "what was lost did not move"
    pool.start_worker_again(lender)
    until(lambda: look(f"{lender} joined with 24 blocks"), "the return is told", 10)
