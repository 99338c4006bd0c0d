"""Outputs, exactly: what of /spell is saved, what is not, and that it comes back as it was."""

import asyncio
import contextlib
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from spellq.trees import TreeEntry
from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon, find_daemon
from spellq_sdk.runs import Run
from spellq_sdk.sending import upload
from spellq_sdk.snapshot import take_snapshot
from tests.e2e.conftest import Installation
from tests.e2e.test_restart import end
from tests.e2e.test_runs import final, launch, output

MIB = 1 << 20

CODE = {
    "kept.py": "kept\n",
    "changed.py": "before\n",
    "touched.py": "touched\n",
    "deleted.py": "deleted\n",
    "same-again.py": "the same\n",
    "other-again.py": "the same\n",
    "old-name.py": "renamed\n",
    "run.sh": "#!/bin/sh\n",
    "package/a.py": "a\n",
    "package/deep/b.py": "b\n",
    "gone/c.py": "c\n",
    "emptied/d.py": "d\n",
    "became-a-folder": "file\n",
    "became-a-file/e.py": "e\n",
    "became-a-link.py": "file\n",
}


@pytest.fixture
async def code(client: AsyncClient, project: Path) -> str:
    """A snapshot of a small project with a link in it."""
    for name, text in CODE.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    (project / "latest").symlink_to("package/a.py")
    (project / "package" / "up").symlink_to("../kept.py")
    return await upload(await asyncio.to_thread(take_snapshot, project), client.gateway)


async def run(client: AsyncClient, command: str, **options: object) -> Run:
    """Run a command that has to succeed."""
    made = await launch(client, command, **options)
    await final(client, made)
    assert (made.status, made.user_exit_code) == ("complete", 0), await output(made)
    return made


async def saved(client: AsyncClient, run: Run) -> dict[str, TreeEntry]:
    tree = await client.gateway.tree(f"runs/{run.id}")
    return {entry.path: entry for entry in tree.entries}


async def said(run: Run, word: str) -> list[str]:
    """The lines about outputs that begin with a word, without it and their frame."""
    return [
        entry.log.removeprefix(f"{word} ")
        async for entry in run.logs()
        if entry.status == "saving" and entry.log.startswith(word)
    ]


async def copied(run: Run, folder: Path) -> dict[str, bytes | str]:
    """What `cp` brings: contents, and the targets of links."""
    await run.cp("", folder)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


async def test_what_is_new_or_changed_is_saved_and_nothing_else(
    client: AsyncClient, code: str, tmp_path: Path
) -> None:
    made = await run(
        client,
        """
        echo after > changed.py
        touch touched.py; chmod 600 touched.py; cat touched.py > t; cat t > touched.py; rm t
        rm deleted.py same-again.py other-again.py; rm -r gone
        echo 'the same' > same-again.py; echo 'the other' > other-again.py
        mv old-name.py new-name.py; mv package moved
        chmod +x run.sh
        rm -r emptied; mkdir emptied
        rm became-a-folder became-a-link.py; rm -r became-a-file
        mkdir became-a-folder; echo e > became-a-folder/e; echo f > became-a-file
        ln -s kept.py became-a-link.py
        echo new > new.txt; echo hidden > .hidden; mkdir -p .cache/x; echo c > .cache/x/y
        echo made > made-and-gone; rm made-and-gone; mkdir -p empty/folders/only
        """,
        snapshot=code,
    )
    assert await copied(made, tmp_path / "copied") == {
        "changed.py": b"after\n",
        "other-again.py": b"the other\n",
        "new-name.py": b"renamed\n",
        "moved/a.py": b"a\n",
        "moved/deep/b.py": b"b\n",
        "moved/up": "../kept.py",
        "run.sh": b"#!/bin/sh\n",
        "became-a-folder/e": b"e\n",
        "became-a-file": b"f\n",
        "became-a-link.py": "kept.py",
        "new.txt": b"new\n",
        ".hidden": b"hidden\n",
        ".cache/x/y": b"c\n",
    }
    assert os.access(tmp_path / "copied" / "run.sh", os.X_OK)
    assert not os.access(tmp_path / "copied" / "new.txt", os.X_OK)
    names = await said(made, "Saving")
    assert names == [f"'/spell/{name}'" for name in sorted(await saved(client, made))]
    assert await said(made, "Skipping") == []


