"""A kernel's specification in, a cubin on disk out: NVRTC through cuda.core, no GPU needed.

Only what is called gets built. A built kernel stays on disk, named by a hash of all that went into it, so a second
process loads it without a compiler in sight: on that path cuda.core is not even imported.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from anyattn.log import log

__all__ = [
    "CompileError", "Cubin", "Resources", "Spec", "cache_dir", "cubin", "cuda_core", "driver_problem", "kept",
    "missing", "nvrtc_version", "serialised",
]  # fmt: skip

# `-v` makes ptxas write each kernel's registers, spills and shared memory into the log; it doesn't change the code.
# Lambdas take no annotations, so what has none must be device code.
OPTIONS = {"std": "c++17", "ptxas_options": ["-v"], "device_as_default_execution_space": True}

INSTALL = (
    "pip install 'anyattn[cuda13]' (or 'anyattn[cuda12]' for a CUDA 12 driver), "
    "which brings cuda-core, cuda-bindings and NVIDIA's NVRTC"
)

OLDEST_NVRTC = (12, 1)  # the first that knows red.global.add.v2.f32 (PTX ISA 8.1)

_importing = threading.Lock()


def cuda_core(module: str = "cuda.core") -> Any:
    """A module of cuda.core, which is not to be imported twice at once: the second thread sees it half made."""
    with _importing:
        return importlib.import_module(module)


class CompileError(RuntimeError):
    """A kernel could not be built; the message says why and what to install."""


class Spec(NamedTuple):
    """All that tells one cubin from another.

    The compiled text is, in this order: the numeric constants, `prelude`, the type names, the source file.
    So a header that the prelude includes can read the numbers and can define the types.
    """

    source: str  # a file of anyattn.cuda_src, for instance "forward_sm80.cu"
    arch: str  # "sm_80", "sm_90a", ...
    constants: tuple[tuple[str, int | bool | str], ...] = ()  # constexpr int, constexpr bool, or a type's name
    prelude: str = ""  # further lines: #include, static_assert

    def text(self) -> str:
        """The lines generated in front of the source file, which line numbers in messages don't count."""
        numbers = [
            f"[[maybe_unused]] constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};"
            for name, value in self.constants
            if not isinstance(value, str)
        ]
        types = [f"using {name} = {value};" for name, value in self.constants if isinstance(value, str)]
        return "\n".join([*numbers, self.prelude, *types, f'#line 1 "{self.source}"', ""])


class Resources(NamedTuple):
    """What one kernel takes, as ptxas reports it."""

    kernel: str
    registers: int  # per thread
    spill_bytes: int  # per thread, stores and loads
    stack_bytes: int  # per thread
    shared_bytes: int  # per block; what is asked for at launch comes on top


def serialised(warnings: list[str]) -> list[str]:
    """Those that tell of tensor-core products which the compiler gave up on overlapping.

    C7517 does not: it moved a wgmma.wait_group, which is wanted where it stands (the kernel says why).
    """
    return [line for line in warnings if re.match(r"\(C75(?!17)\d\d\)", line)]


class Cubin(NamedTuple):
    path: str
    log: str  # the compiler's, which holds warnings on success too
    seconds: float  # the compiler's; 0.0 when it came from the disk

    def resources(self) -> list[Resources]:
        """One entry a kernel of the file."""
        return [_resources(part) for part in self.log.split("Compiling entry function")[1:]]

    def warnings(self) -> list[str]:
        """The compiler's warnings and performance advisories, one line each."""
        lines = (re.sub(r"^ptxas info\s*: ", "", line) for line in self.log.splitlines())
        return [line for line in lines if re.search(r"\bwarning\s*[#:]|\(C\d{4}\)", line)]


