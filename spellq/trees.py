"""Trees: the immutable content of a folder, as a list of what lies in it.

A snapshot of code and the saved outputs of a run are both trees. A tree is itself stored as an
artifact, so its id (SHA-256 of its encoding) fixes every byte below it.
"""

import hashlib
import posixpath
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
from msgspec import Struct

MAX_ENTRIES: Final = 2_000_000


class TreeEntry(Struct, frozen=True, omit_defaults=True, array_like=True):
    """One file (`sha256` of its content, in hex) or one symbolic link (`link`, its target)."""

    path: str
    size: int = 0
    sha256: str | None = None
    link: str | None = None
    executable: bool = False


class Tree(Struct, frozen=True):
    """The content of a folder; entries are sorted by path. Folders are implied by their files."""

    entries: tuple[TreeEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    def below(self, path: str) -> Iterator[TreeEntry]:
        """The entry at `path`, or all that lies below it; paths stay relative to the tree."""
        if not path:
            yield from self.entries
            return
        for entry in self.entries:
            if entry.path == path or entry.path.startswith(path + "/"):
                yield entry

    def subtree(self, path: str) -> "Tree | None":
        """What lies at `path` as a tree of its own (a file: of one entry, under its own name).

        None when nothing does.
        """
        if not path:
            return self
        prefix = len(path) + 1
        found = [
            msgspec.structs.replace(
                entry,
                path=posixpath.basename(path) if entry.path == path else entry.path[prefix:],
            )
            for entry in self.below(path)
        ]
        return Tree(tuple(found)) if found else None

    def entry(self, path: str) -> TreeEntry | None:
        """The file or link at exactly `path`."""
        return next((entry for entry in self.entries if entry.path == path), None)


class InvalidTreeError(ValueError):
    """A tree with an entry that may not be: the message names it."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Tree)


def make_tree(entries: Iterable[TreeEntry]) -> Tree:
    return Tree(tuple(sorted(entries, key=lambda entry: entry.path)))


def encode_tree(tree: Tree) -> tuple[str, bytes]:
    """The tree's id and its bytes."""
    data = _encoder.encode(tree)
    return hashlib.sha256(data).hexdigest(), data


def decode_tree(data: bytes) -> Tree:
    """The tree in `data`, checked: whoever sent it may be hostile.

    Raises:
        InvalidTreeError: not a tree, or one with an unsafe, doubled or malformed entry.
    """
    try:
        tree = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidTreeError(f"not a tree: {error}") from error
    if len(tree.entries) > MAX_ENTRIES:
        raise InvalidTreeError(f"a tree of {len(tree.entries)} entries; the limit is {MAX_ENTRIES}")
    seen: set[str] = set()
    folders: set[str] = set()
    for entry in tree.entries:
        _check(entry)
        if entry.path in seen:
            raise InvalidTreeError(f"{entry.path!r} is in the tree twice")
        seen.add(entry.path)
        folder = posixpath.dirname(entry.path)
        while folder and folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    if both := seen & folders:
        raise InvalidTreeError(f"{min(both)!r} is both a file and a folder")
    return tree


def _check(entry: TreeEntry) -> None:
    path = entry.path
    if not path or path != posixpath.normpath(path) or path.startswith("/") or "\0" in path:
        raise InvalidTreeError(f"unsafe path {path!r}")
    if path == ".." or path.startswith("../"):
        raise InvalidTreeError(f"{path!r} leads out of the tree")
    if (entry.sha256 is None) == (entry.link is None):
        raise InvalidTreeError(f"{path!r} has to be a file or a link")
    if entry.sha256 is not None and not _is_sha256(entry.sha256):
        raise InvalidTreeError(f"{path!r} has no valid SHA-256")
    if entry.link is not None and not link_stays_inside(path, entry.link):
        raise InvalidTreeError(f"the link {path!r} leads out of the tree")


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(digit in "0123456789abcdef" for digit in text)


def link_stays_inside(path: str, target: str) -> bool:
    """Whether a link at `path` points to a place in its own tree, as far as its text tells."""
    if target.startswith("/") or "\0" in target or not target:
        return False
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return joined != ".." and not joined.startswith("../")


def on_one_line(path: str) -> str:
    """The path as people are shown it: one line, and nothing a terminal obeys."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in path
    )
