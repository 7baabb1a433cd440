"""Prove that a run folder is what its manifest says, down to the one file that is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from pipeline.run.digests import LISTING_SUFFIX
from pipeline.run.manifest import ManifestError
from preprocessing.contract import ContractError, load_contract

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.run.manifest import Artifact
    from pipeline.run.state import RunState


#: Where an artifact repeats the contract's digest: artifact, file in it (or itself), JSON key.
CONTRACT_REPEATED = (
    ("student_input", "", "contract"),
    ("dataset", "dataset.json", "contract"),
    ("bundle", "bundle.json", "contract"),
    ("benchmark_report", "report.json", "contract"),
)


@dataclass
class Verification:
    """What was looked at, and what is wrong."""

    checked: int = 0  # files
    problems: list[str] = field(default_factory=list)


def verify_run(state: RunState) -> Verification:
    """Hash every file of every artifact anew, and compare the contract wherever it is repeated.

    Raises:
        ManifestError: there is no manifest yet.
    """
    if state.manifest is None:
        raise ManifestError(f"{state.describe_path(state.folder)} has no manifest.json; run first")
    result = Verification()
    for name, artifact in state.manifest.artifacts.items():
        result.problems += _check_artifact(state, name, artifact, result)
    if not result.problems:
        result.problems += _check_contract(state)
    return result


def _check_artifact(
    state: RunState, name: str, artifact: Artifact, result: Verification
) -> Iterator[str]:
    path = state.folder / artifact.path
    if not path.exists():
        yield f"{name}: {artifact.path} is gone; expected {artifact.sha256}"
    elif path.is_dir():
        yield from _check_folder(state, name, artifact, result)
    else:
        result.checked += 1
        yield from _compare(
            name, artifact.path, artifact.sha256, state.digests.file(path, fresh=True)
        )


def _check_folder(
    state: RunState, name: str, artifact: Artifact, result: Verification
) -> Iterator[str]:
    folder = state.folder / artifact.path
    digests = dict(_entries(state.digests.listing(folder, fresh=True)))
    result.checked += len(digests)
    listing = folder.with_name(folder.name + LISTING_SUFFIX)
    text = listing.read_bytes() if listing.exists() else b""
    if sha256(text).hexdigest() != artifact.sha256:
        # Then the listing can't say which file it is; the folder as a whole still can be judged.
        digest, _ = state.digests.path(folder, fresh=True)
        yield from _compare(name, artifact.path, artifact.sha256, digest)
        yield from _compare(
            name, f"{artifact.path}{LISTING_SUFFIX}", artifact.sha256, sha256(text).hexdigest()
        )
        return
    expected = dict(_entries(text.decode()))
    for file in sorted({*expected, *digests}):
        yield from _compare(
            name,
            f"{artifact.path}/{file}",
            expected.get(file, "no such file"),
            digests.get(file, "no such file"),
        )


def _entries(listing: str) -> Iterator[tuple[str, str]]:
    for line in listing.splitlines():
        name, _, digest = line.split("\0")
        yield name, digest


def _compare(artifact: str, path: str, expected: str, digest: str) -> Iterator[str]:
    if expected != digest:
        yield f"{artifact}: {path}: expected {expected}, found {digest}"


def _check_contract(state: RunState) -> Iterator[str]:
    manifest = state.manifest
    if manifest is None or manifest.contract is None:
        return
    truth = manifest.contract.sha256
    yield from _compare("contract", "the user's file", truth, state.contract_digest())
    contract = manifest.artifacts["contract"]
    yield from _compare("contract", contract.path, truth, contract.sha256)
    try:
        load_contract(state.folder / contract.path)
    except ContractError as error:
        yield f"contract: {error}"
    for name, record in manifest.stages.items():
        if record.key:
            yield from _compare(name, "the contract it used", truth, record.contract)
    for name, file, key in CONTRACT_REPEATED:
        if name in manifest.artifacts:
            path = state.folder / manifest.artifacts[name].path / file
            yield from _compare(name, f"{file or path.name}: {key}", truth, _load_key(path, key))
    pipeline = manifest.artifacts.get("device_pipeline")
    for path in (state.folder / pipeline.path).glob("*.yaml") if pipeline else ():
        if truth.encode() not in path.read_bytes():
            yield f"device_pipeline: {path.name} does not carry the contract's digest {truth}"


def _load_key(path: Path, key: str) -> str:
    try:
        return str(json.loads(path.read_text())[key])
    except (OSError, ValueError, KeyError) as error:
        return f"unreadable ({error})"
