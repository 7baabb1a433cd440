import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.files import folder_files


def checksum(folder):
    digest = hashlib.sha256()
    for path in folder_files(folder):
        digest.update(f"{path}{path.stat().st_mtime_ns}".encode() + path.read_bytes())
    return digest.hexdigest()


def test_a_dry_run_writes_nothing_and_tells_all(finished, project):
    before = checksum(finished.root)
    result = finished.kdpipe(
        "run", "--from", "distill", "--to", "compile", "--dry-run", "--set", "distill.epochs=3"
    )
    assert checksum(finished.root) == before
    assert result.returncode == 0
    distill, calibrate, compiled = result.stdout.splitlines()
    assert distill.startswith("distill    run   stale: epochs was 2, now 3")
    assert "(last time " in distill
    assert "teaching " in distill
    assert calibrate.startswith("calibrate  run   stale: distill comes first and is stale: ")
    assert compiled.startswith("compile    run")
    project_before = checksum(project.root)
    assert project.kdpipe("run", "--dry-run").returncode == 0
    assert checksum(project.root) == project_before


def test_a_dry_run_for_programs(finished):
    document = json.loads(finished.kdpipe("run", "--dry-run", "--json").stdout)
    assert document["plan"][0]["stage"] == "ingest"
    assert {row["action"] for row in document["plan"]} == {"skip"}
    assert len(document["plan"][1]["inputs"]["dataset"]) == 64


def test_why_gives_every_reason_in_full(finished):
    old = finished.manifest["contract"]["sha256"]
    finished.edit_contract("note", to="changed")
    new = hashlib.sha256((finished.root / "preprocessing.json").read_bytes()).hexdigest()
    for stage in ("ingest", "benchmark"):
        lines = finished.kdpipe("status", "--why", stage).stdout.splitlines()
        assert lines[0] == f"{stage} is stale"
        assert f"  preprocessing.json was {old}, now {new}" in lines
    assert set(finished.states().values()) == {"stale"}


def test_only_what_a_change_concerns_is_stale(finished):
    assert stale(finished, "compile.aipu_cores=2") == ["compile", "benchmark"]
    assert stale(finished, "benchmark.min_queries=80") == ["benchmark"]
    assert stale(finished, "calibrate.max_int8_loss=40") == []
    text = (finished.root / "kdpipe.yaml").read_text().splitlines()
    index = text.index("seed: 3")
    text[index], text[index - 1] = text[index - 1] + "  # a comment", text[index]
    (finished.root / "kdpipe.yaml").write_text("\n".join(text) + "\n")
    assert stale(finished, "seed=3") == []


def stale(project, change):
    document = json.loads(project.kdpipe("status", "--json", "--set", change).stdout)
    return [name for name, entry in document["stages"].items() if entry["state"] != "fresh"]


def test_more_aipu_cores_are_a_bigger_batch_with_the_same_answers(finished):
    before = json.loads((finished.artifact("benchmark_report") / "report.json").read_text())
    result = finished.kdpipe("run", "--set", "compile.aipu_cores=4")
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stderr.splitlines() if " runs " in line] == [
        "compile",
        "benchmark",
    ]
    after = json.loads((finished.artifact("benchmark_report") / "report.json").read_text())
    assert after["measurement"]["batch"] == 4
    assert after["measurement"]["top1_test"]["value"] == before["measurement"]["top1_test"]["value"]


def test_another_run_name_is_another_folder(project):
    assert project.kdpipe("run", "--run", "second", "--stage", "ingest").returncode == 0
    assert (project.root / "runs" / "second" / "manifest.json").exists()
    assert not project.folder.exists()


def test_a_stage_alone_runs_alone(finished):
    result = finished.kdpipe("run", "--stage", "compile", "--force")
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stderr.splitlines() if " runs " in line] == [
        "compile"
    ]


def test_doctor_tells_versions_and_what_is_missing(project):
    result = project.kdpipe("doctor")
    assert result.returncode == 0
    assert "onnxruntime" in result.stdout
    assert "axelera-devkit   not installed" in result.stdout
    document = json.loads(project.kdpipe("doctor", "--json").stdout)
    assert document["backends"]["emulator"].startswith("available: onnxruntime ")
    assert document["backends"]["voyager"].startswith("not available: the Voyager SDK is not")


def test_init_writes_a_config_that_is_ready_to_edit(tmp_path):
    kdpipe = Path(sys.executable).parent / "kdpipe"
    command = [kdpipe, "init", "my-project"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "wrote my-project/kdpipe.yaml" in result.stdout
    dry = subprocess.run(
        [kdpipe, "run", "--dry-run"],
        cwd=tmp_path / "my-project",
        capture_output=True,
        text=True,
        check=True,
    )
    assert dry.stdout.splitlines()[0] == "ingest     run   missing: it never ran"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"]])
def test_help_is_light(words):
    """No heavy library is loaded before it is needed; time itself is no test."""
    code = (
        "import sys; from pipeline.cli.main import commands; "
        "commands.main(sys.argv[1:], standalone_mode=False); "
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'lightning', 'timm', 'matplotlib', "
        "'yaml', 'jinja2', 'tqdm', 'PIL'}; "
        "sys.exit('loaded: ' + ', '.join(heavy & sys.modules.keys()) if heavy & sys.modules.keys() "
        "else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                            check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_run_with_nothing_to_do_loads_nothing_heavy(finished):
    assert finished.kdpipe("run").returncode == 0
    code = (
        "import sys; from pipeline.cli.main import commands; "
        "commands.main(['run'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'numpy', 'onnx', 'onnxruntime'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=finished.root, check=False,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
