"""The SDK's interpreter: which one it is, what it has, and one child process per piece of work.

Light: imports the standard library only, and never the SDK.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from metis.backend import BackendError, BackendMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


#: Names the SDK's interpreter where `compile.sdk_python` does not.
PYTHON_VARIABLE = "KDPIPE_SDK_PYTHON"

_CHILD = Path(__file__).with_name("child.py")

_PROBE_SECONDS = 60

#: Oldest release that this adapter drives.
_OLDEST = (1, 6)

_HOW_TO_GET_IT = (
    "pip install axelera-devkit axelera-rt (same release, 1.6 to 1.8) from Axelera's package "
    "index, Python 3.10 to 3.13; an environment of its own is named by compile.sdk_python or "
    f"${PYTHON_VARIABLE}"
)

#: Words of the SDK -> what to do. Source: release notes 1.6 to 1.8, public issue threads.
_CURES = {
    "BufferKind": "pip install omnimalloc==0.5.0 beside devkit 1.7",
    "device support directory": "install axelera-rt beside the devkit, or set AXELERA_DEVICE_DIR",
    "axkernelcc": "the devkit's program axkernelcc is not found: install the devkit anew",
    "Unsupported model version": "compile again with the release that runs the model",
    "Cannot update from version": "quantize again: kdpipe run --stage calibrate --force",
    "AXR_ERROR_CONNECTION": "update the driver package metis-dkms and load its module again",
    "No space left": "make room",
    "killed by signal 9": "often for want of memory: the SDK wants 16 to 32 GB",
    "killed by signal 11": "some models need a larger stack: ulimit -s unlimited",
}

#: Steps of the child whose failure means that something is not installed.
_ABSENT = ("import", "find the program")

log = logging.getLogger("kdpipe.voyager")


@dataclass(frozen=True)
class Interpreter:
    """A Python that may hold the SDK."""

    python: str  # absolute; not resolved, because a virtual environment's is a link
    scripts: str  # folder of its console programs
    versions: dict[str, str]  # distribution, and "python" -> version
    axkernelcc: bool  # whether compile() will find this program
    problem: str  # why it can't be used; empty when it can

    @property
    def release(self) -> str:
        """Of the devkit."""
        return self.versions["axelera-devkit"]


def find_interpreter(path: str = "") -> Interpreter:
    """The interpreter of this path, else of $KDPIPE_SDK_PYTHON, else ours; never raises."""
    path = path or os.environ.get(PYTHON_VARIABLE, "")
    python = shutil.which(Path(path).expanduser()) if path else sys.executable
    if python is None:
        problem = f"there is no Python at {path} (compile.sdk_python, ${PYTHON_VARIABLE})"
        return Interpreter(path, "", {}, False, problem)
    return _examine(str(Path(python).absolute()), os.environ.get("PYTHONPATH", ""))


@cache
def _examine(python: str, python_path: str) -> Interpreter:
    """Ask an interpreter what it has; it is asked once, for `kdpipe status` asks often."""
    command = [python, str(_CHILD), "probe"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
        report = json.loads(result.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return Interpreter(python, "", {}, False, f"{python} does not answer: {error}")
    versions = {**report["versions"], "python": report["python"]}
    old = versions.pop("axelera-voyager-sdk", None)
    return Interpreter(
        python, report["scripts"], versions, report["axkernelcc"], _problem(versions, old)
    )


def _problem(versions: Mapping[str, str], old: str | None) -> str:
    devkit, rt = versions.get("axelera-devkit"), versions.get("axelera-rt")
    if devkit is None:
        state = f"release {old} is too old" if old else "is not installed"
        return f"the Voyager SDK {state}: {_HOW_TO_GET_IT}"
    if _numbers(devkit)[:2] < _OLDEST:
        return f"axelera-devkit {devkit} is too old: {_HOW_TO_GET_IT}"
    if rt is not None and _numbers(rt) != _numbers(devkit):
        return (
            f"axelera-devkit {devkit} and axelera-rt {rt} are of different releases, and models of "
            "one are refused by the other; install both of one release, with == for each"
        )
    return ""


def _numbers(release: str) -> tuple[int, ...]:
    """1.7.0rc1+cpu -> (1, 7, 0)."""
    parts = release.partition("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def run_in_sdk(
    verb: str,
    request: Mapping[str, Any],
    folder: Path,
    *,
    time_limit_s: float,
    python: str = "",
    progress: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """Have the SDK's interpreter do one piece of work, in a process and a folder of its own.

    Everything it prints goes to our log as it comes.

    Args:
        verb: of child.py.
        request: what the verb needs; paths of results are relative to `folder / "work"`.
        folder: to be made; the child's working folder is its subfolder `work`, empty at first.
        time_limit_s: seconds after which it is ended.
        python: the SDK's interpreter, see `find_interpreter`.
        progress: called with the number of calibration samples just done.

    Raises:
        BackendMissingError: there is no usable SDK, or its import fails.
        BackendError: it failed, was ended, or died; its own words are in the message.
    """
    interpreter = find_interpreter(python)
    if interpreter.problem:
        raise BackendMissingError(interpreter.problem)
    (folder / "work").mkdir(parents=True)
    done = folder / "done"
    document = {"verb": verb, "done": str(done.absolute()), **request}
    (folder / "request.json").write_text(json.dumps(document))
    answer_file = folder / "answer.json"
    tail = _run(interpreter, folder, time_limit_s, _Counter(done, progress))
    sdk = f"Voyager SDK {interpreter.release}"
    if not answer_file.exists():
        raise BackendError(f"{sdk} died at {verb}: {tail or 'it said nothing'}{_cure(tail)}")
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    if error := answer.get("error"):
        reason = " ".join(f"{error['kind']}: {error['words']}".split())
        message = f"{sdk} failed at {error['step']}: {reason}{_cure(reason)}"
        raise (BackendMissingError if error["step"] in _ABSENT else BackendError)(message)
    return answer


@contextmanager
def fresh_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for one piece of work, on the disk of what will be made of its contents."""
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".voyager-") as name:
        yield Path(name)


