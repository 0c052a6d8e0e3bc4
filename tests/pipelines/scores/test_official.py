"""Scorers against what their official code computed (`record_scorers.py`): 1e-5, preprocessing included."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scorer_twins import HPS_PROMPTS, PROMPTS, formula_tensor, formula_weights, thin

from pipelines.scores.conversions.affine import collapse_affine
from pipelines.scores.scorers import Score, new_scorer
from pipelines.scores.scorers.images import PREPROCESSINGS, prepare
from pipelines.scores.scorers.text import ClipTokens, clean_as_open_clip
from pipelines.scores.scorers.trunks.head import AffineHead

NEAR = {"rtol": 0, "atol": 1e-5}
SHARED = Path("/work/shared/benchmarks/aesthetic/sac-logos-ava1-l14-affine.safetensors")
HAS_FTFY = importlib.util.find_spec("ftfy") is not None
needs_ftfy = pytest.mark.skipif(not HAS_FTFY, reason="ftfy is not installed")

RECORDED = ("clip-224", "hps-224-antialias", "hps-224-noantialias", "dino-224")


def loaded(name: str, twins: Path) -> Any:
    scorer = new_scorer(name)
    scorer.load(twins, "cpu")
    return scorer


def values(results: list[Any]) -> list[float]:
    return [result.value if isinstance(result, Score) else result for result in results]


@pytest.mark.parametrize("name", RECORDED)
def test_images_are_prepared_as_the_official_code_does(
    name: str, images: list[Image.Image], recorded_tensors: dict[str, torch.Tensor]
) -> None:
    for place, image in enumerate(images):
        found = thin(prepare([image], name)[0])
        torch.testing.assert_close(found, recorded_tensors[f"{name}.{place}"], **NEAR)


def test_preparations_with_other_names_are_told_apart(
    images: list[Image.Image], recorded_tensors: dict[str, torch.Tensor]
) -> None:
    """The fixture is fine enough: each preparation is far from every other one on some image."""
    of_this_size = [each for each in PREPROCESSINGS if each.split("-")[1:2] == ["224"]]
    assert set(RECORDED) <= set(of_this_size)
    for name in RECORDED:
        for other in set(of_this_size) - {name}:
            differences = [
                float((thin(prepare([image], other)[0]) - recorded_tensors[f"{name}.{place}"]).abs().max())
                for place, image in enumerate(images)
            ]
            assert max(differences) > 0.1, (name, other)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_equals_the_official_model(
    name: str, twins: Path, images: list[Image.Image], recorded: dict[str, Any]
) -> None:
    rows = range(len(HPS_PROMPTS)) if HAS_FTFY else [0, 3, 4]
    results = loaded(name, twins).score([images[row] for row in rows], [HPS_PROMPTS[row] for row in rows])
    expected = [100 * recorded["hps"]["scores"][row] for row in rows]
    assert values(results) == pytest.approx(expected, abs=1e-4)  # 1e-6 of the cosine


@needs_ftfy
def test_hps_tokens_are_those_of_the_official_tokenizer(twins: Path, recorded: dict[str, Any]) -> None:
    ids_BS, _ = ClipTokens(twins / "clip-tokenizer", clean_as_open_clip)(HPS_PROMPTS)
    assert [[each for each in row if each] for row in ids_BS.tolist()] == recorded["hps"]["ids"]


def test_plain_prompts_need_no_ftfy(twins: Path, recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    ids_BS, cut = ClipTokens(twins / "clip-tokenizer", clean_as_open_clip)([HPS_PROMPTS[0], HPS_PROMPTS[3]])
    assert [[each for each in row if each] for row in ids_BS.tolist()] == [
        recorded["hps"]["ids"][row] for row in (0, 3)
    ]
    assert cut == [0, (92 - 77) / 90]


def test_imagereward_equals_the_official_model(
    twins: Path, images: list[Image.Image], recorded: dict[str, Any]
) -> None:
    results = loaded("imagereward", twins).score(images[: len(PROMPTS)], PROMPTS)
    assert values(results) == pytest.approx(recorded["imagereward"]["scores"], abs=1e-5)
    assert [result.components["cut_token_ratio"] for result in results] == [0, 0, (62 - 35) / 60, 0]


def test_csd_equals_the_official_model(
    twins: Path, images: list[Image.Image], recorded_tensors: dict[str, torch.Tensor]
) -> None:
    style_BD = recorded_tensors["csd.style"]
    references = [[images[0], images[1]]] * len(images)
    expected = (style_BD @ style_BD[:2].T).max(dim=1).values.clamp(min=0)
    found = loaded("csd", twins).score(images, [""] * len(images), references=references)
    assert values(found) == pytest.approx(expected.tolist(), abs=1e-5)


def test_dino_equals_the_official_model(
    twins: Path, images: list[Image.Image], recorded_tensors: dict[str, torch.Tensor]
) -> None:
    embeds_BD = recorded_tensors["dino.embeds"]
    unit_BD = embeds_BD / embeds_BD.norm(dim=1, keepdim=True)
    references = [[images[2], images[3], images[4]]] * len(images)
    expected = (unit_BD @ unit_BD[2:5].T).mean(dim=1)
    found = loaded("dino", twins).score(images, [""] * len(images), references=references)
    assert values(found) == pytest.approx(expected.tolist(), abs=1e-5)


def test_gram_distance_equals_that_of_torchvisions_features(
    twins: Path, images: list[Image.Image], recorded: dict[str, Any]
) -> None:
    from scorer_twins import formula_image

    first, second = formula_image(512, 512, 0), formula_image(512, 512, 1)
    found = values(loaded("gram", twins).score([first, first], ["", ""], references=[[second], [second, first]]))
    assert found[0] == pytest.approx(recorded["vgg"]["distance"], rel=1e-3)
    assert found[1] == 0


def test_the_collapsed_head_equals_the_official_layers(recorded: dict[str, Any]) -> None:
    affine = collapse_affine(formula_weights(recorded["aesthetic"]["shapes"]))
    embeds_BD = formula_tensor("aesthetic.embeds", (5, 768))
    unit_BD = embeds_BD / embeds_BD.norm(dim=1, keepdim=True)
    found = AffineHead(affine["weight"], affine["bias"], "cpu")(unit_BD).tolist()
    assert found == pytest.approx(recorded["aesthetic"]["scores"], abs=1e-5)


@pytest.mark.skipif(not SHARED.is_file(), reason="the published head is not on this machine")
def test_the_published_aesthetic_head_equals_its_official_script(recorded: dict[str, Any]) -> None:
    state = load_file(SHARED)
    embeds_BD = formula_tensor("aesthetic.embeds", (5, 768))
    unit_BD = embeds_BD / embeds_BD.norm(dim=1, keepdim=True)
    found = AffineHead(state["weight"], state["bias"], "cpu")(unit_BD).tolist()
    assert found == pytest.approx(recorded["aesthetic"]["published_scores"], abs=1e-5)
