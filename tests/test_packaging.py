"""The wheel and the sdist install and run outside the checkout, and carry everything a worker reads."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from infinillm import __version__

ROOT = Path(__file__).parents[1]
NEEDED = (
    "infinillm/__main__.py",
    "infinillm/py.typed",
    "infinillm/kernels/reference.py",
    "infinillm/kernels/cpu/attention.cpp",
    "infinillm/protos/types.proto",
    "infinillm/protos/types_pb2.py",
    "infinillm/protos/shard_pb2.py",
    "infinillm/console/assets/logbook.txt",
    "infinillm/console/assets/report.css",
    "infinillm/console/assets/report.js",
    "infinillm/core/policy/pooled.py",
    "infinillm/sim/traffic.py",
    "infinillm/sim/data/devices.json",
    "infinillm/sim/data/sharegpt.csv",
)
PROGRAM = """
import sys, importlib.resources, pathlib
import infinillm.kernels.reference, infinillm.protos.pool_pb2, infinillm.wire, infinillm.config
home = pathlib.Path(infinillm.config.__file__).parent
assert str(home).startswith(sys.prefix), home
assert (home / "kernels" / "cpu").is_dir() and not (home / "kernels").is_symlink()
assert importlib.resources.files("infinillm.console").joinpath("assets/logbook.txt").is_file()
for taken in ("kernels", "protos"):
    assert not pathlib.Path(home.parent, taken).exists(), taken
"""


def ran(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "INFINILLM"))}
    made = subprocess.run(
        [str(each) for each in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=240, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone has: links as links, nothing that was generated."""
    copy = tmp_path_factory.mktemp("clone") / "infinillm"
    left_out = shutil.ignore_patterns("__pycache__", "*_pb2.py", "*_pb2.pyi", "*.so", "*.egg-info")
    copy.mkdir()
    for name in ("infinillm", "kernels", "protos"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    assert (copy / "infinillm/kernels").is_symlink()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".")
    ran(sys.executable, *command, cwd=checkout)
    return next((checkout / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    ran(
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        "dist",
        ".",
        cwd=checkout,
    )
    return next((checkout / "dist").glob("*.tar.gz"))


def runs_outside(distribution: Path, folder: Path) -> None:
    """Install without dependencies into a new environment that sees ours, and run from an empty folder."""
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env/bin/python"
    site = next((folder / "env/lib").glob("python3*/site-packages"))
    ours = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    install = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--target", site)
    ran(sys.executable, "-m", "pip", *install, distribution, cwd=folder)
    (site / "theirs.pth").write_text(f"{ours}\n")  # last on the path: ours wins
    empty = folder / "empty"
    empty.mkdir()
    assert ran(python, "-m", "infinillm", "--version", cwd=empty).strip() == f"infinillm {__version__}"
    ran(python, "-c", PROGRAM, cwd=empty)
    assert "--kv-blocks" in ran(python, "-m", "infinillm", "serve", "--help", cwd=empty)
    assert "serve" in ran(python, site / "bin/infinillm", "--help", cwd=empty)


def test_the_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in NEEDED if name not in names] == []
    assert {name.split("/")[0] for name in names} == {"infinillm", f"infinillm-{__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    runs_outside(wheel, tmp_path)


def test_the_sdist_has_everything(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    generated = [name for name in NEEDED if name.endswith("_pb2.py")]
    assert [name for name in NEEDED if name not in names and name not in generated] == []
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= set(names)


def test_the_sdist_runs_outside_the_checkout(sdist: Path, tmp_path: Path) -> None:
    runs_outside(sdist, tmp_path)
