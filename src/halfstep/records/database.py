"""The database behind MLflow: its address, a whole schema or none, and a folder that was moved."""

from __future__ import annotations

import contextlib
import select
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from halfstep.errors import HalfstepError
from halfstep.files import write_atomic
from halfstep.records.exclusive import exclusive

CONNECT_S = 10  # for a connection to a database server
ANSWER_S = 20  # for each answer of a server
SERVERS = ("http", "https", "databricks")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
DATABASE = "mlflow.db"  # its name in a results folder
ARTIFACTS = "mlflow-artifacts"  # folder of the uploaded files, next to a SQLite database
# What SQLite says about a file that no later call can use.
DAMAGED = ("file is not a database", "malformed", "unsupported file format")
CLOSED = ("readonly database", "unable to open database file")
SQLITE = b"SQLite format 3\0"  # the first bytes of a database
ELSEWHERE = "or name another place with --uri or MLFLOW_TRACKING_URI"


def check_uri(uri: str) -> None:
    """Refuse an address that MLflow cannot use."""
    scheme = uri.partition(":")[0].partition("+")[0]
    fault = "" if scheme in SERVERS + DATABASES else "unknown kind of address"
    if scheme in DATABASES and "://" not in uri:
        fault = "no :// after the scheme"
    try:
        parts = urlsplit(uri)
        _ = parts.port
        if scheme in ("http", "https") and not parts.hostname:
            fault = "no host"
    except ValueError:  # libraries would cut it in its password, and quote that in their messages
        fault = "write / : @ and % of a password as %2F %3A %40 and %25, and a port as a number"
    if scheme == "sqlite" and not fault:
        name = str(sqlite_file(uri))
        if name in (".", ":memory:"):
            fault = "a database in memory, which would be lost"
        elif name.startswith("file:"):
            fault = "a file: address within a sqlite: address"
    if fault:
        raise HalfstepError(
            f"MLflow at {uri!r}: {fault}; expected http://, https://, sqlite:///file.db, "
            "postgresql:// or mysql://; change --uri or MLFLOW_TRACKING_URI"
        )


def open_database(uri: str) -> str:
    """Make sure that a database is there and whole. Returns its address, with time limits."""
    file = sqlite_file(uri)
    if file:
        prepare_sqlite(file)
        follow_move(file)
    elif not is_web_server(uri):
        uri = with_timeouts(uri)
        try_connection(uri)
    return uri


def is_web_server(uri: str) -> bool:
    """Does the address name a server that keeps artifacts itself, and not a database?"""
    return uri.partition(":")[0] in SERVERS


def new_artifact_folder(uri: str, results: Path) -> str | None:
    """A new folder next to a SQLite file, or in the results; None for a server."""
    if is_web_server(uri):
        return None
    file = sqlite_file(uri)
    folder = (file.parent if file else results).resolve() / ARTIFACTS
    folder.mkdir(exist_ok=True)
    return folder.as_uri()


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address; None for a server."""
    if not uri.startswith("sqlite"):
        return None
    return Path(uri.partition("://")[2].removeprefix("/").partition("?")[0])


def with_timeouts(uri: str) -> str:
    """The address with limits on the time that a server takes to connect and to answer."""
    import sqlalchemy

    if uri.startswith("postgresql"):
        _limit_psycopg2()
        limits = {"connect_timeout": str(CONNECT_S)}
    elif uri.startswith(("mysql:", "mysql+pymysql:", "mysql+mysqldb:")):
        limits = {"connect_timeout": str(CONNECT_S)}
        limits |= {"read_timeout": str(ANSWER_S), "write_timeout": str(ANSWER_S)}
    else:
        return uri
    url = sqlalchemy.make_url(uri)
    missing = {key: value for key, value in limits.items() if key not in url.query}
    return url.update_query_dict(missing).render_as_string(hide_password=False)


def _limit_psycopg2() -> None:
    """Make psycopg2 give up on a server that stopped; by itself it waits for ever."""
    try:
        from psycopg2 import OperationalError, extensions
    except ImportError:
        return

    def wait(connection: extensions.connection) -> None:
        while (state := connection.poll()) != extensions.POLL_OK:
            reads = [connection] if state == extensions.POLL_READ else []
            writes = [connection] if state == extensions.POLL_WRITE else []
            if not any(select.select(reads, writes, [], ANSWER_S)):
                raise OperationalError(f"no answer within {ANSWER_S} s")

    extensions.set_wait_callback(wait)


def try_connection(uri: str) -> None:
    """Connect once to a database server.

    MLflow itself tries ten times, for minutes, before it says that no server is there.
    """
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    engine.connect().close()


def prepare_sqlite(file: Path) -> None:
    """Create the database if there is none, or only a part of its tables and no run.

    MLflow creates its tables one by one. The file gets its name when all of them exist, so a killed
    process or a full disk leaves no part.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HalfstepError(
            f"{file.parent}: this folder cannot be created ({error.strerror}); "
            f"change the path, {ELSEWHERE}"
        ) from None
    if _is_whole(file):
        return
    lock = file.with_name(f".{file.name}.lock")
    with exclusive(lock, patience_s=120):
        if not _is_whole(file):  # another process may have created it
            write_atomic(file, _create_tables)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the database whole


