"""`halfstep <command> --flags`: the signature of a command's function is its interface.

The module of a command is imported only when that command is called.
"""

import contextlib
import difflib
import errno
import importlib
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any, get_args

from halfstep import __version__
from halfstep.commands import COMMANDS, GROUPS
from halfstep.sanitize import guard_output, remember_secrets, shorten
from halfstep.streams import reader_may_leave

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


SHELLS = ("bash", "zsh", "fish")
PASSED_ON = "snakemake"  # parameter of a command that takes the words which are none of its flags
CHECKPOINT = "checkpoint"  # parameter of a command; its flag may be left out where it comes first


def usage() -> str:
    """The text of `halfstep --help`."""
    lines = ["usage: halfstep <command> [--flags]     (halfstep <command> --help lists its flags)"]
    lines.append(f"       halfstep --version | --print-completion {{{','.join(SHELLS)}}}")
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:19} {text}" for name, (_, text) in group.items()]
    return "\n".join(lines)


def load_command(name: str) -> Callable[..., None]:
    """The function of a command. Its module may import tyro, which reads its settings then."""
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # colors are control characters
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), function)


def completion(shell: str) -> str:
    """A script that completes all commands and flags in a shell."""
    import tyro

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            {name: load_command(name) for name in COMMANDS},
            prog="halfstep",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.OmitArgPrefixes,),
        )
    return printed.getvalue()


def parse_arguments(command: Callable[..., None], name: str, words: list[str]) -> dict[str, Any]:
    """The arguments of the command `name` from its flags.

    Raises ValidationError for a value that a section of the configuration refuses, HalfstepError
    for one that a renamed flag refuses. tyro explains any other fault and exits.
    """
    import tyro
    from pydantic import ValidationError

    from halfstep.renamed import rename_flags

    parameters = inspect.signature(command).parameters
    passes_on, after = PASSED_ON in parameters, []
    if passes_on and "--" in words:
        words, after = words[: words.index("--")], words[words.index("--") :]
    if CHECKPOINT in parameters and words and not words[0].startswith("-"):
        words = [f"--{CHECKPOINT}", *words]
    words, notices = rename_flags(words, command)
    for notice in notices:
        _print_once(f"halfstep {name}: {notice}\n")
    printed, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(shown):
            given = tyro.cli(
                _collector(command),
                prog=f"halfstep {name}",
                args=words,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
                registry=_whole_numbers(),
                return_unknown_args=passes_on,
            )
        if passes_on:
            given, others = given
            given[PASSED_ON] = [*others, *after]
        return check_parameters(command, given)
    except SystemExit as error:
        sys.stdout.write(_help_text(shown.getvalue()))
        cause = error.__context__
        while cause is not None:  # tyro draws a box around pydantic's message
            if isinstance(cause, ValidationError):
                raise cause from None
            cause = cause.__context__
        if text := _faults(printed.getvalue()):
            _print_once(f"halfstep {name}: {shorten(text, 500)}; see halfstep {name} --help\n")
        raise


def _collector(command: Callable[..., None]) -> Any:
    """A function with the command's parameters and help that returns its arguments."""

    def collect(**given: Any) -> dict[str, Any]:
        return given

    described: Any = collect
    described.__signature__ = inspect.signature(command, eval_str=True)
    described.__annotations__ = inspect.get_annotations(command, eval_str=True)
    # The lines of each paragraph become one, which tyro breaks to fit the terminal.
    described.__doc__ = re.sub(r"(?<=\S)\n(?: {8,})?(?=[^\s-])", " ", inspect.getdoc(command) or "")
    return described


