"""Typed records that a report is made of: one for each section of the page.

A section that is None belongs to a stage that has not run. `data.py` makes these records from the storage; `page.py`
renders them, `summary.py` condenses them. Cost, timeline and course have their records in their own modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from orchestration.report.cost import Cost
from orchestration.report.timeline import Timeline
from pipelines.suites.evaluation import EvaluationRecord

Row = Mapping[str, float]
"""Numbers of one step or one validation, by name; `step` is among them."""


@dataclass(frozen=True)
class Interval:
    """Mean with the ends of its 95 % interval."""

    low: float
    mean: float
    high: float

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Interval":
        """Return the interval that a summary or an evaluation recorded."""
        return Interval(*(float(data[end]) for end in ("low", "mean", "high")))


@dataclass(frozen=True)
class StageRow:
    """Stage as the table of stages shows it.

    Args:
        name: The stage's name.
        status: A `StageState`.
        seconds: Duration; None if unknown.
        summary: One line about the outcome, or an error message.
        began: ISO time of a start that has not succeeded; else None.
    """

    name: str
    status: str
    seconds: float | None = None
    summary: str = ""
    began: str | None = None


@dataclass(frozen=True)
class DeviceUse:
    """Devices of one kind that a stage ran on; `node` is None where it is not recorded."""

    what: str
    count: int
    device: str
    node: str | None


@dataclass(frozen=True)
class SourceRow:
    """Configured source; secrets in its path are masked."""

    format: str
    path: str


@dataclass(frozen=True)
class RoundRow:
    """Finished round; `parent` is the round whose model it started from, None for the base model."""

    round: int
    parent: int | None
    pairs_version: int
    num_pairs: int | None
    steps: int
    finished_at: str
    checkpoint: str


@dataclass(frozen=True)
class DatasetSection:
    """Snapshot that was trained on; before training, the newest version of the table.

    Args:
        storage: URL of the storage.
        version: Version of the pair table.
        rows: Number of rows for each status.
        reasons: Number of rows for each reason.
        splits: Number of kept rows for each split.
        prompts: Number of distinct prompts of kept rows.
        shards: Number of pair shards.
        bytes: Their size.
        summary: The accounting in one line.
        num_singles: Number of kept single images; the other kept rows are pairs.
        kinds: The kept rows by kind in words; "" if all are pairs.
    """

    storage: str
    version: int
    rows: Mapping[str, int]
    reasons: Mapping[str, int]
    splits: Mapping[str, int]
    prompts: int
    shards: int
    bytes: int
    summary: str
    num_singles: int = 0
    kinds: str = ""

    @property
    def num_rows(self) -> int:
        """Number of rows that were read."""
        return sum(self.rows.values())

    @property
    def num_pairs(self) -> int:
        """Number of kept pairs."""
        return self.rows["kept"] - self.num_singles


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the latents and text embeddings that were trained on."""

    latents: str
    text: str


