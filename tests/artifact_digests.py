"""Artifacts of the tiny project, byte for byte: proof that a change of code changes no artifact.

python tests/artifact_digests.py > before.json      # at the state before
python tests/artifact_digests.py --against before.json

Two artifacts hold times or copies of the code itself and are compared by name alone: the benchmark
report (times) and the bundle (kdbench and preprocessing/ travel in it).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tiny_project import write_project

#: Artifacts whose bytes differ between two runs of equal code, or copy the code.
NOT_COMPARED = ("benchmark_report", "bundle")


def artifact_digests() -> dict[str, str]:
    """SHA-256 of every artifact of a fresh run of the tiny project, by name."""
    with tempfile.TemporaryDirectory() as folder:
        project = write_project(Path(folder) / "project")
        result = project.kdpipe("run", "--debug")
        if result.returncode:
            sys.exit(result.stderr)
        artifacts = project.manifest["artifacts"]
    return {name: artifacts[name]["sha256"] for name in sorted(artifacts)}


def main() -> None:
    """Print the digests, or compare them with printed ones and end with 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="what this script printed before")
    arguments = parser.parse_args()
    digests = artifact_digests()
    if arguments.against is None:
        print(json.dumps(digests, indent=1))
        return
    before = json.loads(arguments.against.read_text())
    names = sorted(before.keys() | digests.keys())
    differ = [n for n in names if n not in NOT_COMPARED and before.get(n) != digests.get(n)]
    compared = [n for n in names if n not in NOT_COMPARED]
    print(f"{len(compared) - len(differ)} of {len(compared)} artifacts are byte-identical")
    if differ:
        sys.exit(f"different: {', '.join(differ)}")


if __name__ == "__main__":
    main()
