"""What runs have saved: resources found, listed, and fixed for mounting."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from spellq.control.errors import NotFound, Rejected
from spellq.ports import ArtifactStore, RunQuery, Store
from spellq.resources import InvalidResourceError, Resource, parse_resource
from spellq.runs import Run
from spellq.trees import Tree, decode_tree, encode_tree
from spellq.wire import LsEntry

_TREES_IN_MEMORY: Final = 64


class Saved(Struct, frozen=True):
    """A resource that is there: the run, the tree its outputs are, and the place in it."""

    run: Run
    tree_id: str
    tree: Tree
    path: str


class SavedOutputs:
    """Finds resources among the outputs of runs that have ended."""

    def __init__(self, store: Store, artifacts: ArtifactStore) -> None:
        self._store = store
        self._artifacts = artifacts
        self._trees: OrderedDict[str, Tree] = OrderedDict()

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
        if resource.path and tree.subtree(resource.path) is None:
            raise NotFound(_refusal(resource, f"run {run.id} saved nothing at {resource.path!r}"))
        return Saved(run, tree_id, tree, resource.path)

    async def subtree(self, text: str, owner: str | None) -> Tree:
        """What lies at a resource, as a tree of its own."""
        saved = await self.find(text, owner)
        return saved.tree.subtree(saved.path) or Tree(())

    async def ls(self, path: str, owner: str | None) -> list[LsEntry]:
        """The rows of one folder, or of one file; "" is the root and "runs" all runs."""
        clean = path.strip("/")
        if not clean:
            return [LsEntry("runs/", None, None)]
        if clean == "runs":
            runs = await self._store.find(RunQuery(limit=1000, owner=owner))
            return [LsEntry(f"{run.id}/", None, run.ended_at, run.status) for run in runs]
        saved = await self.find(clean, owner)
        return list(_rows(saved))

    async def _tree(self, run: Run) -> tuple[str, Tree]:
        if run.outputs is None:
            tree_id, data = encode_tree(Tree(()))
            await self._artifacts.put_bytes(data)
            return tree_id, Tree(())
        tree = self._trees.get(run.outputs)
        if tree is None:
            tree = decode_tree(await self._artifacts.get_bytes(run.outputs))
            self._trees[run.outputs] = tree
            if len(self._trees) > _TREES_IN_MEMORY:
                self._trees.popitem(last=False)
        return run.outputs, tree


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
