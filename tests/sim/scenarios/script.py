"""Scenario files: what is done to a simulated cluster, in words, and line by line what happens then.

A file is blocks with an empty line between: commands, `----`, and what they gave. `#` begins a remark.

    cluster 1x2xCPU1 policy=pooled blocks=24     as `infinillm simulate --cluster`; `blocks` of each worker
    ask NAME prompt=500 output=20                of a session also session=NAME shared=TOKENS
    lose NODE, return NODE                       it dies; it is there again, empty
    at SECONDS COMMAND                           one of these later, in seconds of the cluster
    run SECONDS, run                             until then, or until all is answered
    memory                                       of each worker, as it is

The laws of the books are checked after every event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from infinillm.core.policy import named
from infinillm.core.scheduler import Budget
from infinillm.errors import BadRequest
from infinillm.sim.hardware import cluster, read_size
from infinillm.sim.simulation import Simulation
from infinillm.sim.worlds import world
from tests.sim.scenarios.seen import GroupsSeen, SimulationSeen, Then

LINE = "----"
USUAL = {"policy": "pooled", "model": "SmolLM2-135M", "dtype": "float32", "block": "16", "blocks": "", "tokens": "512"}
USUAL |= {"moves": "64", "lend": "0.9", "beat": "0.5"}
FOREVER = 1e6


def rewritten(text: str) -> str:
    """The same file with what happens now. Raises ValueError where a line says nothing that is known."""
    return "\n".join(_lines(text.rstrip("\n").split("\n"), Script())) + "\n"


def _lines(lines: list[str], script: Script) -> Iterator[str]:
    expected = False
    for number, line in enumerate(lines, 1):
        expected = expected and bool(line)
        if expected:
            continue
        yield line
        if line == LINE:
            expected = True
            yield from script.told()
        elif line and not line.startswith("#"):
            try:
                script.do(*line.split())
            except (BadRequest, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"line {number}, {line!r}: {error}") from error


class Script:
    """One cluster, and what was seen of it."""

    def __init__(self) -> None:
        self.seen: SimulationSeen | GroupsSeen | None = None

    def told(self) -> list[str]:
        """What was seen since it was told last."""
        lines, self.there.lines = self.there.lines, []
        return lines

    @property
    def there(self) -> SimulationSeen | GroupsSeen:
        if self.seen is None:
            raise ValueError("there is no cluster yet")
        return self.seen

    def do(self, verb: str, *words: str) -> None:
        verbs: dict[str, Callable[..., None]] = {
            "cluster": self.cluster,
            "ask": self.ask,
            "lose": self.lose,
            "return": self.revive,
            "at": self.later,
            "run": self.run,
            "memory": self.memory,
        }
        if verb not in verbs:
            raise ValueError(f"a command is one of {', '.join(verbs)}, not {verb!r}")
        verbs[verb](*words)

    def cluster(self, text: str, *words: str) -> None:
        wanted = _values(words, USUAL)
        size = read_size(wanted["model"], int(wanted["block"]), wanted["dtype"])
        budget = Budget(int(wanted["tokens"]), 64, int(wanted["block"]), moves=int(wanted["moves"]))
        lend, beat = float(wanted["lend"]), float(wanted["beat"])
        if wanted["blocks"]:
            place = cluster(text, size)
            place = replace(place, sites=tuple(replace(site, blocks=int(wanted["blocks"])) for site in place.sites))
            policy = named(wanted["policy"])
            self.seen = SimulationSeen(Simulation(place, policy, budget, lend_fraction=lend, beat_seconds=beat))
            return
        found = world(wanted["policy"], text, size, budget, lend_fraction=lend, beat_seconds=beat)
        self.seen = SimulationSeen(found) if isinstance(found, Simulation) else GroupsSeen(found)

    def ask(self, name: str, *words: str) -> None:
        values = _values(words, {"prompt": "", "output": "", "session": "", "shared": "0"})
        prompt, output = int(values["prompt"]), int(values["output"])
        shared = int(values["shared"])
        known = f", the first {shared:,} as before" if shared else ""
        self.there.say(name, f"arrives: {prompt:,} tokens{known}; {output:,} to come")
        of = (values["session"], shared) if values["session"] else ()
        self.there.world.ask(prompt, output, Then(name, self.there), *of)
        self.there.look()

    def lose(self, node: str) -> None:
        self.there.world.die(node)
        self.there.look()

    def revive(self, node: str) -> None:
        self.there.world.revive(node)
        self.there.look()

    def later(self, seconds: str, *words: str) -> None:
        if words[0] not in ("ask", "lose", "return"):
            raise ValueError(f"{words[0]!r} is done at once or not at all")
        self.there.world.clock.at(float(seconds), lambda: self.do(*words))
        self.there.ahead = max(self.there.ahead, float(seconds))

    def run(self, seconds: str = "") -> None:
        there, until = self.there, float(seconds or FOREVER)
        while (seconds or there.world.busy or there.world.now < there.ahead) and there.world.clock.step(until):
            there.look()
        if seconds:
            there.world.run(until)
            there.look()

    def memory(self) -> None:
        self.there.lines += self.there.memory()


def _values(words: tuple[str, ...], usual: dict[str, str]) -> dict[str, str]:
    """The words `name=value`, and what is usual."""
    found = dict(word.split("=", 1) for word in words)
    if strange := found.keys() - usual.keys():
        raise ValueError(f"it has {', '.join(usual)}, not {', '.join(sorted(strange))}")
    return usual | found
