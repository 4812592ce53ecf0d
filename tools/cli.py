"""The command `strata`: what a person runs by hand, each command a module beside this one."""

import argparse
import importlib
import io
import sys
from pathlib import Path

from stages.errors import MistakeError, run
from stages.settings.section import nearest

COMMANDS = {
    "check": "whether params.yaml is right, and what it means on this machine",
    "plan": "what dvc repro would run now and why, and how long that takes",
    "run": "what dvc repro does, with independent stages side by side",
    "watch": "the loss of the stage in training, drawn as it goes",
    "show": "training examples token by token, with their weights",
    "view": "the report: its headline here, its page in the browser",
    "answers": "what the models answer to the questions of a skill, side by side",
    "chat": "a chat with base, stages and the merged model, one or several side by side",
    "serve": "the same models under OpenAI's interface on 127.0.0.1",
    "experiments": "all experiments side by side, as a table and a page",
    "compare": "what sets any models apart, layer by layer",
    "verify": "how much of each adapter is in a file that anybody merged, and what is wrong with it",
    "gate": "whether the merged model may pass: what it lost and kept, by the rules of params.yaml",
    "search": "better weights for the merge, found on the tuning splits",
    "export": "the model to take away: with its card, as GGUF, LoRA or shards, to the hub",
    "provenance": "how a file was made, from its own metadata",
    "docs": "the generated parts of docs/ anew",
}


def main() -> None:
    """Run the command that the first word names."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # For a terminal that is not in UTF-8, as stderr has it; and whoever reads a log while it grows.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--print-completion":
        run(print_completion, " ".join(words))
        return
    if name not in COMMANDS:
        sys.exit(f"error: strata has no command {name!r}; {nearest(name, COMMANDS)}")
    module = importlib.import_module(f"tools.{name}")
    parser = argparse.ArgumentParser(f"strata {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.")
    module.add_arguments(parser)
    run(module.main, **vars(parser.parse_args(words)))


def print_completion(shell: str) -> None:
    """Print the script by which a shell completes commands and their options.

    Raises:
        MistakeError: shtab writes none for this shell.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise MistakeError(f"--print-completion knows no shell {shell!r}; take {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser("strata")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        importlib.import_module(f"tools.{name}").add_arguments(command)
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))


def overview() -> str:
    """All commands, a line each."""
    lines = [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    more = ["`strata COMMAND --help` tells more of one.", "`strata --print-completion bash` (or zsh): for the Tab key."]
    return "\n".join(["usage: strata COMMAND …", "", *lines, "", *more])


if __name__ == "__main__":
    main()