def _create_tables(file: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{file}", str(file.parent / ARTIFACTS))
    store.engine.dispose()


@dataclass
class _Found:
    tables: set[str]
    version: str | None  # of MLflow's schema
    is_used: bool  # holds runs, experiments or models


def _is_whole(file: Path) -> bool:
    """Has the database all tables? Raises HalfstepError if it has not and may not be replaced."""
    if not file.exists():
        return False
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or a device"
        raise HalfstepError(f"{file}: found {kind}, expected a SQLite file; move it, {ELSEWHERE}")
    header = _first_bytes(file)
    if not header:
        return False
    if header != SQLITE:  # SQLite itself takes a short file for an empty database
        raise HalfstepError(_damaged(file))
    with _sqlite(file) as database:
        found = _look(database)
    newest, known = _schemas()
    if found.version == newest:
        return True
    if found.tables and not found.tables & {"experiments", "runs", "alembic_version"}:
        fault = "a database of another program"
        cure = ""
    elif found.version and found.version not in known:
        fault = f"the schema {found.version!r}, which the installed MLflow does not know"
        cure = "install the MLflow that wrote it, "
    elif found.is_used:
        fault = "runs, and a schema that is old or incomplete"
        cure = f"copy the file and call `mlflow db upgrade sqlite:///{file}`, or move it away "
        cure += "(the journals hold everything) and call again, "
    else:
        return False
    raise HalfstepError(f"{file}: found {fault}; expected a database of MLflow; {cure}{ELSEWHERE}")


@contextlib.contextmanager
def _sqlite(file: Path) -> Iterator[sqlite3.Connection]:
    """The open database; its faults are HalfstepErrors, except those that pass by themselves."""
    try:
        address = f"file:{quote(str(file.absolute()))}?mode=rw"
        with (
            contextlib.closing(sqlite3.connect(address, uri=True, timeout=ANSWER_S)) as database,
            database,
        ):
            yield database
    except sqlite3.DatabaseError as error:
        cure = lasting_fault(f"sqlite:///{file}", error)
        raise HalfstepError(cure) if cure else error from None


def lasting_fault(uri: str, error: BaseException) -> str:
    """The fault and its cure if no later call can use this SQLite database; "" otherwise."""
    file, text = sqlite_file(uri), str(error)
    if file is None:
        return ""
    if any(words in text for words in DAMAGED):
        return _damaged(file)
    if any(words in text for words in CLOSED):
        return f"{file}: cannot be opened and written; change its permissions, {ELSEWHERE}"
    return ""


def _first_bytes(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(len(SQLITE))
    except OSError as error:
        raise HalfstepError(
            f"{file}: cannot be read ({error.strerror}); change its permissions, {ELSEWHERE}"
        ) from None


def _damaged(file: Path) -> str:
    return (
        f"{file}: not an intact SQLite database; move it away (the journals hold everything) "
        f"and call again, {ELSEWHERE}"
    )


def _look(database: sqlite3.Connection) -> _Found:
    names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    tables = {name for (name,) in names}
    version = None
    if "alembic_version" in tables:
        version = (database.execute("SELECT * FROM alembic_version").fetchone() or [None])[0]
    own = {
        "runs": "1",
        "registered_models": "1",
        "trace_info": "1",
        "experiments": "experiment_id != 0",  # 0: MLflow's own, "Default"
    }
    is_used = any(
        database.execute(f"SELECT 1 FROM {table} WHERE {condition}").fetchone()
        for table, condition in own.items()
        if table in tables
    )
    return _Found(tables, version, is_used)


def _schemas() -> tuple[str, set[str]]:
    """The newest schema of the installed MLflow, and all that it knows."""
    import mlflow
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    [newest] = scripts.get_heads()
    return newest, {script.revision for script in scripts.walk_revisions()}


def follow_move(file: Path) -> None:
    """Point a database that was moved to the artifacts next to it.

    MLflow stores absolute paths. They change for every experiment whose artifacts were next to the
    database, if these are no longer at the old place or are also at the new one (a copy).
    """
    here = (file.parent.resolve() / ARTIFACTS).as_uri()
    with _sqlite(file) as database:
        found = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (place,) in found:
            is_ours = str(place).startswith("file://") and place.endswith(f"/{ARTIFACTS}")
            if is_ours and place != here and _is_here(database, place, here):
                _rename_places(database, place, here)


def _is_here(database: sqlite3.Connection, old: str, here: str) -> bool:
    """Are the artifacts of the place `old` now in the place `here`?"""
    if not local_folder(old).exists():
        return True
    runs = database.execute(
        "SELECT run_uuid FROM runs WHERE substr(artifact_uri, 1, ?) = ?", (len(old), old)
    )
    return any((local_folder(here) / run).exists() for (run,) in runs)


def _rename_places(database: sqlite3.Connection, old: str, new: str) -> None:
    columns = {
        "experiments": "artifact_location",
        "runs": "artifact_uri",
        "logged_models": "artifact_location",
    }
    for table, column in columns.items():
        database.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def local_folder(place: str) -> Path:
    """The folder of a file:// address."""
    return Path(unquote(urlsplit(place).path))
