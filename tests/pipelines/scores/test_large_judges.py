"""HPSv3 and VQAScore on tiny twins of the real classes: equal to the library's own way, one image at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_twins import reward_head, write_qwen_twins
from safetensors.torch import load_file, save_file
from scorer_twins import formula_image

from pipelines.dataset.errors import ModelError
from pipelines.scores.cluster_weights import locate_parts
from pipelines.scores.scorers import Failure, new_scorer
from pipelines.scores.scorers.hpsv3 import INSTRUCTION, instruction
from pipelines.scores.scorers.vqascore import YES
from pipelines.scores.weights import fetch, files_of

SIZES = [(640, 640), (300, 200), (60, 700), (512, 64)]
PROMPTS = ["a cat", "a red house, please show a {dog}", "a", ""]
REWARD = "<|Reward|>"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen")
    write_qwen_twins(root)
    return root


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [formula_image(*size, seed) for seed, size in enumerate(SIZES)]


def loaded(name: str, folder: Path) -> Any:
    scorer = new_scorer(name)
    scorer.load(folder, "cpu")
    return scorer


def library(model: Any, processor: Path, image: Image.Image, text: str, *marks: str, **settings: Any) -> Any:
    """The inputs of one image as the library's processor makes them, and what the model returns."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(processor)
    tokenizer.add_tokens(list(marks), special_tokens=True)
    images = Qwen2VLImageProcessorPil.from_pretrained(processor)(images=[image], return_tensors="pt", **settings)
    count = int(images["image_grid_thw"].prod()) // 4
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = dict(tokenizer(chat.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt"))
    inputs |= dict(images)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    inputs.pop("token_type_ids", None)
    return tokenizer, inputs


def official_reward(qwen: Path, image: Image.Image, prompt: str) -> list[float]:
    """HPSv3 in the library's own classes: resized by Pillow before the processor, the published head in a row."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    state = load_file(qwen / "hpsv3" / "model.safetensors")
    config = Qwen2VLConfig(**json.loads((qwen / "qwen2-vl-processor" / "config.json").read_text()))
    config.text_config.vocab_size = state["lm_head.weight"].shape[0]
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.load_state_dict(
        {
            name.replace("model.", "model.language_model.", 1) if name.startswith("model.")
            else name.replace("visual.", "model.visual.", 1): tensor.float()
            for name, tensor in state.items() if not name.startswith("rm_head")
        }
    )  # fmt: skip
    head = reward_head()
    head.load_state_dict({name[8:]: tensor.float() for name, tensor in state.items() if name.startswith("rm_head")})
    height, width = smart_resize(image.height, image.width, 28, 256 * 28 * 28, 256 * 28 * 28)
    image = image.resize((width, height))  # as qwen_vl_utils, with Pillow's default
    processor = qwen / "qwen2-vl-processor"
    tokenizer, inputs = library(model, processor, image, instruction(prompt), REWARD, do_resize=False)
    place = inputs["input_ids"][0].tolist().index(tokenizer.convert_tokens_to_ids(REWARD))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
        found: list[float] = head(states[0, place]).tolist()
    return found


def test_hpsv3_equals_the_librarys_own_model_image_by_image(qwen: Path, pictures: list[Image.Image]) -> None:
    found = loaded("hpsv3", qwen).score(pictures, PROMPTS)
    wanted = [official_reward(qwen, image, prompt) for image, prompt in zip(pictures, PROMPTS, strict=True)]
    assert [[each.value, each.components["sigma"]] for each in found] == [
        pytest.approx(pair, abs=2e-5) for pair in wanted
    ]
    assert np.ptp([pair[0] for pair in wanted]) > 1e-3, "the twin tells images and prompts apart"


@pytest.mark.parametrize("name", ["hpsv3", "vqascore-qwen2-vl-7b", "vqascore-qwen3-vl-2b"])
def test_a_batch_of_different_sizes_equals_one_at_a_time(name: str, qwen: Path, pictures: list[Image.Image]) -> None:
    scorer = loaded(name, qwen)
    rows = [0, 1, 2, 3, 3, 2, 1, 0, 2]  # more than one chunk
    before = scorer._model.num_forwards
    batch = scorer.score([pictures[row] for row in rows], [PROMPTS[row] for row in rows])
    assert scorer._model.num_forwards - before == 2
    for row, found in zip(rows, batch, strict=True):
        (single,) = scorer.score([pictures[row]], [PROMPTS[row]])
        assert found.value == pytest.approx(single.value, rel=1e-4, abs=1e-6)


def test_every_image_of_hpsv3_has_the_same_number_of_pixels(qwen: Path, pictures: list[Image.Image]) -> None:
    from pipelines.scores.scorers.hpsv3 import NUM_PIXELS

    scorer = loaded("hpsv3", qwen)
    size = {"shortest_edge": NUM_PIXELS, "longest_edge": NUM_PIXELS}
    grids = scorer._model.prompts(pictures[:2], [instruction("")] * 2, size=size)["image_grid_thw"].tolist()
    assert grids[0] == [1, 32, 32]
    assert all(0.9 < height * width * 14 * 14 / NUM_PIXELS < 1.1 for _, height, width in grids)


def test_a_missing_reward_token_is_an_error(
    qwen: Path, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = loaded("hpsv3", qwen)
    monkeypatch.setattr("pipelines.scores.scorers.hpsv3.INSTRUCTION", INSTRUCTION.replace(REWARD, "reward"))
    with pytest.raises(ModelError, match=r"has 0 tokens <\|Reward\|>, not one"):
        scorer.score(pictures[:1], ["a cat"])
    shutil.copytree(qwen, tmp_path / "short")
    file = tmp_path / "short" / "hpsv3" / "model.safetensors"
    state = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:-1].clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"embeddings for \d+ tokens, and <\|Reward\|> is number \d+"):
        loaded("hpsv3", tmp_path / "short")


@pytest.mark.parametrize(
    "name", ["rm_head.3.weight", "model.layers.1.mlp.up_proj.weight", "visual.blocks.0.norm1.bias"]
)
def test_a_missing_tensor_is_an_error(name: str, qwen: Path, tmp_path: Path) -> None:
    for part in ("hpsv3", "qwen2-vl-processor"):
        shutil.copytree(qwen / part, tmp_path / part)
    file = tmp_path / "hpsv3" / "model.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        loaded("hpsv3", tmp_path)


@pytest.mark.parametrize("name", ["hpsv3", "vqascore-qwen3-vl-8b"])
def test_prompts_and_images_that_a_template_cannot_hold_are_failures(
    name: str, qwen: Path, pictures: list[Image.Image]
) -> None:
    thin = Image.new("RGB", (3, 700))
    marks = ["a cat", "a <|image_pad|> cat", "<|im_end|>", "a thin cat"]
    found = loaded(name, qwen).score([*pictures[:3], thin], marks)
    assert [type(each) for each in found[1:]] == [Failure] * 3
    assert found[1].reason == "the prompt contains <|image_pad|>, a mark of the model"
    assert "3 x 700 pixels" in found[3].reason
    assert found[0] == loaded(name, qwen).score(pictures[:1], marks[:1])[0]
    if name == "hpsv3":
        (reward,) = loaded(name, qwen).score(pictures[:1], [f"a cat {REWARD}"])
        assert reward == Failure(f"the prompt contains {REWARD}, a mark of the model")


@pytest.mark.parametrize(
    ("name", "part", "processor"),
    [
        ("vqascore-qwen2-vl-7b", "qwen2-vl-7b", "qwen2-vl-processor"),
        ("vqascore-qwen3-vl-8b", "qwen3-vl-8b", "qwen3-vl-processor"),
        ("vqascore-qwen3-vl-2b", "qwen3-vl-2b", "qwen3-vl-processor"),
    ],
)
def test_vqascore_equals_the_first_token_that_the_library_generates(
    name: str, part: str, processor: str, qwen: Path, pictures: list[Image.Image]
) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(qwen / part, dtype=torch.float32).eval()
    found = loaded(name, qwen).score(pictures[:3], PROMPTS[:3])
    for image, prompt, each in zip(pictures[:3], PROMPTS[:3], found, strict=True):
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        tokenizer, inputs = library(model, qwen / processor, image, question)
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        probabilities = out.scores[0][0].softmax(dim=-1)
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in YES]
        single = {each[0] for each in ids if len(each) == 1}
        assert len(single) > 2, "Yes, yes and those after a space"
        assert each.components["yes_token"] == pytest.approx(float(probabilities[ids[0][0]]), rel=1e-4)
        assert each.value == pytest.approx(sum(float(probabilities[token]) for token in single), rel=1e-4)
        assert 0 < each.components["yes_token"] < each.value < 1


def test_a_tokenizer_that_splits_yes_is_refused(qwen: Path, tmp_path: Path) -> None:
    for part in ("qwen3-vl-2b", "qwen3-vl-processor"):
        shutil.copytree(qwen / part, tmp_path / part)
    file = tmp_path / "qwen3-vl-processor" / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["merges"] = [each for each in told["model"]["merges"] if "".join(each) != "Yes"]
    file.write_text(json.dumps(told))
    with pytest.raises(ModelError, match=r"reads 'Yes' as [23] tokens"):
        loaded("vqascore-qwen3-vl-2b", tmp_path)


def test_weights_in_several_files_of_bfloat16_are_fetched_as_published(
    qwen: Path, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    name, part = "vqascore-qwen3-vl-8b", "qwen3-vl-8b"
    root = fetch(name, qwen, tmp_path / "cache")
    for file in files_of(part):
        assert (root / part / file).read_bytes() == (qwen / part / file).read_bytes()
    assert [each.name for each in locate_parts(name, new_scorer(name).parts, None)] == list(new_scorer(name).parts)
    from_cache = loaded(name, root).score(pictures[:1], ["a cat"])
    assert from_cache == loaded(name, qwen).score(pictures[:1], ["a cat"])
    shard = root / part / files_of(part)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="model-00002-of-00004"):
        loaded(name, root)


def test_fingerprints_follow_from_the_instruction_and_the_question(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("hpsv3", "vqascore-qwen2-vl-7b", "vqascore-qwen3-vl-8b")
    before = [new_scorer(name).fingerprint(qwen) for name in names]
    monkeypatch.setattr("pipelines.scores.scorers.hpsv3.INSTRUCTION", INSTRUCTION + " ")
    monkeypatch.setattr("pipelines.scores.scorers.vqascore.QUESTION", "Is this {}?")
    after = [new_scorer(name).fingerprint(qwen) for name in names]
    assert all(one != other for one, other in zip(before, after, strict=True))
