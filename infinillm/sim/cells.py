"""A large simulated cluster in cells, each planned by itself, on one clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from infinillm.core.cells import Load, choose, split
from infinillm.core.planners import Planner
from infinillm.core.types import Ledger, NodeId
from infinillm.errors import BadRequest
from infinillm.sim import striping
from infinillm.sim.groups import Groups
from infinillm.sim.hardware import Cluster
from infinillm.sim.parties import Asked
from infinillm.sim.simulation import Clock, Then
from infinillm.sim.steps import Totals
from infinillm.sim.traffic import Arrival


class Cells:
    """As `Groups`; a request goes to one of the cells, and stays there unless what it has is lost."""

    def __init__(self, cluster: Cluster, planner: Planner, block_size: int):
        self.planner, self.clock = planner, Clock()
        sites = cluster.sites
        parts = split(len(sites), sum(site.server == sites[0].server for site in sites), planner.cell)
        places = [replace(cluster, sites=tuple(sites[at] for at in part)) for part in parts]
        self.cells = [Groups(each, striping.times(each), planner, block_size, self.clock) for each in places]

    @property
    def now(self) -> float:
        return self.clock.now

    def ask(self, prompt: int, output: int, then: Then) -> None:
        """Ask for `output` tokens after a prompt of so many, now; `then` hears how it ended."""
        if (cell := self._choose(prompt + output)) is not None:
            cell.ask(prompt, output, then)
        else:
            self._refuse(Asked("", self.now, prompt, output, then))

    def _choose(self, tokens: int) -> Groups | None:
        loads = [Load(each.books.longest, each.books.backlog, each.books.free) for each in self.cells]
        found = choose(tokens, loads)
        return None if found is None else self.cells[found]

    def _refuse(self, request: Asked) -> None:
        request.refuse(self.planner.name, max(cell.books.longest for cell in self.cells), self.now)

    def die(self, node: NodeId) -> None:
        """An instance is lost, now; whoever needs what it kept goes to one of the cells again."""
        if not (cell := self.known(node)).known(node):
            return
        touched = {cell: None}
        for request in cell.lose(node):
            if (other := self._choose(request.most)) is not None:
                other.admit(request)
                touched[other] = None
            else:
                self._refuse(request)
        for each in touched:
            each.plan()

    def revive(self, node: NodeId) -> None:
        """An instance that was lost is there again, empty."""
        self.known(node).revive(node)

    def known(self, node: NodeId) -> Groups:
        """The cell of an instance. Raises BadRequest."""
        names = {site.id: cell for cell in self.cells for site in cell.cluster.sites}
        if node not in names:
            raise BadRequest(f"there is no node {node!r}; there are {', '.join(names)}", field="node")
        return names[node]

    def play(self, arrivals: Iterator[Arrival], then: Then) -> None:
        """Ask for what arrives, when it does; only the next arrival is known at any time."""
        self.clock.play(arrivals, lambda each: self.ask(each.prompt, each.output, then))

    @property
    def busy(self) -> bool:
        """Whether anything is still to arrive or to be answered."""
        return self.clock.arriving is not None or any(cell.busy for cell in self.cells)

    def run(self, until: float) -> None:
        """Let time pass until then."""
        self.clock.run(until)

    def watch(self, every: float, look: Callable[[float, Ledger], None]) -> None:
        """Have somebody look at the time and a ledger every so many seconds from now on."""
        self.clock.watch(every, lambda: look(self.now, self.ledger()))

    def ledger(self) -> Ledger:
        """What people may look at."""
        seen = [cell.ledger() for cell in self.cells]
        nodes = {name: node for each in seen for name, node in each.nodes.items()}
        return Ledger(1, nodes, {name: loan for each in seen for name, loan in each.loans.items()})

    def totals(self) -> Totals:
        return Totals(*map(sum, zip(*(cell.totals() for cell in self.cells), strict=True)))

    def check(self) -> None:
        """Raise Broken where the books of a cell do not balance."""
        for cell in self.cells:
            cell.check()
