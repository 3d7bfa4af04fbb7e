"""What this machine has: memory, cores, a GPU, and how fast memory can be read.

Sizes come from the system's own files, with the limits of a container applied; GPUs from nvidia-smi;
nothing heavy is imported.  Bandwidth of the memory is measured once, for about a second, by reading
arrays far larger than the last cache on all cores, and kept in the user's cache folder under the
processor's name.  A GPU's bandwidth is not measured: it is looked up in its maker's data sheet.

Units: bytes, bytes per second.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dither.errors import OutputError
from dither.system import native
from dither.system.cores import usable_cores
from dither.system.files import cache_folder, replacing

MEASURED, ESTIMATED, LITERATURE, TOLD = "measured", "estimated", "literature", "told"

_SHARE_OF_MAC = 0.75  # of a Mac's memory, what Metal lets one process have
_SECONDS = 1.0  # of measuring
_LEAST_ARRAY = 64 * 2**20  # bytes per core

# what /proc/cpuinfo calls the vector extensions
_VECTORS = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx_vnni": "AVX-VNNI", "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 BF16", "amx_int8": "AMX", "asimd": "NEON",
    "asimddp": "dot product", "i8mm": "I8MM", "sve": "SVE", "sve2": "SVE2",
}  # fmt: skip

# Makers' data sheets, 10⁹ bytes per second.  The first name that is part of the card's decides.
CARDS = (
    ("H200", 4800), ("H100 PCIe", 2000), ("H100 NVL", 3900), ("H100", 3350), ("GH200", 4000), ("B200", 8000),
    ("A100-PCIE-40GB", 1555), ("A100-SXM4-40GB", 1555), ("A100 80GB PCIe", 1935), ("A100", 2039),
    ("L40S", 864), ("L40", 864), ("L4", 300), ("A10G", 600), ("A10", 600), ("A40", 696), ("A30", 933),
    ("T4", 320), ("V100", 900), ("RTX 6000 Ada", 960), ("RTX A6000", 768), ("RTX A5000", 768),
    ("RTX A4000", 448), ("5090", 1792), ("5080", 960), ("5070 Ti", 896), ("5070", 672), ("5060 Ti", 448),
    ("4090", 1008), ("4080 SUPER", 736), ("4080", 717), ("4070 Ti SUPER", 672), ("4070", 504),
    ("4060 Ti", 288), ("4060", 272), ("3090", 936), ("3080 Ti", 912), ("3080", 760), ("3070", 448),
    ("3060 Ti", 448), ("3060", 360),
    ("M1 Ultra", 800), ("M1 Max", 400), ("M1 Pro", 200), ("M1", 68), ("M2 Ultra", 800), ("M2 Max", 400),
    ("M2 Pro", 200), ("M2", 100), ("M3 Ultra", 819), ("M3 Max", 300), ("M3 Pro", 150), ("M3", 100),
    ("M4 Max", 410), ("M4 Pro", 273), ("M4", 120),
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A memory that models run from: the machine's own or a GPU's.  `how_*` say where a number is from."""

    name: str
    bytes: int
    how_bytes: str = MEASURED
    bandwidth: float | None = None
    how_bandwidth: str = ""


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    memory: Device
    gpus: tuple[Device, ...] = ()
    unified: bool = False  # the GPU computes on the machine's own memory (Apple)
    free: int | None = None  # of the memory, at this moment

    @property
    def vram(self) -> int:
        return sum(gpu.bytes for gpu in self.gpus)


def detect(memory: int | None = None, vram: int | None = None, bandwidth: bool = True) -> Machine:
    """This machine, where `memory` and `vram` are what the person says instead; 0 vram is no GPU.

    `bandwidth` False spares the second that measuring takes.
    """
    cpu, cores = cpu_name(), usable_cores()
    total, free = system_memory()
    unified = platform.system() == "Darwin" and platform.machine() == "arm64"
    known = card_bandwidth(cpu) if unified else None
    speed = known or (memory_bandwidth(cpu, cores) if bandwidth else None)
    how = LITERATURE if known else MEASURED if speed else ""
    size, how_size = (memory, TOLD) if memory is not None else (total, MEASURED)
    own = Device("unified memory" if unified else "RAM", size, how_size, speed, how)
    gpus: tuple[Device, ...] = ()
    if vram is not None:
        like = next(iter(graphics_cards()), Device("GPU", 0))
        gpus = (replace(like, bytes=vram, how_bytes=TOLD),) if vram else ()
    elif unified:
        gpus = (Device(cpu, int(size * _SHARE_OF_MAC), ESTIMATED, speed, how),)
    else:
        gpus = tuple(graphics_cards())
    return Machine(cpu, cores, own, gpus, unified and vram is None, free if memory is None else None)


