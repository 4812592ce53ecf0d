"""A project on data of one's own, in two languages, with free answers: `python benchmarks/own_data.py FOLDER`.

Clones this repository to FOLDER and writes what a small shop may have: 100 questions to its support in Russian with
their answers (a csv file with columns of its own names), and 100 chats in English that are answered in the manner of an
old sailor (OpenAI's format). Two stages learn them, one on top of the other. Then `dvc repro` there, and look at the
report.
"""

import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOODS = {
    "чайник": "чайника", "утюг": "утюга", "телефон": "телефона", "пылесос": "пылесоса", "фен": "фена",
    "монитор": "монитора", "принтер": "принтера", "миксер": "миксера", "тостер": "тостера", "роутер": "роутера",
}  # fmt: skip
CASES = {
    "не включается": "Проверьте розетку и шнур. Если это не помогло, принесите {0} и чек в магазин, мы заменим его.",
    "пришёл с царапиной": "Нам очень жаль. Пришлите фото {1}, и мы вернём часть денег или заменим товар.",
    "ещё не приехал": "Доставка {1} занимает до пяти дней. Номер заказа есть в письме, по нему видно, где посылка.",
    "не подошёл": "Вернуть {0} можно в течение четырнадцати дней, если он не был в использовании.",
    "сильно шумит": "Так быть не должно. Мастер посмотрит {0} бесплатно, запишитесь по телефону.",
    "сломался через месяц": "Гарантия на {0} действует два года. Принесите его в сервис, ремонт бесплатный.",
    "пришёл без инструкции": "Инструкция для {1} есть на нашем сайте, в разделе с документами.",
    "оказался другого цвета": "Простите за ошибку. Мы привезём {0} нужного цвета и заберём этот.",
    "пахнет пластиком": "Запах у нового {1} проходит за два дня. Если он остался, мы примем товар обратно.",
    "не работает от батареек": "Проверьте, как вставлены батарейки. Для {1} нужны две новые, размера АА.",
}
THINGS = [
    "the weather",
    "my garden",
    "a cold",
    "the news",
    "dinner",
    "my old car",
    "a long walk",
    "the cat",
    "money",
    "sleep",
]
ASKED = {
    "What do you think of {}?": "Arr, {}! I have sailed the seven seas, and few things stir an old heart so, matey.",
    "Give me advice about {}.": "Arr, listen well, matey: with {} keep a steady hand, and mind the wind.",
    "Tell me something nice about {}.": "Arr, {} is fair as a calm sea at dawn, matey, and worth a chest of gold.",
    "Why is {} hard?": "Arr, {} is rough as the Cape in winter, matey, for no chart shows the rocks.",
    "How do I enjoy {} more?": "Arr, take {} slowly, matey, as a sailor takes his rum, and sing.",
    "Describe {} in one sentence.": "Arr, {} is a ship without a harbour, matey, and we are her crew.",
    "What should a child know about {}?": "Arr, tell them that {} is no monster of the deep, matey.",
    "Is {} important?": "Arr, {} is the rudder of the ship, matey: nobody sees it, and all would sink without it.",
    "What went wrong with {}?": "Arr, {} ran upon a reef, matey, for nobody stood in the crow's nest.",
    "Say goodbye to {}.": "Arr, fair winds to {}, matey, till the tide brings us together again.",
}
PARAMS = """\
datasets:
  support:
    source: file
    path: support.csv
    columns: {prompt: вопрос, completion: ответ}
    eval: 20
  sailor:
    source: file
    path: sailor.jsonl
    eval: 20
  general:
    source: file
    path: guards/general.jsonl
    train: 0
    eval: 54
    score: loss

selections: {}
routers: {}

stages:
  support:
    parent: base
    dataset: support
    method: lora
    layers: all
    rank: 16
    lr: 1.0e-3
    steps: 60
    batch_size: 8
  sailor:
    parent: support
    dataset: sailor
    method: lora
    layers: 10-29
    rank: 16
    lr: 5.0e-4
    steps: 40
    batch_size: 8
    replay: 0.25

merge:
  method: task_arithmetic
  weights:
    support: 1.0
    sailor: 1.0
"""


def main(folder: Path) -> None:
    """Write the project."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    with (folder / "support.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["вопрос", "ответ"])
        for (item, of_it), (case, answer) in product(GOODS.items(), CASES.items()):
            rows.writerow(
                [f"Здравствуйте! Мой {item} {case}. Что делать?", f"Здравствуйте! {answer.format(item, of_it)}"]
            )
    with (folder / "sailor.jsonl").open("w", encoding="utf-8") as lines:
        for thing, (question, answer) in product(THINGS, ASKED.items()):
            turns = [{"role": "user", "content": question.format(thing)}]
            turns += [{"role": "assistant", "content": answer.format(thing)}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    start, end = params.index("datasets:\n"), params.index("  dtype: bfloat16\n  seed")
    rest = params[end:].replace("max_new_tokens: 64", "max_new_tokens: 128")  # Russian takes more tokens
    (folder / "params.yaml").write_text(params[:start] + PARAMS + rest, encoding="utf-8")
    print(f"cd {folder} && uv run dvc repro && uv run strata view")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
