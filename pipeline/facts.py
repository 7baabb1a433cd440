"""What each stage reports: the facts in the manifest, as types.

A field that is not always there has a default, and is left out of the JSON where it has that.
A score is what the task measures, a fraction (top-1 for classification, whose name the JSON keys
have); points are percentage points of it, an interval is the 95 % interval, and `n` counts the
patches behind a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

from preprocessing.student_input import StudentInput

if TYPE_CHECKING:
    from collections.abc import Callable


#: Where a figure comes from.
MeasuredOn = Literal["device", "host-emulation", "host-float", "estimate", "published"]


class Facts(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Something that a stage reports."""


# --- ingest ---


class SplitFacts(Facts, frozen=True):
    """One split of the data."""

    patches: int
    classes: tuple[int, ...]  # patches of each class; unlabeled ones count nowhere
    bad_patches_dropped: int  # with NaN or infinity


class LeakFacts(Facts, frozen=True):
    """Patches that two splits share."""

    one: str  # names of the splits
    other: str
    pairs: tuple[tuple[int, int], ...]  # the first of them: rows in their sources
    count: int  # of all


class BandFacts(Facts, frozen=True):
    """One band of the training split beside the contract; mu and sigma in contract units."""

    modality: str
    band: int  # zero-based
    minimum: float  # stored units
    maximum: float  # stored units
    mu_contract: float | None  # None: the contract z-scores nothing
    mu_data: float
    sigma_contract: float | None
    sigma_data: float


class EncodingFacts(Facts, frozen=True):
    """How well 8 bits carry one band of the student."""

    band: int  # zero-based
    grey_lo: float  # contract units of grey level 0
    grey_hi: float  # contract units of grey level 255
    levels98: float  # grey levels of the middle 98 % of values
    sqnr_db: float | None  # None: no error
    clipped: float  # share of values


class TeacherFacts(Facts, frozen=True):
    """One teacher; its figures are of the validation split."""

    name: str
    modality: str
    bands: tuple[int, ...]  # zero-based, in channel order
    weight: float  # in the mean of the ensemble
    opset: int | None  # None: a torch teacher
    batch: int | None  # patches of one call; None: any
    output: str  # logits, probabilities, or what was done about a softmax
    score: float = field(name="top1_val")
    ece_val: float  # expected calibration error
    logit_mean: float
    logit_std: float
    input_min: float  # of the tensor that the network sees
    input_max: float
    recorded_score: float | None = field(name="recorded_top1")  # by kdpipe.yaml, when trained
    conventions: dict[str, float]  # top-1 by convention, where they were tried
    temperature: float  # its logits are divided by this


class RuleFacts(Facts, frozen=True):
    """An ensemble under one rule of combination, on the validation split."""

    score: float = field(name="top1_val")
    ece_val: float  # expected calibration error


class EnsembleFacts(Facts, frozen=True):
    """The teachers, each and together."""

    members: tuple[TeacherFacts, ...]
    rule: str  # the one of `rules` that distill uses
    mode: str  # cached: all logits were written; live: distill asks
    score: float = field(name="top1_val")
    ece_val: float  # expected calibration error
    rules: dict[str, RuleFacts]
    agreement: tuple[tuple[float, ...], ...]  # of each member with each
    measured_on: MeasuredOn
    n_val: int
    logit_mean: float
    logit_std: float
    threads: str  # how onnxruntime shares the processor, in words


class ViewFacts(Facts, frozen=True):
    """The views of each patch; view 0 is the patch as it is."""

    count: int
    flip: bool
    rotate: bool
    shift: int  # pixels, at most
    zoom: float  # 1 +- up to this


class IngestFacts(Facts, frozen=True):
    """What ingest reports."""

    synthetic: tuple[str, ...]  # what the sources say of how they were made up; empty: real data
    splits: dict[str, SplitFacts]
    leaks: tuple[LeakFacts, ...]
    bands: tuple[BandFacts, ...]
    student_input: StudentInput
    encoding: tuple[EncodingFacts, ...]
    teachers: EnsembleFacts
    views: ViewFacts


# --- distill ---


