"""What this machine has: versions, SDK, device. Never raises for what is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from metis.backend import BACKENDS, open_backend
from metis.sdk_child import find_interpreter
from pipeline.environment import DISTRIBUTIONS, describe_environment, installed


def examine_machine() -> dict[str, dict[str, Any]]:
    """Sections of name and value, for people and for JSON; a value is null when not found."""
    environment = describe_environment()
    environment.update({f"env {k}": v for k, v in environment.pop("threads").items()})
    return {
        "machine": environment,
        "packages": {name: installed(name) or "not installed" for name in DISTRIBUTIONS},
        "backends": {name: _probe(name) for name in BACKENDS},
        "sdk": _sdk(),
        "devices": _devices(),
        "emulator": _emulator(),
    }


def _probe(name: str) -> str:
    try:
        probe = open_backend(name).probe()
    except ImportError as error:
        return f"not available: {error}"
    if not probe.available:
        return f"not available: {probe.missing}"
    return "available: " + ", ".join(f"{n} {v}" for n, v in probe.versions.items())


def _sdk() -> dict[str, str]:
    """Where the SDK was looked for, and whether its compiler will find its helper program."""
    found = find_interpreter()
    helper = "found" if found.axkernelcc else "not found; compiling needs it"
    return {
        "interpreter": found.python,
        "axkernelcc": helper if found.versions else "not looked for",
    }


def _emulator() -> dict[str, str]:
    """Which statements about the chip the emulator follows, and how this CPU runs it."""
    try:
        from metis.emulator import ASSUMPTIONS, FACTS, arithmetic
    except ImportError as error:
        return {"arithmetic": f"not available: {error}"}
    return {
        "arithmetic": arithmetic("per_tensor_histogram")[0],
        **{f"documented {i}": words for i, words in enumerate(FACTS, 1)},
        **{f"assumed {i}": words for i, words in enumerate(ASSUMPTIONS, 1)},
    }


def _devices() -> dict[str, str]:
    """Metis device nodes; SDK 1.8 writes their names with hyphens, earlier ones with colons."""
    nodes = sorted(Path("/dev").glob("metis*"))
    if not nodes:
        return {"metis": "none found (no /dev/metis*: no card, or its driver is not loaded)"}
    return {
        node.name: "readable" if os.access(node, os.R_OK | os.W_OK) else "no permission"
        for node in nodes
    }