def check_parameters(command: Callable[..., None], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command, each within the bounds that its annotation names.

    Raises HalfstepError for a value that is not.
    """
    from pydantic import TypeAdapter, ValidationError

    from halfstep.errors import HalfstepError

    checked = dict(given)
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if not _has_bounds(parameter.annotation):
            continue
        try:
            checked[name] = TypeAdapter(parameter.annotation).validate_python(given[name])
        except ValidationError as error:
            flag, message = name.replace("_", "-"), error.errors()[0]["msg"]
            raise HalfstepError(
                f"--{flag}: found {given[name]!r}: {message[0].lower() + message[1:]}"
            ) from None
    return checked


def _has_bounds(annotation: Any) -> bool:
    """Does an annotation, or a part of it such as the type of a list's items, hold pydantic's?"""
    own = getattr(annotation, "__metadata__", ())
    if any(type(bound).__module__.startswith("pydantic") for bound in own):
        return True
    return any(map(_has_bounds, get_args(annotation)))


def _help_text(text: str) -> str:
    """tyro's help with paragraphs that fit the terminal, plain types and no empty defaults."""
    text = re.sub(r"\(default:\s*(None)?\)", lambda found: re.sub(r"\S", " ", found[0]), text)
    text = _plain_types(text)
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n\n+(?=  )", "\n", text)  # lines that held a default alone
    text = re.sub(r"\n{3,}", "\n\n", text)
    width = min(100, shutil.get_terminal_size().columns)
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _plain_types(text: str) -> str:
    """`{[INT [INT ...]]}` as `[INT ...]`, and as wide as before in front of its description."""
    return re.sub(
        r"(\[)?\{?\[(\S+) \[\2 \.\.\.\]\]\}?(?(1)\])(  )?",
        lambda found: f"[{found[2]} ...]".ljust(len(found[0]) if found[3] else 0),
        text,
    )


def _wrapped(line: str, width: int) -> str:
    """The line, or lines with its indentation if it is wider."""
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)


def _whole_numbers() -> Any:
    """tyro's rules, and one by which `1e6` is a whole number, as it is in config.yaml."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    from halfstep.config import whole_number

    def parse(words: list[str]) -> int:
        value = whole_number(words[0])
        if not isinstance(value, int):
            raise ValueError(f"found {value}, expected a whole number, as 1000000 or 1e6")
        return value

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(kind: Any) -> PrimitiveConstructorSpec | None:
        if kind.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=parse,
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _faults(printed: str) -> str:
    """The faults in tyro's message as one line, without what repeats the help.

    The message has a title, lines of - between its paragraphs, descriptions that are indented by 10
    columns, and colors on a terminal.
    """
    plain = _plain_types(re.sub(r"\x1b\[[0-9;]*m", "", printed))
    lines = [line.strip() for line in plain.splitlines()[1:] if not line.startswith(" " * 10)]
    paragraphs = re.split(r"(?:^|\s+)-{9,}(?:\s+|$)", " ".join(lines))
    said = [
        text.strip().removesuffix(".")
        for text in paragraphs
        if text.strip() and not re.match(" *(Argument helptext|For full help)", text)
    ]
    return re.sub(r"^Missing from [^:]+: ", "missing: ", "; ".join(said))


def _print_once(text: str) -> None:
    """Print to stderr what no other process of this launcher has printed."""
    from halfstep.distributed import launch

    if not launch.already_printed(text):
        sys.stderr.write(text)


def _refuse(name: str, *faults: str) -> int:
    """Print the faults of a command, one line each; the exit code."""
    _print_once("".join(f"halfstep {name}: {shorten(fault, 500)}\n" for fault in faults))
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command that argv names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    remember_secrets(argv)
    guard_output()
    with reader_may_leave():
        if not argv or argv[0] in COMMANDS:
            return run_command(*argv) if argv else _describe("--help")
        return _describe(*argv)


def _describe(name: str, *words: str) -> int:
    """Answer what is no command: --help, --version, --print-completion, or a wrong word."""
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"halfstep {__version__}")
        return 0
    if name == "--print-completion":
        if len(words) == 1 and words[0] in SHELLS:
            print(completion(words[0]))
            return 0
        print(f"halfstep: --print-completion: name one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    near = difflib.get_close_matches(name[:80], COMMANDS, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "see halfstep --help"
    print(f"halfstep: unknown command {shorten(repr(name))}; {hint}", file=sys.stderr)
    return 2


def run_command(*argv: str) -> int:
    """Run `halfstep <argv>`; returns the exit code."""
    name, *words = argv
    from halfstep.distributed import launch
    from halfstep.errors import HalfstepError

    processes = launch.processes_requested(list(argv))
    if processes > 1:
        try:
            return launch.launch(list(argv), processes)
        except HalfstepError as error:
            return _refuse(name, str(error))
    launch.die_with_launcher()
    import pydantic

    from halfstep.records import provenance
    from halfstep.resolve import explain

    provenance.begin_record(["halfstep", *argv])
    command = load_command(name)
    try:
        given = parse_arguments(command, name, words)
        if "machine" in given:
            from halfstep.distributed.device import prepare_process

            prepare_process(given["machine"])
        command(**given)
        sys.stdout.flush()
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
    except RuntimeError as error:
        group = sys.modules.get("halfstep.distributed.group")
        said = group.lost_rank(error) if group else ""
        if not said:
            raise
        return _refuse(name, said)
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