async def test_a_run_that_only_deletes_and_touches_has_no_outputs(
    client: AsyncClient, code: str
) -> None:
    made = await run(client, "rm -r package kept.py; touch changed.py; mkdir x", snapshot=code)
    assert await saved(client, made) == {}
    lines = [entry.log async for entry in made.logs() if entry.status == "saving"]
    assert lines[-1] == "No modified or new files found"
    assert made.outputs_files == 0


async def test_links_that_stay_inside_are_saved_and_the_others_are_named(
    client: AsyncClient, code: str, tmp_path: Path
) -> None:
    made = await run(
        client,
        """
        mkdir -p out/deep; echo x > out/x
        ln -s x out/beside; ln -s ../out/x out/up; ln -s nowhere out/dangling
        ln -s /spell/out/x out/deep/absolute; ln -s /spell out/deep/all; ln -s out/deep folder
        ln -sfn package/deep/b.py latest; touch -h package/up
        ln -s /etc/passwd host; ln -s ../etc/passwd above; ln -s /spellbound near
        ln -s ../../../tmp out/deep/out; ln -s /proc/self/root out/root
        """,
        snapshot=code,
    )
    kept = {
        "out/x": b"x\n",
        "out/beside": "x",
        "out/up": "../out/x",
        "out/dangling": "nowhere",
        "out/deep/absolute": "../x",
        "out/deep/all": "../..",
        "folder": "out/deep",
        "latest": "package/deep/b.py",
    }
    assert await copied(made, tmp_path / "copied") == kept
    assert await said(made, "Skipping") == [
        f"'/spell/{name}': the link leads out of /spell"
        for name in ("above", "host", "near", "out/deep/out", "out/root")
    ]
    later = await run(
        client,
        "cat /mnt/out/beside /mnt/out/deep/absolute; readlink /mnt/folder /mnt/latest",
        attached_resources={f"runs/{made.id}": "/mnt"},
    )
    assert await output(later) == ["x", "x", "out/deep", "package/deep/b.py"]


async def test_what_is_no_file_is_named_and_holds_nothing_up(client: AsyncClient) -> None:
    made = await run(
        client,
        """
        mkfifo pipe
        python -c 'import socket; socket.socket(socket.AF_UNIX).bind("talk")'
        echo x > x
        """,
    )
    assert list(await saved(client, made)) == ["x"]
    assert await said(made, "Skipping") == [
        "'/spell/pipe': it is a FIFO",
        "'/spell/talk': it is a socket",
    ]


ODD_NAMES = [
    "new\nline",
    "tab\tand\rreturn",
    "'single' \"double\" `back`",
    "-rf",
    "--help",
    " spaces ",
    "back\\slash",
    "🎉 é \u202eright to left",
    "e\u0301 decomposed",
    "percent%20?query#fragment&a=b",
    "colon:in:name",
    "$(touch hacked)",
    "*",
    "...",
    "\x1b[31mred",
    "~",
    "L" * 255,
    "a folder\n/with 'odd'\n/-files",
]


async def test_odd_names_come_back_as_they_were(
    client: AsyncClient, shared: Installation, tmp_path: Path
) -> None:
    made = await run(
        client,
        """python - <<'END'
import json, os, pathlib
for name in json.loads(os.environ["NAMES"]):
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_text(name)
open(b"caf\\xe9", "w").close()
os.mkdir(b"fol\\xffder")
open(b"fol\\xffder/file", "w").close()
END""",
        envvars={"NAMES": json.dumps(ODD_NAMES)},
    )
    assert await copied(made, tmp_path / "copied") == {name: name.encode() for name in ODD_NAMES}
    assert await said(made, "Skipping") == [
        r"'/spell/caf\xe9': its name is not UTF-8",
        r"'/spell/fol\xffder/file': its name is not UTF-8",
    ]
    assert len(await said(made, "Saving")) == len(ODD_NAMES)
    listed = {line.path for line in await client.ls(f"runs/{made.id}")}
    assert listed == {name for name in ODD_NAMES if "/" not in name} | {"a folder\n/"}
    for name in ODD_NAMES:
        await made.cp(name, tmp_path / "one by one")
        assert (tmp_path / "one by one" / Path(name).name).read_bytes() == name.encode()
    told = await asyncio.to_thread(shared.spellq, "ls", f"runs/{made.id}")
    assert len(told.stdout.splitlines()) == len(listed)
    assert all(line.isprintable() for line in told.stdout.splitlines())
    later = await run(
        client,
        """cd /mnt; find . -type f -print0 | sort -z | xargs -0 cat | md5sum
        find /spell -mindepth 1""",
        attached_resources={f"runs/{made.id}": "/mnt"},
    )
    again = await run(
        client,
        """cd data; find . -type f -print0 | sort -z | xargs -0 cat | md5sum""",
        attached_resources={f"runs/{made.id}": "data"},
    )
    assert await output(later) == await output(again)
    assert len(await output(later)) == 1


