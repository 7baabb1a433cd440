"""Start a bundle's own program, kdbench.py, here or on another machine over ssh."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.run.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence


#: Exit statuses of kdbench that are results; the gates judge them.
RESULTS = (0, 7)

#: What ssh itself ends with when it can't connect or log in.
_SSH_FAILED = 255

#: What a shell ends with when there is no such program.
_NO_PROGRAM = 127

log = logging.getLogger("kdpipe")


class KdbenchError(StageError):
    """kdbench.py could not measure; `status` is the exit status that it, or the way to it, gave."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RemoteHost:
    """A machine that ssh reaches without asking for a password."""

    host: str  # as ssh takes it: user@box
    ssh_options: tuple[str, ...] = ()
    python: str = "python3"


def deploy_folder() -> Path:
    """The programs that travel: inside an installed wheel, or beside the packages in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_deploy", package.parent / "deploy"):
        if (folder / "kdbench.py").is_file():
            return folder
    raise StageError("kdbench.py is not installed with kdpipe; install kdpipe again")


def run_local(
    bundle: Path,
    arguments: Sequence[str],
    samples: Path,
    time_limit_s: float,
    python: str = sys.executable,
) -> str:
    """Start the bundle's program as a user on the device would; return its last line.

    Args:
        bundle: the bundle.
        arguments: of kdbench's command line.
        samples: file that gets every latency.
        time_limit_s: seconds after which it is ended.
        python: that has the runtime.

    Raises:
        KdbenchError: it ended badly; its own words are in the message.
    """
    command = [python, str(bundle / "kdbench.py"), *arguments, f"--samples={samples}"]
    status, out, err = _run(command, bundle, time_limit_s)
    return _last_line("kdbench.py", status, out, err)


def run_remote(
    remote: RemoteHost, bundle: Path, arguments: Sequence[str], samples: Path, time_limit_s: float
) -> str:
    """Copy the bundle to the machine, start its program there, bring the samples back, clean up.

    Args:
        remote: the machine.
        bundle: the bundle.
        arguments: of kdbench's command line.
        samples: file that gets every latency.
        time_limit_s: seconds after which the program is ended.

    Returns:
        The last line of kdbench.

    Raises:
        KdbenchError: 6 the machine is not reached; 5 it has no such Python; else what kdbench says.
    """
    folder = _ssh(remote, "mktemp -d").decode().strip()
    try:
        _copy(remote, bundle, folder)
        command = _ssh_command(remote, _guarded_command(remote, arguments, folder))
        status, out, err = _run(command, bundle, time_limit_s)
        if status == _NO_PROGRAM:
            raise KdbenchError(
                f"{remote.host} has no {remote.python}; set benchmark.remote_python", 5
            )
        if status == _SSH_FAILED:
            raise KdbenchError(f"the connection to {remote.host} broke: {_last_words(err)}", 6)
        line = _last_line(f"kdbench.py on {remote.host}", status, out, err)
        samples.write_bytes(_ssh(remote, f"cat {shlex.quote(folder)}/samples.npz"))
        return line
    finally:
        _clean(remote, folder)


def _guarded_command(remote: RemoteHost, arguments: Sequence[str], folder: str) -> str:
    """A line of shell that runs kdbench there, and ends it when the connection goes away.

    sshd does not end what it started when ssh is killed; but standard input ends then.
    """
    place = shlex.quote(folder)
    program = shlex.join([remote.python, "kdbench.py", *arguments, "--samples=samples.npz"])
    return (
        f"cd {place} && exec 3<&0; {program} </dev/null & child=$!; "
        f"{{ cat <&3 >/dev/null 2>&1; kill $child; rm -rf {place}; }} >/dev/null 2>&1 & guard=$!; "
        "wait $child; status=$?; kill $guard; exit $status"
    )


def _copy(remote: RemoteHost, bundle: Path, folder: str) -> None:
    command = _ssh_command(remote, f"tar -xf - -C {shlex.quote(folder)}")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        try:
            with tarfile.open(fileobj=child.stdin, mode="w|") as tar:
                tar.add(bundle, arcname=".")
            child.stdin.close()
        except BrokenPipeError:
            pass  # its own words say why
        stderr = child.stderr.read().decode(errors="replace")
    if child.returncode:
        raise KdbenchError(f"the bundle does not get to {remote.host}: {_last_words(stderr)}", 6)


def _clean(remote: RemoteHost, folder: str) -> None:
    """Remove what was copied; a machine that went away must not hide why we are here."""
    try:
        _ssh(remote, f"rm -rf {shlex.quote(folder)}")
    except KdbenchError as error:
        log.warning("%s is still on %s: %s", folder, remote.host, error)


def _ssh(remote: RemoteHost, line: str) -> bytes:
    result = subprocess.run(_ssh_command(remote, line), capture_output=True, check=False)
    if result.returncode:
        reason = _last_words(result.stderr.decode(errors="replace"))
        raise KdbenchError(f"{remote.host} is not reached over ssh: {reason}", 6)
    return result.stdout


def _ssh_command(remote: RemoteHost, line: str) -> list[str]:
    """The words before the host are ssh's: ours first, so that the user's can't be undone."""
    return [
        "ssh",
        *remote.ssh_options,
        "-o",
        "BatchMode=yes",  # ask nobody
        "-o",
        "ConnectTimeout=15",
        "--",
        remote.host,
        line,
    ]


def _run(command: Sequence[str], folder: Path, time_limit_s: float) -> tuple[int, str, str]:
    """Run to the end, in a process group that ends with us; exit status, both outputs.

    Raises:
        KdbenchError: 1 the time was over; a device that hangs never answers.
    """
    # A bundle is what was written, no more: Python must not leave its caches in it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    # Never written to: its end tells the other side that we are gone.
    silent, lifeline = os.pipe()
    try:
        with subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=silent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        ) as child:
            try:
                out, err = child.communicate(timeout=time_limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                log.info("kdbench was ended\n%s%s", *child.communicate())
                raise KdbenchError(
                    f"kdbench.py was ended after {time_limit_s:g} s without a result: the device "
                    "hangs, or benchmark.time_limit is too short",
                    1,
                ) from None
            except BaseException:
                os.killpg(child.pid, signal.SIGKILL)
                raise
    finally:
        os.close(silent)
        os.close(lifeline)
    log.info("kdbench ended with %d\n%s%s", child.returncode, out, err)
    return child.returncode, out, err


def _last_line(program: str, status: int, out: str, err: str) -> str:
    if status not in RESULTS:
        exit_status = status if 0 < status < 7 else 1
        raise KdbenchError(f"{program} ended with {status}: {_last_words(err)}", exit_status)
    return out.rstrip().rpartition("\n")[2]


def _last_words(stderr: str) -> str:
    """The last line of what a program said, without its own `Error:`."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else "it said nothing"


def _die_with_parent() -> None:
    """Ask Linux to end this process when kdpipe is killed; else it would measure on, unseen."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
