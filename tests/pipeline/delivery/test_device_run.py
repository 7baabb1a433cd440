"""kdbench on another machine: an sshd that the test starts on this one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

pytestmark = pytest.mark.skipif(
    not (Path(SSHD).exists() and shutil.which("ssh") and shutil.which("ssh-keygen")),
    reason="needs an ssh server: apt-get install openssh-server",
)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """(port, ssh options) of an sshd of our own, and the temporary folder that it gives out."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "tmp").mkdir()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\nPermitRootLogin yes\n"
        f"PasswordAuthentication no\nPidFile none\nSetEnv TMPDIR={folder / 'tmp'}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where its unprivileged part lives
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"])
    options = ["-p", str(port), "-i", str(folder / "user"), "-F", "none"]
    options += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder / 'known'}"]
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield options, folder / "tmp"
    finally:
        server.terminate()
        server.wait()


def benchmark(project, options, host="127.0.0.1", python=None, **changes):
    values = {"host": host, "ssh_options": options, **changes}
    if python:
        values["remote_python"] = str(python)
    words = [f"--set=benchmark.{key}={json.dumps(value)}" for key, value in values.items()]
    return project.kdpipe("run", "--stage", "benchmark", *words)


def python_with(folder, *packages):
    """An interpreter that has these packages and no others."""
    site = folder / "site"
    site.mkdir()
    for name in packages:
        package = Path(__import__(name).__file__).parent
        for found in package.parent.glob(f"{name}*"):
            (site / found.name).symlink_to(found)
    script = folder / "python"
    shell = f'exec env PYTHONPATH={site} {os.path.realpath(sys.executable)} -S "$@"'
    script.write_text(f"#!/bin/sh\n{shell}\n")
    script.chmod(0o755)
    return script


def test_the_report_comes_back_and_nothing_stays(finished, box, tmp_path):
    options, there = box
    python = python_with(tmp_path, "numpy", "onnxruntime")
    result = benchmark(finished, options, python=python)
    assert result.returncode == 0, result.stderr
    assert "throughput" in result.stderr
    folder = finished.artifact("benchmark_report")
    assert len(np.load(folder / "samples.npz")["all_ns"]) >= 70
    assert (folder / "report.html").exists()
    assert left(there) == []


def test_what_is_missing_there_has_its_own_status(finished, box, tmp_path):
    options, there = box
    for packages, words in (((), "numpy does not load"), (("numpy",), "onnxruntime is not inst")):
        folder = tmp_path / f"with{len(packages)}"
        folder.mkdir()
        result = benchmark(finished, options, python=python_with(folder, *packages))
        assert result.returncode == 5
        assert words in result.stderr
    result = benchmark(finished, options, python="/nowhere/python3")
    assert result.returncode == 5
    assert "127.0.0.1 has no /nowhere/python3; set benchmark.remote_python" in result.stderr
    assert left(there) == []
    assert finished.states()["compile"] == "fresh"


def test_a_host_that_is_not_reached_is_named(finished, box):
    options, _ = box
    closed = ["-p", "1", *options[2:]]
    result = benchmark(finished, closed)
    assert result.returncode == 6
    assert "127.0.0.1 is not reached over ssh: " in result.stderr
    assert "Connection refused" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_host_that_looks_like_an_option_is_a_host(finished, box):
    result = benchmark(finished, box[0], host="-oProxyCommand=touch /tmp/never")
    assert result.returncode == 6
    assert not Path("/tmp/never").exists()


def test_killing_kdpipe_ends_the_program_over_there(finished, box, tmp_path):
    options, there = box
    python = python_with(tmp_path, "numpy", "onnxruntime")
    words = {"host": "127.0.0.1", "ssh_options": options, "remote_python": str(python)}
    for key, value in words.items():
        finished.edit("benchmark", key, to=value)
    finished.edit("benchmark", "min_seconds", to=300)
    command = [Path(sys.executable).parent / "kdpipe", "run", "--stage", "benchmark"]
    with subprocess.Popen(command, cwd=finished.root, stderr=subprocess.DEVNULL) as child:
        started = time.monotonic()
        while not programs(there) and time.monotonic() < started + 120:
            time.sleep(0.1)
        assert programs(there)
        child.kill()
    gone = time.monotonic() + 120
    while (programs(there) or left(there)) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not programs(there)
    assert left(there) == []


def left(there):
    """What mktemp made there."""
    return list(there.glob("tmp.*"))


def programs(there):
    """Processes whose working folder lies there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            folder = (process / "cwd").readlink()
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if folder.is_relative_to(there) and b"kdbench" in words:
            found.append(process.name)
    return found
