"""What runs have saved: resources found, listed, and fixed for mounting."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from anyio import to_thread
from msgspec import Struct

from spellq.control.errors import NotFound, Rejected
from spellq.ports import ArtifactStore, RunQuery, Store
from spellq.resources import InvalidResourceError, Resource, parse_resource
from spellq.runs import Run
from spellq.trees import Tree, decode_tree, encode_tree
from spellq.wire import LsEntry

T = TypeVar("T")

ENTRIES_IN_MEMORY: Final = 500_000
"""Of all remembered trees together; some 150 MiB."""

_ENTRIES_IN_THE_LOOP: Final = 1000
_BYTES_IN_THE_LOOP: Final = 64 * 1024
_PAGE: Final = 1000


class Saved(Struct, frozen=True):
    """A resource that is there: the run, the tree its outputs are, and the place in it."""

    run: Run
    tree_id: str
    tree: Tree
    path: str


class SavedOutputs:
    """Finds resources among the outputs of runs that have ended. One for the whole process."""

    def __init__(
        self, store: Store, artifacts: ArtifactStore, *, entries: int = ENTRIES_IN_MEMORY
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._trees = _Trees(entries)

    async def find(self, text: str, owner: str | None) -> Saved:
        """The resource `text` names; `owner` None sees everybody's.

        Raises:
            Rejected: malformed, unknown, or of a run that is not final.
        """
        try:
            resource = parse_resource(text)
        except InvalidResourceError as error:
            raise Rejected(str(error)) from error
        run = await self._store.get(resource.run)
        if run is None or (owner is not None and run.owner != owner):
            raise NotFound(_refusal(resource, f"there is no run {resource.run}"))
        if not run.is_final:
            raise Rejected(
                _refusal(
                    resource,
                    f"run {run.id} is {run.status}; its outputs are there when it has ended",
                )
            )
        tree_id, tree = await self._tree(run)
        if resource.path and not await _look(tree, lambda: any(tree.below(resource.path))):
            raise NotFound(_refusal(resource, f"run {run.id} saved nothing at {resource.path!r}"))
        return Saved(run, tree_id, tree, resource.path)

    async def subtree(self, text: str, owner: str | None) -> Tree:
        """What lies at a resource, as a tree of its own."""
        saved = await self.find(text, owner)
        below = await _look(saved.tree, lambda: saved.tree.subtree(saved.path))
        return below or Tree(())

    async def ls(self, path: str, owner: str | None) -> list[LsEntry]:
        """The rows of one folder, or of one file; "" is the root and "runs" all runs."""
        clean = path.strip("/")
        if not clean:
            return [LsEntry("runs/", None, None)]
        if clean == "runs":
            return await self._all_runs(owner)
        saved = await self.find(clean, owner)
        return await _look(saved.tree, lambda: list(_rows(saved)))

    async def _all_runs(self, owner: str | None) -> list[LsEntry]:
        rows: list[LsEntry] = []
        before: int | None = None
        while True:
            runs = await self._store.find(RunQuery(limit=_PAGE, owner=owner, before=before))
            rows += [LsEntry(f"{run.id}/", None, run.ended_at, run.status) for run in runs]
            if len(runs) < _PAGE:
                return rows
            before = runs[-1].id

    async def _tree(self, run: Run) -> tuple[str, Tree]:
        if run.outputs is None:
            tree_id, data = encode_tree(Tree(()))
            await self._artifacts.put_bytes(data)
            return tree_id, Tree(())
        tree = self._trees.get(run.outputs)
        if tree is None:
            data = await self._artifacts.get_bytes(run.outputs)
            if len(data) > _BYTES_IN_THE_LOOP:
                tree = await to_thread.run_sync(decode_tree, data)
            else:
                tree = decode_tree(data)
            self._trees.put(run.outputs, tree)
        return run.outputs, tree


class _Trees:
    """The trees used last, as many as have `most` entries in all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries = 0
        self._trees: OrderedDict[str, Tree] = OrderedDict()

    def get(self, tree_id: str) -> Tree | None:
        tree = self._trees.get(tree_id)
        if tree is not None:
            self._trees.move_to_end(tree_id)
        return tree

    def put(self, tree_id: str, tree: Tree) -> None:
        size = _size(tree)
        if tree_id in self._trees or size > self._most:
            return
        self._trees[tree_id] = tree
        self._entries += size
        while self._entries > self._most:
            _, oldest = self._trees.popitem(last=False)
            self._entries -= _size(oldest)


def _size(tree: Tree) -> int:
    return len(tree.entries) + 1


async def _look(tree: Tree, look: Callable[[], T]) -> T:
    """Look through the tree, a large one in a thread."""
    if len(tree.entries) <= _ENTRIES_IN_THE_LOOP:
        return look()
    return await to_thread.run_sync(look)


def _refusal(resource: Resource, why: str) -> str:
    return f"'{resource}' is not a valid resource: {why}."


def _rows(saved: Saved) -> Iterator[LsEntry]:
    entry = saved.tree.entry(saved.path) if saved.path else None
    date = saved.run.ended_at
    if entry is not None:
        name = entry.path.rpartition("/")[2]
        yield LsEntry(name, entry.size, date, link=entry.link)
        return
    folders: set[str] = set()
    below = saved.tree.subtree(saved.path)
    for entry in below.entries if below else ():
        folder, slash, _ = entry.path.partition("/")
        if not slash:
            yield LsEntry(entry.path, entry.size, date, link=entry.link)
        elif folder not in folders:
            folders.add(folder)
            yield LsEntry(folder + "/", None, date)
