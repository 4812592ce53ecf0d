"""Files as people may have them, by mistake or malice: a result or one sentence, and never a traceback, foreign code,
or a file outside the outputs.

Each property is tried on a few inputs here, and all of them together on 10,000 with `-m exhaustive`.
"""

import ast
import copy
import gzip
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from stages import base, data, merge, pick, train
from stages.errors import MistakeError
from stages.files import ADAPTER, BASE, CHECKPOINTS, sha256
from stages.methods import METHODS
from stages.project.check import load_checked
from stages.project.params import Params
from stages.records.sources import SOURCES
from stages.weights.tensor_file import TensorFile
from tests.conftest import PARAMS, ROOT, make_base

EXAMPLES = pytest.mark.parametrize(
    "examples", [25, pytest.param(2500, marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)
CLASSES = [Params, *METHODS.values(), *SOURCES.values(), *(f.annotation for f in Params.model_fields.values())]
KEYS = sorted({key for each in CLASSES for key in getattr(each, "model_fields", {})})
WORDS = [
    *KEYS,
    *METHODS,
    *SOURCES,
    "base",
    "sums",
    "words",
    "all",
    "last 9",
    "0-9",
    "../up",
    "/etc/passwd",
    "x" * 300,  # no name of a file
    ".",
    "",
    "\ud83d",
]
TEXTS = st.sampled_from(WORDS) | st.text(max_size=5)
PLAIN = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.just(10**400) | TEXTS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
ODD = st.binary(max_size=6) | st.sampled_from([b"\xff\xfe", b"\x00", b"\n", b'"'])
BYTES = ODD | st.sampled_from([b"[" * 100_000, b'{"a":' * 20_000])
YAML_TEXTS = [
    *("2001-99-99", "!!int x", "!!float z", "!!timestamp x", "!!binary é", "!!set {a, b}", "!!omap [a]", "1:99", "0o9"),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "<<: 1",
        "<<: [1]",
        "%YAML 9.9\n---",
        "---\n",
        "\t",
    ),
    *("!!python/object/apply:os.system [touch ran]", "!evil", "{", "}", "[" * 3000, "\x07", "\ufffe", "1e999", ".nan"),
]


def tried(strategy, examples):
    """Run the function on that many examples of the strategy, always the same ones."""
    fixed = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    return lambda check: settings(max_examples=examples, **fixed)(given(strategy)(check))()


def places(tree):
    """Every container of a tree with each of its keys."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


@st.composite
def changed(draw, tree):
    """A tree of dicts and lists of which one to three places hold something else, are gone, or have another name."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        owner, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])):
            case "replace":
                owner[key] = draw(VALUES)
            case "rename" if isinstance(owner, dict):
                owner[draw(TEXTS)] = owner.pop(key)
            case "add" if isinstance(owner, dict):
                owner[draw(TEXTS)] = draw(VALUES)
            case _:
                del owner[key]
    return tree


@st.composite
def spliced(draw, content, pieces=BYTES):
    """Bytes of which one or two stretches are replaced."""
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 40, len(content))) | st.just(start))
        content = content[:start] + draw(pieces) + content[end:]
    return content


def files():
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file() or path.is_symlink()}


@contextmanager
def result_or_sentence(*outputs):
    """Within the block there may be a MistakeError of one line; nothing but the outputs is written."""
    before, imported = files(), set(sys.modules)
    try:
        yield
    except MistakeError as mistake:
        assert str(mistake).splitlines() == [str(mistake)]
    after = files()
    for path in after.keys() | before.keys():
        assert after.get(path) == before.get(path) or any(path.is_relative_to(each) for each in outputs), path
    assert not {name for name in sys.modules.keys() - imported if "evil" in name}


@EXAMPLES
def test_params(project, examples):
    path, tree = Path("params.yaml"), YAML(typ="safe").load(PARAMS)
    texts = spliced(PARAMS.encode(), ODD | st.sampled_from(YAML_TEXTS).map(str.encode))

    @tried(changed(tree).map(lambda tree: json.dumps(tree).encode()) | texts, examples)
    def check(content):
        path.write_bytes(content)
        with result_or_sentence():
            load_checked()


