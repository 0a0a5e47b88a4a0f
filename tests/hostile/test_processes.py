"""Hostile environments of one process of several, and hostile numbers of processes."""

import pytest
from hostile import Hostile, answer

GENERATE = [
    "generate",
    "--checkpoint",
    "none",
    "--output",
    "out",
    "--steps",
    "8",
    "--device",
    "cpu",
]
SECOND = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
NO_NUMBER = "found {}, expected a whole number of at least {}"


def process(name: str, refused: str, variables: dict[str, str], *more: str) -> Hostile:
    """A process that another launcher than ours started."""
    kind, arguments = "environment of a process", [*GENERATE, *more]
    return Hostile(kind, name, lambda folder: None, arguments, refused, variables=variables)


def launcher(name: str, refused: str, processes: str, variables: dict[str, str]) -> Hostile:
    """A command that starts processes."""
    kind, arguments = "number of processes", [*GENERATE, f"--processes={processes}"]
    return Hostile(kind, name, lambda folder: None, arguments, refused, variables=variables)


def wrong(name: str, variable: str, value: str, least: int) -> Hostile:
    """The second of two processes, with one variable that is no number."""
    refused = f"{variable}: {NO_NUMBER.format('.*', least)}"
    return process(name, refused, SECOND | {variable: value})


def without(variable: str, refused: str) -> Hostile:
    variables = {name: value for name, value in SECOND.items() if name != variable}
    return process(f"no {variable}", refused, variables)


TWO_NODES = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
CASES = [
    wrong("a world size that is a word", "WORLD_SIZE", "two", 1),
    wrong("a world size of 0", "WORLD_SIZE", "0", 1),
    wrong("a world size below 0", "WORLD_SIZE", "-2", 1),
    wrong("an empty world size", "WORLD_SIZE", "", 1),
    wrong("a world size of 5,000 digits", "WORLD_SIZE", "9" * 5000, 1),
    wrong("a world size of Arabic digits", "WORLD_SIZE", "٢", 1),
    wrong("a rank that is a word", "RANK", "first", 0),
    wrong("a rank below 0", "RANK", "-1", 0),
    wrong("a rank with a fraction", "RANK", "1.0", 0),
    wrong("a rank that is an escape sequence", "RANK", "\x1b[2J\x1b[31m", 0),
    wrong("a port that is a word", "MASTER_PORT", "http", 1),
    wrong("port 0", "MASTER_PORT", "0", 1),
    without("RANK", "RANK: " + NO_NUMBER.format("no value", 0)),
    without("MASTER_PORT", "MASTER_PORT: " + NO_NUMBER.format("no value", 1)),
    without("MASTER_ADDR", "MASTER_ADDR and MASTER_PORT: found '' and 29500, expected an address"),
    without("WORLD_SIZE", "RANK: found 1, expected a number below WORLD_SIZE, which is 1"),
    process("a rank of the world size", "RANK: found 2, expected .* below", SECOND | {"RANK": "2"}),
    process("a port above 65535", "found 'localhost' and 65536", SECOND | {"MASTER_PORT": "65536"}),
    process(
        "an address with a space and an escape",
        "MASTER_ADDR and MASTER_PORT: found 'no host",
        SECOND | {"MASTER_ADDR": "no host\x1b[2J"},
    ),
    process(
        "an address of 100,000 letters",
        "MASTER_ADDR and MASTER_PORT: found 'aaa",
        SECOND | {"MASTER_ADDR": "a" * 100_000},
    ),
    process(
        "another world size than asked for",
        "processes: found a world size of 2, expected 4",
        SECOND,
        "--processes=4",
    ),
    process(
        "a number of local processes that is a word",
        "LOCAL_WORLD_SIZE: " + NO_NUMBER.format("'all'", 1),
        SECOND | {"LOCAL_WORLD_SIZE": "all"},
        "--threads=2",
    ),
    process(
        "no local processes",
        "LOCAL_WORLD_SIZE: " + NO_NUMBER.format("'0'", 1),
        SECOND | {"LOCAL_WORLD_SIZE": "0"},
        "--threads=2",
    ),
    process(
        "a meeting in a folder that is not there",
        "HALFSTEP_MEETING: found '/nowhere/meeting', but its folder is not there",
        SECOND | {"HALFSTEP_MEETING": "/nowhere/meeting"},
    ),
    process("an empty folder of printed messages", "none", {"HALFSTEP_PRINTED": ""}),
    process("a folder of printed messages that is not there", "none", {"HALFSTEP_PRINTED": "gone"}),
    launcher("no process", "processes: found '?0'?: input should be greater than", "0", {}),
    launcher("processes below 0", "processes: found '?-1'?: input should be greater", "-1", {}),
    launcher("a word", "processes", "all", {}),
    launcher("a fraction", "processes", "2.5", {}),
    launcher("100,000 processes", "processes: found 100000 for 1 machines", "100000", {}),
    launcher("a number of 5,000 digits", "processes: found 999999999 for 1", "9" * 5000, {}),
    launcher(
        "a number of nodes that is a word",
        "SLURM_STEP_NUM_NODES: " + NO_NUMBER.format("'abc'", 1),
        "2",
        {"SLURM_STEP_NUM_NODES": "abc"},
    ),
    launcher(
        "no tasks of srun",
        "SLURM_STEP_NUM_TASKS: " + NO_NUMBER.format("'0'", 1),
        "2",
        {"SLURM_STEP_NUM_TASKS": "0"},
    ),
    launcher(
        "two tasks of srun on one node",
        "processes: found 2 tasks of srun on 1 nodes for 2 processes",
        "2",
        {"SLURM_STEP_NUM_TASKS": "2"},
    ),
    launcher(
        "processes that the nodes cannot share",
        "processes: found 2 tasks of srun on 2 nodes for 3 processes",
        "3",
        TWO_NODES,
    ),
    launcher(
        "nodes without names",
        "processes: `scontrol show hostnames ` failed, which names the first node",
        "2",
        TWO_NODES | {"PATH": "/nowhere"},
    ),
    launcher(
        "names of nodes that Slurm does not know",
        "processes: `scontrol show hostnames .*` failed, which names the first node",
        "2",
        TWO_NODES | {"PATH": "/nowhere", "SLURM_STEP_NODELIST": "a[3-"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)
