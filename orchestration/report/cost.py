"""What a run has used, in hours of devices: every execution of encode, train and evaluate that the journal knows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestration.config import RunConfig
from orchestration.report.course import Course
from orchestration.run.journal import StageRecord

NUM_SAMPLERS = 2  # of evaluate: one actor a model
S_PER_H = 3600.0


@dataclass(frozen=True)
class StageCost:
    """Device hours of one stage.

    Args:
        stage: Its name.
        devices: How many it holds at a time.
        is_gpu: Whether they are GPUs; otherwise CPUs.
        seconds: Of all its executions, also those that failed.
        num_attempts: How many those are.
        num_lost: Executions that ended without a word: their time is not known, and not counted.
    """

    stage: str
    devices: int
    is_gpu: bool
    seconds: float
    num_attempts: int
    num_lost: int

    @property
    def hours(self) -> float:
        """Seconds times devices, in hours."""
        return self.seconds * self.devices / S_PER_H


def cost_of(
    course: Course,
    config: RunConfig,
    records: Mapping[str, StageRecord | None],
    workers: list[dict[str, Any]],
) -> dict[str, Any]:
    """The cost of a run as plain data: hours by kind of device, by stage, and the price if one is configured.

    A stage holds its devices from its begin to its end, so start-up, waiting and what a restart repeated are in it.

    Args:
        course: Of the run.
        config: Its configuration.
        records: The last success of each stage.
        workers: Of the newest training, as they tell of themselves.
    """
    found = [_encode_ahead(records["ingest"])]
    found += [
        _stage(course, stage, *_devices(stage, config, records, workers)) for stage in ("encode", "train", "evaluate")
    ]
    counted = [each for each in found if each.num_attempts]
    gpu_hours = sum(each.hours for each in counted if each.is_gpu)
    cpu_hours = sum(each.hours for each in counted if not each.is_gpu)
    price, currency = config.report.gpu_hour_price if gpu_hours else None, config.report.currency
    return {
        "gpu_hours": gpu_hours,
        "cpu_hours": cpu_hours,
        "num_lost": sum(each.num_lost for each in counted),
        "price": None if price is None else {"amount": price * gpu_hours, "hour": price, "currency": currency},
        "stages": [
            {"stage": each.stage, "devices": each.devices, "kind": "GPU" if each.is_gpu else "CPU", "hours": each.hours,
             "seconds": each.seconds, "attempts": each.num_attempts}
            for each in counted
        ],
    }  # fmt: skip


def _stage(course: Course, stage: str, devices: int, is_gpu: bool) -> StageCost:
    attempts = [each for each in course.attempts if each.stage == stage]
    seconds = sum(each.seconds(course.now) for each in attempts)
    num_lost = sum(each.state == "lost" for each in attempts)
    return StageCost(stage, devices, is_gpu, seconds, len(attempts), num_lost)


def _encode_ahead(record: StageRecord | None) -> StageCost:
    """What encoded while ingest went on, in the last ingest."""
    passes = record.details.get("encoded_ahead", []) if record else []
    seconds = sum(each["seconds"] for each in passes)
    devices = max((int(each["num_actors"]) for each in passes), default=1)
    is_gpu = any(each["device"] != "cpu" for each in passes)
    return StageCost("encode beside ingest", devices, is_gpu, seconds, len(passes), 0)


def _devices(
    stage: str, config: RunConfig, records: Mapping[str, StageRecord | None], workers: list[dict[str, Any]]
) -> tuple[int, bool]:
    """How many devices a stage holds, and whether they are GPUs; as measured, else as configured."""
    record = records["encode"]
    speeds = [each for each in (record.details.get("speed") or {}).values() if each] if record else []
    encodes_on_gpu = any(each["device"] != "cpu" for each in speeds)
    trains_on_gpu = any(worker["device"] != "cpu" for worker in workers)
    if stage == "train":
        configured = config.train.worker_range[1] if config.train else 1
        return len(workers) or configured, trains_on_gpu or (not workers and encodes_on_gpu)
    if stage == "evaluate":
        return NUM_SAMPLERS, trains_on_gpu or encodes_on_gpu
    configured = config.encode.worker_range[1] if config.encode else 1
    return max((int(each["num_actors"]) for each in speeds), default=configured), encodes_on_gpu or trains_on_gpu
