"""What can be read of the machine around a measurement; what can't is null, with the reason."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

#: Axelera AI in the PCI vendor list.
_VENDOR = "0x1f9d"

#: Metis throttles its matrix units from here on. Source: Voyager SDK 1.6, thermal guide.
THROTTLING_C = 105.0


def describe_host(sysfs: Path) -> dict[str, Any]:
    """Versions, processor, memory and load, without the machine's name."""
    governor = sysfs / "devices/system/cpu/cpu0/cpufreq/scaling_governor"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "governor": _word(governor),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
        "clock": "time.perf_counter_ns",
    }


def _cpu_model() -> str | None:
    try:
        found = re.search(r"(?:model name|Model)\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _word(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def read_link(device: str | None, sysfs: Path) -> dict[str, Any]:
    """PCIe width and speed, negotiated and possible, as Linux shows them.

    Args:
        device: its name, such as metis-0:4:0; the numbers are taken for the PCI address when there
            is more than one card. None: there is no device.
        sysfs: where /sys is mounted.
    """
    nothing = dict.fromkeys(("width", "max_width", "speed", "max_speed"))
    if device is None:
        return {**nothing, "reason": "no device: emulated on the host"}
    folders = [
        path
        for path in sorted((sysfs / "bus/pci/devices").glob("*"))
        if _word(path / "vendor") == _VENDOR
    ]
    if len(folders) > 1:
        numbers = [int(n) for n in re.findall(r"\d+", device)[:2]]
        folders = [path for path in folders if _pci_numbers(path.name) == numbers]
    if len(folders) != 1:
        return {**nothing, "reason": f"no PCI device of vendor {_VENDOR} that is {device} in sysfs"}
    width, widest = (_word(folders[0] / f"{which}_link_width") for which in ("current", "max"))
    return {
        "width": int(width) if width else None,
        "max_width": int(widest) if widest else None,
        "speed": _word(folders[0] / "current_link_speed"),
        "max_speed": _word(folders[0] / "max_link_speed"),
        "reason": "" if width and widest else "sysfs does not tell the width",
    }


def _pci_numbers(address: str) -> list[int]:
    """Domain and bus of 0000:04:00.0."""
    return [int(part, 16) for part in address.split(":")[:2]]


def read_heat(device: str | None, configuration: dict[str, str]) -> dict[str, Any]:
    """Temperature and power as axmonitor shows them, clocks as the runtime does.

    Source: Voyager SDK 1.6 to 1.8, axmonitor. Its output has no documented form, so the first line
    with the word and a number counts.
    """
    clocks = {k: v for k, v in configuration.items() if "clock" in k or "mvm" in k}
    if device is None:
        return _heat(None, None, {}, "no device: emulated on the host")
    tool = shutil.which("axmonitor")
    if tool is None:
        return _heat(None, None, clocks, "axmonitor is not installed")
    command = [tool, "--server-address", "127.0.0.1:5555", "--ui", "console", "-c", "print"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return _heat(None, None, clocks, f"axmonitor did not answer: {type(error).__name__}")
    temperature = _number(r"temp[^\n\d-]*(-?\d+(?:\.\d+)?)", printed.stdout)
    power = _number(r"power[^\n\d]*(\d+(?:\.\d+)?)\s*W\b", printed.stdout)
    missing = [n for n, v in (("temperature", temperature), ("power", power)) if v is None]
    return _heat(
        temperature, power, clocks, f"axmonitor shows no {' and no '.join(missing)}" * bool(missing)
    )


def _heat(
    temperature: float | None, power: float | None, clocks: dict[str, str], reason: str
) -> dict[str, Any]:
    return {"temperature_c": temperature, "power_w": power, "clocks": clocks, "reason": reason}


def _number(pattern: str, text: str) -> float | None:
    found = re.search(pattern, text, re.IGNORECASE)
    return float(found[1]) if found else None


def machine_faults(
    link: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """Why figures from this machine can't be trusted: a narrow link, heat, a lower clock."""
    faults = []
    if link["width"] and link["max_width"] and link["width"] < link["max_width"]:
        faults.append(
            f"PCIe link is x{link['width']}, the card can x{link['max_width']}; "
            "use another slot, or seat the card again"
        )
    hottest = max((h["temperature_c"] or 0.0) for h in (before, after))
    if hottest >= THROTTLING_C:
        faults.append(f"{hottest:g} C: the chip throttles from {THROTTLING_C:g} C on; cool it")
    if before["clocks"] != after["clocks"]:
        faults.append(f"clocks changed from {before['clocks']} to {after['clocks']}")
    return faults
