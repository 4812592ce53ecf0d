"""`strata export sbom`: what the merged model was made of, as a bill of materials that other tools read.

CycloneDX 1.6 with its parts for machine learning (cyclonedx.org/capabilities/mlbom): the model with its scores, the
base, every stage's adapter, the datasets and the libraries, each with its hash or version, and what came of what. No
time and no chance: the same model gives the same bytes.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.errors import MistakeError
from stages.files import MERGED, REPORTS, read_json, sha256, write_json
from stages.project.params import Params, load_params
from stages.weights.tensor_file import TensorFile
from tools.exporting.merge import EXPORT, WEIGHTS, read_lineage
from tools.exporting.origin import Origin, origin

FILE = EXPORT / "sbom.cdx.json"
HASHED = "A PEFT adapter; the hash is of adapter_config.json and adapter_model.safetensors, one after the other"
MODEL, BASE = "model", "base"
Component = dict[str, Any]


def main(name: str) -> None:
    """Write export/sbom.cdx.json.

    Raises:
        MistakeError: merged/ is not the model that params.yaml describes, or is not evaluated.
    """
    params = load_params()
    lineage = read_lineage(params)
    write_json(FILE, bill(name, params, lineage, read_json(REPORTS / "evaluation.json")))
    print(f"{FILE}: {name} and what it was made of")


def check(path: Path, file: Path) -> list[str]:
    """A sentence for each part of a bill of materials that is not what a file, and the provenance in it, say.

    Args:
        path: of the bill.
        file: the model's weights, or their folder.

    Raises:
        MistakeError: the bill or the file is none.
    """
    weights = file / WEIGHTS if file.is_dir() else file
    provenance = json.loads(TensorFile(weights).metadata.get("strata", "null"))
    wanted = {MODEL: sha256([weights])} | (parts(provenance) if provenance else {})
    told = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(path)
        told = {
            part["bom-ref"]: part["hashes"][0]["content"]
            for part in [content["metadata"]["component"], *content["components"]]
            if "hashes" in part
        }
    if told is None:
        raise MistakeError(f"{path} is no bill of materials of a model; write one with `strata export sbom`")
    return [
        f"{path} has {told.get(ref, 'no hash')} for {ref}, and {weights} is or was made of {digest}"
        for ref, digest in wanted.items()
        if told.get(ref) != digest
    ]


def parts(lineage: dict[str, Any]) -> dict[str, str]:
    """Hashes of what a model was made of, by the names by which the bill refers to them."""
    stages = {stage_ref(stage["name"]): stage["sha256"] for stage in lineage["stages"]}
    data = {data_ref(name): digest for name, digest in data_of(lineage).items()}
    return {BASE: lineage["base"]["sha256"], **stages, **data}


def bill(name: str, params: Params, lineage: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The whole bill, as JSON.

    Args:
        name: what the model is called.
        params: params.yaml.
        lineage: content of merged/lineage.json.
        evaluation: content of reports/evaluation.json.
    """
    digest, known = sha256([MERGED / WEIGHTS]), origin(params.base)
    model = machine_learning(MODEL, name, digest, known) | {"modelCard": card(evaluation, lineage)}
    stages = [
        machine_learning(stage_ref(stage["name"]), stage["name"], stage["sha256"], None) | {"description": HASHED}
        for stage in lineage["stages"]
    ]
    datasets = [
        {
            "type": "data",
            "bom-ref": data_ref(data),
            "name": data,
            "hashes": hashes(digest),
            "data": [{"type": "dataset"}],
        }
        for data, digest in data_of(lineage).items()
    ]
    libraries = [
        {"type": "library", "name": package, "version": version, "purl": f"pkg:pypi/{package}@{version}"}
        for package, version in lineage["versions"].items()
    ]
    base = machine_learning(BASE, known.id or lineage["base"]["model"], lineage["base"]["sha256"], known)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {"components": [{"type": "application", "name": "strata"}]},
        },
        "components": [base, *stages, *datasets, *libraries],
        "dependencies": list(dependencies(lineage)),
    }


def machine_learning(ref: str, name: str, digest: str, known: Origin | None) -> Component:
    """A model or an adapter; what is made of a base has its licence."""
    component: Component = {"type": "machine-learning-model", "bom-ref": ref, "name": name, "hashes": hashes(digest)}
    if known and known.licence:
        component["licenses"] = [{"license": {"name": known.licence["license"]}}]
    return component


def card(evaluation: dict[str, Any], lineage: dict[str, Any]) -> dict[str, Any]:
    """The model's card in CycloneDX's words: what it is, what it learned, and its scores with their 95 % intervals."""
    config = read_json(MERGED / "config.json")
    intervals = evaluation["intervals"]["merged"]
    metrics = [
        {"type": measure, "value": str(value), "slice": dataset}
        | {
            "confidenceInterval": dict(
                zip(("lowerBound", "upperBound"), map(str, intervals[dataset][measure]), strict=True)
            )
        }
        for dataset, cell in evaluation["matrix"]["merged"].items()
        for measure, value in cell.items()
    ]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": config["model_type"],
            "modelArchitecture": config["architectures"][0],
            "datasets": [{"ref": data_ref(dataset)} for dataset in data_of(lineage)],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
    }


def dependencies(lineage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each part was made of: the model of its stages, a stage of its parent and its data."""
    yield {"ref": MODEL, "dependsOn": [BASE, *(stage_ref(name) for name in sorted(lineage["merge"]["weights"]))]}
    for stage in lineage["stages"]:
        parent = BASE if stage["parent"] == "base" else stage_ref(stage["parent"])
        yield {
            "ref": stage_ref(stage["name"]),
            "dependsOn": [parent, *map(data_ref, learned(stage))],
        }


def learned(stage: dict[str, Any]) -> dict[str, str]:
    """Hashes of the datasets that a stage learned, by name; an imported adapter was trained elsewhere."""
    return {} if stage["method"] == "import" else stage.get("dataset_sha256") or {}


def data_of(lineage: dict[str, Any]) -> dict[str, str]:
    """The same of all stages."""
    return {name: digest for stage in lineage["stages"] for name, digest in learned(stage).items()}


def stage_ref(name: str) -> str:
    """The name by which the bill refers to a stage."""
    return f"stage/{name}"


def data_ref(name: str) -> str:
    """The name by which the bill refers to a dataset."""
    return f"data/{name}"


def hashes(digest: str) -> list[dict[str, str]]:
    """A hash in CycloneDX's words."""
    return [{"alg": "SHA-256", "content": digest}]