class ExportFacts(Facts, frozen=True):
    """The torch student against its ONNX file, on the validation split."""

    max_abs_logit_difference: float
    agreement: float = field(name="top1_agreement")  # where their difference leaves no doubt


class RewriteFacts(Facts, frozen=True):
    """One exact rewrite of the exported graph."""

    name: str  # of the rule
    node: str
    words: str  # what became what
    max_abs_difference: float  # of any output
    share_of_range: float  # the same, of the output's range


class Int8Facts(Facts, frozen=True):
    """int8 logits beside the float ones."""

    score: float = field(name="top1")
    agreement: float  # same class as float
    sqnr_db: float | None  # of the logits; None: no noise
    n: int
    measured_on: MeasuredOn


class Int8LossFacts(Facts, frozen=True):
    """What int8 costs a student on the validation split."""

    score: float = field(name="top1")
    agreement: float
    sqnr_db: float | None
    n: int
    measured_on: MeasuredOn
    loss_points: float
    loss_interval95_points: tuple[float, float]


class StudentFacts(Facts, frozen=True, kw_only=True):
    """One trained and exported network."""

    epochs: int
    steps: int  # of the optimizer
    best_epoch: int  # from 1
    losses: dict[str, float]  # of the last epoch
    threads: int  # of torch
    resumed_after_epoch: int | None
    parameters: int
    size_bytes: int  # of the ONNX file
    score: float = field(name="top1_val")  # of the ONNX file
    measured_on: MeasuredOn
    n_val: int
    export: ExportFacts
    rewrites: tuple[RewriteFacts, ...] | None = None  # None: elsewhere, see `OperatorFacts`
    int8: Int8LossFacts | None = None


class QuantizationAwareFacts(Facts, frozen=True):
    """The last epochs on the int8 grid: the student before them, after them, and without them."""

    samples: int  # training patches that gave the ranges
    before: StudentFacts
    after: StudentFacts
    control: StudentFacts | None = None  # the same epochs in float


class OperatorFacts(Facts, frozen=True):
    """What the chip makes of the untrained student's graph."""

    macs: int  # of one patch
    share_on_chip: float  # of the MACs
    refused: tuple[str, ...]  # nodes, and why
    rewrites: tuple[RewriteFacts, ...]


class DistillFacts(StudentFacts, frozen=True, kw_only=True):
    """What distill reports: the student's own facts first."""

    quantization_aware: QuantizationAwareFacts | None = None
    student: str  # name of the network
    macs: int  # of one patch
    operators: OperatorFacts
    loss: str  # as it is added up
    baselines: dict[str, StudentFacts]


class ExportedFile(Facts, frozen=True):
    """A file of `kdpipe export`, beside the ONNX student on the validation split, on this host."""

    format: str
    file: str
    bytes: int
    made_by: str
    max_abs_logit_difference: float
    agreement: float = field(name="top1_agreement")  # of all patches
    score: float = field(name="top1_val")
    n_val: int
    measured_on: Literal["host"]


# --- calibrate ---


class CalibrationSetFacts(Facts, frozen=True):
    """The patches that calibrated."""

    split: str
    samples: int
    classes: tuple[int, ...]  # patches of each class
    left_out: dict[str, int]  # why -> patches
    sha256: str  # of the tensors' bytes


class SchemeFacts(Facts, frozen=True, kw_only=True):
    """One scheme that was tried: its figures on the validation split, or why it was refused."""

    scheme: str
    refused: str = ""
    score: float | UnsetType = field(default=UNSET, name="top1_val_int8")
    int8_loss_points: float | UnsetType = UNSET
    agreement: float | UnsetType = field(default=UNSET, name="top1_agreement")
    logits_sqnr_db: float | UnsetType | None = UNSET  # None: no noise
    chosen: bool


class ComparisonFacts(Facts, frozen=True):
    """The float student against its int8 model on the host, on the validation split."""

    n_val: int
    score_float: float = field(name="top1_val_float")
    score_int8: float = field(name="top1_val_int8")
    measured_on: MeasuredOn
    agreement: float = field(name="top1_agreement")
    logits_cosine_mean: float
    logits_cosine_min: float
    logits_sqnr_db: float | None  # None: no noise
    int8_loss_points: float
    int8_loss_interval95_points: tuple[float, float]


