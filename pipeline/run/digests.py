"""SHA-256 of files and folders, remembered while they do not change."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import msgspec

from pipeline.run.files import folder_files, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


#: Files from this size on are hashed once and remembered by size, times and inode.
REMEMBER_FROM_BYTES = 1 << 20

#: Folders of that many files are hashed once too, and remembered by the same of every file.
REMEMBER_FROM_FILES = 256

#: Beside a folder that is an artifact lies the listing that its digest is the hash of.
LISTING_SUFFIX = ".digests"

_CHUNK_BYTES = 1 << 22


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
            entry = self._load().get(inode, "")
            if big and not fresh and entry.startswith(state):
                return entry.removeprefix(state)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                self._progress(len(chunk))
        if big and entry != state + digest.hexdigest():
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
            entry = self._load().get(inode, "")
            if entry.startswith(state):
                digest, _, size = entry.removeprefix(state).partition(":")
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
