"""The snapshot of code: an immutable copy of a git repository's files, or of a folder.

Taking one only reads. Git is asked with commands that write nothing and with its optional locks
off, so a repository, its index and its stash stay as they are, byte for byte.
"""

import contextlib
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from spellq.sizes import human_size
from spellq.trees import Tree, TreeEntry, link_stays_inside, make_tree

if TYPE_CHECKING:
    import pathspec

SIZE_LIMIT_BYTES: Final = 1 << 30
IGNORE_FILE: Final = ".spellqignore"


_GITLINK: Final = "160000"
_HASHING_THREADS: Final = min(8, (os.cpu_count() or 1) * 2)
_FILES_A_TASK: Final = 32


class SnapshotError(Exception):
    """The code cannot be copied; the message says why and what to do."""


class Snapshot(Struct, frozen=True, kw_only=True):
    """The files of `root` as they were, with where the content of each can be read.

    `plain` tells that `root` is a folder outside git, of which nearly everything is included.
    """

    tree: Tree
    files: dict[str, Path]
    root: Path
    subfolder: str
    repository: str
    commit_hash: str = ""
    description: str = ""
    dirty: bool = False
    untracked: int = 0
    plain: bool = False
    warnings: tuple[str, ...] = ()


def take_snapshot(
    folder: Path, *, untracked: bool = True, home: Path | None = None, limit: int = SIZE_LIMIT_BYTES
) -> Snapshot:
    """The code around `folder`: its git repository's files, or the folder itself.

    Of a repository: tracked files with their uncommitted changes, and (with `untracked`) files git
    does not ignore. Elsewhere everything but `.git` folders. In both without `home` (spellq's own
    state) and without what `.spellqignore` in the root names, in the syntax of `.gitignore`.

    Raises:
        SnapshotError: git refuses, a file cannot be read, or they have more than `limit` bytes.
    """
    folder = folder.resolve()
    if home is not None and folder.is_relative_to(home.resolve()):
        raise SnapshotError(f"{folder} is spellq's own folder. Go to the folder of your project.")
    root = _repository_root(folder)
    if root is None and folder == Path(folder.anchor):
        raise SnapshotError(
            "The whole file system is no project. Go to the folder of your project."
        )
    if root is None and folder == Path(os.path.expanduser("~")).resolve():
        raise SnapshotError(
            f"{folder} is your home folder. Go to the folder of your project, "
            "or run git init there."
        )
    warnings: list[str] = []
    commit, subject, dirty, others = "", "", False, frozenset[str]()
    plain = root is None
    if root is None:
        root = folder
        names: Iterable[str] = _walk(root, home.resolve() if home else None)
    else:
        tracked = _real(root, _tracked(root, warnings))
        others = frozenset(_untracked(root, warnings) if untracked else ())
        commit, subject = _head(root)
        dirty = bool(_git(root, "status", "--porcelain", "-z", "--untracked-files=no",
                          "--ignore-submodules=all"))  # fmt: skip
        names = [*tracked, *others]
    if home is not None and home.resolve().is_relative_to(root):
        inner = home.resolve().relative_to(root).as_posix()
        names = (name for name in names if not f"{name}/".startswith(f"{inner}/"))
    if ignored := _ignore_rules(root):
        names = (name for name in names if not ignored.match_file(name))
    links, files = _sort_out(root, names, warnings)
    _check_size(root, files, limit)
    hashed = _hash_all(root, list(files))
    present = {entry.path for entry in (*links, *hashed)}
    return Snapshot(
        tree=make_tree((*links, *hashed)),
        files={entry.sha256: root / entry.path for entry in hashed if entry.sha256},
        root=root,
        subfolder="" if folder == root else folder.relative_to(root).as_posix(),
        repository=root.name,
        commit_hash=commit,
        description=subject,
        dirty=dirty,
        untracked=len(others & present),
        plain=plain,
        warnings=tuple(warnings),
    )


