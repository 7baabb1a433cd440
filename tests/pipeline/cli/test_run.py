"""`kdpipe run` and `kdpipe status` as a user runs them."""

import hashlib
import json

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