@functools.cache
def cubin(spec: Spec) -> Cubin:
    """The compiled kernel: from memory, else from the disk cache, else from NVRTC.

    Safe with many threads, which build it once, and processes; a file that was truncated or changed is built anew.
    Raises CompileError when NVRTC is missing, doesn't know the architecture, or refuses the source.
    """
    key = _key(spec)
    with _building.setdefault(key, threading.Lock()):
        return _cubin(spec, key)


_building: dict[str, threading.Lock] = {}


def _cubin(spec: Spec, key: str) -> Cubin:
    folder = cache_dir()
    if found := _load(folder, key):
        return found
    start = time.perf_counter()
    code, messages = _compile(spec)
    seconds = time.perf_counter() - start
    log.info("compiled %s for %s in %.2f s: %s", spec.source, spec.arch, seconds, dict(spec.constants))
    try:
        path = _store(folder, key, code, messages)
    except OSError as error:
        path = _store(_temporary_cache(f"{folder}: {error.strerror}"), key, code, messages)
    return Cubin(path, messages, seconds)


@functools.cache
def missing() -> str | None:
    """What is not installed that kernels are compiled with, which those in the cache do without; else None."""
    try:
        if importlib.util.find_spec("cuda.core") and importlib.util.find_spec("cuda.bindings"):
            return None
    except ModuleNotFoundError:
        pass
    return f"compiling a kernel needs cuda.core and cuda.bindings. Install them: {INSTALL}"


def cache_dir() -> Path:
    """$ANYATTN_CACHE, or `anyattn` in the user's cache folder of the platform. It need not exist yet."""
    if chosen := os.environ.get("ANYATTN_CACHE"):
        return Path(chosen).absolute()  # also where the process changes its folder
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return Path(base, "anyattn")


