"""`strata export model`: the merged model as others take it, in export/model.

The weights of merged/ (the same bytes, and on one disk not stored twice), its config and tokenizer, the card as
README.md, the picture of the evaluation, lineage.json, and a notebook that loads and asks it.
"""

import shutil

from analysis.telling.facts import gather
from stages.errors import MistakeError
from stages.files import MERGED, REPORTS, publish, write_json
from stages.project.params import load_params
from tools.exporting.card import FOLDER, code, make_card, tell
from tools.exporting.merge import WEIGHTS, copy_companions, link, read_lineage
from tools.exporting.notebook import make_notebook
from tools.exporting.origin import Origin, origin

PICTURE = "evaluation.svg"


def main(name: str, license: str | None) -> None:
    """Write export/model anew.

    Raises:
        MistakeError: merged/ holds no model, or another one than params.yaml describes; or the base has a licence that
            is not the one given.
    """
    params = load_params()
    lineage = read_lineage(params)
    if not (REPORTS / PICTURE).exists():
        raise MistakeError(f"{REPORTS / PICTURE} is missing; run `dvc repro`")
    facts, known = gather(params), with_licence(origin(params.base), license)
    with publish(FOLDER) as folder:
        copy_companions(folder)
        link(MERGED / WEIGHTS, folder / WEIGHTS)
        shutil.copyfile(REPORTS / PICTURE, folder / PICTURE)
        if known.licence_file:
            shutil.copyfile(known.licence_file, folder / known.licence_file.name)
        make_card(facts, known, lineage, name).save(folder / "README.md")
        write_json(folder / "notebook.ipynb", make_notebook(tell(facts, known, lineage, name), code(params, ".")))
    print(f"{FOLDER} holds {name}; its card is {FOLDER / 'README.md'}")
    if not known.licence:
        print("The licence of the base is not on record: with --license ID it is written into the card.")


def with_licence(known: Origin, given: str | None) -> Origin:
    """What is known, with the licence that was given where there is none."""
    if given is None:
        return known
    if known.licence and known.licence["license"] not in (given, "other"):
        raise MistakeError(f"--license {given}: the base says {known.licence['license']} of itself; leave it out")
    return Origin(known.id, {"license": given}, known.languages, known.quantised, known.licence_file)