class VariantFacts(Facts, frozen=True):
    """Another way to quantize, emulated on validation patches."""

    name: str
    scheme: str
    score: float = field(name="top1")
    agreement: float
    sqnr_db: float | None
    n: int
    measured_on: MeasuredOn


class LayerFacts(Facts, frozen=True):
    """A layer that alone is int8, emulated on a few validation patches."""

    layer: str  # name of its tensor
    operator: str
    score: float = field(name="top1")
    agreement: float
    sqnr_db: float | None  # of the logits; None: no noise
    n: int
    measured_on: MeasuredOn
    depthwise: bool


class CalibrateFacts(Facts, frozen=True, kw_only=True):
    """What calibrate reports; those of `ComparisonFacts` are in the middle."""

    calibration: CalibrationSetFacts
    backend: str
    backend_version: str
    scheme: str
    schemes: tuple[SchemeFacts, ...]
    arithmetic: str  # what the host computed with
    n_val: int
    score_float: float = field(name="top1_val_float")
    score_int8: float = field(name="top1_val_int8")
    measured_on: MeasuredOn
    agreement: float = field(name="top1_agreement")
    logits_cosine_mean: float
    logits_cosine_min: float
    logits_sqnr_db: float | None
    int8_loss_points: float
    int8_loss_interval95_points: tuple[float, float]
    emulator: ComparisonFacts | None = None  # beside the SDK's own figures
    baked: Int8Facts  # the float student with weights on the int8 grid
    host_operators: tuple[str, ...]  # that run in float on the host
    variants: tuple[VariantFacts, ...]  # the first as configured
    worst_layers: tuple[LayerFacts, ...] | None = None  # the worst first
    suggestions: tuple[str, ...]


# --- compile ---


class ChannelFacts(Facts, frozen=True):
    """What three decimals of mean / 255 and std / 255 do to one channel."""

    band: int  # zero-based
    mean: float  # grey levels
    std: float  # grey levels
    mean_kept: float  # grey levels
    std_kept: float  # grey levels
    scale_error: float | None  # std / std_kept - 1; None: std vanishes
    worst: float | None  # of the tensor, in standard deviations; likewise


class ConstantsFacts(Facts, frozen=True):
    """What the device pipe's constants do to the student's tensor, and to its answers."""

    channels: tuple[ChannelFacts, ...]
    worst: float | None  # standard deviations; None: a std vanishes, and the rest is not there
    # Of the float student on the validation split, with exact constants and with those kept.
    score_exact: float | None = field(default=None, name="top1_exact")
    score_kept: float | None = field(default=None, name="top1_kept")
    agreement: float | None = field(default=None, name="top1_agreement")
    n_val: int | None = None
    measured_on: MeasuredOn | None = None


class EstimateFigure(Facts, frozen=True):
    """An estimated number with its band; None where the model has nothing to say."""

    value: float | None
    unit: str
    measured_on: Literal["estimate"]
    scope: str
    low: float | None
    high: float | None


class LayerTimeFacts(Facts, frozen=True):
    """A layer that takes much of a frame's estimated time."""

    name: str
    op_type: str
    value: float  # `unit`
    unit: str
    measured_on: Literal["estimate"]
    term: str  # what its time goes into
    advice: str


class BoardFacts(Facts, frozen=True):
    """Estimates for one kind of card."""

    throughput: EstimateFigure  # frames/s
    latency: EstimateFigure  # ms
    shares: dict[str, float]  # of a frame's time, by term
    slowest: tuple[LayerTimeFacts, ...]


class EstimateSettings(Facts, frozen=True):
    """For which way of compiling an estimate holds."""

    aipu_cores: int
    replication: bool


