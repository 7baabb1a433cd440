"""Rewrite a graph until the chip's rules are kept, as far as exact rewrites go, and prove each.

A proof is two runs: onnxruntime computes the graph before and after a rewrite, node by node as it
is written, on random inputs and on those that the caller has. Float operations may change their
order, so the outputs may differ by `TOLERANCE` of an output's range; more is an error that names
the rewrite. What a proof found is said in the record of the rewrite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, version_converter

from metis.graph.edit import copy_proto
from metis.graph.sessions import open_exact, run_node
from metis.graph.view import constant_nodes
from metis.operators.draft import Draft
from metis.operators.report import OPSETS, OperatorReport, check_model, read_graph
from metis.operators.rewrites import REWRITERS, fix_batch

#: Largest difference of an output, as a share of its range (largest minus smallest value) over the
#: inputs tried: some 80 times float32's precision.
TOLERANCE = 1e-5

#: Of ONNX's file format, the first with opset 17.
_IR_VERSION = 8

#: Random inputs of each proof.
_RANDOM_INPUTS = 4

#: Rewrites that no finding of the rules asks for.
EXTRA_REWRITES = {
    "opset": f"convert to opset {OPSETS[-1]}",
    "trailing softmax": "end in logits; the host does the softmax",
}

Outputs = list[list[NDArray[Any]]]  # per input tried, per output


class RewriteError(RuntimeError):
    """A rewrite changed what the graph computes, or did not cure what it should."""


@dataclass(frozen=True)
class Rewrite:
    """One change of a graph, and what its proof found."""

    name: str  # in REWRITES or EXTRA_REWRITES
    node: str  # the node, or the input or output of the graph, that was changed
    words: str
    max_abs_difference: float  # of any output; all changes of one name are proven together
    share_of_range: float  # the same, relative to the output's range

    def proof(self) -> str:
        """What the proof found, in words."""
        if not self.max_abs_difference:
            return "outputs equal"
        return (
            f"outputs differ by up to {self.max_abs_difference:.2g}, "
            f"{self.share_of_range:.1g} of their range"
        )


@dataclass(frozen=True)
class Legalized:
    """A graph after all exact rewrites that the chip's rules ask for."""

    model: onnx.ModelProto
    rewrites: tuple[Rewrite, ...]
    before: OperatorReport
    report: OperatorReport  # of `model`
    inputs_tried: int
    max_abs_difference: float  # of any output, between the first graph and the last
    note: str = ""  # why nothing was rewritten, or why the proofs show little

    def refusal(self, subject: str) -> str:
        """Why Metis can't run `subject`, in one line; empty when it can."""
        message = self.report.refusal(subject)
        return f"{message}; {self.note}" if message and self.note and not self.rewrites else message

    def facts(self) -> list[dict[str, Any]]:
        """The rewrites as a manifest or a program reads them."""
        return [asdict(rewrite) for rewrite in self.rewrites]

    def lines(self) -> list[str]:
        """The rewrites as a terminal shows them."""
        return [f"rewrite   {r.name:<16} {r.node}: {r.words} ({r.proof()})" for r in self.rewrites]


def legalize(
    model: onnx.ModelProto, inputs: Sequence[NDArray[np.float32]] = (), *, seed: int = 0
) -> Legalized:
    """Do every exact rewrite that a rule asks for, cut off a last softmax, convert the opset.

    Args:
        model: any classifier; it stays as it is.
        inputs: real inputs, each (1, C, H, W), for models with one input; random ones are always
            tried too.
        seed: of the random inputs.

    Returns:
        The rewritten model. What no rewrite cures is in its report.

    Raises:
        RewriteError: a rewrite is not proven exact, or does not cure what it should.
    """
    original = check_model(model)
    obstacle = _unfit(original)
    if obstacle:
        return Legalized(model, (), original, original, 0, 0.0, obstacle)
    try:
        session = _RewriteSession(model, _feeds(model, inputs, seed))
    except Exception as error:  # onnxruntime has many kinds  # noqa: BLE001
        note = f"nothing was rewritten: onnxruntime can't run the graph: {_first_line(error)}"
        return Legalized(model, (), original, original, 0, 0.0, note)
    problem = _convert_opset(session)
    report = check_model(session.model)
    if problem:
        report = _with_note(report, problem)
    else:
        while _rewrite_one_kind(session, report):
            report = check_model(session.model)
    return Legalized(
        session.model,
        tuple(session.done),
        original,
        report,
        inputs_tried=len(session.feeds),
        max_abs_difference=session.total_difference(),
        note=session.doubt() if session.done else "",
    )