ROWS = [
    *({"prompt": f"{a}+1=", "completion": str(a + 1), "weight": 1.0, "spans": [[0, 1, 2.0]]} for a in range(3)),
    *(
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "tools": []}
        for _ in "ab"
    ),
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "abc"},
    {"input_ids": [1, 2, 3], "loss_weights": [0, 1, 1]},
]


def as_lines(rows):
    return "\n".join(map(json.dumps, rows)).encode()


def as_table(rows):
    """Rows as a parquet file, or nothing where a table has no type for them."""
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
        return b""
    return sink.getvalue().to_pybytes()


CSV = b'prompt,completion,weight\r\n1+1=,2,1\r\n"2,5+1=","3\n4",\r\n3+1=,4,0.5\r\n'
TABLE = as_table(ROWS[:3])
SOURCE_FILES = {
    ".jsonl": changed(ROWS).map(as_lines) | st.sampled_from(ROWS).flatmap(lambda row: changed([row] * 3)).map(as_lines)
    | spliced(as_lines(ROWS)),
    ".json": changed(ROWS).map(lambda rows: json.dumps(rows).encode())
    | changed({"data": ROWS[:3]}).map(lambda rows: json.dumps(rows).encode()) | spliced(json.dumps(ROWS).encode()),
    ".csv": spliced(CSV, BYTES | st.sampled_from([b",", b'"', b"\r", b"\n", b";", b"\t"])),
    ".tsv": spliced(CSV.replace(b",", b"\t")),
    ".parquet": st.sampled_from(ROWS).flatmap(lambda row: changed([row] * 3)).map(as_table) | spliced(TABLE),
    ".jsonl.gz": spliced(gzip.compress(as_lines(ROWS), mtime=0)),
}  # fmt: skip