class EstimateFacts(Facts, frozen=True):
    """What the cost model says of cards. Never a measurement."""

    measured_on: Literal["estimate"]
    fitted_on: str
    settings: EstimateSettings
    obstacle: str | None  # why there is no figure
    misses: tuple[str, ...]  # what the figures leave out
    boards: dict[str, BoardFacts]
    by_aipu_cores: dict[str, dict[str, EstimateFigure]]  # other numbers of cores -> board -> rate


class CompileFacts(Facts, frozen=True):
    """What compile reports."""

    backend: str
    backend_version: str
    runtime: str
    aipu_cores: int
    sdk: dict[str, Any] | None  # what the SDK said; it has no schema
    pipeline_yaml: str | None  # file name
    pipeline_yaml_obstacle: str  # why there is none
    device_constants: ConstantsFacts | None  # None: no pipeline YAML
    estimate: EstimateFacts


# --- benchmark ---


class ImageValues(Facts, frozen=True):
    """How far tensors from images are off; nothing where the leg does not apply."""

    max_abs_difference: float | UnsetType | None = UNSET  # standard deviations; None: no tensor
    fields: tuple[str, ...] | UnsetType = UNSET  # what is wrong, in words
    grey_level: float | UnsetType = UNSET  # of the PNG leg: one level in standard deviations


class Int8Values(Facts, frozen=True):
    """What the leg int8 is judged by, and what it shows; as in `ComparisonFacts`."""

    score_float: float = field(name="top1_float")
    score_int8: float = field(name="top1_int8")
    loss_points: float
    loss_interval95_points: tuple[float, float]
    agreement: float = field(name="top1_agreement")
    cosine_mean: float
    cosine_min: float
    sqnr_db: float | None


class ComparedPair(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name"):
    """What all legs say."""

    source: str  # what is compared
    target: str  # with what
    n: int

    @property
    def name(self) -> str:
        """The kind of leg: png, yaml, export or int8."""
        return str(self.__struct_config__.tag)


class PngLeg(ComparedPair, frozen=True, tag="png"):
    """The training tensor against that from exported images, by preprocessing/ alone."""

    values: ImageValues
    obstacle: str = ""  # why the leg does not apply


class YamlLeg(ComparedPair, frozen=True, tag="yaml"):
    """The training tensor against that from exported images, by doing what the YAML says."""

    values: ImageValues
    obstacle: str = ""


class ExportLeg(ComparedPair, frozen=True, tag="export"):
    """The torch student against the ONNX student."""

    values: ExportFacts
    obstacle: str = ""


class Int8Leg(ComparedPair, frozen=True, tag="int8"):
    """The float student against the int8 model."""

    values: Int8Values
    obstacle: str = ""


#: One comparison of parity on the validation split; see `pipeline.parity.legs`.
Leg = PngLeg | YamlLeg | ExportLeg | Int8Leg


class LatencyFacts(Facts, frozen=True):
    """From tensor to logits, in ms; None where the queries are too few for the percentile."""

    p50: float | None
    p90: float | None
    p99: float | None


class Verdict(Facts, frozen=True):
    """Whether the timings may be used."""

    word: Literal["VALID", "INVALID", "SMOKE"]
    reasons: tuple[str, ...]


class BenchmarkFacts(Facts, frozen=True):
    """What benchmark reports."""

    measured_on: MeasuredOn
    runtime: str  # with its version
    score: float = field(name="top1_test")
    n_test: int
    latency_ms: LatencyFacts
    throughput_fps: float  # frames/s
    verdict: Verdict
    parity: tuple[Leg, ...]


class RunFacts:
    """The facts of a run by stage, read from its manifest when they are asked for."""

    ingest: IngestFacts
    distill: DistillFacts
    calibrate: CalibrateFacts
    compile: CompileFacts
    benchmark: BenchmarkFacts

    def __init__(self, reader: Callable[[str], object]) -> None:
        """`reader` gives the facts of a stage, or raises why there are none."""
        self._reader = reader

    if not TYPE_CHECKING:  # a type checker shall refuse stages that are not above

        def __getattr__(self, stage: str) -> object:
            if stage.startswith("_"):  # what copy and pickle ask for
                raise AttributeError(stage)
            facts = vars(self)[stage] = self._reader(stage)
            return facts
