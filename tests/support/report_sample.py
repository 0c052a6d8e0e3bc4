"""A report's data, spelled out, and a page as a browser would read it."""

import io
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
from PIL import Image, ImageDraw

from orchestration.report.cost import Cost, Devices, Price, StageCost
from orchestration.report.course import RunState
from orchestration.report.encoding import work_parts
from orchestration.report.records import (
    BytesPerPair,
    ContactImage,
    DatasetSection,
    DeviceUse,
    EncodingSection,
    EncodingSpeed,
    EvaluationSection,
    Fingerprints,
    ReportData,
    RoundRow,
    SampleGrid,
    SourceRow,
    StageRow,
    TrainingSection,
    WorkerRow,
)
from orchestration.report.timeline import Bar, Timeline
from orchestration.stages.stage import StageState
from pipelines.suites.audit import JudgeAgreement
from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.evaluation import EvaluationCost, EvaluationRecord, warnings_of
from pipelines.suites.gallery import choose_gallery
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.results import Judge, Results
from pipelines.suites.suite import Suite, SuitePrompt

GRIDS = (0, 400, 800, 1200)
PROMPTS = (
    "a cat on a sofa", "a red bicycle against a wall", "a bowl of lemons", "mountains after rain",
    '<script>alert("x")</script> & <img src=x onerror=alert(1)>', "an old harbour at dawn, " * 30, "x" * 300,
    "\U0001f98a\U0001f342 a fox, \u79cb\u306e\u68ee\u306e\u4e2d\u306e\u8d64\u3044\u72d0",
)  # fmt: skip


def landscape(seed: int, *, side: int = 64, styled: bool = False) -> bytes:
    """Return a small landscape; `styled` gives it warm colours, as a style taught from preferences would be."""
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), (240, 190, 120) if styled else (150, 180, 205))
    draw = ImageDraw.Draw(image)
    for layer in range(3):
        top, waves = side * (0.45 + 0.16 * layer) + rng.uniform(-4, 4), rng.uniform(4, 9)
        tint = (200 - 50 * layer, 90 - 20 * layer, 40) if styled else (95 - 22 * layer,) * 3
        edge = [(x, top + side * 0.08 * math.sin(x / side * waves + seed + layer)) for x in range(side)]
        draw.polygon([*edge, (side, side), (0, side)], fill=tint)
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def _step(step: int, progress: float, rng: random.Random, noise: float) -> dict[str, float]:
    gain = 1 - math.exp(-4 * progress)
    chosen, rejected = (mean + noise * rng.gauss(0, 0.035) for mean in (0.21 - 0.06 * gain, 0.215 + 0.02 * gain))
    accuracy = min(1.0, max(0.0, 0.49 + 0.27 * gain + noise * rng.gauss(0, 0.12)))
    return {
        "step": step, "loss": chosen + 0.0866 - 0.02 * gain, "mse_chosen": chosen, "mse_rejected": rejected,
        "margin": rejected - chosen, "implicit_accuracy": round(accuracy * 16) / 16 if noise else accuracy,
    }  # fmt: skip


def sample_data(num_steps: int = 1200) -> ReportData:
    """Return the data of a run that has finished."""
    done, train = StageState.DONE, "1,200 steps on 2 workers"
    return ReportData(
        name="photos", created_at="2026-11-23T23:10:00Z", command="mapo run photos.yaml",
        config={"name": "photos", "storage": "runs/photos", "train": {"loss": {"beta": 8.0}}},
        versions={"mapo": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "python": "3.11.9"},
        state=RunState.FINISHED, stage=None, message="", started_at="2026-11-23T20:00:00Z",
        timeline=Timeline(
            bars=[Bar("ingest", done, 0.0, 8.0), Bar("train", StageState.FAILED, 8.0, 292.0),
                  Bar("train", done, 312.0, 688.0)],
            pauses=[300.0], left_out_s=7200.0, began="2026-11-23T20:00:00Z", ended="2026-11-23T23:10:00Z",
            is_open=False,
        ),
        cost=Cost(gpu_hours=2.5, cpu_hours=0.0, price=Price(6.25, 2.5, "EUR"), num_lost=1,
                  stages=[StageCost("train", Devices(2, is_gpu=True), 4500.0, 2, 1)]),
        places=[DeviceUse("train", 2, "cpu", "10.0.0.1")],
        sources=[SourceRow("pickapic", "data/*.parquet")],
        rounds=[RoundRow(round=1, parent=None, pairs_version=3, num_pairs=560, steps=1200,
                         finished_at="2026-11-23T22:50:00Z", checkpoint="runs/photos/checkpoints/0123/step")],
        stages=[StageRow("ingest", done, 12.3, "668 rows: 612 kept, 56 not"), StageRow("encode", StageState.UP_TO_DATE),
                StageRow("train", done, 2587.0, train)],
        dataset=DatasetSection(
            storage="runs/photos", version=3, shards=2, bytes=9123456, prompts=90,
            rows={"kept": 612, "tie": 30, "duplicate": 8, "quarantined": 18},
            reasons={"equal_preference": 30, "repeated": 8, "truncated_image": 4, "missing_prompt": 13, "<odd>": 1},
            splits={"train": 560, "validation": 52}, summary="668 rows: 612 kept, 30 tie, 8 duplicate, 18 quarantined",
        ),
        encoding=encoding_data(),
        fingerprints=Fingerprints("9f" * 16, "77" * 16),
        training=_training(num_steps),
        evaluation=evaluation_data(),
        model="runs/photos/runs/photos/model",
    )  # fmt: skip


