"""Hostile journals, run files, metric rows and databases, given to `halfstep track`."""

import functools
import json
import os
import random
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import Hostile, answer

pytest.importorskip("mlflow")

RUN = {
    "name": "teacher",
    "node": "pretrain/t",
    "fingerprint": "0f" * 32,
    "started": 1795742313.5,
    "status": "finished",
    "params": {"lr": 0.1},
    "tags": {},
    "datasets": [],
    "artifacts": [],
    "checkpoint": None,
}
ROW = {"metric": "perplexity", "protocol": "ids", "model": "t/teacher", "steps": 8, "value": 2.5}
MODEL = "out/results/models/t/teacher"
TRACK = ["track", "--results", "out/results", "--uri"]
INTO = [*TRACK, "sqlite:///out/mlflow.db"]


def point(step: object = 1, time: object = 1795742314.5, **metrics: object) -> dict:
    return {"step": step, "time": time, "metrics": metrics or {"train/loss": 1.0}}


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


@functools.cache
def new_database() -> bytes:
    """MLflow's empty database, made once."""
    from halfstep.records.database import prepare_sqlite

    with tempfile.TemporaryDirectory() as folder:
        prepare_sqlite(Path(folder) / "mlflow.db")
        return (Path(folder) / "mlflow.db").read_bytes()


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def results(folder: Path, journal: bytes = line(point()), run: object = RUN) -> None:
    """A results folder with one model, and a database of MLflow next to it."""
    write(folder / MODEL / "run.json", json.dumps(run).encode())
    write(folder / MODEL / "journal.jsonl", journal)
    write(folder / "out/mlflow.db", new_database())


def sent(folder: Path, key: str = "train/loss") -> list[int]:
    """The steps of a curve in the database."""
    with sqlite3.connect(folder / "out/mlflow.db") as database:
        found = database.execute("SELECT step FROM metrics WHERE key = ? ORDER BY step", (key,))
        return [step for (step,) in found]


def journal(name: str, content: bytes, refused: str | None, steps: list[int] | None = None):
    """A case with this journal; if it is taken, the steps of the curve are these."""

    def check(folder: Path) -> None:
        assert sent(folder) == steps

    return Hostile("journal", name, lambda f: results(f, content), INTO, refused, check)


def broken_line(name: str, content: bytes, fault: str):
    """A case whose second line is broken."""
    refused = rf"teacher/journal\.jsonl:2: {fault}; delete the line"
    return journal(name, line(point(1)) + content + line(point(3)), refused)


def in_place_of_the_journal(name: str, make: Callable[[Path], object], refused: str | None):
    def replace(folder: Path) -> None:
        results(folder)
        (folder / MODEL / "journal.jsonl").unlink()
        make(folder / MODEL / "journal.jsonl")

    return Hostile("journal", name, replace, INTO, refused)


