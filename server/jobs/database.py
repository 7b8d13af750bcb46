"""SQLite or PostgreSQL behind one URL: transactions, the clock, and what their failures are called here.

The clock is the database's: one for all workers, on whatever machine they run, so that no clock that is ahead takes a job
from a worker that is alive.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, insert, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from server.jobs.errors import JobsMisconfigured, StoreUnavailable
from server.jobs.models import VERSION, Base, SchemaVersion

WAIT_SECONDS = 5.0  # for a lock or a connection; then it is a 503
CONNECTIONS = 8
CLOCKS = {
    "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}
# Of PostgreSQL's advisory locks; any number will do that nobody else uses in this database.
CREATING = 0x66657773746570
OURS = (DataError, IntegrityError, ProgrammingError)  # a bug, whatever the state of the database


class Database:
    """Sessions whose objects stay readable after they end. To be used by any number of threads and processes."""

    def __init__(self, url: str, clock: Callable[[], float] | None = None, wait_seconds: float = WAIT_SECONDS) -> None:
        """clock: seconds since 1970, in place of the database's. Makes the tables where there are none. Raises
        JobsMisconfigured, or StoreUnavailable."""
        where = parse(url)
        self.clock, self.dialect = clock, where.get_backend_name()
        self.engine = open_engine(where, wait_seconds)
        with translated(), self.engine.begin() as connection:
            self.one_at_a_time(connection)
            if inspect(connection).has_table(SchemaVersion.__tablename__):
                check_version(connection.scalar(select(SchemaVersion.version)))
            else:
                Base.metadata.create_all(connection)
                connection.execute(insert(SchemaVersion).values(version=VERSION))

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """What it sees is of one moment on SQLite, and of one moment per query on PostgreSQL."""
        with translated(), self.engine.connect() as connection:
            connection.execution_options(reading=True)
            with Session(connection, expire_on_commit=False) as session:
                yield session

    @contextmanager
    def writing(self) -> Iterator[tuple[Session, float]]:
        """A transaction and its time. What is changed is durable when the block ends, and undone when it raises."""
        with translated(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            now = self.clock() if self.clock else session.scalar(text(CLOCKS[self.dialect]))
            assert now is not None
            yield session, now

    def one_at_a_time(self, connection: Any) -> None:
        """Until the transaction ends nobody else is past this line. SQLite's writers are one at a time anyhow."""
        if self.dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:name)"), {"name": CREATING})

    def close(self) -> None:
        self.engine.dispose()


def parse(url: str) -> URL:
    """Raises JobsMisconfigured for anything but a SQLite file or PostgreSQL."""
    try:
        where = make_url(url)
    except ArgumentError:
        raise JobsMisconfigured("the URL of the jobs' database cannot be read; legal are " + LEGAL) from None
    if where.drivername == "sqlite" and where.database not in (None, "", ":memory:"):
        return where
    if where.drivername in ("postgresql", "postgresql+psycopg"):
        return where.set(drivername="postgresql+psycopg")
    shown = where.render_as_string(hide_password=True)
    raise JobsMisconfigured(f"jobs cannot be kept in {shown!a:.200}; legal are {LEGAL}")


LEGAL = "sqlite:///FOLDER/FILE (with four slashes for an absolute path) and postgresql://USER:PASSWORD@HOST/DATABASE"


def open_engine(where: URL, wait_seconds: float) -> Engine:
    """Not connected yet."""
    if where.get_backend_name() == "sqlite":
        return open_sqlite(where, wait_seconds)
    # Commits wait for the disk, whatever the server's default is.
    # A process that is stopped in the middle of a transaction would keep its locks for as long as it is.
    milliseconds = {
        "lock_timeout": 1000 * wait_seconds,
        "statement_timeout": 2000 * wait_seconds,
        "idle_in_transaction_session_timeout": 2000 * wait_seconds,
    }
    options = " ".join(["-c synchronous_commit=on", *(f"-c {name}={value:.0f}" for name, value in milliseconds.items())])
    try:
        return create_engine(
            where,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=wait_seconds,
            pool_pre_ping=True,  # the server may have restarted
            connect_args={"options": options, "connect_timeout": max(2, round(wait_seconds))},
        )
    except ModuleNotFoundError:
        raise JobsMisconfigured("jobs in PostgreSQL need `pip install 'fewstep[postgres]'`") from None


def open_sqlite(where: URL, wait_seconds: float) -> Engine:
    """Write-ahead log, so that readers wait for nobody, and a commit that is on disk when it returns."""
    assert where.database
    file = Path(where.database).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)  # it holds prompts; SQLite gives its other files the same mode
    except OSError as error:
        raise StoreUnavailable(f"the file of the jobs' database: {error.strerror}") from None
    engine = create_engine(
        where, pool_size=CONNECTIONS, max_overflow=0, pool_timeout=wait_seconds, connect_args={"timeout": wait_seconds}
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # else the driver begins transactions at moments of its own
        use_write_ahead_log(connection, wait_seconds)
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that reads first and then wants to write would be refused if another has written in between.
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def use_write_ahead_log(connection: sqlite3.Connection, wait_seconds: float) -> None:
    """Unlike all else that SQLite does, the first switch to it does not wait for others who open the database too."""
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def check_version(found: int | None) -> None:
    if found != VERSION:
        raise JobsMisconfigured(
            f"the jobs' database has version {found} of the tables and this fewstep wants {VERSION}; run the fewstep that made"
            " it, or name another database"
        )


@contextmanager
def translated() -> Iterator[None]:
    """The drivers' failures as StoreUnavailable. The message is for the log: it may tell where the database is."""
    try:
        yield
    except OURS:
        raise
    except (DBAPIError, DatabaseError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailable(f"the jobs' database: {' '.join(str(cause).split())}") from error
