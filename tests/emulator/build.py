"""A kernel's specification in, a shared library for the CPU out; on disk it stays, named by all that went into it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from anyattn import compile as compiler
from anyattn.compile import Spec
from tests.emulator.translate import translate

__all__ = ["BuildError", "find_compiler", "kernel", "locate", "machine"]

MACHINE = Path(__file__).with_name("machine")
OPTIONS = ("-std=c++17", "-march=native", "-fPIC", "-shared", "-w", "-g1", "-fno-omit-frame-pointer")
MACHINE_OPTIONS = (*OPTIONS, "-O3", "-fno-math-errno")
KERNEL_OPTIONS = (*OPTIONS, "-O2", "-fno-math-errno")


class BuildError(RuntimeError):
    """There is no C++ compiler, or it refused the translated kernel."""


@functools.cache
def find_compiler() -> str | None:
    """$CXX, or the first one on the path."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def machine() -> Path:
    """The library that all kernels share."""
    sources = sorted(MACHINE.glob("*.cpp"))
    return _build("machine", _machine_text("*"), "", (*MACHINE_OPTIONS, *map(str, sources)))


def kernel(spec: Spec, sources: Path | None = None) -> Path:
    """The library of one kernel, from anyattn's sources or from another folder of theirs.

    It has emulator_entry(params) and the integer emulator_params_bytes.
    """
    folder = sources or compiler._source_dir()
    name = spec.source.removesuffix(".cu")
    text = spec.text() + (folder / spec.source).read_text(encoding="utf-8")
    text = f"""\
#define __CUDA_ARCH__ {re.sub(r"[^0-9]", "", spec.arch)}0
#include "cuda.h"
{translate(text)}
extern "C" void emulator_entry(const void* params) {{ emulator::call(&{name}, params); }}
extern "C" const int emulator_params_bytes = emulator::params_bytes(&{name});
"""
    return _build(
        name,
        _machine_text("*.h"),
        text,
        (*KERNEL_OPTIONS, "-x", "c++", "-I", str(_translated(folder)), "-I", str(MACHINE)),
    )


def locate(library: Path, offsets: list[str]) -> str:
    """The source lines of calls (the innermost first): "kernel.cu:12:34 ring.cuh:5", the outermost first."""
    tool = shutil.which("addr2line")
    if tool is None or not offsets:
        return ""
    found = subprocess.run([tool, "-i", "-e", str(library), *offsets], capture_output=True, text=True, check=False)
    places = re.findall(r"^(?:.*/)?([^/]+\.cuh?):(\d+)", found.stdout, re.MULTILINE)
    files = itertools.groupby(reversed(places), key=lambda place: place[0])
    return " ".join(f"{file}:{':'.join(line for _, line in lines)}" for file, lines in files)


@functools.cache
def _version() -> str:
    """Of the compiler and of the CPU that it compiles for."""
    if (found := find_compiler()) is None:
        raise BuildError("the emulator needs a C++ compiler ($CXX, g++, clang++ or c++), and there is none")
    shown = [(found, "--version"), (found, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)]
    return "".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in shown)


@functools.cache
def _machine_text(pattern: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(MACHINE.glob(pattern)))


def _translated(folder: Path) -> Path:
    """A copy of the sources without inline assembly."""
    headers = {path.relative_to(folder): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.cuh"))}
    texts = {name: translate(text) for name, text in headers.items()}
    target = _folder() / f"sources-{_hash(repr(texts))}"
    if not target.exists():
        _folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_folder()) as temporary:
            for name, text in texts.items():
                path = Path(temporary, "sources", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            try:
                Path(temporary, "sources").rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


def _build(name: str, parts: str, text: str, options: tuple[str, ...]) -> Path:
    target = _folder() / f"{name}-{_hash(text, parts, *options, _version())}.so"
    if target.exists():
        return target
    _folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_folder()) as temporary:
        made = Path(temporary, "made.so")
        files = ["-"] if text else []
        command = [str(find_compiler()), *options, *files, "-o", str(made)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{find_compiler()} refused a translated kernel:\n{done.stderr[:6000]}")
        made.replace(target)
    return target


def _folder() -> Path:
    return compiler.cache_dir() / "emulator"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
