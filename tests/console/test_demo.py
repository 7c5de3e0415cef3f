"""The demo, from its first word to its last process, with a tiny model and a document of its own."""

import re
from pathlib import Path

from tests import live, tiny


def test_the_demo_lends_answers_and_cleans_up(tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(" ".join(f"On day {day} the pool held {day * day} blocks." for day in range(40)))
    flags = ("--document", str(document), "--question", "How many?", "--max-tokens", "6")
    made = live.cli("demo", str(tiny.folder("llama")), *flags, seconds=240)
    assert made.returncode == 0, made.stdout + made.stderr
    said = " ".join(made.stdout.split())

    each, held = map(int, re.search(r"3 workers, each with (\d+) blocks of K/V memory, (\d+) tokens", said).groups())  # type: ignore[union-attr]
    tokens, need = (int(n.replace(",", "")) for n in re.search(r"are ([\d,]+) tokens: (\d+) blocks", said).groups())  # type: ignore[union-attr]
    assert held == each * 16 < tokens
    assert each < need <= 2 * each
    assert "would refuse it: the request needs" in said
    assert f"policy isolated offers {each} on one worker" in said

    placed = {node: int(blocks) for node, blocks in re.findall(r"█ (worker-\d): (\d+) blocks", said)}
    assert len(placed) > 1
    assert need <= sum(placed.values()) <= need + 1
    lent = {(lender, borrower) for lender, borrower in re.findall(r"(worker-\d) lent (worker-\d) \d+ blocks", said)}
    (home,) = {borrower for _, borrower in lent}
    assert {lender for lender, _ in lent} == set(placed) - {home}

    assert f"Afterwards {3 * each} of {3 * each} blocks are free again." in said
    assert "every process has ended" in said