@EXAMPLES
@pytest.mark.parametrize("kind", SOURCE_FILES)
def test_records(project, kind, examples):
    settings = changed({"source": "file", "path": f"rows{kind}", "eval": 1, "columns": {}, "score": "auto"})

    @tried(st.tuples(SOURCE_FILES[kind], st.none() | settings), -(-examples // 4))
    def check(drawn):
        content, dataset = drawn
        Path(f"rows{kind}").write_bytes(content)
        tree = YAML(typ="safe").load(PARAMS)
        tree["datasets"]["sums"] = dataset or {"source": "file", "path": f"rows{kind}", "eval": 1}
        Path("params.yaml").write_text(json.dumps(tree))
        with result_or_sentence("data", "reports/data"):
            data.main("sums")


@EXAMPLES
def test_tensors(examples):
    content = (make_base("qwen2") / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8:length]), content[length:]
    dtypes = st.sampled_from(["F8_E4M3", "F4", "U64", "C64", "I8", "BF16", "F64"])

    def whole(text):
        return len(text).to_bytes(8, "little") + text + rest

    retyped = st.tuples(st.sampled_from(sorted(header)), dtypes).map(
        lambda drawn: header | {drawn[0]: {"dtype": drawn[1], "shape": [0], "data_offsets": [0, 0]}}
    )
    headers = (changed(header) | retyped).map(lambda tree: whole(json.dumps(tree).encode()))
    path = Path("a.safetensors")

    @tried(headers | spliced(content[:length]).map(lambda start: start + rest), examples)
    def check(content):
        path.write_bytes(content)
        with result_or_sentence():
            file = TensorFile(path)
            for name in file:
                assert list(file.read(name).shape) == file.specification(name)[0]
                assert sum(piece.numel() for piece in file.pieces(name)) == file.read(name).numel()


EVIL = "from pathlib import Path\n\nPath('ran').touch()\n"
AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
FOREIGN = {
    "a type that is known": {"auto_map": AUTO},
    "a type that is not known": {"auto_map": AUTO, "model_type": "evil"},
    "no type": {"auto_map": AUTO, "model_type": None},
    "another repository": {"auto_map": {name: f"owner/evil--{place}" for name, place in AUTO.items()}},
}


def test_nothing_is_loaded_that_could_bring_code_with_it():
    files = [path for folder in ("stages", "analysis", "tools") for path in (ROOT / folder).rglob("*.py")]
    calls = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [
        ast.unparse(call) for call in calls if getattr(call.func, "attr", "") in ("from_pretrained", "from_config")
    ]
    loads = [load for load in loads if not load.startswith(("PeftConfig", "PeftModel"))]
    assert len(loads) > 10
    assert [load for load in loads if "trust_remote_code" not in load and "**settings" not in load] == []


@pytest.mark.parametrize("case", FOREIGN)
def test_code_that_comes_with_a_base_is_never_run(project, case, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    Path("model/evil.py").write_text(EVIL)
    for name in ("config.json", "tokenizer_config.json"):
        path = Path("model", name)
        path.write_text(json.dumps(json.loads(path.read_text()) | FOREIGN[case]))
    with result_or_sentence("checkpoints"):
        base.main()
    assert not list(Path().glob("**/ran")) and not list(Path("checkpoints").glob("**/evil.py"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "part/model.safetensors", 7, None])
def test_an_index_that_leads_out_of_its_folder_is_refused(project, name):
    shutil.copy("model/model.safetensors", "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MistakeError, match=r"model/model.safetensors.index.json names .*, which is no file of its"):
        base.main()


BASE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@EXAMPLES
def test_bases(project, examples):
    originals = {name: (Path("model") / name).read_bytes() for name in BASE_FILES}

    def other(name):
        spoiled = spliced(originals[name])
        if name.endswith(".json"):
            spoiled |= changed(json.loads(originals[name])).map(lambda tree: json.dumps(tree).encode())
        return st.tuples(st.just(name), spoiled)

    @tried(st.sampled_from(BASE_FILES).flatmap(other), -(-examples // 4))
    def check(drawn):
        for name, content in originals.items():
            Path("model", name).write_bytes(content)
        Path("model", drawn[0]).write_bytes(drawn[1])
        with result_or_sentence("checkpoints"):
            base.main()


@EXAMPLES
def test_adapters(project, examples):
    """One that is taken is merged as well."""
    base.main()
    for name in ("sums", "words"):
        data.main(name)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained("outside")
    Path("evil.py").write_text(EVIL)
    originals = {name: (Path("outside") / name).read_bytes() for name in ADAPTER}
    config = json.loads(originals[ADAPTER[0]])
    tensors = originals[ADAPTER[1]]
    length = 8 + int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8:length])

    def whole(tree):
        text = json.dumps(tree).encode()
        return len(text).to_bytes(8, "little") + text + tensors[length:]

    foreign = {"megatron_config": {"a": 1}, "megatron_core": "evil", "auto_mapping": {"parent_library": "evil"}}
    configs = (changed(config) | changed(config | foreign)).map(lambda tree: json.dumps(tree).encode())
    drawn = st.tuples(st.just(ADAPTER[0]), configs | spliced(originals[ADAPTER[0]]))
    drawn |= st.tuples(
        st.just(ADAPTER[1]), changed(header).map(whole) | spliced(tensors[:length]).map(lambda t: t + tensors[length:])
    )
    tree = YAML(typ="safe").load(PARAMS)
    tree["merge"]["weights"] = {"sums": 1.0}
    del tree["stages"]["words"]

    @tried(drawn, -(-examples // 4))
    def check(drawn):
        for name, content in originals.items():
            Path("outside", name).write_bytes(content)
        Path("outside", drawn[0]).write_bytes(drawn[1])
        pin = sha256(Path("outside") / name for name in ADAPTER)
        own = {"parent": "base", "dataset": "sums", "method": "import", "path": "outside", "sha256": pin}
        Path("params.yaml").write_text(json.dumps(tree | {"stages": {"sums": own}}))
        shutil.rmtree(CHECKPOINTS / "sums", ignore_errors=True)
        with result_or_sentence("checkpoints", "reports/train"):
            train.main("sums")
        if (CHECKPOINTS / "sums").exists():
            pick.main("checkpoints")
            try:
                merge.main()
            except MistakeError as mistake:
                assert "is not finite" in str(mistake)
        assert not Path("ran").exists()