async def test_a_mount_point_below_spell_and_what_is_in_it_are_no_outputs(
    client: AsyncClient, code: str, tmp_path: Path
) -> None:
    data = await run(client, "mkdir d; echo in > d/in.txt; echo one > one.txt")
    made = await run(
        client,
        """
        cat made/for/it/in.txt package/deep/in.txt single.txt
        echo beside > made/for/beside; echo beside > package/beside; echo x > made/for/it.txt
        """,
        snapshot=code,
        attached_resources={
            f"runs/{data.id}/d": "made/for/it",
            f"runs/{data.id}/d/": "/spell/package/deep",
            f"runs/{data.id}/one.txt": "single.txt",
        },
    )
    assert await output(made) == ["in", "in", "one"]
    assert await copied(made, tmp_path / "copied") == {
        "made/for/beside": b"beside\n",
        "made/for/it.txt": b"x\n",
        "package/beside": b"beside\n",
    }


async def test_modes_hard_links_and_depth(client: AsyncClient, tmp_path: Path) -> None:
    deep = "/".join(["d"] * 200)
    made = await run(
        client,
        f"""
        for mode in 000 200 400 444 644 666 700 755 777 100 4755; do
            echo $mode > m$mode; chmod $mode m$mode
        done
        echo linked > first; ln first second; ln first third; chmod +x third
        mkdir -p {deep}; echo deep > {deep}/file
        mkdir -p shut/inner; echo x > shut/inner/x; echo y > shut/y
        chmod 000 shut/y shut/inner shut
        mkdir readable; echo z > readable/z; chmod 400 readable
        """,
    )
    found = await saved(client, made)
    assert await said(made, "Skipping") == []
    modes = {name[1:] for name, entry in found.items() if name[0] == "m" and entry.executable}
    assert modes == {"700", "755", "777", "100", "4755"}
    assert found["first"].executable
    assert found["first"].sha256 == found["second"].sha256 == found["third"].sha256
    brought = await copied(made, tmp_path / "copied")
    assert brought[f"{deep}/file"] == b"deep\n"
    assert brought["shut/inner/x"] == b"x\n"
    assert brought["m000"] == b"000\n"
    assert not stat.S_IMODE((tmp_path / "copied" / "m4755").stat().st_mode) & stat.S_ISUID
    later = await run(
        client,
        f"""cd /mnt; cat m000 shut/y shut/inner/x readable/z {deep}/file
        test -x m755 && test -x second && ! test -x m644 && ! test -x m000""",
        attached_resources={f"runs/{made.id}": "/mnt"},
    )
    assert await output(later) == ["000", "y", "x", "z", "deep"]


def artifacts_of(installation: Installation, entry: TreeEntry) -> Path:
    assert entry.sha256 is not None
    return installation.home / "artifacts" / entry.sha256[:2] / entry.sha256


