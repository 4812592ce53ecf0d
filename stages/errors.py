"""Mistakes that a user can mend, told in one sentence instead of a traceback; and how a stage ends."""

import ctypes
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
TIMES = Path(".dvc/tmp/times.jsonl")  # what each stage took here, for `strata plan`


class MistakeError(Exception):
    """Something in a file the user wrote is wrong; the message names the file, the key and the fix.

    It is one line, even where a name in the file has more.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.splitlines()))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the sentence alone."""
        return [f"error: {self}"]


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Within the block the sentence of a mistake begins with `where`, such as `params.yaml: stages.sums.`."""
    try:
        yield
    except MistakeError as mistake:
        raise MistakeError(f"{where}{mistake}") from None


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(main: Callable[..., None], *args: str, **named: Any) -> None:
    """Call `main`; on a MistakeError, a full disk or a read-only file, say so on stderr and exit with code 1."""
    if sys.platform == "win32":
        sys.exit("error: Strata runs on Linux and macOS; on Windows, run it in WSL")
    if "DVC_STAGE" in os.environ:
        end_with_parent()
    try:
        main(*args, **named)
        sys.stdout.flush()
    except MistakeError as mistake:
        sys.exit(f"error: {mistake}")
    except KeyboardInterrupt:
        sys.exit("stopped; the next run goes on from here")
    except BrokenPipeError:  # who read what is printed, as `head` does, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails once more at its end
    except Exception as error:
        if _system_error(error) not in NO_ROOM:
            raise
        file = getattr(error, "filename", None) or "a file"
        sys.exit(f"error: {file} cannot be written ({first_line(error)}); give it room, and the right to be written")
    if "DVC_STAGE" in os.environ:
        note_time()


def note_time() -> None:
    """Add to TIMES what this stage took since its process started; no result depends on it."""
    import psutil  # it is of use here alone

    entry = {"stage": os.environ["DVC_STAGE"], "seconds": round(time.time() - psutil.Process().create_time(), 1)}
    with suppress(OSError), Path(os.environ.get("DVC_ROOT", "."), TIMES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def end_with_parent() -> None:
    """Let the system kill this process when its parent ends, where it is Linux.

    A stage whose dvc was killed would go on, and write what the next `dvc repro` writes and hashes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _system_error(error: Exception) -> int | None:
    """The system's number of an error, which libraries in Rust have in their text alone."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return error.errno if isinstance(error, OSError) else int(told[1]) if told else None