def _unfit(report: OperatorReport) -> str:
    """Why no proof could be run."""
    unknown = [entry.name for entry in report.graph if entry.reason == "the shape is not fixed"]
    return f"nothing was rewritten: the shape of {unknown[0]} is not fixed" if unknown else ""


def _feeds(
    model: onnx.ModelProto, inputs: Sequence[NDArray[np.float32]], seed: int
) -> list[dict[str, NDArray[Any]]]:
    """Inputs for the proofs: random ones, then the caller's."""
    graph = read_graph(model)
    random = np.random.default_rng(seed)
    feeds = []
    for _ in range(_RANDOM_INPUTS):
        feed = {}
        for value in graph.inputs:
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = graph.shape(value.name) or ()
            if np.issubdtype(dtype, np.integer):
                feed[value.name] = random.integers(0, 100, shape).astype(dtype)
            else:
                feed[value.name] = random.normal(size=shape).astype(dtype)
        feeds.append(feed)
    return [*feeds, *({graph.inputs[0].name: array} for array in inputs)]


class _RewriteSession:
    """A model under rewriting: what was done, and what the graph answers to the inputs tried."""

    def __init__(self, model: onnx.ModelProto, feeds: list[dict[str, NDArray[Any]]]) -> None:
        self.model = model
        self.feeds = feeds
        self.done: list[Rewrite] = []
        self.softmaxes: dict[int, onnx.NodeProto] = {}  # cut off, by the number of their output
        self._first_outputs = self._outputs = self._run(model)
        self._tried: set[tuple[str, str]] = set()

    def _run(self, model: onnx.ModelProto) -> Outputs:
        session = open_exact(model)
        return [session.run(None, feed) for feed in self.feeds]

    def ask_once(self, name: str, place: str) -> None:
        """Note that a rewrite is done somewhere; twice in one place means that it cures nothing."""
        if (name, place) in self._tried:
            raise RewriteError(f"the rewrite {name!r} of {place} does not cure what it should")
        self._tried.add((name, place))

    def accept(
        self,
        model: onnx.ModelProto,
        name: str,
        changes: list[tuple[str, str]],
        softmaxes: dict[int, onnx.NodeProto] | None = None,
    ) -> None:
        """Prove a rewritten model equal to the one before, and go on with it.

        Args:
            model: after the rewrite.
            name: of the rewrite.
            changes: node and words of each.
            softmaxes: softmaxes that were cut off; the proof does them again.
        """
        try:
            outputs = self._run(model)
        except Exception as error:  # of any kind: what we made is no valid graph
            raise RewriteError(
                f"the rewrite {name!r} of {changes[0][0]} makes a graph that does not run: "
                f"{_first_line(error)}"
            ) from error
        restored = self._restore_softmaxes(outputs, softmaxes or {})
        difference, share = _compare(self._outputs, restored)
        if not share <= TOLERANCE:
            raise RewriteError(
                f"the rewrite {name!r} of {', '.join(place for place, _ in changes[:3])} changes "
                f"what the graph computes: outputs differ by up to {difference:.3g}, "
                f"{share:.2g} of their range (limit {TOLERANCE:g})"
            )
        self.model, self._outputs = model, outputs
        self.softmaxes.update(softmaxes or {})
        self.done += [
            Rewrite(name, place, description, difference, share) for place, description in changes
        ]

    def total_difference(self) -> float:
        """Between the first graph and the present one."""
        restored = self._restore_softmaxes(self._outputs, self.softmaxes)
        return _compare(self._first_outputs, restored)[0]

    def doubt(self) -> str:
        """What makes the proofs weak, if anything does."""
        varies = any(
            np.ptp(np.stack(rows), axis=0).any() for rows in zip(*self._first_outputs, strict=True)
        )
        return "" if varies else "the graph answers the same to all inputs: the proofs show little"

    def _restore_softmaxes(self, outputs: Outputs, softmaxes: dict[int, onnx.NodeProto]) -> Outputs:
        """Outputs with the softmaxes done that were cut off."""
        return [
            [
                self._run_softmax(softmaxes[n], value) if n in softmaxes else value
                for n, value in enumerate(row)
            ]
            for row in outputs
        ]

    def _run_softmax(self, node: onnx.NodeProto, logits: NDArray[Any]) -> NDArray[Any]:
        return run_node(node, {node.input[0]: logits}, self.model)[0]