def evaluation_data() -> EvaluationSection:
    """Return the evaluation of two models by three scorers, on two suites."""
    judges = {
        "style": Judge("share, 0 to 1", description="How far the style is met.", verified=True, licence="MIT"),
        "content": Judge("share, 0 to 1", description="How far the content is met.", verified=False),
        "dark_share": Judge("share, 0 to 1", higher_is_better=False, description="Share that is nearly black."),
    }
    suites = [
        Suite(name, 1, tuple(SuitePrompt.of(prompt, *tags) for prompt, tags in prompts),
              images_per_prompt=images, num_inference_steps=25, guidance_scale=3.0, scorers=tuple(judges),
              primary=("style", "content"), protocol=about)
        for name, prompts, images, about in (
            ("held-out", [(prompt, ()) for prompt in PROMPTS], 2, ""),
            ("own", [(f"thing {i}", ("thing", "few" if i < 12 else "many")) for i in range(40)], 1, "Things."),
        )
    ]  # fmt: skip
    values = {suite.name: _values(suite) for suite in suites}
    results = Results({
        suite.name: reduce_suite(values[suite.name], suite, against="base", judges=judges, num_draws=500)
        for suite in suites
    })  # fmt: skip
    gallery = choose_gallery(values["held-out"], suites[0], against="base", judges=judges, num_each=2, num_plain=16)
    return EvaluationSection(
        EvaluationRecord(
            results=results, gallery=gallery, judges=judges,
            audit={"style": JudgeAgreement(0.71, 0.58, 0.81, 52, 9, 1.0),
                   "content": JudgeAgreement(None, None, None, 0)},
            warnings=warnings_of(results, judges, made_by=["style"]), cost=EvaluationCost(112, 0.25, 450.0),
        )
    )  # fmt: skip


def _values(suite: Suite) -> pa.Table:
    """Return scores: the aligned model meets the style better; its content is the same but for noise."""
    rng, rows = random.Random(7), []
    for number, prompt in enumerate(suite.prompts):
        for index in range(suite.images_per_prompt):
            easy = rng.gauss(0, 0.05)
            for model, means in (("base", (0.1, 0.26, 0.2)), ("aligned", (0.34, 0.255, 0.1))):
                for scorer, mean in zip(suite.scorers, means, strict=True):
                    value = (
                        None
                        if (model, scorer, number) == ("aligned", "content", 3)
                        else mean + easy + rng.gauss(0, 0.03)
                    )
                    rows.append((model, scorer, prompt.prompt_id, index, value, None if value else "non_finite"))
    return pa.table(dict(zip(VALUES_SCHEMA.names, zip(*rows, strict=True), strict=True)), schema=VALUES_SCHEMA)


def former_details() -> dict[str, Any]:
    """Return what the version of November 2026 recorded of an evaluation."""
    return {
        "num_samples": 64, "split": "validation", "num_inference_steps": 25, "guidance_scale": 3.0,
        "scores": [
            {"name": name, "description": f"How far the {name} is met.", "base": ends(*base), "aligned": ends(*aligned)}
            for name, base, aligned in (("style", (0.08, 0.104, 0.128), (0.3, 0.341, 0.379)),
                                        ("content", (0.25, 0.26, 0.27), (0.24, 0.255, 0.265)))
        ],
        "samples": [{"prompt": prompt, "seed": 17 + i, "base": f"base-{i:03}.png", "aligned": f"aligned-{i:03}.png"}
                    for i, prompt in enumerate(PROMPTS * 2)],
    }  # fmt: skip


def ends(low: float, mean: float, high: float) -> dict[str, float]:
    return {"low": low, "mean": mean, "high": high}