NOT_JSON, STEP = "not a line of JSON", "step is not a whole number between 0 and 2\\^63"
TIME, METRICS = "time is not a number of seconds since 1970", "metrics is not a table of numbers"
POINT = "no point with step, time and metrics"
JOURNALS = [
    broken_line("a line that is not JSON", b"rubbish\n", NOT_JSON),
    broken_line("an empty line", b"\n", NOT_JSON),
    broken_line("a line of zeros, as after a power failure", b"\0" * 100 + b"\n", NOT_JSON),
    broken_line("a line that is not UTF-8", b'{"step": "\xff"}\n', NOT_JSON),
    broken_line("two points in one line", line(point())[:-1] * 2 + b"\n", NOT_JSON),
    broken_line("a list", line([1, 2]), POINT),
    broken_line("a point without metrics", line({"step": 1, "time": 1.0}), POINT),
    broken_line("a step of text", line(point("1")), STEP),
    broken_line("a fractional step", line(point(1.5)), STEP),
    broken_line("a negative step", line(point(-1)), STEP),
    broken_line("a step that is true", line(point(True)), STEP),
    broken_line("a step beyond 64 bits", line(point(2**70)), STEP),
    broken_line("a time that is NaN", line(point(2, float("nan"))), TIME),
    broken_line("a time of text", line(point(2, "noon")), TIME),
    broken_line("a time beyond all clocks", line(point(2, 1e300)), TIME),
    broken_line("metrics that are a list", line(point() | {"metrics": [1]}), METRICS),
    broken_line("a value of text", line(point(2, a="1")), METRICS),
    broken_line("a value that is null", line(point(2, a=None)), METRICS),
    broken_line("a value beyond all floats", line(point(2, a=10**400)), METRICS),
    broken_line("lists in lists, 100,000 deep", b"[" * 100_000 + b"\n", NOT_JSON),
    broken_line("a number of 5,000 digits", b'{"step": ' + b"9" * 5000 + b"}\n", NOT_JSON),
    broken_line("a line of 3 MB", b"[" + b" " * 3_000_000 + b"]\n", "a line longer than .* bytes"),
    journal("UTF-16", line(point()).decode().encode("utf-16"), "journal.jsonl:1: " + NOT_JSON),
    journal("200 MB without a newline", b"x" * 200_000_000, None, []),
    journal("a torn last line", line(point(1)) + b'{"step": 2, "ti', None, [1]),
    journal("a torn only line", b'{"st', None, []),
    journal("each line twice", (line(point(1)) + line(point(2))) * 2, None, [1, 2]),
    journal("steps that go back", b"".join(map(line, map(point, (1, 5, 3, 6)))), None, [1, 5, 6]),
    journal("NaN and infinity", line(point(1, **{"train/loss": float("nan")})), None, [1]),
    journal("line ends of Windows", line(point(1))[:-1] + b"\r\n", None, [1]),
    journal("a key given twice", b'{"step": 7, ' + line(point(2))[1:], None, [2]),
    journal(
        "1,500 metrics in a line",
        line(point(4, **{"train/loss": 1.0, **{f"m{i}": i for i in range(1500)}})),
        None,
        [4],
    ),
    journal(
        "a metric name of 300 letters", line(point(1, **{"m" * 300: 1})), "cannot take the data"
    ),
    journal("a metric name with a new line", line(point(1, **{"a\nb": 1})), "cannot take the data"),
    journal("an empty metric name", line(point(1, **{"": 1})), "cannot take the data"),
    in_place_of_the_journal("a folder", Path.mkdir, "found a folder, expected a file"),
    in_place_of_the_journal("a pipe", os.mkfifo, "found a pipe or a device, expected a file"),
    in_place_of_the_journal("nothing", lambda file: None, None),
    in_place_of_the_journal("a link to nothing", lambda file: file.symlink_to("nowhere"), None),
]


def run_json(name: str, refused: str | None, /, **changes: object):
    """A case with a run.json in which these values were changed; ... stands for a missing one."""
    run = {key: value for key, value in (RUN | changes).items() if value is not ...}
    return Hostile("run.json", name, lambda f: results(f, run=run), INTO, refused)


def run_content(name: str, content: bytes, refused: str):
    def make(folder: Path) -> None:
        results(folder)
        (folder / MODEL / "run.json").write_bytes(content)

    return Hostile("run.json", name, make, INTO, refused)


def pipe_for_run_json(folder: Path) -> None:
    results(folder)
    (folder / MODEL / "run.json").unlink()
    os.mkfifo(folder / MODEL / "run.json")


