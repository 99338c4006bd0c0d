"""Sending a snapshot: what the gateway lacks of it, small files together."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import anyio
import anyio.to_thread
import msgspec

from spellq.trees import Tree, TreeEntry, make_tree
from spellq_sdk.exceptions import BadRequest
from spellq_sdk.snapshot import Snapshot, SnapshotError

HASHES_A_QUESTION: Final = 10_000
SMALL_BYTES: Final = 64 << 10
"""Files of up to so many bytes are sent in batches."""
BATCH_FILES: Final = 500
BATCH_BYTES: Final = 8 << 20
BATCHES_AT_ONCE: Final = 4
FILES_AT_ONCE: Final = 8


class Storage(Protocol):
    """Where snapshots are sent (a client's `gateway`)."""

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        """Those of the SHA-256 hashes whose content is not stored yet."""
        ...

    async def upload(self, sha256: str, source: Path) -> None:
        """Store a file's content under its hash; a BadRequest where it has another one."""
        ...

    async def upload_batch(self, contents: Sequence[bytes]) -> list[str]:
        """Store small contents, at most 1,000 and 8 MiB in all; gives their hashes, in order."""
        ...

    async def create_tree(self, tree: Tree) -> str:
        """Store a tree whose contents are stored, and give its id."""
        ...


async def upload(
    snapshot: Snapshot, storage: Storage, progress: Callable[[int, int], None] | None = None
) -> str:
    """Send what `storage` lacks of a snapshot; gives the tree's id.

    Small files travel together, large ones each for itself. `progress` is told
    how many of how many missing files have been sent. A small file that changed
    meanwhile (a log somebody writes, say) goes as it is when it is sent.

    Raises:
        SnapshotError: a large file changed after the snapshot was taken, or a file is gone.
        ClientException: the gateway refuses, or cannot be reached.
    """
    hashes = sorted(snapshot.files)
    missing: list[str] = []
    for at in range(0, len(hashes), HASHES_A_QUESTION):
        missing += await storage.missing(hashes[at : at + HASHES_A_QUESTION])
    small, large = _batches(snapshot, missing)
    batches, files = iter(small), iter(large)
    changed: dict[Path, TreeEntry] = {}
    done = 0

    def sent(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, len(missing))

    async def send_batches() -> None:
        for batch in batches:
            contents = {sha256: snapshot.files[sha256] for sha256 in batch}
            changed.update(await _send_batch(storage, contents))
            sent(len(batch))

    async def send_files() -> None:
        for sha256 in files:
            await _send(storage, sha256, snapshot.files[sha256])
            sent(1)

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(min(BATCHES_AT_ONCE, len(small))):
                tasks.start_soon(send_batches)
            for _ in range(min(FILES_AT_ONCE, len(large))):
                tasks.start_soon(send_files)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return await storage.create_tree(_as_sent(snapshot, changed))


def _as_sent(snapshot: Snapshot, changed: dict[Path, TreeEntry]) -> Tree:
    """The tree with the files that changed as they were sent."""
    if not changed:
        return snapshot.tree
    entries = []
    for entry in snapshot.tree.entries:
        sent = changed.get(snapshot.root / entry.path)
        if sent is not None:
            entry = msgspec.structs.replace(entry, sha256=sent.sha256, size=sent.size)
        elif (file := snapshot.files.get(entry.sha256 or "")) in changed:
            raise _changed(file)  # another file had the content that is lost
        entries.append(entry)
    return make_tree(entries)


def _batches(snapshot: Snapshot, missing: Iterable[str]) -> tuple[list[list[str]], list[str]]:
    """The hashes of small files in batches, and those of large ones."""
    sizes = {entry.sha256: entry.size for entry in snapshot.tree.entries}
    small: list[list[str]] = []
    large: list[str] = []
    room = 0
    for sha256 in missing:
        size = sizes[sha256]
        if size > SMALL_BYTES:
            large.append(sha256)
            continue
        if not small or size > room or len(small[-1]) == BATCH_FILES:
            small.append([])
            room = BATCH_BYTES
        small[-1].append(sha256)
        room -= size
    return small, large


async def _send_batch(storage: Storage, files: dict[str, Path]) -> dict[Path, TreeEntry]:
    """Send small files; gives those that are not what they were any more, as they were sent."""
    contents = await anyio.to_thread.run_sync(lambda: [_content(file) for file in files.values()])
    stored = await storage.upload_batch(contents)
    return {
        file: TreeEntry(path="", size=len(content), sha256=now)
        for (before, file), content, now in zip(files.items(), contents, stored, strict=True)
        if now != before
    }


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(SMALL_BYTES + 1)
    except OSError as error:
        raise _changed(file) from error
    if len(content) > SMALL_BYTES:
        raise _changed(file)
    return content


async def _send(storage: Storage, sha256: str, file: Path) -> None:
    try:
        await storage.upload(sha256, file)
    except (BadRequest, OSError) as error:
        raise _changed(file) from error


def _changed(file: Path) -> SnapshotError:
    return SnapshotError(
        f"{file} changed while the code was being sent. Try again once nothing writes there."
    )