def _training(num_steps: int) -> TrainingSection:
    rng = random.Random(0)
    history = [
        {**_step(step, step / num_steps, rng, 1.0), "grad_norm": 0.8 * math.exp(rng.gauss(0, 0.35)),
         "learning_rate": 1e-4 * min(1, step / 50) * (1 - step / num_steps), "pairs_per_s": rng.gauss(7.4, 0.3),
         "step_s": 2.0 if step > 1 else 20.0, "data_wait_ratio": 0.01 if step > 1 else 0.5, "mfu": 0.412, "hfu": 0.509,
         "memory_bytes": 61.5e9 + step, "skipped_steps": 0}
        for step in range(1, num_steps + 1)
    ]  # fmt: skip
    measured = range(0, num_steps + 1, num_steps // 6)
    return TrainingSection(
        method="mapo_paper", loss={"beta": 8.0}, precision="fp32", global_batch_size=16, num_starts=2,
        workers=[WorkerRow(rank, 2, "10.0.0.1", 4711 + rank, "cpu", "gloo", 2, 9604 + rank, f"ab{rank}2" * 4)
                 for rank in (0, 1)],
        steps=num_steps, max_steps=num_steps, is_over=True, notes=[], history=history,
        validation=[{**_step(step, step / num_steps, rng, 0.0), **_quarters(step / num_steps), "num_pairs": 52.0}
                    for step in measured],
        samples=[SampleGrid(step, f"samples/0123/step-{step:08}.jpg") for step in GRIDS],
    )  # fmt: skip


def _quarters(progress: float) -> dict[str, float]:
    return {f"implicit_accuracy_q{quarter}": 0.5 + progress * quarter / 10 for quarter in (1, 2, 3, 4)}


def _grid(progress: float) -> bytes:
    """Return four landscapes, the more styled the later."""
    grid = Image.new("RGB", (1032, 1032), (128, 128, 128))
    for i in range(4):
        plain, styled = (Image.open(io.BytesIO(landscape(40 + i, side=512, styled=each))) for each in (False, True))
        grid.paste(Image.blend(plain, styled, progress), (520 * (i % 2), 520 * (i // 2)))
    grid.save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def encoding_data() -> EncodingSection:
    return EncodingSection(
        pairs=612, images=1501, image_slots=1606, prompts=90, truncated_prompts=3, max_tokens=77,
        image_ratio=1.07, text_ratio=6.8, quarantined={"non_finite": 2, "truncated_image": 1},
        bytes_per_pair=BytesPerPair(latents=8420.0, text=1020.5, text_per_pair_storage=10205.0),
        speeds=[
            EncodingSpeed(
                "latents", "pair", seconds=12.3, num_items=803, num_images=1499, images_per_s=122.0, items_per_s=65.25,
                busy_ratio=0.934, num_actors=2, device="cpu", batch_size=8, halved_to=None,
                parts=work_parts({"fetch": 1.2, "decode": 3.0, "encode": 20.1, "pack": 0.5, "upload": 0.2}),
            ),
            EncodingSpeed(
                "text", "prompt", seconds=1.6, num_items=91, num_images=0, images_per_s=0.0, items_per_s=56.9,
                busy_ratio=0.712, num_actors=1, device="NVIDIA H100 80GB HBM3", batch_size=64, halved_to=None,
                parts=work_parts({"encode": 1.1, "pack": 0.3, "upload": 0.1}),
            ),
        ],
        contact=[
            ContactImage(
                pair_key=f"c0ffee{i:02}" * 4, prompt=prompt, side=i % 2, bucket=[64 + 16 * (i % 2), 64],
                psnr=None if i == 2 else 28.4 + i, source=f"encode/contact-{i:03}-source.png",
                decoded=f"encode/contact-{i:03}-decoded.png",
            )
            for i, prompt in enumerate(PROMPTS)
        ],
    )  # fmt: skip


def contact_names() -> list[str]:
    return [name for image in encoding_data().contact for name in (image.source, image.decoded)]


def sample_images() -> dict[str, bytes]:
    data = sample_data(6)
    assert data.evaluation is not None
    samples = {image.name: landscape(int(entry.prompt_id[:4], 16) + entry.index, styled=model == "aligned")
               for entry in data.evaluation.record.gallery for model, image in entry.images.items()}  # fmt: skip
    former = {f"{model}-{i:03}.png": landscape(17 + i, styled=model == "aligned")
              for i in range(2 * len(PROMPTS)) for model in ("base", "aligned")}  # fmt: skip
    contact = {name: landscape(100 + i // 2) for i, name in enumerate(contact_names())}
    return samples | former | contact | {f"samples/0123/step-{step:08}.jpg": _grid(step / GRIDS[-1]) for step in GRIDS}


def running(**changes: Any) -> ReportData:
    """Return the same run during training: step 700 of 1,200."""
    data = sample_data()
    assert data.training is not None
    training = replace(
        data.training,
        is_over=False,
        steps=700,
        history=data.training.history[:700],
        notes=["step 4: <slow> disk"],
        validation=[row for row in data.training.validation if row["step"] <= 700],
        workers=[replace(worker, num_pairs=None, digest=None) for worker in data.training.workers],
    )
    train = StageRow("train", StageState.RUNNING, 2587.0, began="2026-11-23T22:00:00Z")
    live = {"state": "running", "stage": "train", "evaluation": None, "model": None}
    return replace(data, **{"training": training, "stages": [*data.stages[:2], train], **live, **changes})


def changed(record: Any, changes: Mapping[str, Any]) -> Any:
    """Return a record with other values at some paths, such as `training.method` or `evaluation.scores.0.name`."""
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if isinstance(record, list | tuple):
            place = int(name)
            record = [*record[:place], changed(record[place], {rest: value}) if rest else value, *record[place + 1 :]]
        elif isinstance(record, dict):
            record = record | {name: changed(record[name], {rest: value}) if rest else value}
        else:
            record = replace(record, **{name: changed(getattr(record, name), {rest: value}) if rest else value})
    return record


class Page(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = self.style = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.text += " " * (tag in ("td", "th", "dd", "li"))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data.replace("\u00a0", " ")