def _shown(name: str | bytes) -> str:
    """A name as it can be shown: what is not UTF-8, or not printable, as `\\xe9`."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


# Git


def _git(root: Path, *arguments: str) -> bytes:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ("git", "-c", "core.fsmonitor=false", *arguments)
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True
        )
    except FileNotFoundError:
        raise SnapshotError(
            f"{root} is a git repository, but git is missing. Install it."
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split()).removeprefix("fatal: ")
        raise SnapshotError(f"git {arguments[0]} failed: {said}")
    return done.stdout


def _repository_root(folder: Path) -> Path | None:
    inside = any((place / ".git").exists() for place in (folder, *folder.parents))
    if not inside and "GIT_DIR" not in os.environ:
        return None
    top = _git(folder, "rev-parse", "--show-toplevel")
    root = Path(os.fsdecode(top.removesuffix(b"\n"))).resolve()
    return root if folder.is_relative_to(root) else None


def _head(root: Path) -> tuple[str, str]:
    try:
        _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except SnapshotError:
        return "", ""  # no commit yet
    text = _git(root, "log", "-1", "--no-show-signature", "--no-color", "--format=%H%x00%s", "HEAD")
    commit, _, subject = text.decode(errors="replace").strip().partition("\0")
    return commit, subject


def _tracked(root: Path, warnings: list[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for record in _git(root, "ls-files", "-z", "--cached", "--stage").split(b"\0"):
        facts, _, raw = record.partition(b"\t")
        if not raw or raw in seen:  # an unmerged file is listed once a side
            continue
        seen.add(raw)
        name = _text(raw, warnings)
        if name is None:
            continue
        if facts.startswith(_GITLINK.encode()):
            warnings.append(f"The submodule {_shown(name)} is left out.")
        else:
            yield name


def _untracked(root: Path, warnings: list[str]) -> Iterator[str]:
    for raw in _git(root, "ls-files", "-z", "--others", "--exclude-standard").split(b"\0"):
        name = _text(raw, warnings) if raw else None
        if name is None:
            continue
        if name.endswith("/"):
            warnings.append(f"{_shown(name)} is a git repository of its own and is left out.")
        else:
            yield name


def _text(raw: bytes, warnings: list[str]) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        warnings.append(f"{_shown(raw)} is left out: its name is not UTF-8.")
        return None


def _real(root: Path, names: Iterable[str]) -> Iterator[str]:
    """The names whose folders are folders: where one became a link, its old files are deleted."""
    folders: dict[str, bool] = {"": True}

    def is_real(folder: str) -> bool:
        if folder not in folders:
            above = os.path.dirname(folder)
            place = root / folder
            folders[folder] = is_real(above) and place.is_dir() and not place.is_symlink()
        return folders[folder]

    return (name for name in names if is_real(os.path.dirname(name)))


# Folders


def _walk(root: Path, home: Path | None) -> Iterator[str]:
    """What lies in the folder; `home` is not looked into, where not everything can be read."""
    base = len(os.fspath(root).rstrip("/")) + 1

    def refuse(error: OSError) -> None:
        raise SnapshotError(
            f"Cannot read {error.filename}: {error.strerror}. Name it in {IGNORE_FILE}."
        ) from error

    rules = _ignore_rules(root)
    for place, folders, files in os.walk(root, onerror=refuse):
        kept = []
        for name in folders:
            path = os.path.join(place, name)
            if os.path.islink(path):
                yield path[base:]
            elif (
                name != ".git"
                and path != str(home)
                and not (rules and rules.match_file(path[base:] + "/"))
            ):
                kept.append(name)
        folders[:] = kept
        yield from (os.path.join(place, name)[base:] for name in files if name != ".git")


def _ignore_rules(root: Path) -> "pathspec.GitIgnoreSpec | None":
    place = root / IGNORE_FILE
    try:
        lines = place.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise SnapshotError(f"{place} is not UTF-8. Save it as that.") from error
    except OSError as error:
        raise SnapshotError(f"{place} cannot be read: {error.strerror}.") from error
    import pathspec

    try:
        return pathspec.GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise SnapshotError(f"{place} cannot be read: {error}.") from error


# Content


def _sort_out(
    root: Path, names: Iterable[str], warnings: list[str]
) -> tuple[list[TreeEntry], dict[str, int]]:
    """The links as entries, and the regular files with their sizes."""
    links: list[TreeEntry] = []
    files: dict[str, int] = {}
    own = _own_output()
    for name in names:
        path = os.path.join(root, name)
        try:
            name.encode()
            found = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else ""
        except UnicodeEncodeError:
            warnings.append(f"{_shown(name)} is left out: its name is not UTF-8.")
        except (FileNotFoundError, NotADirectoryError):
            continue  # deleted, but not yet for git
        else:
            if (found.st_dev, found.st_ino) in own:
                continue  # what this very command writes is no code
            if stat.S_ISREG(found.st_mode):
                files[name] = found.st_size
            elif stat.S_ISLNK(found.st_mode):
                if link_stays_inside(name, target):
                    links.append(TreeEntry(path=name, link=target))
                else:
                    warnings.append(
                        f"The link {_shown(name)} is left out: it leads to '{_shown(target)}'."
                    )
            elif not stat.S_ISDIR(found.st_mode):
                warnings.append(
                    f"{_shown(name)} is left out: it is neither a file nor a folder nor a link."
                )
    return links, files


def _own_output() -> set[tuple[int, int]]:
    """The files this very process writes to (`spellq run … > out.log`), by device and inode."""
    own = set()
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                own.add((found.st_dev, found.st_ino))
    return own


def _check_size(root: Path, files: dict[str, int], limit: int) -> None:
    total = sum(files.values())
    if total <= limit:
        return
    largest = ", ".join(f"{_shown(name)} ({human_size(size)})" for name, size in _largest(files))
    raise SnapshotError(
        f"The code in {root} has {human_size(total)}; the limit is {human_size(limit)}. "
        f"The largest entries: {largest}. Name what runs do not need in {IGNORE_FILE} "
        "or, where it is untracked, in .gitignore."
    )


def _largest(files: dict[str, int], number: int = 3) -> list[tuple[str, int]]:
    """The largest places: folders, entered as long as a single place in them holds nearly all."""
    found = sorted(_children(files, "").items(), key=lambda place: -place[1])[:number]
    for index, (name, size) in enumerate(found):
        while name.endswith("/"):
            inner, inner_size = max(_children(files, name).items(), key=lambda place: place[1])
            if inner_size < 0.9 * size:
                break
            name, size = inner, inner_size
        found[index] = (name, size)
    return found


def _children(files: dict[str, int], folder: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, size in files.items():
        if name.startswith(folder):
            head, slash, _ = name[len(folder) :].partition("/")
            child = folder + head + slash
            sizes[child] = sizes.get(child, 0) + size
    return sizes


def _hash_all(root: Path, names: list[str]) -> list[TreeEntry]:
    parts = [names[at : at + _FILES_A_TASK] for at in range(0, len(names), _FILES_A_TASK)]

    def hash_some(some: list[str]) -> list[TreeEntry]:
        return [entry for name in some if (entry := _hash(root, name))]

    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        return [entry for entries in threads.map(hash_some, parts) for entry in entries]


def _hash(root: Path, name: str) -> TreeEntry | None:
    try:
        with open(os.path.join(root, name), "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return None  # deleted meanwhile
    except OSError as error:
        raise SnapshotError(
            f"Cannot read {root / name}: {error.strerror}. Name it in {IGNORE_FILE}."
        ) from error
    return TreeEntry(
        path=name,
        size=found.st_size,
        sha256=digest,
        executable=bool(found.st_mode & stat.S_IXUSR),
    )


# Sending