def _cure(text: str) -> str:
    return next((f" ({cure})" for symptom, cure in _CURES.items() if symptom in text), "")


class _Counter:
    """Turns the growing length of a file into progress."""

    def __init__(self, path: Path, progress: Callable[[int], object]) -> None:
        self._path, self._progress, self._seen = path, progress, 0

    def look(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size > self._seen:
            self._progress(size - self._seen)
            self._seen = size


def _run(interpreter: Interpreter, folder: Path, time_limit_s: float, counter: _Counter) -> str:
    """Run the child to its end; nothing of its process group is left. Returns its last line."""
    files = (_CHILD, folder / "request.json", folder / "answer.json")
    child = subprocess.Popen(
        [interpreter.python, *(str(file.absolute()) for file in files)],
        cwd=folder / "work",
        env=_environment(interpreter),
        stdin=subprocess.PIPE,  # never written to: its end tells the child that we are gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert child.stdout is not None
    listener = _Listener(child.stdout)
    try:
        listener.start()
        deadline = time.monotonic() + time_limit_s
        while child.poll() is None:
            if time.monotonic() > deadline:
                raise BackendError(
                    f"Voyager SDK {interpreter.release} was ended after {time_limit_s:g} s, at "
                    f"{listener.step or 'its start'}; compile.time_limit allows more"
                )
            counter.look()
            time.sleep(0.02)
        counter.look()
    finally:
        # Also after a good end: helpers that the compiler left behind hold its output open.
        _end_group(child)
        listener.join(timeout=10)
        child.stdin.close()  # type: ignore[union-attr]  # it is a pipe
    end = f"killed by signal {-child.returncode}" if child.returncode < 0 else ""
    return "; ".join(filter(None, (end, listener.last)))


def _end_group(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _environment(interpreter: Interpreter) -> dict[str, str]:
    folders = [str(Path(interpreter.python).parent), interpreter.scripts]
    return {
        **{k: v for k, v in os.environ.items() if k != "PYTHONHOME"},
        # compile() starts axkernelcc, which lies among the interpreter's scripts.
        "PATH": os.pathsep.join([*dict.fromkeys(folders), os.environ.get("PATH", os.defpath)]),
        # The SDK's protobuf files and the C++ backend of protobuf don't go together.
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
        "PYTHONHASHSEED": "0",  # the SDK's documentation of 1.7: sets are ordered by it
        "PYTHONUNBUFFERED": "1",
    }


class _Listener(Thread):
    """Writes what the child says to our log, and remembers its last words."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream, self.last, self.step = stream, "", ""

    def run(self) -> None:
        """Until nobody holds the other end."""
        for line in self._stream:
            text = line.rstrip()
            log.info("%s", text)
            if text.startswith("kdpipe: "):
                self.step = text.removeprefix("kdpipe: ")
            elif text:
                self.last = text
        self._stream.close()
