"""How the processes of a stage are started. No result depends on it, but for how many there are."""

import os
import shlex
import sys

from accelerate import Accelerator
from accelerate.utils import DistributedType

from stages.errors import MistakeError
from stages.settings.stage import Training
from stages.training.quantize import in_4bit
from stages.training.shard import is_divided

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
STARTED = "STRATA_LAUNCHED"  # the stage whose launcher was started, as some launchers do not tell
LAUNCHED = {STARTED, "LOCAL_RANK", "WORLD_SIZE"}  # what a process finds in its environment that a launcher has started
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(name: str, command: str, processes: int) -> None:
    """Become the launcher that starts this stage's processes, where there are to be several or the user has one.

    Args:
        name: of the stage.
        command: `launch` of params.yaml.
        processes: of the stage.

    Raises:
        MistakeError: there is no such command.
    """
    words = launcher(command, processes)
    if not words or LAUNCHED & os.environ.keys():
        return
    os.environ[STARTED] = name
    try:
        os.execvp(words[0], [*words, "-m", "stages.train", name])
    except OSError as error:
        raise MistakeError(
            f"params.yaml: launch starts with {words[0]!r}, which does not start ({error.strerror}); write python,"
            " torchrun or a command that is installed"
        ) from None


def launcher(command: str, processes: int) -> list[str]:
    """Words of the command that starts a stage's processes; none where one process trains alone.

    `python` and `torchrun` without more words start as many as the stage asks for.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MistakeError(f"params.yaml: launch {command!r} is no command ({error}); correct it") from None
    if words in ([], ["python"], ["torchrun"]):
        words = ["python", *TORCHRUN, str(processes)] if processes > 1 else []
    return [sys.executable if word == "python" else word for word in words]


def check_processes(name: str, stage: Training, accelerator: Accelerator) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        MistakeError: the launcher started another number of processes than the stage asks for, trains in a way that is
            not known here, or divides a model in four bits.
    """
    kind, started = accelerator.distributed_type, accelerator.num_processes
    if started != stage.processes:
        raise MistakeError(
            f"params.yaml: stages.{name}.processes is {stage.processes}, but launch started {started}; write processes:"
            f" {started}, or launch: torchrun, which starts as many as a stage asks for"
        )
    if kind not in REPLICATED and not is_divided(accelerator):
        raise MistakeError(
            f"params.yaml: launch asks for {kind.value}, which is not known here; take a config with distributed_type"
            " MULTI_GPU or FSDP, or python"
        )
    if is_divided(accelerator) and in_4bit(stage):
        raise MistakeError(
            f"params.yaml: stages.{name}.load_in_4bit does not go with launch, which asks for {kind.value}: four bits"
            " cannot be divided among processes; remove the key, or take a config with distributed_type MULTI_GPU"
        )
