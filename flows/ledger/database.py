"""The ledger's data base: SQLite on a local disk, or PostgreSQL; each piece of work in a transaction of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from flows.machine.mounts import network_type

BUSY_S: Final = 30.0
ANSWER_S = 10.0  # that PostgreSQL has to answer in: a link can be dead without a word
_TABLES_LOCK: Final = 0x5CA45C21  # of PostgreSQL: one process at a time makes the tables
_T = TypeVar("_T")


class LedgerError(Exception):
    """The ledger cannot be used. The message says how to mend it; it holds no password."""

    code = "ledger"


class Database:
    """Runs each piece of work in a transaction of its own. SQLite has one writer at a time, the others wait for it."""

    def __init__(self, url: str, tables: sql.MetaData) -> None:
        """Makes the tables that are missing. Raises LedgerError."""
        try:
            self._url = sql.make_url(url)
        except SQLAlchemyError:
            raise LedgerError(
                "The ledger's URL cannot be read: give one like postgresql://user:password@host/database."
            ) from None
        self._loop: asyncio.AbstractEventLoop | None = None
        name = self._url.get_backend_name()
        if name == "sqlite":
            self.insert: Any = sqlite.insert
            _check_local(self._url.database)
            self._engine = sql.create_engine(self._url, connect_args={"timeout": BUSY_S})
            sql.event.listen(self._engine, "connect", _prepare_sqlite)
            sql.event.listen(self._engine, "begin", _begin_immediate)
        elif name == "postgresql":
            self.insert = postgresql.insert
            self._async = create_async_engine(
                self._url.set(drivername="postgresql+asyncpg"),
                pool_pre_ping=True,
                connect_args={"timeout": ANSWER_S, "command_timeout": ANSWER_S},
            )
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="ledger", daemon=True).start()
        else:
            raise LedgerError(f"There is no ledger on {name}: give a URL of PostgreSQL, or none for SQLite.")
        try:
            self.run(lambda connection: _make_tables(connection, tables))
        except LedgerError:
            self.close()
            raise

    def run(self, work: Callable[[sql.Connection], _T]) -> _T:
        """Raises LedgerError."""
        try:
            if self._loop is not None:
                return asyncio.run_coroutine_threadsafe(self._run(work), self._loop).result()
            with self._engine.begin() as connection:
                return work(connection)
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(self._explain(error)) from None
        except Exception as error:  # asyncpg raises its own where there is no connection yet
            if not type(error).__module__.startswith("asyncpg"):
                raise
            raise LedgerError(self._explain(error)) from None

    async def _run(self, work: Callable[[sql.Connection], _T]) -> _T:
        async with self._async.begin() as connection:
            return await connection.run_sync(work)

    def close(self) -> None:
        if self._loop is None:
            self._engine.dispose()
            return
        asyncio.run_coroutine_threadsafe(self._async.dispose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _explain(self, error: Exception) -> str:
        """What to tell a person. Statements and their values, which hold paths, stay out."""
        place = self._url.render_as_string(hide_password=True)
        said = f"it did not answer in {ANSWER_S:g} s" if isinstance(error, TimeoutError) else ""
        if isinstance(error, OSError) and (error.errno or 0) > 0:  # asyncio's own words have the address once more
            said = said or os.strerror(error.errno or 0)
        cause = said or str(getattr(error, "orig", None) or error).partition("\n")[0].rpartition(">: ")[2]
        if self._url.get_backend_name() == "postgresql":
            return f"The ledger at {place} cannot be used ({cause}): see that the server runs and takes this user."
        if "not a database" in cause or "malformed" in cause:
            return f"The ledger {place} is damaged: move it away; the next start makes it anew from what is on disk."
        return f"The ledger {place} cannot be used ({cause}): see that its folder can be written and has space."


def _make_tables(connection: sql.Connection, tables: sql.MetaData) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_TABLES_LOCK)))
    tables.create_all(connection)


def _prepare_sqlite(connection: Any, record: object) -> None:
    """WAL: readers and the writer do not wait for each other. A power cut can cost the last rows, never the file."""
    connection.isolation_level = None  # transactions are begun below
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_immediate(connection: sql.Connection) -> None:
    """The write lock is taken first: a transaction that finds it needs it only later could not wait for it."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_local(database: str | None) -> None:
    if not database or database == ":memory:":
        raise LedgerError("The ledger needs a file: give a URL like sqlite:////var/lib/scanscribe/ledger.db.")
    folder = Path(database).resolve().parent
    if not folder.is_dir():
        raise LedgerError(f"There is no folder {folder} for the ledger: make it, or give another URL.")
    if kind := network_type(folder):
        raise LedgerError(
            f"The ledger lies on a network file system ({kind}), where SQLite cannot lock it: set SCANSCRIBE_HOME to a "
            "local folder, or use PostgreSQL."
        )
    path = Path(database)
    if not path.exists():
        with contextlib.suppress(OSError):  # for SQLite to say
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # it holds file names
