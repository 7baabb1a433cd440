"""The manifest: the only channel between stages, and the record people read."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCHEMA = 1

#: Files from this size on are hashed once and remembered by size, times and inode.
REMEMBER_FROM_BYTES = 1 << 20

#: Folders of that many files are hashed once too, and remembered by the same of every file.
REMEMBER_FROM_FILES = 256

#: Beside a folder that is an artifact lies the listing that its digest is the hash of.
LISTING_SUFFIX = ".digests"

_CHUNK_BYTES = 1 << 22


class ManifestError(ValueError):
    """A manifest, or an artifact it names, is not as it was left."""


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage made."""

    path: str  # relative to the run folder, POSIX
    sha256: str  # of a folder: of its sorted list of path, size and digest
    size_bytes: int
    stage: str


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended badly."""

    kind: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class StageRecord:
    """What is known of one stage: its latest attempt, and its latest completed one."""

    status: str  # of the latest attempt: pending, running, ok, failed or interrupted
    reason: str = ""  # why the latest attempt ran, or how it ended
    attempts: int = 0
    attempt_key: str = ""
    started: str = ""  # UTC, RFC 3339
    finished: str = ""
    seconds: float = 0.0
    log: str = ""  # relative to the run folder
    error: Failure | None = None
    # The rest is of the latest completed attempt, and empty before there is one.
    key: str = ""
    key_parts: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    contract: str = ""  # sha256 of the preprocessing.json that was used
    inputs: dict[str, str] = field(default_factory=dict)  # artifact -> sha256
    sources: dict[str, Source] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    gate: dict[str, GateRecord] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reproduce: str = ""  # one command line


@dataclass(frozen=True)
class Source:
    """One of the user's files: relative to the config's folder, or just a name when outside it."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class GateRecord:
    """How a gate judged, and whether the user overrode it."""

    passed: bool
    message: str
    allowed: str = ""  # when and why it was overridden


@dataclass(frozen=True)
class ContractRecord:
    """The preprocessing.json of this run."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """One run folder's record. Frozen: `with_stage` and friends give the next state."""

    schema: int
    run: str
    kdpipe: str  # version
    created: str
    updated: str
    contract: ContractRecord | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def with_stage(self, name: str, record: StageRecord) -> Manifest:
        """The manifest with this record in place."""
        return replace(self, stages={**self.stages, name: record})

    def save(self, folder: Path) -> None:
        """Replace manifest.json in the run folder, all or nothing."""
        tree = msgspec.to_builtins(self)
        # A NaN would be written, and the whole manifest be no JSON any more.
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / "manifest.json", text.encode())


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a run folder, or None when there is none yet.

    Raises:
        ManifestError: not readable as a manifest of this schema.
    """
    path = folder / "manifest.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"{path} can't be read: {error.strerror}") from error
    try:
        schema = msgspec.json.decode(data, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise ManifestError(
                f"{path} has schema {schema!r}; this kdpipe reads {SCHEMA}. "
                "Use the kdpipe that wrote it, or another run name (--run)"
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise ManifestError(
            f"{path} is damaged ({error}); restore it, or start another run (--run NAME)"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the new one at every moment."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Digests:
    """SHA-256 of files and folders; remembers big files by size, times and inode.

    The memory is a file with no names in it, so that it can be shared and never tells where a
    user's data lie. Whoever can't write it just hashes again.
    """

    def __init__(self, memory: Path, progress: Callable[[int], object] = lambda n: None) -> None:
        self._memory = memory
        self._progress = progress  # called with the number of bytes just hashed
        self._known: dict[str, str] | None = None
        self._changed = False

    def file(self, path: Path, *, fresh: bool = False) -> str:
        """The digest of one file; `fresh` hashes it whatever is remembered.

        Raises:
            OSError: not readable.
        """
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            big = stat.st_size >= REMEMBER_FROM_BYTES
            inode = _inode(stat)
            state = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:"
            known = self._load().get(inode, "")
            if big and not fresh and known.startswith(state):
                return known.removeprefix(state)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                self._progress(len(chunk))
        if big and known != state + digest.hexdigest():
            self._load()[inode] = state + digest.hexdigest()
            self._changed = True
        return digest.hexdigest()

    def path(self, path: Path, *, fresh: bool = False) -> tuple[str, int]:
        """Digest and size in bytes of a file or a folder.

        Raises:
            OSError: not there or not readable.
        """
        if not path.is_dir():
            return self.file(path, fresh=fresh), path.stat().st_size
        files = [] if fresh else list(folder_files(path))
        state, inode = "", ""
        if len(files) >= REMEMBER_FROM_FILES:
            state, inode = _folder_state(path, files), _inode(path.stat())
            known = self._load().get(inode, "")
            if known.startswith(state):
                digest, _, size = known.removeprefix(state).partition(":")
                return digest, int(size)
        listing = self.listing(path, fresh=fresh)
        total = sum(int(line.split("\0")[1]) for line in listing.splitlines())
        digest = hashlib.sha256(listing.encode()).hexdigest()
        if inode:
            self._load()[inode] = f"{state}{digest}:{total}"
            self._changed = True
        return digest, total

    def listing(self, folder: Path, *, fresh: bool = False) -> str:
        """Path, size and digest of every file of a folder, sorted; its hash is the folder's digest.

        Raises:
            OSError: not there or not readable.
        """
        return "".join(
            f"{member.relative_to(folder).as_posix()}\0{member.stat().st_size}"
            f"\0{self.file(member, fresh=fresh)}\n"
            for member in folder_files(folder)
        )

    def save(self) -> None:
        """Write what was learned; does nothing when that is nothing."""
        if not self._changed or self._known is None:
            return
        text = json.dumps(self._known, indent=0)
        try:
            write_atomically(self._memory, text.encode())
        except OSError:  # a run folder that only others may write; hashing again is all it costs
            return
        self._changed = False

    def _load(self) -> dict[str, str]:
        if self._known is None:
            try:
                self._known = msgspec.json.decode(self._memory.read_bytes(), type=dict[str, str])
            except (OSError, msgspec.DecodeError):
                self._known = {}
        return self._known


def _inode(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}"


def _folder_state(folder: Path, files: list[Path]) -> str:
    """Names, sizes, times and inodes of a folder's files in one hash."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = file.relative_to(folder).as_posix()
        entry = (name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        digest.update(repr(entry).encode())
    return f"{digest.hexdigest()}:"


def folder_files(path: Path) -> Iterator[Path]:
    """Every file below a folder, sorted by its relative POSIX path."""
    files = (p for p in path.rglob("*") if p.is_file())
    yield from sorted(files, key=lambda p: p.relative_to(path).as_posix())