def system_memory() -> tuple[int, int | None]:
    """Memory of the machine, or what its container may use, and how much of it is free right now."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    fields = {key: 1024 * int(kib) for key, kib in found}
    total, free = fields.get("MemTotal", 0), fields.get("MemAvailable")
    if not total and platform.system() == "Darwin":
        total = int(_run("sysctl", "-n", "hw.memsize").strip() or 0)
    total = total or native.physical_memory()
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        total, free = int(limit), None if free is None else min(free, int(limit))
    return total, free


def cpu_name() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    if named:
        return named[1].strip()
    if platform.system() == "Darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine()
    return platform.processor() or platform.machine() or "unknown"


def cpu_vectors() -> list[str]:
    """The vector extensions of the processor that matter for arithmetic on weights; empty where nothing says."""
    flags = " ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)).split()
    return [name for flag, name in _VECTORS.items() if flag in flags]


def cpu_quota() -> float | None:
    """Processors' worth of time a container may use (cgroup v2's `cpu.max`: quota and period)."""
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def graphics_cards() -> list[Device]:
    """NVIDIA's cards, as their driver lists them."""
    cards = []
    for name, mebibytes in nvidia_smi("name", "memory.total") or ():
        if mebibytes.isdigit():
            speed = card_bandwidth(name)
            cards.append(Device(name, int(mebibytes) * 2**20, MEASURED, speed, LITERATURE if speed else ""))
    return cards


def nvidia_smi(*fields: str) -> list[list[str]] | None:
    """What NVIDIA's driver says of each card, a text for each field; None where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    text = _run(program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    return [(row + [""] * len(fields))[: len(fields)] for row in rows] or None


def card_bandwidth(name: str) -> float | None:
    """A card's bandwidth by its maker's data sheet; None for a card that is not in the table.

    >>> card_bandwidth("NVIDIA GeForce RTX 4090"), card_bandwidth("Voodoo 2")
    (1008000000000.0, None)
    """
    found = (rate for part, rate in CARDS if re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![0-9])", name))
    return next((gigabytes * 1e9 for gigabytes in found), None)


def memory_bandwidth(cpu: str, cores: int) -> float:
    """Bytes per second that all cores together read; remembered for this processor."""
    place, key = cache_folder() / "bandwidth.json", f"{cpu}, {cores} cores"
    kept = _kept(place)
    if key in kept:
        return kept[key]
    measured = measure_bandwidth(cores)
    with suppress(OSError, OutputError):  # a cache that cannot be written costs a second next time
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place, sync=False) as file:
            file.write(json.dumps({**kept, key: measured}).encode())
    return measured


def measure_bandwidth(cores: int, seconds: float = _SECONDS) -> float:
    """The best of several rounds: anything else that runs can only make a round slower."""
    import numpy as np

    size = max(_LEAST_ARRAY, 4 * last_cache() // cores)
    _, free = system_memory()
    if free is not None:
        size = min(size, max(2**20, free // (4 * cores)))
    arrays = [np.full(size // 8, i, dtype=np.uint64) for i in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        end = time.perf_counter() + seconds
        while not best or time.perf_counter() < end:
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, arrays))
            best = max(best, cores * size / (time.perf_counter() - started))
    return best


def last_cache() -> int:
    """Bytes of the largest cache of the first core, 0 where the system does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return 1024 * max((int(kib) for file in files for kib in re.findall(r"^(\d+)K", _text(file))), default=0)


def _kept(place: Path) -> dict[str, float]:
    with suppress(OSError, ValueError):
        found = json.loads(place.read_text())
        if isinstance(found, dict):
            return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and v > 0}
    return {}


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