RUNS = [
    run_content("a list", b"[]", "run.json.*found.*expected"),
    run_content("not JSON", b"{", "run.json: not valid JSON"),
    run_content("not UTF-8", b"\xff\xfe\xfa", "run.json: not valid JSON"),
    Hostile("run.json", "a pipe", pipe_for_run_json, INTO, "found a pipe or a device, expected"),
    run_json("no name", "run.json: name: found nothing", name=...),
    run_json("started is text", "run.json: started: found 'now'", started="now"),
    run_json("started is missing", "run.json: started: found nothing", started=...),
    run_json("started beyond all clocks", "run.json: started", started=1e300),
    run_json("an unknown status", "run.json: status: found 'asleep'", status="asleep"),
    run_json("params are a list", "run.json: params", params=[1]),
    run_json("a param name with a new line", "cannot take the data", params={"a\nb": 1}),
    run_json("a param of 100,000 letters", None, params={"a": "x" * 100_000}),
    run_json("a data set without digest", "datasets.0.digest", datasets=[{"name": "d"}]),
    run_json("a checkpoint without checksums", "checkpoint.sha256", checkpoint={"folder": "."}),
    run_json("a file outside of the folder", "outside of the folder", artifacts=["../../../x"]),
    run_json("a file at an absolute path", "outside of the folder", artifacts=["/etc/passwd"]),
    run_json("a file that is not there", None, artifacts=["gone.json"]),
]


def rows(name: str, content: object, refused: str | None):
    """A case with this file of metric rows."""

    def make(folder: Path) -> None:
        results(folder)
        write(folder / "out/results/metrics/t/teacher/samples.json", json.dumps(content).encode())

    return Hostile("metric rows", name, make, INTO, refused)


def without(key: str) -> dict:
    return {name: value for name, value in ROW.items() if name != key}


TIMING = {"metric": "latency_s", "model": "t/teacher", "teacher": "t", "value": 1.0}
ROWS = [
    rows("no metric", [without("metric")], "row 1: metric: found nothing, expected text"),
    rows("no model", [ROW, without("model")], "row 2: model: found nothing"),
    rows("no value", [without("value")], "row 1: value: found nothing"),
    rows("no protocol", [without("protocol")], "row 1: protocol: found nothing"),
    rows("no teacher of a bare model", [ROW | {"model": "data"}], "row 1: teacher: found nothing"),
    rows("a value of text", [ROW | {"value": "2.5"}], "row 1: value: found '2.5'"),
    rows("a value that is true", [ROW | {"value": True}], "row 1: value: found True"),
    rows("negative steps", [ROW | {"steps": -1}], "row 1: steps: found -1"),
    rows("steps beyond 64 bits", [ROW | {"steps": 2**63}], "row 1: steps"),
    rows("a row that is a number", [7], "row 1: found 7"),
    rows("a time without length", [TIMING], "row 1: length: found nothing"),
    rows("two rows that disagree", [ROW, ROW | {"value": 3.0}], "keep one of them"),
    rows("a metric name with a new line", [ROW | {"metric": "a\nb"}], "cannot take the data"),
    rows("no rows, but an object", {"metric": 1}, None),
    rows("a value that is null", [ROW | {"value": None}], None),
]


def database(
    name: str, content: bytes | Callable[[], bytes], refused: str | None, file="mlflow.db"
):
    """A case with this file as the database. It stays as it is if it is refused."""

    def make(folder: Path) -> None:
        results(folder)
        write(folder / file, content() if callable(content) else content)

    return Hostile("MLflow database", name, make, [*TRACK, f"sqlite:///{file}"], refused)


def address(name: str, uri: str, refused: str):
    return Hostile("MLflow database", name, results, [*TRACK, uri], refused)


def changed(*statements: str) -> Callable[[], bytes]:
    """MLflow's database after these statements."""

    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "mlflow.db"
            file.write_bytes(new_database())
            with sqlite3.connect(file) as found:
                for statement in statements:
                    found.execute(statement)
            found.close()
            return file.read_bytes()

    return make


def foreign() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        with sqlite3.connect(Path(folder) / "x.db") as found:
            found.execute("CREATE TABLE bookmarks (url TEXT)")
        found.close()
        return (Path(folder) / "x.db").read_bytes()


def damaged() -> bytes:
    """The first pages stay as they are."""
    intact = new_database()
    return intact[:8192] + random.Random(1).randbytes(len(intact) - 8192)


def place(name: str, make: Callable[[Path], object], refused: str | None):
    """A case in which something else is where the database belongs."""

    def replace(folder: Path) -> None:
        results(folder)
        make(folder / "place")

    return Hostile("MLflow database", name, replace, [*TRACK, "sqlite:///place"], refused)


