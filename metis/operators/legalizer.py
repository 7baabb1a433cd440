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

Answers = list[list[NDArray[Any]]]  # per input tried, per output


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

    def refusal(self, what: str) -> str:
        """Why Metis can't run `what`, in one line; empty when it can."""
        words = self.report.refusal(what)
        return f"{words}; {self.note}" if words and self.note and not self.rewrites else words

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
    before = check_model(model)
    obstacle = _unfit(before)
    if obstacle:
        return Legalized(model, (), before, before, 0, 0.0, obstacle)
    try:
        work = _Work(model, _feeds(model, inputs, seed))
    except Exception as error:  # onnxruntime has many kinds  # noqa: BLE001
        note = f"nothing was rewritten: onnxruntime can't run the graph: {_first_line(error)}"
        return Legalized(model, (), before, before, 0, 0.0, note)
    refused = _convert_opset(work)
    report = check_model(work.model)
    if refused:
        report = _with_note(report, refused)
    else:
        while _rewrite_one_kind(work, report):
            report = check_model(work.model)
    return Legalized(
        work.model,
        tuple(work.done),
        before,
        report,
        inputs_tried=len(work.feeds),
        max_abs_difference=work.total_difference(),
        note=work.doubt() if work.done else "",
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
    return [*feeds, *({graph.inputs[0].name: given} for given in inputs)]


class _Work:
    """A model under rewriting: what was done, and what the graph answers to the inputs tried."""

    def __init__(self, model: onnx.ModelProto, feeds: list[dict[str, NDArray[Any]]]) -> None:
        self.model = model
        self.feeds = feeds
        self.done: list[Rewrite] = []
        self.cut: dict[int, onnx.NodeProto] = {}  # number of an output -> softmax that was there
        self._first = self._answers = self._run(model)
        self._tried: set[tuple[str, str]] = set()

    def _run(self, model: onnx.ModelProto) -> Answers:
        session = open_exact(model)
        return [session.run(None, feed) for feed in self.feeds]

    def ask_once(self, name: str, where: str) -> None:
        """Note that a rewrite is done somewhere; twice in one place means that it cures nothing."""
        if (name, where) in self._tried:
            raise RewriteError(f"the rewrite {name!r} of {where} does not cure what it should")
        self._tried.add((name, where))

    def accept(
        self,
        model: onnx.ModelProto,
        name: str,
        changes: list[tuple[str, str]],
        cut: dict[int, onnx.NodeProto] | None = None,
    ) -> None:
        """Prove a rewritten model equal to the one before, and go on with it.

        Args:
            model: after the rewrite.
            name: of the rewrite.
            changes: node and words of each.
            cut: softmaxes that were cut off; the proof does them again.
        """
        try:
            answers = self._run(model)
        except Exception as error:  # of any kind: what we made is no valid graph
            raise RewriteError(
                f"the rewrite {name!r} of {changes[0][0]} makes a graph that does not run: "
                f"{_first_line(error)}"
            ) from error
        difference, share = _compare(self._answers, self._restored(answers, cut or {}))
        if not share <= TOLERANCE:
            raise RewriteError(
                f"the rewrite {name!r} of {', '.join(where for where, _ in changes[:3])} changes "
                f"what the graph computes: outputs differ by up to {difference:.3g}, "
                f"{share:.2g} of their range (limit {TOLERANCE:g})"
            )
        self.model, self._answers = model, answers
        self.cut.update(cut or {})
        self.done += [Rewrite(name, where, words, difference, share) for where, words in changes]

    def total_difference(self) -> float:
        """Between the first graph and the present one."""
        return _compare(self._first, self._restored(self._answers, self.cut))[0]

    def doubt(self) -> str:
        """What makes the proofs weak, if anything does."""
        varies = any(
            np.ptp(np.stack(rows), axis=0).any() for rows in zip(*self._first, strict=True)
        )
        return "" if varies else "the graph answers the same to all inputs: the proofs show little"

    def _restored(self, answers: Answers, cut: dict[int, onnx.NodeProto]) -> Answers:
        """Answers with the softmaxes done that were cut off."""
        return [
            [
                run_node(cut[n], {cut[n].input[0]: value}, self.model)[0] if n in cut else value
                for n, value in enumerate(row)
            ]
            for row in answers
        ]


def _compare(expected: Answers, found: Answers) -> tuple[float, float]:
    """The largest difference of any output: absolute, and as a share of the output's range."""
    largest = share = 0.0
    for one, other in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
        a, b = (np.stack([np.asarray(v, np.float64) for v in rows]) for rows in (one, other))
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf"), float("inf")
        finite = np.isfinite(a)
        if not finite.any():
            continue
        difference = float(np.abs(a[finite] - b[finite]).max())
        spread = float(np.ptp(a[finite]))
        largest = max(largest, difference)
        if difference:
            share = max(share, difference / spread if spread else float("inf"))
    return largest, share


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _convert_opset(work: _Work) -> str:
    """Bring the model to an opset that the rules are for; why not, if that fails."""
    version = next((o.version for o in work.model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version in OPSETS:
        return ""
    target = OPSETS[-1]
    try:
        converted = version_converter.convert_version(_plain_constants(work.model), target)
        # Before 4, initializers had to be inputs too; before 8, there was no opset 17.
        converted.ir_version = max(converted.ir_version, _IR_VERSION)
        work.accept(converted, "opset", [("the graph", f"opset {version} -> {target}")])
    except RewriteError as error:
        return f"opset {version} can't be converted exactly: {error}"
    except Exception as error:  # the converter's own have no common kind  # noqa: BLE001
        # Before it, an assertion of C++: its file, line and condition.
        words = _first_line(error).rpartition("failed: ")[2]
        return f"opset {version} can't be converted: {words}"
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


def _rewrite_one_kind(work: _Work, report: OperatorReport) -> bool:
    """Do all rewrites of the first name that a rule asks for; False when none is left."""
    free = [entry.name for entry in report.graph if "batch to 1" in entry.rewrites]
    if free:
        draft = Draft(work.model)
        for name in free:
            work.ask_once("batch to 1", name)
        changes = [(name, fix_batch(draft, name)) for name in free]
        work.accept(draft.finished(), "batch to 1", changes)
        return True
    for name in REWRITERS:
        if any(name in entry.rewrites for entry in report.nodes) and _rewrite(work, report, name):
            return True
    return _cut_softmax(work)


def _rewrite(work: _Work, report: OperatorReport, name: str) -> bool:
    """Do the rewrites of one name; False when they all stay undone, at the host's edges."""
    draft = Draft(work.model)
    judged = [node for node in draft.nodes if node.op_type != "Constant"]
    changes = []
    for node, entry in zip(judged, report.nodes, strict=True):
        if name not in entry.rewrites:
            continue
        made = node.output[0]
        words = REWRITERS[name](draft, node)
        if words is not None:
            work.ask_once(name, made)
            changes.append((entry.name, words))
        elif entry.curable:
            raise RewriteError(f"the rewrite {name!r} of {entry.name} can't be done")
    if changes:
        work.accept(draft.finished(), name, changes)
    return bool(changes)


def _cut_softmax(work: _Work) -> bool:
    """Let outputs end in logits; the record says what the host has to do."""
    draft = Draft(work.model)
    outputs = draft.model.graph.output
    cut, changes = {}, []
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
        cut[number] = node
        changes.append(
            (
                value.name,
                f"the output is {logits} now; {node.op_type} along axis {axis} is the host's",
            )
        )
        value.name = logits
    if changes:
        work.accept(draft.finished(), "trailing softmax", changes, cut)
    return bool(changes)
