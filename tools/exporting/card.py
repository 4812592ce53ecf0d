"""The card of the merged model: README.md with the hub's metadata, in the words and numbers of the report."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.telling.facts import Facts
from analysis.telling.page import contents
from analysis.telling.text import percent, scored
from analysis.telling.words import guards, headline, label
from stages.files import MERGED, read_json, sha256
from stages.project.params import Params
from stages.records.lines import load_split
from stages.records.record import Record, asked
from stages.records.sources.hub import Hub
from stages.records.sources.mix import Mix
from stages.records.template import as_chat
from tools.exporting.merge import EXPORT, WEIGHTS
from tools.exporting.origin import Origin

FOLDER = EXPORT / "model"
SETTLED = {"parent", "dataset", "method", "layers", "steps", "lr"}  # settings of a stage with columns of their own
ROUNDING = 3  # the section of the report that tells what the file holds
TRIED = 20  # questions of which the shortest is the example
CODE = """\
from transformers import pipeline

ask = pipeline("text-generation", model="{model}", max_new_tokens={tokens}{trust})
question = {question}
print(ask(question)[0]["generated_text"]{answer})"""


def make_card(facts: Facts, origin: Origin, lineage: dict[str, Any], name: str) -> ModelCard:
    """The card as README.md holds it.

    Args:
        facts: of the report.
        origin: what is known of the base.
        lineage: content of merged/lineage.json.
        name: what the model is called.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    text = environment.get_template("card.md").render(tell(facts, origin, lineage, name))
    return ModelCard(f"---\n{metadata(facts, origin, name).to_yaml()}\n---\n\n{text}")


def metadata(facts: Facts, origin: Origin, name: str) -> ModelCardData:
    """What the hub reads of a card; hub ids only, and nothing that is not known.

    `base_model_relation` is `merge` where adapters from the hub are in it, which then are listed too.
    """
    params = facts.settings
    merged = {ancestor for stage in params.merge.weights for ancestor in params.lineage(stage)}
    adapters = [getattr(stage, "id", None) for key, stage in params.stages.items() if key in merged]
    sources = [origin.id, *dict.fromkeys(adapters)]
    known = [source for source in sources if source]
    rest: dict[str, Any] = {**origin.licence}
    if known:
        rest["base_model_relation"] = "merge" if len(known) > 1 else "finetune"
    learned = {params.skills[key] for key in merged if params.stages[key].method != "import"}
    datasets = [found for key in params.datasets if key in learned for found in hub_ids(params.datasets[key])]
    return ModelCardData(
        base_model=known or None,
        datasets=list(dict.fromkeys(datasets)) or None,
        language=origin.languages or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["strata", *(["conversational"] if has_chat() else [])],
        model_name=name,
        eval_results=list(results(facts)),
        **rest,
    )


def hub_ids(dataset: Any) -> list[str]:
    """Ids of a dataset on the hub, or of those that a mix is made of."""
    if isinstance(dataset, Mix):
        return [found for part in dataset.parts.values() for found in hub_ids(part)]
    return [dataset.id] if isinstance(dataset, Hub) and not Path(dataset.id).exists() else []


def results(facts: Facts) -> list[EvalResult]:
    """What the merged model reaches, for the hub's model-index."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=next(iter(hub_ids(facts.settings.datasets[dataset])), dataset),
            dataset_name=dataset,
            dataset_args={"questions": facts.evaluation["questions"][dataset]},
            metric_type=measure,
            metric_value=value,
        )
        for dataset, cell in facts.matrix["merged"].items()
        for measure, value in cell.items()
    ]


def tell(facts: Facts, origin: Origin, lineage: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template tells, by the names that it uses."""
    params, measures = facts.settings, facts.evaluation["measures"]
    base = f"[{origin.id}](https://huggingface.co/{origin.id})" if origin.id else f"`{Path(params.base.model).name}`"
    told = headline(facts)
    return {
        "name": name,
        "base": base,
        "dtype": params.merge.dtype,
        "legend": legend(facts),
        "code": code(params),
        "transformers": read_json(MERGED / "config.json").get("transformers_version", "4").partition(".")[0],
        "asked": asked_how(),
        "stages": stage_rows(facts),
        "merge": params.merge,
        "weights": ", ".join(f"{stage} {weight}" for stage, weight in params.merge.weights.items()),
        "headline": [each.text for each in told if each.text not in guards(facts.guarded) and each.section != ROUNDING],
        "skills": [f"{skill} ({facts.evaluation['questions'][skill]} questions)" for skill in measures],
        "matrix": {
            " · ".join(filter(None, [f"**{model}**", label(facts, model)])): [
                matrix_cell(cells[skill], measures[skill]) for skill in measures
            ]
            for model, cells in facts.matrix.items()
        },
        "limits": limits(facts, origin, [each.text for each in told if each.section == ROUNDING]),
        "hashes": hashes(lineage),
        "versions": ", ".join(f"{package} {version}" for package, version in lineage["versions"].items()),
    }


