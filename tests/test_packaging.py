"""The wheel, and the ways to install: each works inside the checkout, where ./anyattn comes first, and outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    run([sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--quiet"], cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that the real one stays clean."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    parts = ("anyattn", "backends", "cuda_src", "tests", "pyproject.toml", "README.md", "LICENSE")
    for part in parts:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / part)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    pip("wheel", checkout, "--wheel-dir", checkout.parent, cwd=checkout)
    [path] = checkout.parent.glob("*.whl")
    return path


def make_venv(folder: Path) -> Path:
    """An environment with all packages of this one but anyattn."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(path).iterdir():
            if not entry.name.startswith(("anyattn", "__editable__", "__pycache__")):
                (packages / entry.name).symlink_to(entry)
    return python


def check_everything(python: Path, folder: Path, package: Path, tests: Path, **environment: str) -> None:
    """In this folder, the package is found where it should be, whole, and the commands of the README run."""
    program = (
        "import anyattn, anyattn.cuda_src, importlib, numpy as np; "
        "importlib.import_module('anyattn.backends.numpy'); "
        "assert anyattn.attention(*np.ones((3, 4, 8), np.float32)).shape == (4, 8); "
        "print(anyattn.__path__[0])"
    )
    found = Path(run([python, "-c", program], folder, **environment).strip())
    assert found.samefile(package)
    assert json.loads(run([python, "-m", "anyattn", "info", "--json"], folder, **environment))["anyattn"]
    collect: list[str | Path] = [
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-pno:cacheprovider",
        tests / "test_compile.py",
    ]
    assert "test_prelude" in run([python, *collect], folder, **environment)


def test_wheel_holds_all_that_is_needed_and_no_more(wheel: Path, checkout: Path) -> None:
    assert wheel.stat().st_size < 1 << 20
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    def files(folder: str, *patterns: str) -> set[str]:
        found = (path for pattern in patterns for path in (checkout / folder).rglob(pattern))
        return {path.relative_to(checkout / folder).as_posix() for path in found}

    assert names == (
        {f"anyattn/{name}" for name in files("anyattn", "*.py", "*.yaml", "py.typed")}
        | {f"anyattn/backends/{name}" for name in files("backends", "*.py")}
        | {f"anyattn/cuda_src/{name}" for name in files("cuda_src", "*.py", "*.cu", "*.cuh")}
    )
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_source_distribution_builds_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run([sys.executable, "-c", build], checkout)
    [sdist] = tmp_path.glob("*.tar.gz")
    pip("wheel", sdist, "--wheel-dir", tmp_path, cwd=tmp_path)
    assert set(zipfile.ZipFile(tmp_path / wheel.name).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_plain_install(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    python = make_venv(tmp_path / "venv")
    pip("--python", python, "install", wheel, cwd=tmp_path)
    installed = run([python, "-c", "import anyattn; print(anyattn.__path__[0])"], tmp_path).strip()
    assert Path(installed).is_relative_to(tmp_path / "venv")
    check_everything(python, tmp_path, Path(installed), checkout / "tests")
    check_everything(python, checkout, checkout / "anyattn", checkout / "tests")
    assert "anyattn" in run([python.with_name("anyattn"), "info"], tmp_path)


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    python = make_venv(tmp_path / "venv")
    pip("--python", python, "install", "--editable", checkout, cwd=tmp_path)
    for folder in (tmp_path, checkout):
        check_everything(python, folder, checkout / "anyattn", checkout / "tests")
    assert "anyattn" in run([python.with_name("anyattn"), "info"], tmp_path)


def test_no_install(checkout: Path, tmp_path: Path) -> None:
    python = Path(sys.executable)
    check_everything(python, checkout, checkout / "anyattn", checkout / "tests", PYTHONPATH=".")
    check_everything(python, tmp_path, checkout / "anyattn", checkout / "tests", PYTHONPATH=str(checkout))
