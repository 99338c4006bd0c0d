"""The tables of an embedded installation, and how its database is opened."""

import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

SCHEMA_VERSION: Final = 1

_TABLES: Final = """
CREATE TABLE installation (epoch TEXT NOT NULL) STRICT;
CREATE TABLE numbers (kind TEXT PRIMARY KEY, last INTEGER NOT NULL) STRICT;
CREATE TABLE allotments (
    command_id TEXT PRIMARY KEY, numbers TEXT NOT NULL, at REAL NOT NULL
) STRICT;
CREATE INDEX allotments_by_age ON allotments (at);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    live INTEGER NOT NULL,
    workflow INTEGER,
    master INTEGER NOT NULL,
    agent TEXT,
    due_at REAL,
    spec BLOB NOT NULL,
    state BLOB NOT NULL
) STRICT;
CREATE INDEX runs_live ON runs (number) WHERE live;
CREATE INDEX runs_due ON runs (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX runs_of_workflow ON runs (workflow, number) WHERE workflow IS NOT NULL;
CREATE TABLE labels (label TEXT, number INTEGER, PRIMARY KEY (label, number)) STRICT, WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL,
    version INTEGER NOT NULL,
    at REAL NOT NULL,
    body BLOB NOT NULL,
    lines BLOB
) STRICT;
CREATE UNIQUE INDEX events_of_run ON events (run, version);
CREATE TABLE workflows (number INTEGER PRIMARY KEY, state BLOB NOT NULL) STRICT;
CREATE TABLE tokens (hash TEXT PRIMARY KEY, state BLOB NOT NULL) STRICT;
"""


class WrongSchema(Exception):
    """The database was made by another version of spellq."""


def connector(path: Path | None) -> Callable[[], sqlite3.Connection]:
    """How to connect to the database at `path`, or to one in memory."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            path or ":memory:", isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=5000")
        _migrate(connection)
        return connection

    return connect


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    connection.execute("BEGIN EXCLUSIVE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _TABLES.split(";"):
            if statement.strip():
                connection.execute(statement)
        connection.execute("INSERT INTO installation VALUES (?)", (secrets.token_hex(4),))
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    if version not in (0, SCHEMA_VERSION):
        connection.close()
        raise WrongSchema(
            f"The state was written by a spellq with schema {version}; this one reads "
            f"{SCHEMA_VERSION}. Use that spellq, or another SPELLQ_HOME."
        )
