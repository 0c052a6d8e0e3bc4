"""The drawing of two models that is killed, for the crash matrix of samples."""

import json
from pathlib import Path
from typing import Any

from crash import COMMITS, CPUS_A_NODE, NUM_NODES, Job
from drawings import drawing_of, sampling_of

from pipelines.dataset.layout import SAMPLES
from pipelines.samples.drawing import Drawing

SAMPLES_A_UNIT = 4
NUM_UNITS = 8
"""Of each model."""
BATCH_SIZE = 2
NUM_WORKERS = 2
TEXTS = [f"a cat on hill {number}" for number in range(NUM_UNITS * SAMPLES_A_UNIT)]

DRAW = (
    COMMITS
    + f"nodes, batch_size, num_workers = {[CPUS_A_NODE] * NUM_NODES}, {BATCH_SIZE}, {NUM_WORKERS}\n"
    + f"samples_a_unit = {SAMPLES_A_UNIT}"
    + """
import json
from ray.cluster_utils import Cluster
import pipelines.samples.plan
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import prompt_id
from pipelines.samples.drawing import Drawing, DrawnModel, Sampling
from pipelines.samples.execution import draw
from pipelines.samples.fingerprint import samples_fingerprint
from pipelines.samples.plan import wanted_samples
from pipelines.samples.prompts import Prompt
from pipelines.units.workers import Workers

pipelines.samples.plan.SAMPLES_A_UNIT = samples_a_unit
config, storage = json.loads(sys.argv[1]), Storage(sys.argv[2])
quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3,
         "health_check_initial_delay_ms": 0}
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": quick})
for num_cpus in nodes:  # one may be lost
    cluster.add_node(num_cpus=num_cpus, object_store_memory=100 << 20)
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
print("ready", flush=True)
prompts = [Prompt(prompt_id(text), text) for text in config["texts"]]
drawings = []
for unet in (None, config["unet"]):
    model, sampling = DrawnModel("m", ModelSource(config["model"]), unet=unet), Sampling(**config["sampling"])
    name = samples_fingerprint(model, sampling)
    drawings.append(Drawing(model, sampling, name, wanted_samples(prompts, name, seed=0, images_per_prompt=1)))
draw(storage, drawings, Workers("evaluate", batch_size=batch_size, num_workers=num_workers))
os._exit(0)
"""
)


def drawings_of(model: Path, other: Path) -> list[Drawing]:
    """What the job draws: a base, and the base with another UNet."""
    sampling = sampling_of(num_inference_steps=1)
    return [drawing_of(model, TEXTS, sampling=sampling, **unet) for unet in ({}, {"unet": str(other)})]


def job_of(model: Path, other: Path) -> Job:
    sampling = sampling_of(num_inference_steps=1)
    config: dict[str, Any] = {"model": str(model), "unet": str(other), "texts": TEXTS, "sampling": vars(sampling)}
    first, _ = drawings_of(model, other)
    return Job(DRAW, json.dumps(config), f"{SAMPLES}/{first.fingerprint}", f"{SAMPLES}/")
