"""`strata export shards`: the merged model in several files with an index, as transformers reads them."""

from typing import Any

from huggingface_hub.serialization import split_state_dict_into_shards_factory

from stages.errors import MistakeError
from stages.files import MERGED, publish, write_json
from stages.project.params import load_params
from stages.weights.single_file import single_file
from stages.weights.tensor_file import TensorFile
from stages.weights.tensor_file import size as size_of
from tools.exporting.merge import EXPORT, WEIGHTS, copy_companions, read_lineage

FOLDER = EXPORT / "shards"


def main(size: str) -> None:
    """Write export/shards, a piece of a tensor in memory at a time; the numbers are those of merged/, byte for byte.

    Raises:
        MistakeError: `size` is none, or merged/ is not the model that params.yaml describes.
    """
    read_lineage(load_params())
    source = TensorFile(MERGED / WEIGHTS)
    plan = split(source, size)
    with publish(FOLDER) as folder:
        copy_companions(folder)
        for file, names in plan.filename_to_tensors.items():
            specifications = {name: source.specification(name) for name in names}
            with single_file(folder / file, specifications, source.metadata) as shard:
                for name in names:
                    shard.put_pieces(name, source.pieces(name))
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(folder / f"{WEIGHTS}.index.json", index)
    print(f"{FOLDER}: {len(plan.filename_to_tensors)} files of at most {size}")


def split(source: TensorFile, size: str) -> Any:
    """Which tensor goes into which file, by huggingface_hub's own rule; one that is larger than `size` has its own."""
    try:
        return split_state_dict_into_shards_factory(
            {name: source.specification(name) for name in source},
            get_storage_size=size_of,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=size,
        )
    except ValueError:
        raise MistakeError(f"--size {size} is no size; write it as 2GB or 500MB") from None
