"""The words, times and tables of the commands that look at runs and act on them."""

from datetime import UTC, datetime, timedelta
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spellq.cli.control import batch_lines, one_line
from spellq.cli.daemon import without_masters
from spellq.cli.doctor import Check, line
from spellq.cli.events import event_line
from spellq.cli.files import ls_line
from spellq.cli.info import facts
from spellq.cli.runs import row, status_words, verbose_row
from spellq.cli.screen import Screen, screen
from spellq.cli.shipping import has_start, told
from spellq.cli.tables import table
from spellq.cli.times import ago, duration, listed, stamp
from spellq.runs import Cause, Status
from spellq.trees import Tree, TreeEntry
from spellq.wire import LsEntry, RunReply, RunView
from spellq_sdk.models import RunEvent
from spellq_sdk.snapshot import Snapshot

NOW = datetime(2026, 5, 6, 12, 0, tzinfo=UTC)

RUN = RunView(
    id=12,
    status=Status.RUNNING,
    version=4,
    attempt=1,
    command="python train.py --epochs 100 \\\n  --fast",
    machine_type="T4",
    owner="ada",
    created_at=NOW - timedelta(hours=1),
    started_at=NOW - timedelta(minutes=2, seconds=5),
    ended_at=None,
    user_exit_code=None,
    cause=None,
    reason="",
    description="Add the training",
    git_commit_hash="0123456789abcdef",
    repository="project",
    cwd="",
    attached_resources={"runs/3/data": "/mnt/data"},
    environment_names=["KEY", "OTHER"],
    labels=["nightly", "x"],
    workflow=2,
    master=False,
    agent="local",
    outputs_files=0,
    outputs_bytes=0,
    timeout_minutes=90.0,
)


def run(**changes: Any) -> RunView:
    return msgspec.structs.replace(RUN, **changes)


DONE = run(
    status=Status.COMPLETE,
    user_exit_code=66,
    ended_at=NOW - timedelta(minutes=1),
    outputs_files=2,
    outputs_bytes=1536,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 seconds ago"),
        (1, "1 second ago"),
        (59.9, "59 seconds ago"),
        (60, "1 minute ago"),
        (7199, "1 hour ago"),
        (86400 * 13, "13 days ago"),
        (86400 * 14, "2026-04-22"),
    ],
)
def test_ago(seconds: float, text: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.6, "1s"),
        (59, "59s"),
        (61, "1m 1s"),
        (3600, "1h 0m 0s"),
        (90061, "1d 1h 1m 1s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text


def test_stamp_and_listed() -> None:
    assert stamp(NOW) == "2026-05-06 12:00:00"
    local = NOW.astimezone()
    assert listed(NOW, NOW) == local.strftime("%b %d %H:%M")
    assert listed(NOW - timedelta(days=400), NOW) == (local - timedelta(days=400)).strftime(
        "%b %d %Y"
    )


def test_tables_align_what_is_wide() -> None:
    assert table([("ID", "NAME", "X"), ("1", "✨", ""), ("22", "ab\x1b[1mc\x1b[0m", "y")]) == [
        "ID  NAME  X",
        "1   ✨",
        "22  ab\x1b[1mc\x1b[0m   y",
    ]
    assert table([]) == []
    assert table([("a\x1b[2Jb\nc", "x")]) == ["ab c  x"]


def test_in_ascii_what_is_the_users_own_is_kept() -> None:
    plain = Screen(TextIOWrapper(BytesIO(), "ascii"), terminal=False, unicode=False)
    assert table([("✨ é", "x"), ("abc…", "y")], plain.cell) == ["? ?     x", "abc...  y"]
    assert plain.fit("✨ say ✨ → …") == "say ? -> ..."


@pytest.mark.parametrize(
    ("name", "value", "live", "colour"),
    [("NO_COLOR", "1", True, False), ("TERM", "dumb", False, False), ("TERM", "xterm", True, True)],
)
def test_what_a_terminal_may_be_sent(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, live: bool, colour: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    stream = StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    found = screen(stream)
    assert (found.terminal, found.live, found.colour) == (True, live, colour)
    assert ("\x1b" in found.green("x")) == colour


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (Status.USER_REQUESTED, None, "Requested"),
        (Status.MACHINE_REQUESTED, None, "Queued"),
        (Status.BUILDING, None, "*Building"),
        (Status.SAVING, 0, "*Saving (0)"),
        (Status.COMPLETE, 0, "Complete (0)"),
        (Status.COMPLETE, 66, "Complete (66)"),
        (Status.STOPPED, 143, "Stopped (143)"),
        (Status.BUILD_FAILED, None, "Build Failed"),
        (Status.KILLED, None, "Killed"),
    ],
)
def test_status_words(status: Status, code: int | None, words: str) -> None:
    assert status_words(run(status=status, user_exit_code=code)) == words


