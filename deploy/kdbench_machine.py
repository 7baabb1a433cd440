"""What can be read of the machine around a measurement; what can't is null, with the reason.

Started as a program it prints what it finds of every Metis device, as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

from kdbench_heat import THROTTLING_C, find_tool, read_heat

#: Axelera AI in the PCI vendor list.
_VENDOR = "0x1f9d"


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
        match = re.search(r"(?:model name|Model)\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return match[1] if match else None


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
        folders = [path for path in folders if _is_at(path.name, device)]
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


def _is_at(address: str, device: str) -> bool:
    """Whether metis-0:4:0 may be at 0000:04:00.0; no page says if its numbers are hexadecimal."""
    place = [int(part, 16) for part in address.split(":")[:2]]
    numbers = re.findall(r"[0-9a-f]+", device.partition("-")[2])[:2]
    readings = [[int(n, 16) for n in numbers]]
    if all(n.isdecimal() for n in numbers):
        readings.append([int(n) for n in numbers])
    return place in readings


def read_driver(device: str | None) -> str | None:
    """Release of the kernel driver, as the SDK's axversion tells it."""
    tool = find_tool("axversion")
    if device is None or tool is None:
        return None
    try:
        printed = subprocess.run(
            [tool, "--driver"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\d+\.\d+[\w.+-]*", printed.stdout)
    return match[0] if match else None


def machine_faults(
    link: dict[str, Any], before: dict[str, Any], during: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """Why figures from this machine can't be trusted: a narrow link, heat, a lower clock."""
    faults = []
    if link["width"] and link["max_width"] and link["width"] < link["max_width"]:
        faults.append(
            f"PCIe link is x{link['width']}, the card can x{link['max_width']}; "
            "use another slot, or seat the card again"
        )
    degrees = (before["temperature_c"], during["hottest_c"], after["temperature_c"])
    hottest = max(found or 0.0 for found in degrees)
    if hottest >= THROTTLING_C:
        faults.append(f"{hottest:g} C: the chip throttles from {THROTTLING_C:g} C on; cool it")
    was, became = _settings(before["clocks"]), _settings(after["clocks"])
    if was != became:
        faults.append(
            f"clocks changed from {was} to {became}; let nobody else set them "
            "(AXELERA_CONFIGURE_BOARD=0), and measure again"
        )
    return faults


def _settings(clocks: dict[str, str]) -> dict[str, str]:
    """What somebody sets; a clock that follows the load is no fault."""
    return {k: v for k, v in clocks.items() if k.startswith(("clock_profile", "mvm_"))}


def describe_devices(sysfs: Path = Path("/sys")) -> list[dict[str, Any]]:
    """Every device that the runtime lists: name, board, firmware, driver, link, heat.

    Raises:
        ImportError: there is no runtime.
        Exception: of the runtime, when it can't list them; its errors have no common class.
    """
    with import_module("axelera.runtime").Context() as context:
        return [
            {
                "name": info.name,
                "board": str(getattr(info, "board_type", None)),
                "firmware": str(getattr(info, "firmware_version", None)),
                "driver": read_driver(info.name),
                "link": read_link(info.name, sysfs),
                "heat": read_heat(info.name, {}),
            }
            for info in context.list_devices()
        ]


if __name__ == "__main__":
    print(json.dumps(describe_devices()))
