"""`halfstep <command> --flags`: the signature of a command's function is its interface.

The module of a command is imported only when that command is called.
"""

import contextlib
import difflib
import errno
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from halfstep.sanitize import guard_output, one_line, remember_secrets

COMMANDS = {  # name: (module:function, what it does)
    "prepare-corpus": (
        "halfstep.commands.data:prepare_corpus",
        "write the tokens, tokenizer and held-out split of a corpus",
    ),
    "pretrain": (
        "halfstep.commands.train:pretrain",
        "train the teacher, a masked diffusion language model",
    ),
    "train-baseline": (
        "halfstep.commands.train:train_baseline",
        "train the autoregressive baseline, which is also the judge at laptop scale",
    ),
    "import": (
        "halfstep.commands.publish:import_checkpoint",
        "make a checkpoint of published weights (MDLM, SDTT), from a file or the hub",
    ),
    "export": (
        "halfstep.commands.publish:export_checkpoint",
        "write a folder for transformers, with a model card, and push it to the hub",
    ),
    "distill-round": (
        "halfstep.commands.distill:distill_round",
        "run one round of SDTT: one student step replaces several teacher steps",
    ),
    "generate": (
        "halfstep.commands.generate:generate",
        "draw samples from a checkpoint at one step count",
    ),
    "score-samples": (
        "halfstep.commands.evaluate:score_samples",
        "measure generative perplexity, entropy and consistency of samples",
    ),
    "score-corpus": (
        "halfstep.commands.evaluate:score_corpus",
        "measure the same for held-out text",
    ),
    "score-lambada": (
        "halfstep.commands.evaluate:score_lambada",
        "measure last-word accuracy and perplexity through lm-eval",
    ),
    "continue-prompts": (
        "halfstep.commands.continuations:continue_prompts",
        "continue the beginnings of held-out documents",
    ),
    "score-continuations": (
        "halfstep.commands.continuations:score_continuations",
        "measure MAUVE, self-BLEU and perplexity of continuations",
    ),
    "latency": (
        "halfstep.commands.benchmark:latency",
        "time students at each step count against autoregressive baselines",
    ),
    "tabulate": ("halfstep.commands.report:tabulate", "gather metric rows into tables"),
    "plot": ("halfstep.commands.report:plot", "draw one figure from the tables"),
    "track": ("halfstep.commands.track:track", "send the journals to MLflow, idempotently"),
    "merge-provenance": (
        "halfstep.commands.verify:merge_provenance",
        "gather the records of all artifacts in results/provenance.json",
    ),
    "verify": (
        "halfstep.commands.verify:verify",
        "recompute all checksums, and list what is changed, missing or stale",
    ),
    "fetch": (
        "halfstep.commands.fetch:fetch",
        "download text, tokenizers, judges and weights for nodes without internet",
    ),
    "plan": (
        "halfstep.commands.plan:plan",
        "estimate GPU-hours, disk space and the longest path of the graph",
    ),
    "doctor": (
        "halfstep.commands.doctor:doctor",
        "check Slurm, GPUs, disks, hub cache and MLflow, and say what to do",
    ),
    "summary": (
        "halfstep.commands.report:summary",
        "print the tables, two texts and the places of the results",
    ),
    "write-schema": (
        "halfstep.commands.config:write_schema",
        "write the JSON schema of config.yaml, for editors",
    ),
}

PERMISSION = "you may not read or write there: change its permissions, or name another place"
SPACE = "free some space, or name another disk, and give the same command again"
ADVICE = {  # error of the file system: what to do
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "name a place that can be written",
    errno.ENOTDIR: "a part of the path is a file: move it away, or name another place",
    errno.EEXIST: "there is a file where a folder is needed: move it away, or name another place",
    errno.EISDIR: "there is a folder where a file is needed: name a file",
    errno.ENOENT: "check the path, or run the step that makes it",
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
}


def usage() -> str:
    """The text of `halfstep --help`."""
    head = "usage: halfstep <command> [--flags]     (halfstep <command> --help lists its flags)"
    rows = [f"  {name:19} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([head, "", *rows])


def parse_arguments(command: Callable[..., None], name: str, words: list[str]) -> dict[str, Any]:
    """The arguments of the command `name` from its flags.

    Raises ValidationError for a value that a section of the configuration refuses, HalfstepError
    for one that a renamed flag refuses. tyro explains any other fault and exits.
    """
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # colors are control characters
    import tyro
    from pydantic import ValidationError

    from halfstep.renamed import rename_flags

    words, notices = rename_flags(words, command)
    for notice in notices:
        _print_once(f"halfstep {name}: {notice}\n")
    collect = functools.wraps(command)(lambda **given: given)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            flat = (tyro.conf.OmitArgPrefixes,)
            return tyro.cli(collect, prog=f"halfstep {name}", args=words, config=flat)
    except SystemExit as error:
        cause = error.__context__
        while cause is not None:  # tyro draws a box around pydantic's message
            if isinstance(cause, ValidationError):
                raise cause from None
            cause = cause.__context__
        _print_once(printed.getvalue())
        raise


def _print_once(text: str) -> None:
    """Print to stderr what no other process of this launcher has printed."""
    from halfstep.distributed import launch

    if not launch.already_printed(text):
        sys.stderr.write(text)


def _refuse(name: str, *faults: str) -> int:
    """Print the faults of a command, one line each; the exit code."""
    _print_once("".join(f"halfstep {name}: {one_line(fault)}\n" for fault in faults))
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command that argv names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    remember_secrets(argv)
    guard_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *words = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else "see halfstep --help"
        print(f"halfstep: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    from halfstep.distributed import launch
    from halfstep.errors import HalfstepError

    processes = launch.processes_requested(argv)
    if processes > 1:
        try:
            return launch.launch(argv, processes)
        except HalfstepError as error:
            return _refuse(name, str(error))
    launch.die_with_launcher()
    import pydantic

    from halfstep.records import provenance
    from halfstep.resolve import explain

    provenance.begin_record(["halfstep", *argv])
    module, function = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), function)
    try:
        given = parse_arguments(command, name, words)
        if "machine" in given:
            from halfstep.distributed.device import prepare_process

            prepare_process(given["machine"])
        command(**given)
    except pydantic.ValidationError as error:
        return _refuse(name, *explain(error))
    except HalfstepError as error:
        return _refuse(name, str(error))
    except OSError as error:
        if error.errno is None:  # not from the file system
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        advice = ADVICE.get(error.errno, "check the path")
        return _refuse(name, f"{where}{error.strerror}; {advice}")
    # Only after success, because destroy_process_group needs every rank.
    if group := sys.modules.get("halfstep.distributed.group"):
        group.leave_group()
    return 0


def program() -> None:
    """The program `halfstep`: run main, and end with its exit code."""
    from halfstep.distributed.launch import end_process

    try:
        code: object = main()
    except SystemExit as end:
        code = end.code or 0
        end_process(code)  # here: the exception keeps what torch holds
    except Exception:
        sys.excepthook(*sys.exc_info())
        end_process(1)
    end_process(code)


if __name__ == "__main__":
    program()
