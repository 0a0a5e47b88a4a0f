"""`halfstep <command> --flags`: a command's signature is its interface; nothing is imported before it is called."""

import contextlib
import errno
import functools
import importlib
import io
import sys
from collections.abc import Callable

COMMANDS = {  # name: (module:function, what it does)
    "prepare-corpus": (
        "halfstep.commands.data:prepare_corpus",
        "write tokens, tokenizer and held-out split of a corpus",
    ),
    "pretrain": (
        "halfstep.commands.train:pretrain",
        "train the teacher, a masked diffusion language model",
    ),
    "train-baseline": (
        "halfstep.commands.train:train_baseline",
        "train the autoregressive peer: baseline, and judge at laptop scale",
    ),
    "import": (
        "halfstep.commands.publish:import_checkpoint",
        "make a checkpoint of published weights (MDLM, SDTT), from a file or the hub",
    ),
    "export": (
        "halfstep.commands.publish:export_checkpoint",
        "write a folder that transformers loads, with a model card, and push it",
    ),
    "distill-round": (
        "halfstep.commands.distill:distill_round",
        "one round of SDTT: the student learns two teacher steps in one",
    ),
    "generate": (
        "halfstep.commands.generate:generate",
        "draw samples from a checkpoint at one step count",
    ),
    "score-samples": (
        "halfstep.commands.evaluate:score_samples",
        "generative perplexity, entropy and consistency of samples",
    ),
    "score-corpus": (
        "halfstep.commands.evaluate:score_corpus",
        "the same measures of held-out text itself",
    ),
    "score-lambada": (
        "halfstep.commands.evaluate:score_lambada",
        "last-word accuracy and perplexity through lm-eval",
    ),
    "continue-prompts": (
        "halfstep.commands.continuations:continue_prompts",
        "continue the beginnings of held-out documents",
    ),
    "score-continuations": (
        "halfstep.commands.continuations:score_continuations",
        "MAUVE, self-BLEU and perplexity of continuations",
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
        "gather the records of all artefacts in results/provenance.json",
    ),
    "verify": (
        "halfstep.commands.verify:verify",
        "recompute all checksums, and name what is changed, missing or stale",
    ),
    "fetch": (
        "halfstep.commands.fetch:fetch",
        "bring text, tokenizers, judges and weights from the hub, for nodes without internet",
    ),
    "plan": (
        "halfstep.commands.plan:plan",
        "price the graph: GPU-hours, disk and longest path, before anything is submitted",
    ),
    "doctor": (
        "halfstep.commands.doctor:doctor",
        "look at Slurm, GPUs, disks, hub cache and MLflow, and say what to do",
    ),
    "summary": (
        "halfstep.commands.report:summary",
        "print the tables, two texts and where everything lies",
    ),
    "write-schema": (
        "halfstep.commands.config:write_schema",
        "write the JSON schema of config.yaml, for editors",
    ),
}

MENDS = {  # what the file system refused: what to do
    errno.EACCES: "you may not read or write there: change its permissions, or name another place",
    errno.EPERM: "you may not read or write there: change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOTDIR: "a part of the path is a file: move that away, or name another place",
    errno.EEXIST: "where a folder is needed there is a file: move that away, or name another place",
    errno.EISDIR: "where a file is needed there is a folder: name a file",
    errno.ENOENT: "check the path, or run the step that makes it",
    errno.ENOSPC: "free some space, or name another disk, and give the same command again",
    errno.EDQUOT: "free some space, or name another disk, and give the same command again",
}


def usage() -> str:
    rows = "\n".join(f"  {name:19} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: halfstep <command> [--flags]     (halfstep <command> --help lists a command's flags)\n\n{rows}"


def arguments(command: Callable, argv: list[str]) -> dict:
    """A command's arguments from its flags. What a section of the configuration refuses is its ValidationError; tyro explains the rest and exits."""
    import tyro
    from pydantic import ValidationError

    from halfstep.distributed import launch

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = functools.wraps(command)(lambda **given: given)
            return tyro.cli(
                given,
                prog=f"halfstep {argv[0]}",
                args=argv[1:],
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as error:
        cause: BaseException | None = error
        while cause := cause.__context__:  # tyro draws a box around pydantic's message
            if isinstance(cause, ValidationError):
                raise cause from None
        if not launch.already_printed(said.getvalue()):
            sys.stderr.write(said.getvalue())
        raise


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, 1, 0.4)
        print(
            f"halfstep: unknown command {argv[0]!r}"
            + (f"; did you mean {near[0]}?" if near else "; see halfstep --help"),
            file=sys.stderr,
        )
        return 2
    from halfstep.distributed import launch
    from halfstep.errors import HalfstepError

    if (processes := launch.processes_requested(argv)) > 1:
        try:
            return launch.launch(argv, processes)
        except HalfstepError as error:
            print(f"halfstep {argv[0]}: {error}", file=sys.stderr)
            return 1
    launch.die_with_launcher()
    import pydantic

    from halfstep.records import provenance
    from halfstep.resolve import explain

    def refuse(*lines: str) -> int:
        text = "\n".join(f"halfstep {argv[0]}: {line}" for line in lines)
        if not launch.already_printed(text):
            print(text, file=sys.stderr)
        return 1

    provenance.begin_record(["halfstep", *argv])
    module, function = COMMANDS[argv[0]][0].split(":")
    command = getattr(importlib.import_module(module), function)
    try:
        given = arguments(command, argv)
        if "machine" in given:
            from halfstep.distributed.device import prepare_process

            prepare_process(given["machine"])
        command(**given)
    except pydantic.ValidationError as error:
        return refuse(*explain(error))
    except HalfstepError as error:
        return refuse(str(error))
    except OSError as error:
        if error.errno is None:  # not the file system's
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return refuse(f"{where}{error.strerror}; {MENDS.get(error.errno, 'check the path')}")
    if processes := sys.modules.get(
        "halfstep.distributed.group"
    ):  # not where all went ill: to part in good order takes all
        processes.leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
