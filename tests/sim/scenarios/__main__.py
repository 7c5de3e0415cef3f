"""`python -m tests.sim.scenarios FILE...`: write into scenario files what happens now; read the difference."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.sim.scenarios.script import rewritten

for path in map(Path, sys.argv[1:]):
    path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
