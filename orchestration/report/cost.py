"""Device hours of a run: every execution of encode, train and evaluate that the journal knows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.config import RunConfig
from orchestration.report.course import Course
from orchestration.run.journal import StageRecord
from orchestration.stages.stage import StageState

S_PER_H = 3600.0


@dataclass(frozen=True)
class Devices:
    """Devices that a stage holds at a time; CPUs if they are not GPUs."""

    count: int
    is_gpu: bool


@dataclass(frozen=True)
class StageCost:
    """Device hours of one stage.

    Args:
        stage: The stage's name.
        devices: The devices it holds.
        seconds: Time of all executions, failed ones included.
        num_executions: Number of executions.
        num_lost: Executions whose driver vanished; their time is unknown and not counted.
    """

    stage: str
    devices: Devices
    seconds: float
    num_executions: int
    num_lost: int = 0

    @property
    def hours(self) -> float:
        """Device hours."""
        return self.seconds * self.devices.count / S_PER_H

    @property
    def kind(self) -> str:
        """Kind of the devices: GPU or CPU."""
        return "GPU" if self.devices.is_gpu else "CPU"


@dataclass(frozen=True)
class Price:
    """Price of the GPU hours: in all, and for one of them."""

    amount: float
    hour: float
    currency: str


@dataclass(frozen=True)
class Cost:
    """Device hours by kind and by stage.

    Args:
        gpu_hours: GPU hours.
        cpu_hours: Hours of stages that ran on CPUs.
        price: None without a configured price or without GPU hours.
        num_lost: Executions whose time is unknown.
        stages: Cost of each stage that ran.
    """

    gpu_hours: float
    cpu_hours: float
    price: Price | None
    num_lost: int = 0
    stages: Sequence[StageCost] = ()


@dataclass(frozen=True)
class Used:
    """Devices that the records of a run mention.

    Args:
        encoders: Device of each kind of encoding, and how many actors it had.
        workers: Node and device of each worker of the newest training.
    """

    encoders: Sequence[tuple[str, int]]
    workers: Sequence[tuple[str, str]]

    @staticmethod
    def of_records(encoded: StageRecord | None, workers: Iterable[tuple[str, str]]) -> "Used":
        """Return the devices from the record of encode, and those of the workers."""
        speeds = (encoded.details.get("speed") or {}).values() if encoded else ()
        return Used([(each["device"], int(each["num_actors"])) for each in speeds if each], tuple(workers))


def cost_of(course: Course, config: RunConfig, ingested: StageRecord | None, used: Used) -> Cost:
    """Add up the device hours of a run.

    A stage holds its devices from start to end, so start-up, waiting and repeated work are included.

    Args:
        course: The run's course.
        config: The run's configuration.
        ingested: The last success of ingest, during which encoding may have run.
        used: Devices that encode and train recorded.
    """
    stages = [_encode_ahead(ingested)]
    stages += [_stage_cost(course, stage, devices) for stage, devices in _devices(config, used).items()]
    counted = [each for each in stages if each.num_executions]
    gpu_hours = sum(each.hours for each in counted if each.devices.is_gpu)
    hour = config.report.gpu_hour_price if gpu_hours else None
    return Cost(
        gpu_hours=gpu_hours,
        cpu_hours=sum(each.hours for each in counted if not each.devices.is_gpu),
        price=None if hour is None else Price(hour * gpu_hours, hour, config.report.currency),
        num_lost=sum(each.num_lost for each in counted),
        stages=counted,
    )


def _stage_cost(course: Course, stage: str, devices: Devices) -> StageCost:
    executions = [each for each in course.executions if each.stage == stage]
    seconds = sum(each.seconds(course.now) for each in executions)
    num_lost = sum(each.state == StageState.LOST for each in executions)
    return StageCost(stage, devices, seconds, len(executions), num_lost)


def _encode_ahead(ingested: StageRecord | None) -> StageCost:
    """Return the cost of encoding during the last ingest."""
    passes: Sequence[Mapping[str, Any]] = ingested.details.get("encoded_ahead", ()) if ingested else ()
    seconds = sum(each["seconds"] for each in passes)
    num_actors = max((int(each["num_actors"]) for each in passes), default=1)
    devices = Devices(num_actors, _has_gpu(each["device"] for each in passes))
    return StageCost("encode during ingest", devices, seconds, len(passes))


def _devices(config: RunConfig, used: Used) -> dict[str, Devices]:
    """Return the devices of each stage: as recorded, else as configured."""
    num_actors = config.encode.worker_range[1] if config.encode else 1
    num_workers = config.train.worker_range[1] if config.train else 1
    encodes_on_gpu = _has_gpu(device for device, _ in used.encoders)
    trains_on_gpu = _has_gpu(device for _, device in used.workers)
    any_gpu = encodes_on_gpu or trains_on_gpu
    return {
        "encode": Devices(max((count for _, count in used.encoders), default=num_actors), any_gpu),
        "train": Devices(len(used.workers) or num_workers, trains_on_gpu if used.workers else encodes_on_gpu),
        "evaluate": Devices(config.evaluate.worker_range[1], any_gpu),
    }


def _has_gpu(devices: Iterable[str]) -> bool:
    return any(device != "cpu" for device in devices)