def _compare(expected: Outputs, actual: Outputs) -> tuple[float, float]:
    """The largest difference of any output: absolute, and as a share of the output's range."""
    largest = share = 0.0
    pairs = zip(zip(*expected, strict=True), zip(*actual, strict=True), strict=True)
    for pair in pairs:
        reference, result = (np.stack([np.asarray(v, np.float64) for v in rows]) for rows in pair)
        finite = np.isfinite(reference)
        if reference.shape != result.shape or not np.array_equal(finite, np.isfinite(result)):
            return float("inf"), float("inf")
        if not finite.any():
            continue
        difference = float(np.abs(reference[finite] - result[finite]).max())
        spread = float(np.ptp(reference[finite]))
        largest = max(largest, difference)
        if difference:
            share = max(share, difference / spread if spread else float("inf"))
    return largest, share


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _convert_opset(session: _RewriteSession) -> str:
    """Bring the model to an opset that the rules are for; why not, if that fails."""
    opsets = session.model.opset_import
    version = next((o.version for o in opsets if o.domain in ("", "ai.onnx")), 0)
    if version in OPSETS:
        return ""
    target = OPSETS[-1]
    try:
        model = version_converter.convert_version(_plain_constants(session.model), target)
        # Before 4, initializers had to be inputs too; before 8, there was no opset 17.
        model.ir_version = max(model.ir_version, _IR_VERSION)
        session.accept(model, "opset", [("the graph", f"opset {version} -> {target}")])
    except RewriteError as error:
        return f"opset {version} can't be converted exactly: {error}"
    except Exception as error:  # the converter's own have no common kind  # noqa: BLE001
        # Before it, an assertion of C++: its file, line and condition.
        reason = _first_line(error).rpartition("failed: ")[2]
        return f"opset {version} can't be converted: {reason}"
    return ""


def _plain_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose Constants hold tensors, the only form that the converter knows."""
    plain = copy_proto(model)
    for node in plain.graph.node:
        if node.op_type == "Constant":
            for name, tensor in constant_nodes([node]):
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("value", tensor))
                node.attribute[0].t.name = name
    return plain


def _with_note(report: OperatorReport, note: str) -> OperatorReport:
    """The report, its entry about the opset with what the conversion met."""
    entries = tuple(
        replace(entry, reason=f"{entry.reason}; {note}") if entry.name == "opset" else entry
        for entry in report.graph
    )
    return replace(report, graph=entries)


def _rewrite_one_kind(session: _RewriteSession, report: OperatorReport) -> bool:
    """Do all rewrites of the first name that a rule asks for; False when none is left."""
    free_inputs = [entry.name for entry in report.graph if "batch to 1" in entry.rewrites]
    if free_inputs:
        draft = Draft(session.model)
        for name in free_inputs:
            session.ask_once("batch to 1", name)
        changes = [(name, fix_batch(draft, name)) for name in free_inputs]
        session.accept(draft.finish(), "batch to 1", changes)
        return True
    for name in REWRITERS:
        is_asked = any(name in entry.rewrites for entry in report.nodes)
        if is_asked and _rewrite(session, report, name):
            return True
    return _cut_softmax(session)


def _rewrite(session: _RewriteSession, report: OperatorReport, name: str) -> bool:
    """Do the rewrites of one name; False when they all stay undone, at the host's edges."""
    draft = Draft(session.model)
    nodes = [node for node in draft.nodes if node.op_type != "Constant"]
    changes = []
    for node, entry in zip(nodes, report.nodes, strict=True):
        if name not in entry.rewrites:
            continue
        output = node.output[0]
        description = REWRITERS[name](draft, node)
        if description is not None:
            session.ask_once(name, output)
            changes.append((entry.name, description))
        elif entry.curable:
            raise RewriteError(f"the rewrite {name!r} of {entry.name} can't be done")
    if changes:
        session.accept(draft.finish(), name, changes)
    return bool(changes)


def _cut_softmax(session: _RewriteSession) -> bool:
    """Let outputs end in logits; the record says what the host has to do."""
    draft = Draft(session.model)
    outputs = draft.model.graph.output
    softmaxes, changes = {}, []
    for number, value in enumerate(outputs):
        node = draft.graph.producer(value.name)
        if node is None or node.op_type not in ("Softmax", "LogSoftmax"):
            continue
        logits = node.input[0]
        is_computed = draft.graph.producer(logits) is not None
        is_output = logits in {value.name for value in outputs}
        if not is_computed or is_output or draft.graph.consumers(value.name):
            continue
        axis = draft.view(node).attribute("axis", -1)
        softmaxes[number] = node
        changes.append(
            (
                value.name,
                f"the output is {logits} now; {node.op_type} along axis {axis} is the host's",
            )
        )
        value.name = logits
    if changes:
        session.accept(draft.finish(), "trailing softmax", changes, softmaxes)
    return bool(changes)