def kept(name: str, content: str, refused: str):
    """A case with this .track.json."""

    def make(folder: Path) -> None:
        results(folder)
        (folder / "out/results/.track.json").write_text(content)

    return Hostile("MLflow database", name, make, INTO, refused)


def folder_for_the_lock(folder: Path) -> None:
    results(folder)
    (folder / "out/results/.track.lock").mkdir()


OLD, GONE = "UPDATE alembic_version SET version_num = '451aebb31d03'", "DROP TABLE alembic_version"
USED = "INSERT INTO experiments (experiment_id, name, workspace) VALUES (5, 'e', 'default')"
NEW = "UPDATE alembic_version SET version_num = 'ffffffffffff'"
INTACT, UNUSABLE = "not an intact SQLite database; move it away", "MLflow at .* cannot"
DATABASES = [
    database("an empty file", b"", None, "out/empty.db"),
    database("no schema number, and no run", changed(GONE), None, "out/mlflow.db"),
    database("an old schema, and no run", changed(OLD), None, "out/mlflow.db"),
    database("one table only", changed("DROP TABLE metrics", GONE), None, "out/mlflow.db"),
    database("no schema number, but an experiment", changed(GONE, USED), "mlflow db upgrade"),
    database("an old schema, and an experiment", changed(OLD, USED), "mlflow db upgrade"),
    database("a newer schema", changed(NEW), "installed MLflow does not know"),
    database("another program's", foreign, "a database of another program"),
    database("text", b"runs: none\n" * 100, INTACT),
    database("one byte", b"S", INTACT),
    database("a picture", b"\x89PNG\r\n\x1a\n" + bytes(5000), INTACT),
    database("half of the pages", lambda: new_database()[:400_000], INTACT),
    database("the first page only", lambda: new_database()[:4096], INTACT),
    database("random pages", damaged, INTACT),
    place("a folder", Path.mkdir, "place: found a folder, expected a SQLite file"),
    place("a pipe", os.mkfifo, "place: found a pipe or a device"),
    address("an unknown scheme", "frob://x", "unknown kind of address; expected http://"),
    address("a folder of MLflow 1", "runs", "unknown kind of address"),
    address("a file:// address", "file:///tmp/mlruns", "unknown kind of address"),
    address("a scheme alone", "sqlite:mlflow.db", "no :// after the scheme"),
    address("memory", "sqlite:///:memory:", "a database in memory"),
    address("memory without a name", "sqlite://", "a database in memory"),
    address("a device", "sqlite:////dev/null", "found a pipe or a device"),
    address("below a file", "sqlite:///out/mlflow.db/x.db", "cannot be created"),
    address("a server without a name", "http://", "no host"),
    address("half an IPv6 address", "http://[::1", "write / : @ and % of a password"),
    address("a port that is no number", "http://127.0.0.1:x", "a port as a number"),
    address("no server", "http://127.0.0.1:9", "no server answers.*nothing is lost"),
    address("no PostgreSQL", "postgresql://u@127.0.0.1:9/x", "Connection refused.*nothing is lost"),
    address("a PostgreSQL port of text", "postgresql://u@127.0.0.1:x/y", "a port as a number"),
    address("an unknown driver", "postgresql+frob://127.0.0.1/x", UNUSABLE),
    address("a driver that is not installed", "mysql+asyncmy://127.0.0.1/x", UNUSABLE),
    kept("own runs: text", "x", "track.json: not valid JSON"),
    kept("own runs: a list", "[]", "track.json: found other content"),
    kept(
        "own runs: an id that is a filter", '{"id": "\' OR \'1\'=\'1", "runs": {}}', "other content"
    ),
    kept("own runs: no table", '{"id": "' + "0" * 32 + '", "runs": []}', "other content"),
    Hostile(
        "MLflow database", "a folder for the lock", folder_for_the_lock, INTO, "no lock can be"
    ),
]

CASES = [*JOURNALS, *RUNS, *ROWS, *DATABASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)
