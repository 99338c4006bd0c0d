"""One machine, no services: SQLite, files, and a bus inside the process."""

from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_brokers.embedded.bus import InProcessBus
from spellq_brokers.embedded.entrylog import EntryLog, FileEntryLog, MemoryEntryLog
from spellq_brokers.embedded.store import SqliteStore
from spellq_brokers.embedded.writer import InlineWriter, ThreadWriter, Writer

__all__ = [
    "DiskArtifacts",
    "EntryLog",
    "FileEntryLog",
    "InProcessBus",
    "InlineWriter",
    "MemoryEntryLog",
    "SqliteStore",
    "ThreadWriter",
    "Writer",
]
