"""The workers' identity and speed, and the progress of the run."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from PIL.Image import Image
from torch import Tensor

from training.data.loader import Batch
from training.engine import Engine
from training.flops import Flops, pair_flops, peak_flops, predicted_image_flops, utilization
from training.methods import METHODS, NEEDS_REFERENCE
from training.run_progress import RunProgress, WorkerIdentity
from training.spec import TrainSpec
from training.tracking.metrics import History, MetricsWriter
from training.tracking.trackers import open_trackers

Show = Callable[[History], None]


def gather_workers(engine: Engine) -> list[WorkerIdentity]:
    """Gather the identity of every rank, in order; collective."""
    everyone: list[Any] = [None] * engine.world_size
    torch.distributed.all_gather_object(everyone, engine.identity())
    return everyone


class StartUp:
    """Durations of the parts of a start, in seconds."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure one part."""
        started = time.monotonic()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - started


class Speed:
    """Time, waiting, memory and FLOPs of a rank's steps.

    Args:
        spec: The run.
        engine: The rank's engine.
        unet_config: Configuration of the UNet, for counting its FLOPs.
    """

    def __init__(self, spec: TrainSpec, engine: Engine, unet_config: Mapping[str, Any]) -> None:
        self._config, self._engine, self._unet_config = spec.config, engine, unet_config
        on_gpu = engine.device.type == "cuda"
        name = torch.cuda.get_device_name(engine.device) if on_gpu else "cpu"
        self._peak = peak_flops(name, self._config.precision, self._config.peak_tflops)
        self._per_area: Flops | None = None  # of a pair, by elements of its latents' plane
        self._started = self._waited_s = 0.0
        self._flops = Flops(0.0, 0.0)

    def start(self, *, waited_s: float) -> None:
        """Begin a step.

        Args:
            waited_s: Total seconds waited for the loader so far.
        """
        self._started, self._waited_s = time.monotonic(), waited_s
        self._flops = Flops(0.0, 0.0)

    def count(self, batch: Batch, *, num_images: int = 2) -> None:
        """Count the FLOPs of a micro-batch: exactly for the first shape, by area for others (within 1 % for SDXL).

        Args:
            batch: The micro-batch.
            num_images: Images of each record that had a forward pass.
        """
        if self._peak is None:
            return
        pairs, _, height, width = batch.chosen_BCHW.shape
        if self._per_area is None:
            self._per_area = self._count(height, width, batch.prompt_embeds_BSD.shape[1]) * (1 / (height * width))
        self._flops += self._per_area * (height * width * pairs * num_images / 2)

    def _count(self, height: int, width: int, tokens: int) -> Flops:
        found = pair_flops(
            self._unet_config,
            height,
            width,
            tokens,
            self._config.method in NEEDS_REFERENCE,
            self._config.gradient_checkpointing,
            self._config.lora,
        )
        if METHODS[self._config.method].needs_mean_gain:  # each global batch is measured once more
            more = 2 * predicted_image_flops(self._unet_config, height, width, tokens)
            found += Flops(more, more)
        return found

    def stop(self, *, waited_s: float) -> Tensor:
        """End a step and return the values to sum over the ranks, float64; `metrics` reads the sum."""
        seconds = time.monotonic() - self._started
        times = [seconds, waited_s - self._waited_s]
        return torch.tensor([*times, self._memory(), self._flops.model, self._flops.hardware], dtype=torch.float64)

    def _memory(self) -> float:
        if self._engine.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._engine.device))
        return float(psutil.Process().memory_info().rss)

    def metrics(self, summed: Tensor) -> dict[str, float]:
        """Return the metrics of a step over all ranks, from the sum of the ranks' `stop`."""
        ranks = self._engine.world_size
        seconds, waited, memory, model, hardware = (summed / ranks).tolist()
        numbers = {
            "step_s": seconds,
            "pairs_per_s": self._config.global_batch_size / seconds,
            "data_wait_ratio": waited / seconds,
            "memory_bytes": memory,
        }
        if self._peak is not None:
            numbers |= utilization(Flops(model, hardware), seconds=seconds, num_devices=1, peak=self._peak)
        return numbers


class ProgressReporter:
    """The progress of the run: its workers, finished steps and newest metrics.

    Args:
        spec: The run.
        starts: How often workers were started, including this time.
        workers: From `gather_workers`.
        start_up: Duration of this start, by part.
        notes: Notes for the user, such as a damaged checkpoint that was skipped.
    """

    def __init__(
        self, spec: TrainSpec, *, starts: int, workers: list[WorkerIdentity], start_up: StartUp, notes: list[str]
    ) -> None:
        self._starts = starts
        self._spec, self._workers, self._start_up, self._notes = spec, workers, start_up, notes
        self._began = time.time()
        self._out: MetricsWriter | None = None

    def _state(self, history: History, tracker_warnings: Sequence[str] = ()) -> RunProgress:
        return RunProgress(
            key=self._spec.key,
            step=int(history.steps[-1]["step"]) if history.steps else 0,
            max_steps=self._spec.config.max_steps,
            starts=self._starts,
            started_at=self._began,
            start_up_s=self._start_up.parts,
            workers=self._workers,
            notes=[*self._notes, *tracker_warnings],
            last=history.last(),
        )

    def warn(self, texts: Sequence[str], *, step: int) -> None:
        """Add warnings, which do not stop the run."""
        self._notes.extend(f"step {step}: {text}" for text in texts)

    def picture(self, name: str, image: Image, *, step: int) -> None:
        """Show an image on the trackers; only where `writer` is enabled."""
        if self._out is not None:
            self._out.image(name, image, step)

    @contextlib.contextmanager
    def writer(self, *, enabled: bool, history: History) -> Iterator[Show]:
        """Yield a function to call after each step; on rank 0 it writes, elsewhere it does nothing."""
        if not enabled:
            yield lambda history: None
            return
        start, config = int(history.steps[-1]["step"]) if history.steps else 0, self._spec.config
        trackers = open_trackers(
            config.trackers,
            storage=self._spec.storage,
            folder=self._spec.folder,
            key=self._spec.key,
            start=start,
            parameters=config.model_dump(mode="json"),
        )
        with MetricsWriter(self._spec.storage, self._spec.folder, trackers) as out:
            self._out, seen_validations = out, len(history.validations)
            out.progress(self._state(history))

            def show(history: History) -> None:
                nonlocal seen_validations
                state = self._state(history, out.warnings)
                out.step(history.steps[-1], state)
                for metrics in history.validations[seen_validations:]:
                    out.validation(metrics)
                seen_validations = len(history.validations)
                if state.step == state.max_steps:
                    out.progress(state)
                if state.step % config.checkpoint_every == 0:
                    out.flush()

            yield show
        self._out = None
