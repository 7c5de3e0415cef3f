"""What the processes of a run logged: counted, and what none of them may say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEFECTS = ("rpc_failed", "law_broken", "pass_failed", "superseded", "join_refused")  # events that must not be
ROOM = "room for "  # how the reason of an order that makes room begins
ROOM_ORDERED, MOVED = "ordered to make room", "moved as ordered"  # counted beside the events


class Heard(NamedTuple):
    """How often each event was logged, and what must not have been."""

    events: Counter[str]
    defects: list[str]


def heard(folder: Path) -> Heard:
    """What all logs of a folder say."""
    events, defects = Counter[str](), list[str]()
    led: dict[int, str] = {}  # by the epoch, which is one leader's only
    ordered, moved = set[Any](), list[Any]()
    for path in sorted(folder.glob("*.log")):
        believed = 0
        for said in _lines(path):
            event = said["event"]
            events[event] += 1
            if event in DEFECTS or "traceback" in said:
                defects.append(f"{path.stem}: {json.dumps(said)[:1500]}")
            match event:
                case "leads":
                    if (epoch := said["epoch"]) in led:
                        defects.append(f"epoch {epoch}: led by {led[epoch]} and by {path.stem}")
                    led[epoch] = path.stem
                case "member":
                    if said["epoch"] < believed:
                        defects.append(f"{path.stem}: joined in epoch {said['epoch']} after {believed}")
                    believed = said["epoch"]
                case "ordered":
                    events[ROOM_ORDERED] += said["reason"].startswith(ROOM)
                    ordered.add((said["request"], said["source"], said["target"]))
                case "moved":
                    moved.append((said["request"], said["source"], said["target"]))
    events[MOVED] = sum(each in ordered for each in moved)
    return Heard(events, defects)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log; half a line, by one that was killed, is passed over."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and "event" in said:
            yield said


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
