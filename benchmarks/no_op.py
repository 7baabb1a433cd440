"""What it costs to learn that nothing is to be done, and to read the help, against known peers.

    make demo
    python -m venv peers
    peers/bin/pip install dvc==3.67.1 kedro==1.7.0 kedro-datasets==9.6.0
    python -m venv olive; olive/bin/pip install olive-ai==0.13.0 onnxruntime requests
    python benchmarks/no_op.py --dvc peers/bin/dvc --kedro peers/bin/kedro --olive olive/bin/olive

The five stages of the demo, all fresh: `kdpipe run` looks whether config, code, inputs and every
artifact are what they were; `dvc repro` does so for the same folders as the outputs of five stages;
`kedro run --only-missing-outputs` only looks whether five files of the same sizes exist. By turns;
prints the median of CPU seconds (user and system, all children) and of seconds on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

TURNS = 9
STAGES = ("ingest", "distill", "calibrate", "compile", "benchmark")
DEMO = Path(__file__).parent.parent / "examples" / "landsat"
QUIET = {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "KEDRO_DISABLE_TELEMETRY": "1"}
KDPIPE = str(Path(sys.executable).with_name("kdpipe"))


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--project", type=Path, default=DEMO, help="with a finished run")
    for peer in ("dvc", "kedro", "olive"):
        parser.add_argument(f"--{peer}", help="its executable")
    given = parser.parse_args()
    folders = newest_folders(given.project)
    commands = {"kdpipe run": ([KDPIPE, "run"], given.project)}
    helps = {"kdpipe --help": ([KDPIPE, "--help"], given.project)}
    with tempfile.TemporaryDirectory(prefix="kdpipe-") as root:
        if given.dvc:
            where = dvc_project(Path(root) / "dvc", folders, given.dvc)
            commands["dvc repro"] = ([given.dvc, "repro"], where)
            helps["dvc --help"] = ([given.dvc, "--help"], where)
        if given.kedro:
            where = kedro_project(Path(root) / "kedro", folders)
            words = [given.kedro, "run", "--only-missing-outputs"]
            finished(words, where)
            commands["kedro run --only-missing-outputs"] = (words, where)
        if given.olive:
            helps["olive --help"] = ([given.olive, "--help"], Path(root))
        mb = sum(size_of(folder) for folder in folders.values()) / 1e6
        print(f"five stages, {mb:.0f} MB of artifacts, {TURNS} turns\n")
        print_table("nothing to do", commands)
        print_table("help", helps)


def newest_folders(project: Path) -> dict[str, Path]:
    """The folder of each stage's present artifacts, in the one run of a project."""
    manifest = next(project.glob("runs/*/manifest.json"))
    stages = {
        Path(artifact["path"]).parts[:2]
        for artifact in json.loads(manifest.read_text())["artifacts"].values()
    }
    return {stage: manifest.parent / stage / attempt for stage, attempt in sorted(stages)}


def dvc_project(root: Path, folders: dict[str, Path], dvc: str) -> Path:
    """The same folders as what five stages of DVC make, done once."""
    root.mkdir()
    stages = {}
    for number, name in enumerate(STAGES):
        shutil.copytree(folders[name], root / "source" / name)
        deps = [STAGES[number - 1]] if number else ["source/ingest"]
        stages[name] = {"cmd": f"cp -r source/{name} {name}", "deps": deps, "outs": [name]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    finished([dvc, "init", "--no-scm"], root)
    finished([dvc, "repro"], root)
    return root


def kedro_project(root: Path, folders: dict[str, Path]) -> Path:
    """Five nodes that make files of the same sizes."""
    (root / "src" / "five").mkdir(parents=True)
    (root / "conf" / "base").mkdir(parents=True)
    (root / "conf" / "local").mkdir()
    (root / "data").mkdir()
    (root / "pyproject.toml").write_text(
        '[tool.kedro]\npackage_name = "five"\nproject_name = "five"\n'
        'kedro_init_version = "1.7.0"\nsource_dir = "src"\n'
    )
    (root / "src" / "five" / "__init__.py").touch()
    (root / "src" / "five" / "settings.py").touch()
    sizes = {name: size_of(folders[name]) for name in STAGES}
    (root / "src" / "five" / "pipeline_registry.py").write_text(
        "from functools import partial\n"
        "from kedro.pipeline import node, pipeline\n\n"
        f"SIZES = {sizes}\n\n\n"
        "def made(size, before):\n    return bytes(size)\n\n\n"
        "def register_pipelines():\n"
        "    names = ['source', *SIZES]\n"
        "    return {'__default__': pipeline([\n"
        "        node(partial(made, SIZES[now]), before, now, name=f'make_{now}')\n"
        "        for before, now in zip(names, names[1:])\n"
        "    ])}\n"
    )
    catalog = {
        name: {"type": "pickle.PickleDataset", "filepath": f"data/{name}.pkl"}
        for name in ("source", *STAGES)
    }
    (root / "conf" / "base" / "catalog.yml").write_text(yaml.safe_dump(catalog))
    (root / "data" / "source.pkl").write_bytes(pickle.dumps(b""))
    return root


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def finished(command: list[str], where: Path) -> None:
    """Run it; stop when it fails."""
    done = subprocess.run(
        command, cwd=where, env={**os.environ, **QUIET}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")


def print_table(title: str, commands: dict[str, tuple[list[str], Path]]) -> None:
    """Medians of every command by turns, and how many times the first one's CPU they take."""
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    wall: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(TURNS):
        for name, (command, where) in commands.items():
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            finished(command, where)
            wall[name].append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    first = statistics.median(cpu[next(iter(commands))])
    print(f"| {title} | CPU s | s | CPU, times kdpipe's |\n|---|---|---|---|")
    for name in commands:
        here = statistics.median(cpu[name])
        print(
            f"| `{name}` | {here:.2f} | {statistics.median(wall[name]):.2f} | {here / first:.1f} |"
        )
    print()


if __name__ == "__main__":
    main()
