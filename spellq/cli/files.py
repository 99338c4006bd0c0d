"""`spellq ls` and `cp`: what runs have saved."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spellq.cli.connection import connected, execute, print_json
from spellq.cli.errors import CONFIGURATION, CliError
from spellq.cli.options import output_option
from spellq.cli.screen import errors, output
from spellq.cli.times import listed
from spellq.trees import on_one_line
from spellq.wire import LsEntry, LsReply

if TYPE_CHECKING:
    from spellq.trees import Tree


@click.command(epilog="Example: spellq ls -h runs/12")
@click.argument("path", default="")
@click.option("-h", "human", is_flag=True, help="Sizes for people.")
@output_option
def ls(path: str, human: bool, as_json: bool) -> None:
    """List what runs have saved: runs, or the files at PATH."""

    async def fetch() -> LsReply:
        async with connected() as client:
            return await client.gateway.ls(path)

    entries = execute(fetch).entries
    if as_json:
        print_json(entries)
        return
    if not entries:
        errors().line(f"No files for path {path}")
    now = datetime.now(UTC)
    for entry in entries:
        output().line(ls_line(entry, now, human=human))


def ls_line(entry: LsEntry, now: datetime, *, human: bool) -> str:
    """`SIZE DATE PATH`, with what else is known of it."""
    size = "-" if entry.size is None else str(entry.size)
    if human and entry.size is not None:
        from spellq.sizes import human_size

        size = human_size(entry.size).replace(" ", "").removesuffix("iB")
    date = "-" if entry.date is None else listed(entry.date, now)
    info = f" ({entry.info})" if entry.info else ""
    link = f" → {entry.link}" if entry.link else ""
    return f"{size:<8} {date:<14} {on_one_line(entry.path)}{info}{on_one_line(link)}"


@click.command(epilog="Example: spellq cp runs/12/model.bin models")
@click.argument("source")
@click.argument("folder", default=".", metavar="[FOLDER]", type=click.Path(path_type=Path))
@click.option("-f", "--force", is_flag=True, help="Overwrite what is there.")
@click.option("-i", "--interactive", is_flag=True, help="Ask before overwriting a file.")
def cp(source: str, folder: Path, force: bool, interactive: bool) -> None:
    """Copy the file SOURCE, or what is in the folder SOURCE, into FOLDER (or here)."""
    if force and interactive:
        raise CliError("--force and --interactive exclude each other.", CONFIGURATION)
    if source.startswith("/"):
        raise CliError(
            f"{source!r} is a path of this machine. Name a resource, for example runs/12.",
            CONFIGURATION,
        )
    ask = interactive or (not force and output().terminal)
    found = execute(lambda: _tree(source.rstrip("/")))
    chosen = _choose(found, folder) if ask else found
    execute(lambda: _fetch(chosen, folder))
    if output().terminal:
        copied, skipped = len(chosen.entries), len(found.entries) - len(chosen.entries)
        some = "1 file" if copied == 1 else f"{copied} files"
        also = f" Skipped {skipped} file{'' if skipped == 1 else 's'}." if skipped else ""
        output().line(f"✔ Copied {some}.{also}")


async def _tree(source: str) -> "Tree":
    async with connected() as client:
        return await client.gateway.tree(source)


async def _fetch(tree: "Tree", folder: Path) -> None:
    from spellq_sdk.downloads import download

    async with connected() as client:
        await download(client.gateway, tree, folder)


def _choose(tree: "Tree", folder: Path) -> "Tree":
    """Ask about what is there already. Not while a loop runs, so that ^C is obeyed."""
    from spellq.trees import make_tree

    return make_tree(
        entry
        for entry in tree.entries
        if not os.path.lexists(folder / entry.path)
        or _confirm(f"Overwrite {on_one_line(str(folder / entry.path))}?")
    )


def _confirm(question: str) -> bool:
    """Ask until the answer is yes or no (or empty: no). input(), in click's, may swallow a ^C."""
    while True:
        errors().write(errors().cell(f"{question} [y/N]: "))
        answer = sys.stdin.readline()
        if not answer:
            raise click.Abort
        if (word := answer.strip().lower()) in ("y", "yes"):
            return True
        if word in ("", "n", "no"):
            return False
