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
from typing import TYPE_CHECKING

from pipeline.run.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


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
class Elsewhere:
    """A machine that ssh reaches without asking for a password."""

    host: str  # as ssh takes it: user@box
    ssh_options: tuple[str, ...] = ()
    python: str = "python3"


def run_here(
    bundle: Path,
    words: Sequence[str],
    samples: Path,
    time_limit_s: float,
    python: str = sys.executable,
) -> str:
    """Start the bundle's program as a user on the device would; return its last line.

    Args:
        bundle: the bundle.
        words: of kdbench's command line.
        samples: file that gets every latency.
        time_limit_s: seconds after which it is ended.
        python: that has the runtime.

    Raises:
        KdbenchError: it ended badly; its own words are in the message.
    """
    command = [python, str(bundle / "kdbench.py"), *words, f"--samples={samples}"]
    status, out, err = _run(command, bundle, time_limit_s)
    return _last_line("kdbench.py", status, out, err)


def run_there(
    there: Elsewhere, bundle: Path, words: Sequence[str], samples: Path, time_limit_s: float
) -> str:
    """Copy the bundle to the machine, start its program there, bring the samples back, clean up.

    Args:
        there: the machine.
        bundle: the bundle.
        words: of kdbench's command line.
        samples: file that gets every latency.
        time_limit_s: seconds after which the program is ended.

    Returns:
        The last line of kdbench.

    Raises:
        KdbenchError: 6 the machine is not reached; 5 it has no such Python; else what kdbench says.
    """
    folder = _ssh(there, "mktemp -d").decode().strip()
    try:
        _copy(there, bundle, folder)
        command = _ssh_command(there, _guarded(there, words, folder))
        status, out, err = _run(command, bundle, time_limit_s)
        if status == _NO_PROGRAM:
            raise KdbenchError(
                f"{there.host} has no {there.python}; set benchmark.remote_python", 5
            )
        if status == _SSH_FAILED:
            raise KdbenchError(f"the connection to {there.host} broke: {_final(err)}", 6)
        line = _last_line(f"kdbench.py on {there.host}", status, out, err)
        samples.write_bytes(_ssh(there, f"cat {shlex.quote(folder)}/samples.npz"))
        return line
    finally:
        _clean(there, folder)


def _guarded(there: Elsewhere, words: Sequence[str], folder: str) -> str:
    """A line of shell that runs kdbench there, and ends it when the connection goes away.

    sshd does not end what it started when ssh is killed; but standard input ends then.
    """
    place = shlex.quote(folder)
    program = shlex.join([there.python, "kdbench.py", *words, "--samples=samples.npz"])
    return (
        f"cd {place} && exec 3<&0; {program} </dev/null & child=$!; "
        f"{{ cat <&3 >/dev/null 2>&1; kill $child; rm -rf {place}; }} >/dev/null 2>&1 & guard=$!; "
        "wait $child; status=$?; kill $guard; exit $status"
    )


def _copy(there: Elsewhere, bundle: Path, folder: str) -> None:
    command = _ssh_command(there, f"tar -xf - -C {shlex.quote(folder)}")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        try:
            with tarfile.open(fileobj=child.stdin, mode="w|") as tar:
                tar.add(bundle, arcname=".")
            child.stdin.close()
        except BrokenPipeError:
            pass  # its own words say why
        words = child.stderr.read().decode(errors="replace")
    if child.returncode:
        raise KdbenchError(f"the bundle does not get to {there.host}: {_final(words)}", 6)


def _clean(there: Elsewhere, folder: str) -> None:
    """Remove what was copied; a machine that went away must not hide why we are here."""
    try:
        _ssh(there, f"rm -rf {shlex.quote(folder)}")
    except KdbenchError as error:
        log.warning("%s is still on %s: %s", folder, there.host, error)


def _ssh(there: Elsewhere, line: str) -> bytes:
    result = subprocess.run(_ssh_command(there, line), capture_output=True, check=False)
    if result.returncode:
        words = _final(result.stderr.decode(errors="replace"))
        raise KdbenchError(f"{there.host} is not reached over ssh: {words}", 6)
    return result.stdout


def _ssh_command(there: Elsewhere, line: str) -> list[str]:
    """The words before the host are ssh's: ours first, so that the user's can't be undone."""
    return [
        "ssh",
        *there.ssh_options,
        "-o",
        "BatchMode=yes",  # ask nobody
        "-o",
        "ConnectTimeout=15",
        "--",
        there.host,
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
        known = status if 0 < status < 7 else 1
        raise KdbenchError(f"{program} ended with {status}: {_final(err)}", known)
    return out.rstrip().rpartition("\n")[2]


def _final(words: str) -> str:
    """The last line of what a program said, without its own `Error:`."""
    lines = list(_spoken(words))
    return lines[-1].removeprefix("Error: ") if lines else "it said nothing"


def _spoken(words: str) -> Iterator[str]:
    return (line.strip() for line in words.splitlines() if line.strip())


def _die_with_parent() -> None:
    """Ask Linux to end this process when kdpipe is killed; else it would measure on, unseen."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
