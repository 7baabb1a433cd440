"""Temperature and power of a device, before, after, and once a second while it is measured.

What asks each second is this file, started as a program of its own: the program that measures lends
it no time, and reads what it wrote when the measurement is over. Source: Voyager SDK 1.6 to 1.8,
axmonitor. Its output has no documented form, so the first line with the word and a number counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Metis throttles its matrix units from here on. Source: Voyager SDK 1.6, thermal guide.
THROTTLING_C = 105.0

#: What axmonitor shows changes this often (Voyager SDK 1.6 to 1.8).
INTERVAL_SECONDS = 1.0

#: Fewer readings say nothing about a scenario.
FEWEST_READINGS = 3

#: The runtime is not documented to answer while instances of it run.
_NO_CLOCKS = "not_readable: the runtime is not asked while it runs; heat_before and heat_after have"


@dataclass(frozen=True)
class Reading:
    """One answer of axmonitor."""

    at_ns: int  # of time.perf_counter_ns, which all programs of a Linux machine share
    temperature_c: float | None
    power_w: float | None
    cost_s: float  # CPU time of all asking so far


def read_heat(device: str | None, configuration: dict[str, str]) -> dict[str, Any]:
    """Temperature and power as axmonitor shows them, clocks as the runtime does."""
    clocks = {k: v for k, v in configuration.items() if "clock" in k or "mvm" in k}
    temperature, power, reason = _ask(device)
    return {"temperature_c": temperature, "power_w": power, "clocks": clocks, "reason": reason}


def find_tool(name: str) -> str | None:
    """A program of the SDK: on the path, or beside an interpreter that was started by its path."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _ask(device: str | None) -> tuple[float | None, float | None, str]:
    """Degrees, watts, and why one of them is missing."""
    if device is None:
        return None, None, "no device: emulated on the host"
    tool = find_tool("axmonitor")
    if tool is None:
        return None, None, "axmonitor is not installed"
    command = [tool, "--server-address", "127.0.0.1:5555", "--ui", "console", "-c", "print"]
    nothing = subprocess.DEVNULL  # our own standard input has a meaning
    try:
        printed = subprocess.run(
            command, stdin=nothing, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, None, f"axmonitor did not answer: {type(error).__name__}"
    text = _part_about(printed.stdout, device)
    temperature = _number(r"temp[^\n\d-]*(-?\d+(?:\.\d+)?)", text)
    power = _number(r"power[^\n\d]*(\d+(?:\.\d+)?)\s*W\b", text)
    missing = [n for n, v in (("temperature", temperature), ("power", power)) if v is None]
    reason = f"axmonitor shows no {' and no '.join(missing)}" if missing else ""
    return temperature, power, reason


def _part_about(printed: str, device: str) -> str:
    """What is printed of this device where devices are named; SDK 1.8 writes hyphens for colons."""
    name = device.replace(":", "-")
    parts = re.split(r"(?=metis-\d)", printed)
    return next((part for part in parts if part.replace(":", "-").startswith(name)), printed)


def _number(pattern: str, text: str) -> float | None:
    match = re.search(pattern, text, re.IGNORECASE)
    return float(match[1]) if match else None


class Watch:
    """Readings from entry to exit; none where the device can't be read, with the reason.

    Args:
        device: its name; None: there is no device.
        before: what `read_heat` found; without a temperature and a power nobody asks again.
    """

    def __init__(self, device: str | None, before: dict[str, Any]) -> None:
        self._device = device
        readable = before["temperature_c"] is not None or before["power_w"] is not None
        self._readable = device is not None and readable
        self._reason: str = before["reason"]
        self._readings: list[Reading] = []

    def __enter__(self) -> Watch:
        self._begin = time.perf_counter_ns()
        if self._readable:
            self._file = tempfile.TemporaryFile("w+")
            command = [sys.executable, "-I", "-B", str(Path(__file__)), str(self._device)]
            # Its standard input is never written to; the end of it says that we are gone.
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=self._file, stderr=subprocess.DEVNULL
                )
            except OSError as error:  # a sandbox, or an interpreter that can't be found again
                self._readable = False
                self._reason = f"no second program could be started: {type(error).__name__}"
                self._file.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._end = time.perf_counter_ns()
        if self._readable:
            try:
                self._child.communicate(timeout=3)
            except subprocess.TimeoutExpired:  # axmonitor does not answer any more
                self._child.kill()
                self._child.communicate()
            self._readings = self.readings()
            self._file.close()

    def readings(self) -> list[Reading]:
        """All so far."""
        if not self._readable or self._file.closed:
            return self._readings
        lines = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        return [Reading(*json.loads(line)) for line in lines.splitlines(True) if b"\n" in line]

    def between(self, start_ns: int, end_ns: int) -> dict[str, float | None]:
        """Hottest temperature and mean power of a part of the time; null for too few readings."""
        inside = [r for r in self.readings() if start_ns <= r.at_ns <= end_ns]
        degrees = [r.temperature_c for r in inside if r.temperature_c is not None]
        watts = [r.power_w for r in inside if r.power_w is not None]
        return {
            "hottest_c": max(degrees) if len(degrees) >= FEWEST_READINGS else None,
            "power_w": sum(watts) / len(watts) if len(watts) >= FEWEST_READINGS else None,
        }

    def describe(self) -> dict[str, Any]:
        """What was read, what asking cost, and whether the chip got hot enough to throttle."""
        readings, elapsed_ns = self._readings, self._end - self._begin
        degrees = [r.temperature_c for r in readings if r.temperature_c is not None]
        missing = f"not_readable: {self._reason or 'axmonitor stopped answering'}"
        return {
            "source": "axmonitor, each second" if readings else None,
            "n": len(readings),
            "coolest_c": min(degrees, default=None),
            "hottest_c": max(degrees, default=None),
            "throttling": max(degrees) >= THROTTLING_C if degrees else None,
            "cpu_share": readings[-1].cost_s / elapsed_ns * 1e9 if readings else None,
            "clocks": _NO_CLOCKS if self._device is not None else missing,
            "reason": self._reason if readings else missing,
        }


def main(device: str) -> None:
    """Write a reading per second, one JSON list per line, until standard input ends."""
    # Whoever measures comes first; a late reading is better than a late query.
    with contextlib.suppress(OSError):
        os.nice(19)
    due = time.perf_counter()
    while True:
        at = time.perf_counter_ns()
        temperature, power, _ = _ask(device)
        print(json.dumps([at, temperature, power, sum(os.times()[:4])]), flush=True)
        due = max(due + INTERVAL_SECONDS, time.perf_counter())
        if select.select([sys.stdin], [], [], due - time.perf_counter())[0]:
            return


if __name__ == "__main__":
    main(sys.argv[1])
