"""Joules, where the machine counts them: the processor's RAPL counters, the driver's for NVIDIA's cards.

RAPL (running average power limit) is a counter of microjoules per processor package that Linux shows in
/sys/class/powercap; on AMD's processors it has Intel's name too.  It wraps around.  Since 2020 most systems let
only root read it (CVE-2020-8694: power leaks secrets), and virtual machines have none.  NVML counts millijoules of a
whole card since the driver was loaded.

Both count everything that runs there, not this process alone: the numbers mean something only on a machine that
does nothing else.  If nothing can be read, the reason is part of the result.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from dither.units import counted

POWERCAP = Path("/sys/class/powercap")
Reading = dict[Path | int, float]  # joules counted so far, by RAPL's package or the card's index


class EnergyMeter:
    """What can be read on this machine; `note` says what that is, or why there is nothing."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages, reason = _packages(powercap)
        self._nvml, self._cards = _cards()
        self.sources = [f"RAPL ({counted(len(self._packages), 'package')})"] if self._packages else []
        self.sources += [f"NVML ({counted(len(self._cards), 'card')})"] if self._cards else []
        counted_here = f"{' + '.join(self.sources)}, of all that ran on the machine"
        self.note = counted_here if self.sources else f"not readable here: {reason}"

    def read(self) -> Reading:
        reading: Reading = {}
        for package in self._packages:
            with suppress(OSError, ValueError):
                reading[package] = int((package / "energy_uj").read_text()) / 1e6
        for index, card in self._cards.items():
            with suppress(self._nvml.NVMLError):
                reading[index] = self._nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3
        return reading

    def between(self, before: Reading, after: Reading) -> float | None:
        """Joules from one reading to a later one; None if there is no counter.

        A counter that wrapped around once is corrected for; twice (minutes, at full power) cannot be seen.
        """
        if not self.sources:
            return None
        joules = 0.0
        for counter, end in after.items():
            spent = end - before.get(counter, end)
            if spent < 0 and isinstance(counter, Path):
                with suppress(OSError, ValueError):
                    spent += int((counter / "max_energy_range_uj").read_text()) / 1e6
            joules += max(0.0, spent)
        return joules


def _packages(powercap: Path) -> tuple[list[Path], str]:
    """The counters of whole packages that can be read; cores and graphics are parts of these."""
    if not powercap.is_dir():
        return [], f"the system shows no {powercap}"
    names: dict[Path, str] = {}
    for domain in sorted(powercap.glob("intel-rapl:*")):
        with suppress(OSError):
            names[domain] = (domain / "name").read_text()
    # "psys" is the whole platform: it counts where packages are not counted by themselves.
    packages = [domain for domain, name in names.items() if name.startswith("package")]
    packages = packages or [domain for domain, name in names.items() if name.startswith("psys")]
    if not packages:
        return [], f"{powercap} counts no processor package"
    readable = []
    for domain in packages:
        with suppress(OSError, ValueError):
            int((domain / "energy_uj").read_text())
            readable.append(domain)
    return readable, f"only root may read {packages[0] / 'energy_uj'}"


def _cards() -> tuple[Any, dict[int, Any]]:
    """NVIDIA's cards that count energy (Volta and later), through pynvml where it is installed."""
    try:
        import pynvml
    except ImportError:
        return None, {}
    cards = {}
    with suppress(pynvml.NVMLError):  # no driver
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # an older card
                card = pynvml.nvmlDeviceGetHandleByIndex(index)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
                cards[index] = card
    return pynvml, cards
