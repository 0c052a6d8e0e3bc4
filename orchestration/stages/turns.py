"""Runs the models that draw samples: in parallel if all fit on the cluster, else one after the other."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.config import RunConfig
from orchestration.stages.drawn_samples import DrawnSamples
from pipelines.dataset.errors import unwrap
from pipelines.dataset.model_files import ModelSource, read_family, weight_files
from pipelines.dataset.safetensors_header import tensor_shapes
from pipelines.progress import ProgressBar
from pipelines.resources import Demand, nodes, uses_gpu
from pipelines.units.waiting import LOOK_S, Wait, wait_for

WEIGHT_BYTES = 4  # on CPUs pipelines compute in float32
PROCESS_BYTES = 1 << 30  # Python with torch and diffusers
PIXEL_BYTES = 3 << 10  # of a sample while the VAE decodes it: 3 GB at 1024 x 1024, about three times its widest layer

WAY_OUT = "add such a node, or set `encode.device: cpu`; `encode.start_timeout_s` allows a longer wait"


@dataclass(frozen=True)
class Room:
    """The demand of a sampler, and how many may draw at the same time."""

    demand: Demand
    at_once: int


def find_room(config: RunConfig, num_models: int) -> Room:
    """Return room for as many samplers as there are GPUs, or as fit on the nodes' cores and memory; at least one."""
    assert config.encode is not None
    if uses_gpu(config.encode.device):
        demand = Demand("GPU", {"CPU": 1})
        return Room(demand, max(1, min(num_models, demand.places(nodes()))))
    batch = min(config.evaluate.batch_size, config.evaluate.num_samples)
    working = PIXEL_BYTES * config.encode.resolution**2 * batch
    demand = Demand("CPU", {"memory": pipeline_bytes(config.encode.source) + working})
    at_once = min(num_models, demand.places(nodes()))
    if at_once > 1:
        return Room(demand, at_once)
    return Room(Demand("CPU"), 1)  # alone on its node, which Ray must not refuse it by an estimate


def pipeline_bytes(source: ModelSource) -> int:
    """Return the memory of a process that has loaded the pipeline in float32, in bytes."""
    folder = source.folder()
    parts = [(folder / "unet", "diffusion_pytorch_model", source.variant)]
    parts.append((source.vae_folder(), "diffusion_pytorch_model", source.vae_variant))
    parts += [(folder / name, "model", source.variant) for name in read_family(folder).text_encoders]
    num_weights = 0
    for part in parts:
        for shape in tensor_shapes(weight_files(*part)).values():
            size = 1
            for length in shape:
                size *= length
            num_weights += size
    return PROCESS_BYTES + WEIGHT_BYTES * num_weights


class _Sampler:
    """An actor that draws the missing samples of one model, batch after batch; ended with `close`."""

    def __init__(self, actor: Any, drawn: DrawnSamples, prompts: list[str], seeds: list[int], size: int) -> None:
        self._actor, self._drawn, self._prompts, self._seeds, self._size = actor, drawn, prompts, seeds, size
        self._dtype: str | None = None
        self._todo: list[int] = []
        self._batch: list[int] = []
        self.pending = actor.dtype.remote()

    def advance(self, progress: ProgressBar) -> bool:
        """Collect finished samples and request the next batch; return False if there is none."""
        import ray

        result = ray.get(self.pending)
        if self._dtype is None:
            self._begin(result, progress)
            return self._ask()
        if result is None:
            self._size = max(1, len(self._batch) // 2)
            self._todo = self._batch + self._todo
            progress.say(
                f"evaluate: out of memory in a batch of {len(self._batch)}; continuing with batches of {self._size}"
            )
            return self._ask()
        done, has_more = self._batch, self._ask()  # the device works while the samples are written
        self._drawn.add(done, result, self._dtype)
        progress.advance(len(done))
        return has_more

    def _begin(self, dtype: str, progress: ProgressBar) -> None:
        num_known = len(self._drawn.missing)
        self._drawn.remove_others(dtype)
        self._dtype, self._todo = dtype, self._drawn.missing
        progress.expect(len(self._todo) - num_known)

    def _ask(self) -> bool:
        self._batch, self._todo = self._todo[: self._size], self._todo[self._size :]
        if not self._batch:
            return False
        self.pending = self._actor.sample.remote(
            [self._prompts[i] for i in self._batch], [self._seeds[i] for i in self._batch]
        )
        return True

    def is_placed(self) -> bool:
        """Return whether it has a node; also False while Ray restarts it on another one."""
        from ray._private.state import actors

        return bool(actors(self._actor._actor_id.hex()).get("State") == "ALIVE")

    def close(self) -> None:
        """End the actor, so that its device and its memory are free."""
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.kill(self._actor)


def draw_missing(
    config: RunConfig, drawn: Mapping[str, DrawnSamples], new_actor: Callable[[str, Room], Any],
    prompts: list[str], seeds: list[int],
) -> None:  # fmt: skip
    """Draw the missing samples of each model and store them, batch by batch.

    Args:
        config: The run's configuration.
        drawn: The samples of each model.
        new_actor: Creates the actor of a model.
        prompts: One prompt per sample.
        seeds: One seed per sample.

    Raises:
        ClusterError: No node has the resources of a sampler, and none joined in time.
        EncodingError: There is not enough memory for the model, or for a single sample of it.
    """
    import ray

    waiting = [name for name, samples in drawn.items() if samples.missing]
    if not waiting:
        return
    assert config.encode is not None
    # As if none were drawn yet: the threads of torch, and so its sums, follow from it.
    room, batch_size = find_room(config, len(drawn)), config.evaluate.batch_size
    running: list[_Sampler] = []
    num_missing = sum(len(samples.missing) for samples in drawn.values())
    with ProgressBar("evaluate", num_missing, "samples") as progress:
        timeout_s = config.encode.start_timeout_s
        wait = wait_for("evaluate", room.demand, timeout_s=timeout_s, way_out=WAY_OUT, say=progress.say)
        try:
            while waiting or running:
                if (name := _next_model(waiting, room, running)) is not None:
                    running.append(_Sampler(new_actor(name, room), drawn[name], prompts, seeds, batch_size))
                _advance(running, wait, progress)
        except ray.exceptions.RayError as error:
            raise unwrap(error) or error from error
        finally:
            for sampler in running:
                sampler.close()


def _advance(running: list[_Sampler], wait: Wait, progress: ProgressBar) -> None:
    """Store the batches drawn within LOOK_S, request the next ones, and end the samplers that have none left."""
    import ray

    done, _ = ray.wait([each.pending for each in running], timeout=LOOK_S)
    if done or all(each.is_placed() for each in running):
        wait.restart()
    else:
        wait.look()
    for sampler in list(running):
        if sampler.pending in done and not sampler.advance(progress):
            running.remove(sampler)
            sampler.close()


def _next_model(waiting: list[str], room: Room, running: Sequence[_Sampler]) -> str | None:
    """Take the next waiting model, if there is room for it."""
    return waiting.pop(0) if waiting and _has_room(room, running) else None


def _has_room(room: Room, running: Sequence[_Sampler]) -> bool:
    """Return whether another model may start: always if none is drawing, else if there is room for it."""
    if not running:
        return True
    are_placed = all(each.is_placed() for each in running)
    return len(running) < room.at_once and are_placed and room.demand.is_free()
