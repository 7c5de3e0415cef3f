"""What is seen of a simulated cluster: after each event, what is not as it was, a line each.

Theory of operation. Nothing in a world tells what it does. So its state is copied after every event, in words and
numbers, and compared with the copy before: what differs is said, always in the same order. A request is called as the
scenario calls it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from infinillm.core.policy.orders import MoveBlocks, counted
from infinillm.core.request import Sequence, total
from infinillm.core.types import Move, NodeId
from infinillm.sim.cells import Cells
from infinillm.sim.groups import Groups
from infinillm.sim.parties import Place
from infinillm.sim.simulation import Ending, Simulation
from infinillm.sim.worker import Worker


class Seen:
    """The lines that were not told yet, and the names of requests."""

    def __init__(self, world: Any):
        self.world = world
        self.lines: list[str] = []
        self.endings: list[tuple[str, Ending]] = []
        self.ahead = 0.0  # the last moment for which something is to be done

    def say(self, who: str, what: str) -> None:
        self.lines.append(f"{self.world.now:7.2f}  {who:<8} {what}")

    def ended(self) -> None:
        for name, ending in self.endings:
            self.say(
                name, f"is refused: {ending.refused}" if ending.refused else f"is answered: {ending.output:,} tokens"
            )
        self.endings.clear()


class Then:
    """Who hears how a request ended; and its name."""

    def __init__(self, name: str, seen: Seen):
        self.name, self.seen = name, seen

    def __call__(self, ending: Ending) -> None:
        self.seen.endings.append((self.name, ending))


def named(asked: Any) -> str:
    then = asked.then
    assert isinstance(then, Then)
    return then.name


# --- workers that lend -----------------------------------------------------------------------------------------------


class Request(NamedTuple):
    node: NodeId
    runs: bool
    first: bool
    lost: int  # tokens
    there: tuple[tuple[NodeId, int], ...]  # tokens that have K/V, by node


@dataclass
class View:
    """A copy of what may change. Loans are by lender and borrower, in blocks."""

    requests: dict[str, Request] = field(default_factory=dict)
    loans: dict[tuple[NodeId, NodeId], int] = field(default_factory=dict)
    recalled: dict[tuple[NodeId, NodeId], int] = field(default_factory=dict)
    starts: dict[NodeId, tuple[int, bool]] = field(default_factory=dict)  # which start of a node, and whether it died
    members: set[NodeId] = field(default_factory=set)  # that the ledger knows
    orders: tuple[MoveBlocks, ...] = ()
    moving: dict[NodeId, tuple[tuple[Move, ...], int]] = field(default_factory=dict)  # in hand, and tokens that went


class SimulationSeen(Seen):
    """A world of workers that lend."""

    world: Simulation

    def __init__(self, world: Simulation):
        super().__init__(world)
        self.called: dict[str, str] = {}  # requests
        self.went: Counter[tuple[str, NodeId, NodeId]] = Counter()  # blocks that moved, and of which more are to move
        self.before = self._view()

    def memory(self) -> list[str]:
        self.world.run(self.world.now)
        rows = []
        for worker in self.world.workers.values():
            books = worker.blocks
            where = f"{books.used} used, {books.lent} lent, {books.room} left"
            rows.append(f"{'':7}  {worker.id:<8} {_blocks(books.count)}: {'lost' if worker.dead else where}")
        return rows

    def look(self) -> None:
        self.world.check()
        self.called |= {seq: named(asked) for seq, asked in self.world.running.items()}
        before, now = self.before, self._view()
        self.before = now
        self.ended()
        self._nodes(before, now)
        self._lending(before, now)
        self._moves(before, now)
        for name in now.requests:
            self._request(name, before.requests.get(name), now.requests[name])

    def _view(self) -> View:
        workers = self.world.workers.values()
        loans = [loan for w in workers if not w.dead for loan in w.lender.told()]
        return View(
            {self.called[s.id]: _request(w, s) for w in workers if not w.dead for s in w.sequences.values()},
            {(loan.lender, loan.borrower): loan.blocks for loan in loans},
            {(loan.lender, loan.borrower): loan.recalled for loan in loans},
            {w.id: (w.start, w.dead) for w in workers},
            set(self.world.ledger.nodes),
            self.world.orders,
            {w.id: (w.moves.now, w.moves.tokens) for w in workers},
        )

    def _nodes(self, before: View, now: View) -> None:
        for node, (start, dead) in now.starts.items():
            if dead and not before.starts[node][1]:
                self.say(node, "is lost")
            if start != before.starts[node][0]:
                self.say(node, "is there again, with nothing in it")
        for node in sorted(before.members - now.members):
            self.say(node, "was silent for long: the ledger forgets it")

    def _lending(self, before: View, now: View) -> None:
        for (lender, borrower), blocks in sorted(now.loans.items()):
            had = before.loans.get((lender, borrower))
            if had is None and not blocks:
                self.say(lender, f"lets {borrower} read what it keeps")
            elif blocks > (had or 0):
                self.say(
                    lender, f"lends {borrower} {_blocks(blocks - (had or 0))}" + (f", {blocks} now" if had else "")
                )
            wanted = now.recalled[lender, borrower]
            if wanted > before.recalled.get((lender, borrower), 0):
                self.say(lender, f"wants {wanted} of its {_blocks(blocks)} back from {borrower}")
        for (lender, borrower), had in sorted(before.loans.items()):
            blocks = now.loans.get((lender, borrower), 0)
            if had > blocks and not now.starts[lender][1]:
                self.say(
                    lender, f"has {_blocks(had - blocks)} back from {borrower}" + (f", {blocks} left" if blocks else "")
                )

    def _moves(self, before: View, now: View) -> None:
        if now.orders is not before.orders:
            for order in now.orders:
                what = f"{_blocks(order.blocks)} of {self.called[order.seq]} from {order.source} to {order.target}"
                self.say(order.home, f"is to move {what}: {order.reason}")
        for node, (moves, tokens) in before.moving.items():
            if now.moving[node][1] > tokens:
                for move in moves:
                    self.went[self.called[move.seq], move.source, move.target] += move.blocks
        going = {
            (self.called[move.seq], move.source, move.target)
            for worker in self.world.workers.values()
            for move in (*worker.moves.now, *(wish.move for wish in worker.moves.wishes))
        }
        for name, source, target in sorted(self.went.keys() - going):
            self.say(name, f"has {_blocks(self.went.pop((name, source, target)))} moved from {source} to {target}")

    def _request(self, name: str, before: Request | None, now: Request) -> None:
        stays = before is not None and before.node == now.node
        if not now.runs and (not stays or (before is not None and before.runs)):
            self.say(name, f"gives way, and waits at {now.node}" if stays else f"waits at {now.node}")
        if now.runs and not (stays and before is not None and before.runs):
            shared = " and ".join(f"{tokens:,} tokens of it on {node}" for node, tokens in now.there)
            self.say(name, f"begins at {now.node}" + (f", with {shared}" if shared else ""))
        if before is not None and now.lost > before.lost:
            self.say(name, f"has lost {now.lost - before.lost:,} tokens, which are computed again")
        if now.first and not (before is not None and before.first):
            self.say(name, "has its first token")


def _blocks(count: int) -> str:
    return counted(count, "block")


def _request(worker: Worker, sequence: Sequence) -> Request:
    there: Counter[NodeId] = Counter()
    for span in sequence.layout:
        there[span.node] += sum(max(min(b, span.stop) - max(a, span.start), 0) for a, b in sequence.done)
    return Request(
        worker.id,
        sequence in worker.running,
        sequence.id in worker.firsts,
        total(sequence.holes),
        tuple((node, tokens) for node, tokens in sorted(there.items()) if tokens),
    )


# --- groups ----------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    prefill: tuple[NodeId, ...]  # that compute its prompt
    group: tuple[NodeId, ...]  # that it decodes on
    master: NodeId
    rests: bool  # it has begun, and nobody works on it
    first: bool
    held: tuple[tuple[NodeId, int], ...]


WAITS = Planned((), (), "", rests=False, first=False, held=())


class GroupsSeen(Seen):
    """A world of groups."""

    def __init__(self, world: Cells | Groups):
        super().__init__(world)
        self.cells = world.cells if isinstance(world, Cells) else [world]
        self.before: dict[str, Planned] = {}
        self.there = self._places()

    def _places(self) -> dict[NodeId, Place | None]:
        """All instances; those that are lost have none."""
        return {site.id: cell.books.places.get(site.id) for cell in self.cells for site in cell.cluster.sites}

    def memory(self) -> list[str]:
        return [
            f"{'':7}  {node:<8} {f'{place.slots:,} tokens: {place.used:,} used' if place else 'lost'}"
            for node, place in self._places().items()
        ]

    def look(self) -> None:
        for cell in self.cells:
            cell.check()
        before, self.before = self.before, {name: each for cell in self.cells for name, each in _planned(cell).items()}
        there, self.there = self.there, self._places()
        for node, place in self.there.items():
            if (place is None) != (there[node] is None):
                self.say(node, "is there again, with nothing in it" if place else "is lost")
        self.ended()
        for name, now in self.before.items():
            was = before.get(name)
            if was is not None and not all(self.there[node] for node, _ in was.held):
                if was.first:
                    self.say(name, "has lost what was kept of it, which is computed again")
                was = None
            self._request(name, was, now)

    def _request(self, name: str, before: Planned | None, now: Planned) -> None:
        if before is not None and not before.first and now.first:
            self.say(name, "has its first token")
        if now.prefill and (before is None or before.prefill != now.prefill):
            kept = ", ".join(f"{node}: {tokens:,}" for node, tokens in now.held)
            self.say(name, f"is computed by {' '.join(now.prefill)}; kept on {kept}")
        elif now.group and (before is None or before.group != now.group or before.master != now.master):
            beside = [node for node in now.group if node != now.master]
            self.say(name, f"decodes on {now.master}" + (f", with {' '.join(beside)}" if beside else ""))
        elif now.rests and not (before is not None and before.rests):
            self.say(name, "rests")
        elif not now.prefill and not now.group and not now.rests and before != now:
            self.say(name, "waits" if before is None else "gives way, and waits")
        if before is not None and before.held and now.held and not before.prefill and not now.prefill:
            self._went(name, dict(before.held), dict(now.held))

    def _went(self, name: str, before: dict[NodeId, int], now: dict[NodeId, int]) -> None:
        for node, tokens in before.items():
            if (gone := tokens - now.get(node, 0)) > 0:
                self.say(
                    name, f"has {gone:,} tokens moved from {node} to {' '.join(n for n in now if n not in before)}"
                )


def _planned(cell: Groups) -> dict[str, Planned]:
    found = dict.fromkeys(cell.books.waiting, WAITS)
    for prefill in cell.books.prefills:
        found |= dict.fromkeys(prefill.requests, WAITS._replace(prefill=prefill.group))
    for party in cell.books.parties:
        masters = {each.id: master for master, requests in party.masters.items() for each in requests}
        for each in party.requests:
            going = party.times > 0
            group, master = (party.group, masters[each.id]) if going else ((), "")
            found[each.id] = Planned((), group, master, rests=not going, first=True, held=())
    return {
        named(cell.books.requests[seq]): each._replace(
            first=cell.books.requests[seq].produced > 0, held=tuple(sorted(cell.books.requests[seq].held.items()))
        )
        for seq, each in found.items()
    }
