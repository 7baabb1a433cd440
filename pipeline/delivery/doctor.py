"""What this machine has: versions, SDK, device. Never raises for what is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from metis.backend import BACKENDS, open_backend
from metis.voyager.process import find_interpreter
from pipeline.delivery.device_run import deploy_folder
from pipeline.run.environment import DISTRIBUTIONS, describe_environment, installed_version


class _Link(msgspec.Struct):
    """PCIe, negotiated and possible; null with the reason where it can't be read."""

    width: int | None
    max_width: int | None
    speed: str | None
    reason: str


class _Heat(msgspec.Struct):
    """Null with the reason where it can't be read."""

    temperature_c: float | None
    power_w: float | None
    reason: str


class _Device(msgspec.Struct):
    """A device as deploy/kdbench_machine.py lists it."""

    name: str
    board: str | None
    firmware: str | None
    driver: str | None
    link: _Link
    heat: _Heat


def examine_machine() -> dict[str, dict[str, Any]]:
    """Sections of name and value, for people and for JSON; a value is null when not found."""
    environment = describe_environment()
    environment.update({f"env {k}": v for k, v in environment.pop("threads").items()})
    return {
        "machine": environment,
        "packages": {name: installed_version(name) or "not installed" for name in DISTRIBUTIONS},
        "backends": {name: _probe(name) for name in BACKENDS},
        **{entry.doctor_section: _describe(name) for name, entry in BACKENDS.items()},
        "devices": _devices(),
    }


def _probe(name: str) -> str:
    try:
        probe = open_backend(name).probe()
    except ImportError as error:
        return f"not available: {error}"
    if not probe.available:
        return f"not available: {probe.missing}"
    return "available: " + ", ".join(f"{n} {v}" for n, v in probe.versions.items())


def _describe(name: str) -> dict[str, str]:
    try:
        return open_backend(name).describe()
    except ImportError as error:
        return {name: f"not available: {error}"}


def _devices() -> dict[str, str]:
    """Metis device nodes, whose names SDK 1.8 writes with hyphens; and what the runtime lists."""
    nodes = sorted(Path("/dev").glob("metis*"))
    states = {
        f"/dev/{node.name}": "readable" if os.access(node, os.R_OK | os.W_OK) else "no permission"
        for node in nodes
    }
    missing = {"metis": "none found (no /dev/metis*: no card, or its driver is not loaded)"}
    return {**(states or missing), **_list_devices()}


def _list_devices() -> dict[str, str]:
    """Firmware, driver, link and heat of every device, from the interpreter with the runtime."""
    interpreter = find_interpreter()
    if "axelera-rt" not in interpreter.versions:
        return {"axelera.runtime": "not installed, so firmware, driver and link are not read"}
    command = [interpreter.python, "-B", str(deploy_folder() / "kdbench_machine.py")]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        devices = _parse_devices(result.stdout) if result.returncode == 0 else None
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError, IndexError) as error:
        return {"axelera.runtime": f"does not answer: {error}"}
    if devices is None:
        words = [line for line in result.stderr.splitlines() if line.strip()]
        return {"axelera.runtime": f"lists no device: {words[-1] if words else 'it said nothing'}"}
    if not devices:
        return {"axelera.runtime": "lists no device"}
    return {device.name: _device_line(device) for device in devices}


def _parse_devices(stdout: str) -> list[_Device]:
    """The last line of kdbench_machine.py."""
    return msgspec.json.decode(stdout.splitlines()[-1], type=list[_Device])


def _device_line(device: _Device) -> str:
    """One line; what can't be read is null, with the reason."""
    link, heat = device.link, device.heat
    width = f"PCIe x{link.width} of x{link.max_width} at {link.speed}"
    degrees, watts = heat.temperature_c, heat.power_w
    return ", ".join(
        [
            f"board {device.board}",
            f"firmware {device.firmware}",
            f"driver {device.driver or 'null (axversion --driver does not tell)'}",
            width if link.width is not None else f"link null ({link.reason})",
            f"{degrees:g} C" if degrees is not None else f"temperature null ({heat.reason})",
            f"{watts:g} W" if watts is not None else f"power null ({heat.reason})",
        ]
    )