def test_ps_rows() -> None:
    assert row(RUN) == ("12", "project", "python train.py --epochs…", "*Running", "ada")
    assert row(RUN, whole=True)[2] == "python train.py --epochs 100 \\ --fast"
    assert row(run(repository="", command="\x1b]0;x\x07a"))[1:3] == ("-", "a")
    assert verbose_row(RUN, NOW) == (
        "12",
        "project",
        "python train.py --epochs…",
        "01234567",
        "*Running [2m 5s]",
        "ada",
        "nightly, x",
        "T4",
        "Add the training",
    )
    assert verbose_row(DONE, NOW)[4] == "Complete (66) -- 1 minute ago"


def test_info_of_a_running_run() -> None:
    assert facts(RUN, NOW) == [
        ("Run", "12"),
        ("Workflow", "2"),
        ("Repository", "project"),
        ("Git Commit", "0123456789abcdef"),
        ("Status", "running"),
        ("Command", "python train.py --epochs 100 \\ --fast"),
        ("Description", "Add the training"),
        ("Creator", "ada"),
        ("Machine Type", "T4"),
        ("Created", "2026-05-06 11:00:00"),
        ("Start Time", "2026-05-06 11:57:55"),
        ("Duration", "2m 5s"),
        ("Timeout", "90 minutes"),
        ("Labels", "nightly, x"),
        ("Mounts", "runs/3/data at /mnt/data"),
        ("Environment Vars", "KEY, OTHER"),
    ]


def test_info_of_the_others() -> None:
    done = dict(facts(DONE, NOW))
    assert done["Status"] == "complete (66)"
    assert done["Outputs"] == "2 files, 1.5 KiB in runs/12"
    assert done["Duration"] == "1m 5s"
    waiting = run(
        status=Status.MACHINE_REQUESTED, reason="Waiting for a free t4 slot.", started_at=None
    )
    assert dict(facts(waiting, NOW))["Waiting for"] == "a free t4 slot."
    stopped = run(status=Status.STOPPED, cause=Cause.TIMEOUT, reason="Too long.")
    assert dict(facts(stopped, NOW))["Cause"] == "timeout: Too long."


def reply(number: int, status: Status, *, changed: bool = True) -> RunReply:
    return RunReply(run(id=number, status=status), changed)


def test_stop_and_kill_one() -> None:
    assert one_line("stop", reply(3, Status.STOPPING), "spell") == [
        "Stopping run 3. Use 'spell logs -f 3' to view logs while the job finishes."
    ]
    assert one_line("kill", reply(3, Status.KILLED), "spell") == ["3"]
    assert one_line("stop", reply(3, Status.COMPLETE, changed=False), "spell") == [
        "Run 3 has already finished: complete."
    ]
    assert one_line("stop", reply(3, Status.SAVING, changed=False), "spell") == [
        "Run 3 has ended its command and is saving its outputs."
    ]
    assert one_line("stop", reply(3, Status.KILLING, changed=False), "spell") == [
        "Run 3 is being killed."
    ]
    assert one_line("stop", None, "spell") == []