@dataclass(frozen=True)
class WorkPart:
    """Part of encoding: its seconds over all actors and its share (0..1) of the work."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class EncodingSpeed:
    """Speed at which this run encoded latents or text.

    Args:
        name: `latents` or `text`.
        item: What `num_items` counts: `pair` or `prompt`.
        seconds: Wall-clock time.
        num_items: Items encoded.
        num_images: Images encoded; 0 for text.
        images_per_s: Images per second.
        items_per_s: Items per second.
        busy_ratio: Share of the time that the devices were busy.
        num_actors: Number of actors.
        device: `cpu`, or the name of the GPU.
        batch_size: Images or prompts in a forward pass.
        halved_to: Batch size after running out of memory; None if that did not happen.
        parts: The work by part.
    """

    name: str
    item: str
    seconds: float
    num_items: int
    num_images: int
    images_per_s: float
    items_per_s: float
    busy_ratio: float
    num_actors: int
    device: str
    batch_size: int
    halved_to: int | None
    parts: Sequence[WorkPart]


@dataclass(frozen=True)
class BytesPerPair:
    """Stored bytes per pair; `text_per_pair_storage` is what a text stored with every pair would take."""

    latents: float | None
    text: float | None
    text_per_pair_storage: float | None


@dataclass(frozen=True)
class ContactImage:
    """Image of the contact sheet, with the names of its source and decoded files, relative to the run's folder.

    Args:
        pair_key: Its pair.
        prompt: The pair's prompt.
        side: 0 or 1.
        bucket: Height and width.
        psnr: dB between the two files; None if they are identical.
        source: File with the pixels that were encoded.
        decoded: File with the decoded latents.
    """

    pair_key: str
    prompt: str
    side: int
    bucket: Sequence[int]
    psnr: float | None
    source: str
    decoded: str

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ContactImage":
        """Return the image that the record of encode describes."""
        return ContactImage(**{field.name: data[field.name] for field in fields(ContactImage)})


@dataclass(frozen=True)
class EncodingSection:
    """Encodings under the fingerprints that were trained on; `speeds` and `contact` only if this run did it."""

    pairs: int
    images: int
    image_slots: int
    image_ratio: float | None
    prompts: int
    truncated_prompts: int
    max_tokens: int
    text_ratio: float | None
    bytes_per_pair: BytesPerPair
    quarantined: Mapping[str, int]
    speeds: Sequence[EncodingSpeed] = ()
    contact: Sequence[ContactImage] = ()
    singles: int = 0

    @property
    def saved_ratio(self) -> float | None:
        """Share of the storage that one text per prompt saves; None if unknown or nothing is saved."""
        stored, otherwise = self.bytes_per_pair.text, self.bytes_per_pair.text_per_pair_storage
        return 1 - stored / otherwise if stored is not None and otherwise and stored < otherwise else None

    @property
    def cut_ratio(self) -> float:
        """Share of the prompts that are longer than the text encoders read."""
        return self.truncated_prompts / self.prompts if self.prompts else 0.0


@dataclass(frozen=True)
class WorkerRow:
    """Training worker; `num_pairs` and `digest` of the pairs it consumed are known once training has finished."""

    rank: int
    world_size: int
    node: str
    pid: int
    device: str
    backend: str
    zero_stage: int
    num_pairs: int | None = None
    digest: str | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "WorkerRow":
        """Return the worker that a record or `progress.json` describes."""
        return WorkerRow(**{field.name: data[field.name] for field in fields(WorkerRow) if field.name in data})


@dataclass(frozen=True)
class SampleGrid:
    """Grid of samples drawn during training; `image` is its file, relative to the run's folder."""

    step: int
    image: str


@dataclass(frozen=True)
class TrainingSection:
    """Finished training, or a live one as far as it has come.

    Args:
        method: `train.method`.
        loss: Parameters of the loss.
        precision: `train.precision`.
        global_batch_size: Pairs per optimizer step.
        num_starts: How often the workers were started.
        workers: The workers of the newest start.
        steps: Optimizer steps done.
        max_steps: Optimizer steps to do.
        is_over: Whether it has finished.
        notes: Notes of the workers of a live training.
        history: Metrics of the steps.
        validation: Metrics on held-out pairs, of the weights that are exported.
        held_out: What the page calls `validation`.
        samples: Sample grids.
    """

    method: str
    loss: Mapping[str, float]
    precision: str
    global_batch_size: int
    num_starts: int
    workers: Sequence[WorkerRow]
    steps: int
    max_steps: int
    is_over: bool
    notes: Sequence[str]
    history: Sequence[Row]
    validation: Sequence[Row]
    held_out: str = "held out"
    samples: Sequence[SampleGrid] = ()

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self.workers[0].world_size

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the workers."""
        return self.workers[0].zero_stage


@dataclass(frozen=True)
class EvaluationSection:
    """Newest evaluation; one of an earlier version (`is_former`) has neither paired differences nor win rates."""

    record: EvaluationRecord
    is_former: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything that the page of a run shows.

    Args:
        name: The run's name.
        created_at: ISO time at which the storage was read, UTC.
        command: The command to continue the run.
        config: The resolved configuration as plain data.
        versions: Versions of Python and the main packages.
        state: A `RunState`.
        stage: The stage that runs, or at which the run ended; else None.
        message: The error or stop message.
        stages: The stages, in order.
        timeline: When the stages ran; None before the first.
        started_at: ISO time of the run's first event; None before it.
        cost: Device hours.
        places: Devices that encoding and training ran on.
        sources: The configured sources.
        rounds: The finished rounds.
        dataset: See `DatasetSection`.
        fingerprints: See `Fingerprints`.
        encoding: See `EncodingSection`.
        training: See `TrainingSection`.
        evaluation: See `EvaluationSection`.
        model: URL of the exported model.
    """

    name: str
    created_at: str
    command: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    state: str
    stage: str | None
    message: str
    stages: Sequence[StageRow]
    timeline: Timeline | None
    started_at: str | None
    cost: Cost
    places: Sequence[DeviceUse] = ()
    sources: Sequence[SourceRow] = ()
    rounds: Sequence[RoundRow] = ()
    dataset: DatasetSection | None = None
    fingerprints: Fingerprints | None = None
    encoding: EncodingSection | None = None
    training: TrainingSection | None = None
    evaluation: EvaluationSection | None = None
    model: str | None = None
