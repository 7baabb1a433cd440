"""`kdpipe init` as a user runs it."""

import subprocess
import sys
from pathlib import Path


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
