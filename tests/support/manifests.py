"""Manifests as data for the tests of infra: rendered, patched as kustomize does, and held to a strict schema."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

from orchestration.infra.render import Settings, render_files, render_stream

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "infra" / "example.yaml"
CRDS = ROOT.parent / "shared" / "kuberay"


def stream(target: str = "kuberay", *overrides: str, **settings: Any) -> list[dict[str, Any]]:
    """The documents of a target's stream."""
    return list(yaml.safe_load_all(render_stream(EXAMPLE, overrides, target, Settings(**settings))))


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one document of a kind; a RayJob also out of a CronJob's ConfigMap."""
    inner = [yaml.safe_load(d["data"]["rayjob.yaml"]) for d in documents if "rayjob.yaml" in d.get("data", {})]
    (found,) = [document for document in [*documents, *inner] if document["kind"] == kind]
    return found


def overlay(kind: str, *overrides: str, **settings: Any) -> list[dict[str, Any]]:
    """What kustomize makes of an overlay: its resources and JSON patches, and nothing else it could do."""
    files = render_files(EXAMPLE, overrides, "kuberay", Settings(**settings))
    kustomization = yaml.safe_load(files[f"overlays/{kind}/kustomization.yaml"])
    assert kustomization["resources"] == ["../../base"]
    base = yaml.safe_load(files["base/kustomization.yaml"])["resources"]
    documents = [document for name in base for document in yaml.safe_load_all(files[f"base/{name}"])]
    for each in kustomization["patches"]:
        text = each["patch"] if "patch" in each else files[f"overlays/{kind}/{each['path']}"]
        operations = yaml.safe_load(text) or []
        targets = [n for n, document in enumerate(documents) if document["kind"] == each["target"]["kind"]]
        assert targets
        for n in targets:
            documents[n] = jsonpatch.apply_patch(copy.deepcopy(documents[n]), operations)
    return documents


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod of Ray, submitter and round, by its component label."""
    for document in documents:
        yield from _pods_in(document)
        for text in document.get("data", {}).values():
            yield from _pods_in(yaml.safe_load(text))


def _pods_in(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) and "labels" in value.get("metadata", {}):
            yield value["metadata"]["labels"]["app.kubernetes.io/component"], value["spec"]
        for inner in value.values():
            yield from _pods_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pods_in(inner)


def strict(schema: Any) -> Any:
    """A CRD's structural schema as JSON schema under which a field that the API server would prune is an error."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: strict(value) if key != "properties" else {k: strict(v) for k, v in value.items()}
        for key, value in schema.items()
    }
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and "properties" in schema and not keeps:
        made["additionalProperties"] = False
    return made