def legend(facts: Facts) -> str:
    """How to read the picture and the table."""
    learned, guarded = set(facts.settings.skills.values()), facts.settings.guards
    told = (
        "Rows are models, columns are what they were asked, with questions that no stage has seen. A frame is the skill"
        " that a stage was trained on, ▼ what got worse by more than chance."
    )
    if guarded := [name for name in facts.evaluation["measures"] if name in guarded and name not in learned]:
        told += f" No stage learns {', '.join(guarded)}: it shows what the training did to the rest."
    return told


def matrix_cell(cell: dict[str, float], measure: str) -> str:
    """A skill's own measure, and the others in brackets."""
    others = ", ".join(scored(value, other) for other, value in cell.items() if other != measure)
    return scored(cell[measure], measure) + (f" ({others})" if others else "")


def stage_rows(facts: Facts) -> list[dict[str, Any]]:
    """What each stage was given, and what came of it."""
    rows = []
    for row in contents(facts, {})["skills"]:
        name = row["stage"]
        stage, spent = facts.settings.stages[name], facts.spent[name]
        chosen = stage.model_dump(exclude_unset=True, exclude=SETTLED, exclude_none=True)
        rows.append(
            {
                "name": name,
                "parent": stage.parent,
                "dataset": stage.dataset if stage.method != "import" else f"elsewhere; asked {stage.dataset}",
                "method": stage.method,
                "layers": facts.trained(name),
                "steps": spent.get("steps", "–"),
                "tokens": f"{spent['tokens']:,}" if "tokens" in spent else "–",
                "lr": f"{stage.lr:g}" if hasattr(stage, "lr") else "–",
                "rest": ", ".join(f"{key} {value}" for key, value in chosen.items()) or "–",
                "gain": f"{row['scores'][0]} → {row['scores'][1]} ({row['unit']})",
                "kept": row["kept"],
            }
        )
    return rows


def limits(facts: Facts, origin: Origin, rounding: list[str]) -> list[str]:
    """What a reader should not expect of the model; `rounding` is what the report's headline tells of the file."""
    told = guards(facts.guarded)
    if not facts.guarded:
        told.append("Nothing that no stage learns was measured: what the training did to the rest is not known.")
    error = facts.whole.loc["merged", "floor_share"]
    if not rounding and error > 0:
        told.append(
            f"Rounding to {facts.settings.merge.dtype} alters the trained change by {percent(error)} of its size."
        )
    told += rounding
    if origin.quantised:
        told.append(f"Before the training the base's weights had been quantised to {origin.quantised}.")
    languages = ", ".join(origin.languages)
    told.append(f"Languages of the base: {languages}." if languages else "No languages of the base are on record.")
    if not origin.licence:
        told.append("No licence of the base is on record; find it before you pass this on.")
    return told


def hashes(lineage: dict[str, Any]) -> dict[str, str]:
    """By what is hashed; an imported adapter has no data here."""
    found = {
        WEIGHTS: sha256([MERGED / WEIGHTS]),
        "weights of the base": lineage["base"]["sha256"],
    }
    for stage in lineage["stages"]:
        found[f"adapter of {stage['name']}"] = stage["sha256"]
        for dataset, digest in (stage.get("dataset_sha256") or {}).items():
            found[f"data of {dataset}"] = digest
    return found


def has_chat() -> bool:
    """Whether the model is asked in chats."""
    return (MERGED / "chat_template.jinja").exists() or "chat_template" in read_json(MERGED / "tokenizer_config.json")


def asked_how() -> str:
    """How the scores were made, which is how it is best asked."""
    how = "in its base's own chat format" if has_chat() else "in plain text"
    told = f"It was trained and scored {how}, with greedy answers"
    if read_json(MERGED / "generation_config.json").get("do_sample"):
        return f"{told}; `do_sample=False` asks for them, for its generation_config.json has it draw at random."
    return f"{told}, which its generation_config.json asks for."


def code(params: Params, model: str = str(FOLDER)) -> str:
    """Lines that load the model and ask it the shortest of the first questions of a skill."""
    question = example(params)
    answer = '[-1]["content"]' if isinstance(question, list) else ""
    text = json.dumps(question, ensure_ascii=False)
    trust = ", trust_remote_code=True" if "auto_map" in read_json(MERGED / "config.json") else ""
    return CODE.format(model=model, tokens=params.evaluate.max_new_tokens, trust=trust, question=text, answer=answer)


def example(params: Params) -> list[dict[str, str]] | str:
    """A question of the first merged stage's skill: messages of a chat, or plain text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MERGED, trust_remote_code=False)
    stage = next(name for name in params.stages if name in params.merge.weights)
    record = min(load_split(params.skills[stage], "eval")[:TRIED], key=lambda each: len(asked(each)))
    return _question(record, as_chat(record, tokenizer))


def _question(record: Record, chat: Any) -> list[dict[str, str]] | str:
    if chat:
        return [{"role": each["role"], "content": each["content"]} for each in chat.messages[:-1]]
    return record["prompt"] if "prompt" in record else " ".join(record.get("text", "Once upon a time").split()[:8])