def most_memory_bytes(daemon: LocalDaemon) -> int:
    """The most the daemon ever held in memory."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def test_two_gigabytes_with_holes_are_moved_and_the_holes_stay(
    client: AsyncClient, shared: Installation, daemon: LocalDaemon, tmp_path: Path
) -> None:
    before = most_memory_bytes(daemon)
    made = await run(
        client,
        """
        truncate -s 2G big; echo middle | dd of=big bs=1M seek=1000 conv=notrunc status=none
        truncate -s 512M tool; echo end >> tool; chmod +x tool
        stat -c %i big
        """,
    )
    found = await saved(client, made)
    stored = artifacts_of(shared, found["big"]).stat()
    assert await output(made) == [str(stored.st_ino)]
    assert stored.st_size == found["big"].size == 2 << 30
    assert stored.st_blocks * 512 < 4 * MIB
    assert artifacts_of(shared, found["tool"]).stat().st_blocks * 512 < 4 * MIB
    assert most_memory_bytes(daemon) - before < 100 * MIB
    await made.cp("tool", tmp_path)
    assert (tmp_path / "tool").stat().st_size == (512 * MIB) + 4
    assert (tmp_path / "tool").stat().st_blocks * 512 < 4 * MIB
    later = await run(
        client,
        "stat -c %s /mnt/big; dd if=/mnt/big bs=1M skip=1000 count=1 status=none | head -c 7;"
        "tail -c 4 /mnt/tool; test -x /mnt/tool; du -m /mnt | tail -1 | cut -f1",
        attached_resources={f"runs/{made.id}": "/mnt"},
    )
    size, middle, end, room = await output(later)
    assert (size, middle, end) == (str(2 << 30), "middle", "end")
    assert int(room) < 10


async def test_a_daemon_killed_while_it_saves_loses_nothing(
    own: Installation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPELLQ_HOME", str(own.home))
    for name in ("SPELLQ_URL", "SPELLQ_TOKEN", "SPELL_RUN"):
        monkeypatch.delenv(name, raising=False)
    async with AsyncClient.from_environment() as client:
        made = await client.runs.new(
            command="for n in $(seq 3000); do echo $n > $n; done; chmod +x 7; ln 8 again; exit 6"
        )
        kills = 0
        async with contextlib.aclosing(made.logs(follow=True)) as entries:
            async for entry in entries:
                if entry.log.startswith("Saving") and kills < 2:
                    daemon = await asyncio.to_thread(find_daemon, own.home)
                    if daemon is not None:  # else these lines came before its end
                        await asyncio.to_thread(end, daemon, signal.SIGKILL)
                        kills += 1
        assert kills == 2
        await made.refresh()
        assert (made.status, made.user_exit_code, made.outputs_files) == ("complete", 6, 3001)
        expected = {str(n): b"%d\n" % n for n in range(1, 3001)} | {"again": b"8\n"}
        assert await copied(made, tmp_path / "copied") == expected
        assert (await saved(client, made))["7"].executable
        assert os.listdir(own.home / "artifacts" / "incoming") == []


async def test_more_than_the_limit_fails_and_names_it(client: AsyncClient) -> None:
    made = await launch(client, "truncate -s 101G big; echo small > small")
    await final(client, made)
    assert (made.status, made.cause, made.user_exit_code) == ("failed", "outputs", 0)
    assert "larger than 100 GiB, the limit of one run" in made.reason
    assert await saved(client, made) == {}


MANY_FILES = """python - <<'END'
import os
for folder in range(FOLDERS):
    os.makedirs(f"d/{folder}")
    for n in range(1000):
        with open(f"d/{folder}/{n}", "w") as file:
            file.write(f"{folder} {n}")
END"""


async def test_a_kill_while_outputs_are_saved(client: AsyncClient, shared: Installation) -> None:
    killed = await launch(client, MANY_FILES.replace("FOLDERS", "10"))
    async with contextlib.aclosing(killed.logs(follow=True)) as entries:
        async for entry in entries:
            if entry.log.startswith("Saving"):
                break
    await killed.kill()
    await final(client, killed)
    assert killed.status == "killed"
    assert await saved(client, killed) == {}
    assert os.listdir(shared.home / "artifacts" / "incoming") == []


@pytest.mark.large
@pytest.mark.timeout(600)
async def test_a_hundred_thousand_small_files(client: AsyncClient, daemon: LocalDaemon) -> None:
    before = most_memory_bytes(daemon)
    made = await launch(client, MANY_FILES.replace("FOLDERS", "100"))
    await final(client, made)
    assert (made.status, made.outputs_files) == ("complete", 100_000)
    found = await saved(client, made)
    assert len(found) == 100_000
    assert len(await said(made, "Saving")) == 100_000
    assert most_memory_bytes(daemon) - before < 300 * MIB
    later = await run(
        client,
        "cd /mnt/data; ls | wc -l; find . -type f | wc -l; cat 42/421",
        attached_resources={f"runs/{made.id}/d": "/mnt/data"},
    )
    assert await output(later) == ["100", "100000", "42 421"]
