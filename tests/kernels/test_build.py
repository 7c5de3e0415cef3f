"""Building the native body: once, by many at a time, or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infinillm.kernels import bodies, build, torch_body

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler")

QUICK = ("-std=c++17", "-O0")  # what matters here is that it is built, not how


@needs_compiler
def test_processes_that_start_at_once_share_one_library(tmp_path: Path) -> None:
    code = f"import pathlib, sys, torch; from infinillm.kernels import build; build.FLAGS = {QUICK}; "
    code += "assert build.build(pathlib.Path(sys.argv[1]))"
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_without_a_compiler_torch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert bodies.body(torch.device("cpu"), tmp_path / "never") is torch_body


def test_a_compiler_that_fails_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/false")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "spare"))
    assert build.build(tmp_path / "cache") is None


@needs_compiler
def test_a_cache_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "FLAGS", QUICK)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert build.build(tmp_path / "file" / "cache") is not None