def kept(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    """parse(text), of what JSON can hold: from the disk cache, once a process has put it there."""
    folder = cache_dir()
    path = folder / f"kept-{name}-{hashlib.sha256(text.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        entry = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.sha256(entry["content"].encode()).hexdigest() == entry["sha256"]:
            return json.loads(entry["content"])
    parsed = parse(text)
    try:
        content = json.dumps(parsed)
        parsed = json.loads(content)  # as later processes get it
        folder.mkdir(parents=True, exist_ok=True)
        checksum = hashlib.sha256(content.encode()).hexdigest()
        _write(path, json.dumps({"sha256": checksum, "content": content}).encode())
    except (OSError, TypeError, ValueError) as error:
        log.info("%s will be parsed anew: %s", name, error)
    return parsed


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that would compile. Raises CompileError when there is none."""
    import ctypes

    try:
        # The search that cuda.bindings does itself, without the rest of it.
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompileError(
            f"NVRTC, the run-time compiler of CUDA, was not found ({reason}). Install it: {INSTALL}"
        ) from error
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def driver_problem(driver_version: int) -> str | None:
    """Why the NVRTC found here can't build for a driver, or None.

    driver_version: CUDA's own number, 1000 * major + 10 * minor (cuDriverGetVersion). A driver loads the cubins of its
    own CUDA major version, whatever the minor one, and of older ones. Raises CompileError when there is no NVRTC.
    """
    major, minor = nvrtc_version()
    supported = driver_version // 1000
    if (major, minor) < OLDEST_NVRTC:
        return _too_old("these kernels")
    if major <= supported:
        return None
    return (
        f"NVRTC {major}.{minor} builds kernels that this driver (CUDA {supported}.{driver_version % 1000 // 10}) "
        f"cannot load. Install an NVRTC of the driver's major version: pip uninstall nvidia-cuda-nvrtc; "
        f"pip install 'anyattn[cuda{supported}]'. Or update the driver"
    )


def _too_old(purpose: str) -> str:
    return (
        "NVRTC {}.{} is too old for {}. Install a newer one: ".format(*nvrtc_version(), purpose)
        + "pip install --upgrade nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for a CUDA 12 driver)"
    )


@functools.cache
def _source_dir() -> Path:
    """The folder of the CUDA sources, in a checkout as in an installed package."""
    # What importlib.resources.files() would find, without the 15 ms of importing it.
    return Path(importlib.import_module("anyattn.cuda_src").__path__[0])


def _included(text: str, known: dict[str, str]) -> dict[str, str]:
    """Adds to `known` every header that the text includes, directly or not: name -> text."""
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        if name not in known:
            known[name] = (_source_dir() / name).read_text(encoding="utf-8")
            _included(known[name], known)
    return known


def _key(spec: Spec) -> str:
    front = spec.text()
    source = (_source_dir() / spec.source).read_text(encoding="utf-8")
    headers = sorted(_included(front + source, {}).items())
    parts = (front, source, headers, OPTIONS, spec.arch, nvrtc_version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _compile(spec: Spec) -> tuple[bytes, str]:
    try:
        core = cuda_core()
    except ImportError as error:
        raise CompileError(
            f"compiling a kernel needs cuda.core and cuda.bindings ({error}). Install them: {INSTALL}"
        ) from error
    if nvrtc_version() < OLDEST_NVRTC:
        raise CompileError(_too_old("these kernels"))
    source = (_source_dir() / spec.source).read_text(encoding="utf-8")
    options = core.ProgramOptions(name=spec.source, arch=spec.arch, include_path=str(_source_dir()), **OPTIONS)
    messages = io.StringIO()
    try:
        built = core.Program(spec.text() + source, "c++", options).compile("cubin", logs=messages)
    except (
        Exception
    ) as error:  # cuda.core's own class moved between its versions; every one of them means the same here
        if "gpu-architecture" in str(error):
            raise CompileError(_too_old(spec.arch)) from error
        version = "{}.{}".format(*nvrtc_version())
        raise CompileError(f"NVRTC {version} could not compile {spec.source} for {spec.arch}:\n{error}") from error
    return bytes(built.code), messages.getvalue().strip("\0\n")


# The cache holds two files a kernel, beside those of kept(): KEY.json says which cubin belongs to the key and keeps the
# compiler's log; the cubin is named by its own checksum. So processes that race write either the same bytes or
# different names, and the JSON file, which comes last, never points at half a cubin.


def _load(folder: Path, key: str) -> Cubin | None:
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        path = folder / f"{entry['sha256']}.cubin"
        if hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]:
            return Cubin(str(path), str(entry["log"]), 0.0)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _store(folder: Path, key: str, code: bytes, log: str) -> str:
    checksum = hashlib.sha256(code).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{checksum}.cubin"
    if not (path.is_file() and path.read_bytes() == code):  # Windows replaces no file that another process reads
        _write(path, code)
    _write(folder / f"{key}.json", json.dumps({"sha256": checksum, "log": log}).encode())
    return str(path)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: readers see the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would keep other users from a cache that is shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache
def _temporary_cache(reason: str) -> Path:
    """A private folder that lives as long as the process."""
    try:
        folder = tempfile.mkdtemp(prefix="anyattn-")
    except OSError as error:
        raise CompileError(
            f"there is nowhere to keep a kernel: the cache is not writable ({reason}), nor is there a temporary folder "
            f"({error.strerror}). Set ANYATTN_CACHE to a folder that is writable"
        ) from None

    def remove(maker: int) -> None:
        if os.getpid() == maker:  # not in its forks
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove, os.getpid())
    log.warning(
        "the kernel cache is not writable (%s): kernels go to %s and are built anew by every process. "
        "Set ANYATTN_CACHE to a folder that is.",
        reason,
        folder,
    )
    return Path(folder)


def _resources(log: str) -> Resources:
    """One kernel's part of the log, which starts right after "Compiling entry function"."""

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))  # functions that were not inlined have lines of their own

    name = re.search(r"'([^']+)'", log)
    return Resources(
        kernel=name[1] if name else "",
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=number(r"(\d+) bytes smem"),
    )