def test_stop_and_kill_many() -> None:
    replies = {
        1: reply(1, Status.COMPLETE, changed=False),
        2: None,
        3: reply(3, Status.STOPPING),
        4: reply(4, Status.STOPPING),
    }
    assert batch_lines("stop", replies) == [
        "Executing batch stop…",
        "| Already finished: 1",
        "| Run ID does not exist: 2",
        "--------------------",
        "| Successfully stopping: 3, 4. Any outputs will be pushed and saved.",
    ]
    assert batch_lines("kill", {3: reply(3, Status.KILLED)}) == [
        "Executing batch kill...",
        "| Successfully killed: 3",
    ]


def test_ls_lines() -> None:
    date = NOW.astimezone().strftime("%b %d %H:%M")
    file = LsEntry("model.bin", 123456, NOW)
    assert ls_line(file, NOW, human=False) == f"123456   {date:<14} model.bin"
    assert ls_line(file, NOW, human=True) == f"120.6K   {date:<14} model.bin"
    folder = LsEntry("12/", None, None, info="complete")
    assert ls_line(folder, NOW, human=False) == f"{'-':<8} {'-':<14} 12/ (complete)"
    link = LsEntry("latest", None, None, link="model.bin")
    assert ls_line(link, NOW, human=False).endswith(" latest → model.bin")


def event(**changes: Any) -> RunEvent:
    plain = RunEvent(
        run=12,
        version=5,
        type="run.status",
        status="complete",
        at=NOW,
        attempt=1,
        owner="ada",
        workflow=None,
        cause=None,
        data={"user_exit_code": 0},
        cursor="9",
    )
    return msgspec.structs.replace(plain, **changes)


def test_event_lines() -> None:
    time = NOW.astimezone().strftime("%H:%M:%S.000")
    assert event_line(event()) == f"{time}  run 12  run.status  complete (0)"
    labelled = event(type="run.label", data={"labels": ["x", "y"]})
    assert event_line(labelled) == f"{time}  run 12  run.label  complete  x, y"
    created = event(type="run.created", status="machine_requested", data={"command": "a\n\x1bcb"})
    assert event_line(created) == f"{time}  run 12  run.created  machine_requested  a b"


def snapshot(**changes: Any) -> Snapshot:
    plain = Snapshot(tree=Tree(()), files={}, root=Path("/r"), subfolder="", repository="r")
    return msgspec.structs.replace(plain, **changes)


def test_what_is_told_of_a_snapshot() -> None:
    assert told(snapshot()) == []
    assert told(snapshot(untracked=1)) == [
        "✨ 1 untracked file is included (--no-untracked leaves them out)."
    ]
    assert told(snapshot(untracked=2, dirty=True)) == [
        "✨ 2 untracked files are included (--no-untracked leaves them out).",
        "✨ Preparing uncommitted changes…",
    ]
    code = Tree((TreeEntry("net.py", 1, "0" * 64),))
    assert told(snapshot(plain=True, tree=code)) == ["✨ 1 file of this folder is included."]
    assert told(snapshot(plain=True)) == ["✨ 0 files of this folder are included."]
    many = told(snapshot(warnings=tuple(f"File {number} is left out." for number in range(7))))
    assert many[-2:] == ["✨ File 4 is left out.", "✨ 2 more are left out."]


def test_a_folder_without_files_is_no_place_to_start() -> None:
    code = Tree((TreeEntry("lib/net.py", 1, "0" * 64),))
    assert has_start(snapshot(tree=code))
    assert has_start(snapshot(tree=code, subfolder="lib"))
    assert not has_start(snapshot(tree=code, subfolder="li"))


def test_doctor_lines() -> None:
    assert line(Check("git", True, "2.39.5")) == "✔ git: 2.39.5"
    assert line(Check("git", False, "missing.", "Install git.")) == "✖ git: missing. Install git."


def test_machine_types_without_those_of_masters() -> None:
    assert without_masters({"cpu": 8, "masters": 16}) == {"cpu": 8}
