"""Bad input: a clear error that names the value and the remedy, and nothing half-created."""

import asyncio
import contextlib
import http.client
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import aiohttp
import pytest

import spellq
from spellq_sdk import AsyncClient, BadRequest, ClientException
from spellq_sdk.daemon import LocalDaemon
from tests.e2e.conftest import SPELLQ, Installation


async def refused(client: AsyncClient, **options: object) -> str:
    """The refusal of a launch, after which there is no run more than before."""
    before = [run.id for run in await client.runs.list(1)]
    with pytest.raises(ClientException) as caught:
        await client.runs.new(**options)  # type: ignore[arg-type]
    assert [run.id for run in await client.runs.list(1)] == before
    assert caught.value.response is not None
    assert caught.value.response.status_code in (400, 404)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"command": ""}, "The command is empty"),
        ({"command": " \n"}, "The command is empty"),
        ({"command": "a\0b"}, "NUL"),
        ({"command": "x" * 200_000}, "longer than 131071 bytes"),
        (
            {"machine_type": "t5"},
            "Unknown machine type 't5'. Did you mean 't4'? Served here: cpu, t4",
        ),
        ({"machine_type": "t5"}, "spellq up --machine-types"),
        ({"cwd": "../x"}, "'..' is not allowed in '../x'"),
        ({"cwd": "/etc"}, "'/etc' has to be a relative path"),
        ({"envvars": {"A B": "1"}}, "'A B' cannot name an environment variable"),
        ({"envvars": {"SPELL_TOKEN": "1"}}, "SPELL_TOKEN belongs to the runtime"),
        ({"envvars": {"BIG": "x" * 131_068}}, "BIG has 131072 bytes"),
        ({"description": "x" * 10_001}, "has 10001 characters; the limit is 10000"),
        ({"labels": [""]}, "A label is empty"),
        ({"labels": ["x" * 201]}, "has 201 characters; the limit is 200"),
        ({"labels": [str(n) for n in range(101)]}, "at most 100 labels, not 101"),
        ({"attached_resources": {f"runs/{n + 1}": f"/m/{n}" for n in range(1001)}}, "1001 mounts"),
        ({"machine_type": "Masters"}, "'Masters' is no machine type"),
        ({"timeout": -1}, "timeout is -1 minutes"),
        ({"workflow_id": 4711}, "There is no workflow 4711"),
        ({"attached_resources": {"runs/99999": ""}}, "there is no run 99999"),
        ({"attached_resources": {"runs/abc": ""}}, "'runs/abc' is not a valid resource"),
        ({"attached_resources": {"nonsense": ""}}, "not a valid resource"),
        ({"attached_resources": {f"runs/{2**63}": ""}}, "not a valid resource"),
        ({"attached_resources": {"runs/" + "9" * 5000: ""}}, "not a valid resource"),
        ({"attached_resources": {"runs/1/../2": ""}}, "'..' is not allowed"),
        ({"attached_resources": {"runs/1/a\0b": ""}}, "NUL"),
    ],
)
async def test_launches_that_cannot_be(
    client: AsyncClient, options: dict[str, object], words: str
) -> None:
    assert words in await refused(client, **{"command": "true", **options})


@pytest.fixture
async def saved(client: AsyncClient) -> int:
    """A run that saved a.txt and b.txt."""
    run = await client.runs.new(command="echo a > a.txt; echo b > b.txt")
    await run.wait_status(*client.runs.FINAL)
    return run.id


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/spell", "/spell belongs to the run itself"),
        ("/spell/", "/spell belongs to the run itself"),
        (".", "/spell belongs to the run itself"),
        ("/", "/ belongs to the run itself"),
        ("/proc/x", "/proc/x belongs to the run itself"),
        ("../up", "'..' is not allowed"),
        ("/mnt/../spell", "'..' is not allowed"),
    ],
)
async def test_mount_points_that_cannot_be(
    client: AsyncClient, saved: int, target: str, words: str
) -> None:
    mounts = {f"runs/{saved}/a.txt": target}
    assert words in await refused(client, command="true", attached_resources=mounts)


async def test_resources_that_cannot_be_mounted(client: AsyncClient, saved: int) -> None:
    text = await refused(
        client,
        command="true",
        attached_resources={f"runs/{saved}/a.txt": "/mnt/x", f"runs/{saved}/b.txt": "/mnt/x/"},
    )
    assert "mounted at /mnt/x" in text
    text = await refused(client, command="true", attached_resources={f"runs/{saved}/no": "/m"})
    assert f"Cannot mount resource 'runs/{saved}/no'" in text
    assert "not a valid resource" in text
    assert "saved nothing at 'no'" in text
    live = await client.runs.new(command="sleep 60")
    await live.wait_status("running")
    text = await refused(client, command="true", attached_resources={f"runs/{live.id}": "/m"})
    assert f"run {live.id} is running" in text
    await live.kill()


async def test_one_bad_launch_among_many_fails_alone(client: AsyncClient) -> None:
    answers = await asyncio.gather(
        *(client.runs.new(command=command) for command in ("true", "", "true")),
        return_exceptions=True,
    )
    assert [isinstance(answer, BadRequest) for answer in answers] == [False, True, False]


async def test_keywords_and_waits_that_cannot_be(client: AsyncClient) -> None:
    with pytest.raises(TypeError, match=r"'comand'.*Did you mean 'command'"):
        await client.runs.new(comand="true")  # type: ignore[call-arg]
    with pytest.raises(ClientException) as caught:
        await client.runs.get(99999)
    assert caught.value.response is not None
    assert caught.value.response.status_code == 404
    run = await client.runs.new(command="true")
    with pytest.raises(BadRequest, match="at least one status"):
        await run.wait_status()
    with pytest.raises(BadRequest, match="'finished'"):
        await run.wait_status("finished")


# HTTP, as others may speak it


def ask(
    daemon: LocalDaemon,
    path: str,
    *,
    token: str | None = None,
    body: bytes | None = None,
    method: str | None = None,
    last_event_id: str | None = None,
) -> tuple[int, dict[str, object]]:
    headers = {"Content-Type": "application/json"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    door = http.client.HTTPConnection(daemon.url.removeprefix("http://"), timeout=10)
    with contextlib.closing(door):
        door.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = door.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")


@pytest.mark.parametrize("path", ["/api/me", "/api/runs", "/api/openapi.json", "/api/events"])
def test_nothing_is_served_without_a_token(daemon: LocalDaemon, path: str) -> None:
    status, answer = ask(daemon, path)
    assert status == 401
    assert "bearer token is missing" in str(answer["error"])
    for wrong in ("x", daemon.token + "x", "sqr_1_1_" + "0" * 64, "sqr_a_b_c", "sqr_1"):
        status, answer = ask(daemon, path, token=wrong)
        assert status == 401
        assert "not valid" in str(answer["error"])


async def test_the_socket_wants_a_token_too(daemon: LocalDaemon) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await session.ws_connect(f"{daemon.url}/api/socket")
        headers = {"Authorization": f"Bearer {daemon.token}"}
        async with session.ws_connect(f"{daemon.url}/api/socket", headers=headers) as open_socket:
            await open_socket.send_str("{nonsense")
            closed = await open_socket.receive()
            assert closed.type is aiohttp.WSMsgType.CLOSE
            assert closed.data == 1007


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/runs", b"{not json", 400, "JSON"),
        ("/api/runs", b'{"command": 7}', 400, "command"),
        ("/api/runs", b"{}", 400, "command"),
        ("/api/runs", b'{"command": "' + b"x" * 11_000_000 + b'"}', 413, "too large"),
        ("/api/runs/batch", b'{"runs": []}', 400, "1 to 500 runs, not 0"),
        ("/api/trees", b'{"entries": [["../x", 1, "00"]]}', 400, "../x"),
        ("/api/artifacts/missing", b'{"hashes": ["abc"]}', 400, "'abc' is no SHA-256"),
        ("/nonsense", b"{}", 404, ""),
        ("/api/runs/1/explode", b"{}", 404, ""),
        ("/api/runs/999999/stop", b"", 404, "There is no run 999999"),
        ("/api/runs/1/nonsense", b"", 404, ""),
        ("/api/workflows/1/explode", b"", 404, ""),
        ("/api/nonsense", b"{}", 404, ""),
        (
            "/api/runs",
            b'{"command": "true", "workflow_id": 9223372036854775808}',
            400,
            "workflow_id: Expected `int` <= 9223372036854775807",
        ),
        (
            "/api/runs",
            json.dumps(
                {"command": "x", "environment_vars": {f"V{n}": "x" * 120_000 for n in range(9)}}
            ).encode(),
            400,
            "the limit is 1048576",
        ),
        ("/api/runs", b'{"command": "true", "x": ' + b"[" * 100_000, 400, "nested too deeply"),
        ("/api/trees", b'{"entries": ' + b"[" * 100_000, 400, "Invalid tree"),
    ],
)
def test_bodies_and_paths_that_cannot_be(
    daemon: LocalDaemon, path: str, body: bytes, status: int, words: str
) -> None:
    answered, answer = ask(daemon, path, token=daemon.token, body=body, method="POST")
    assert (answered, answer["status"]) == (status, status)
    assert words.lower() in str(answer["error"]).lower()


@pytest.mark.parametrize("number", [str(2**63), "9" * 30, "9" * 5000], ids=["64", "100", "many"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/runs/{}"),
        ("GET", "/api/runs/{}/logs"),
        ("POST", "/api/runs/{}/stop"),
        ("POST", "/api/runs/{}/kill"),
        ("POST", "/api/runs/{}/labels"),
        ("GET", "/api/workflows/{}"),
        ("POST", "/api/workflows/{}/stop"),
        ("POST", "/api/workflows/{}/kill"),
        ("GET", "/api/runs?before={}"),
        ("GET", "/api/runs?workflow={}"),
        ("GET", "/api/runs?limit={}"),
        ("GET", "/api/runs/1/logs?offset={}"),
        ("GET", "/api/runs/1/logs?offset=-{}"),
        ("GET", "/api/events?after={}"),
        ("GET", "/api/resources/ls?path=runs/{}"),
        ("GET", "/api/resources/tree?path=runs/{}/x"),
    ],
)
async def test_numbers_beyond_all_runs(
    daemon: LocalDaemon, saved: int, method: str, path: str, number: str
) -> None:
    body = b"{}" if method == "POST" else None
    path = path.replace("/1/", f"/{saved}/").format(number)
    status, answer = await asyncio.to_thread(
        ask, daemon, path, token=daemon.token, body=body, method=method
    )
    in_path = path.startswith(("/api/runs/" + number, "/api/workflows/"))
    assert status == (404 if in_path else 400)
    assert answer["error"]


@pytest.mark.parametrize("number", [str(2**63), "9" * 5000], ids=["64", "many"])
def test_tokens_of_masters_that_cannot_be(daemon: LocalDaemon, number: str) -> None:
    for token in (f"sqr_{number}_1_x", f"sqr_1_{number}_x", f"sqr_{number}_{number}_x"):
        status, answer = ask(daemon, "/api/me", token=token)
        assert status == 401
        assert "not valid" in str(answer["error"])


def test_a_last_event_id_beyond_the_log(daemon: LocalDaemon) -> None:
    for cursor in (str(2**63), "9" * 5000):
        status, answer = ask(daemon, "/api/events", token=daemon.token, last_event_id=cursor)
        assert status == 400
        assert "is no cursor of this event log" in str(answer["error"])


async def test_a_socket_outlives_messages_that_cannot_be(
    daemon: LocalDaemon, client: AsyncClient
) -> None:
    run = await client.runs.new(command="sleep 60")
    headers = {"Authorization": f"Bearer {daemon.token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.ws_connect(f"{daemon.url}/api/socket") as opened,
    ):

        async def answer_to(message: str) -> tuple[int, int]:
            await opened.send_str(message)
            answer = await opened.receive_json(timeout=5)
            assert answer["op"] == "error", answer
            return answer["id"], answer["status"]

        wait = '{"op": "wait", "id": %s, "run": %s, "statuses": [%s]}'
        await opened.send_str(wait % (1, run.id, '"killed"'))
        assert await answer_to(wait % (2, 2**63, '"running"')) == (2, 404)
        assert await answer_to(wait % (3, "9" * 5000, '"running"')) == (3, 400)
        assert await answer_to(wait % (4, run.id, '"sleeping"')) == (4, 400)
        assert await answer_to('{"op": "dance", "id": 5}') == (5, 400)
        for impossible in ("0", "-1", str(2**63), '"x"', "null", "9" * 5000):
            assert await answer_to(wait % (impossible, run.id, '"running"')) == (0, 400)
        assert await answer_to("[]") == (0, 400)
        assert await answer_to(wait % (1, run.id, '"running"')) == (1, 400)
        for cursor in ("x", str(2**63), "9" * 5000):
            await opened.send_str(f'{{"op": "events", "id": 6, "after": "{cursor}"}}')
            assert (await opened.receive_json(timeout=5))["op"] == "event"
            answer = await opened.receive_json(timeout=5)
            assert (answer["op"], answer["id"], answer["status"]) == ("error", 6, 400)
        await run.kill()
        assert await opened.receive_json(timeout=5) == {
            "op": "reached",
            "id": 1,
            "status": "killed",
        }
        await opened.send_str('{"op": "wait", "x": ' + "[" * 100_000)
        closed = await opened.receive(timeout=5)
        assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1007)


def test_openapi_describes_the_api(daemon: LocalDaemon) -> None:
    status, answer = ask(daemon, "/api/openapi.json", token=daemon.token)
    assert status == 200
    assert "/api/runs/{number}/logs" in answer["paths"]  # type: ignore[operator]


def test_an_upload_that_is_not_what_it_says_is_not_kept(daemon: LocalDaemon) -> None:
    name = "0" * 64
    status, answer = ask(
        daemon, f"/api/artifacts/{name}", token=daemon.token, body=b"x", method="PUT"
    )
    assert status == 400
    assert "SHA-256" in str(answer["error"])
    assert ask(daemon, f"/api/artifacts/{name}", token=daemon.token)[0] == 404


# The command line


def error_of(told: subprocess.CompletedProcess[str], code: int) -> str:
    assert told.returncode == code
    lines = told.stderr.strip().splitlines()
    assert len(lines) == 1, told.stderr
    assert lines[0].startswith("ERROR: ")
    return lines[0]


def test_errors_of_the_command_line_are_one_line(shared: Installation, project: Path) -> None:
    assert "There is no run 4711" in error_of(shared.spellq("info", "4711"), 1)
    assert "machine type 'k80'" in error_of(
        shared.spellq("run", "-t", "k80", "true", cwd=project), 1
    )
    assert "runs/4711" in error_of(shared.spellq("ls", "runs/4711"), 1)
    told = shared.spellq("ps", SPELLQ_URL=shared.start().url, SPELLQ_TOKEN="wrong")
    assert "not valid" in error_of(told, 1)


def test_a_gateway_that_is_not_there(shared: Installation) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        told = shared.spellq("ps", SPELLQ_URL=url, SPELLQ_TOKEN="x")
    assert told.returncode == 1
    trying, error = told.stderr.splitlines()
    assert trying == f"✨ Trying to reach {url}…"
    assert error.startswith(f"ERROR: Could not reach spellq at {url}: Connection refused.")
    assert "SPELLQ_URL" in error


def test_a_port_in_use(own: Installation) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        text = error_of(own.spellq("up", "--port", port), 1)
    assert port in text
    assert "--port" in text
    assert not (own.home / "daemon.json").exists()


def test_machine_types_that_cannot_be(own: Installation) -> None:
    for types, words in (
        ("cpu=0", "'0'"),
        ("c p u", "'c p u'"),
        ("cpu,CPU", "named twice"),
        ("cpu,Masters=2", "'masters'"),
    ):
        assert words in error_of(own.spellq("up", "--machine-types", types), 2)


def test_a_home_that_is_not_writable(own: Installation, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    text = error_of(own.spellq("ps", SPELLQ_HOME=str(file / "home")), 1)
    assert str(file / "home") in text
    assert "SPELLQ_HOME" in text


def test_a_damaged_configuration(own: Installation) -> None:
    (own.home / "config.toml").write_text("port = [")
    assert "config.toml is not valid TOML" in error_of(own.spellq("up"), 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("key", b"", "a key has 32 bytes, this file 0"),
        ("key", b"short", "a key has 32 bytes, this file 5"),
        ("key", None, "Is a directory"),
        ("state.db", b"garbage" * 1000, "file is not a database"),
        ("state.db", None, "unable to open database file"),
        ("config.toml", b"\xff", "is not valid TOML"),
        ("config.toml", None, "cannot be read: Is a directory"),
    ],
)
def test_what_a_home_holds_cannot_be_used(
    own: Installation, name: str, content: bytes | None, words: str
) -> None:
    damaged = own.home / name
    damaged.mkdir() if content is None else damaged.write_bytes(content)
    text = error_of(own.spellq("up"), 1)
    assert str(damaged) in text
    assert words in text
    if content is not None:
        assert damaged.read_bytes() == content
        damaged.unlink()
        assert own.spellq("up").returncode == 0


def test_a_home_is_for_its_owner_alone(own: Installation) -> None:
    own.home.chmod(0o777)
    own.start()
    assert stat.S_IMODE(own.home.stat().st_mode) == 0o700


def test_a_home_of_somebody_else(own: Installation) -> None:
    if os.getuid() != 0:  # only root can give a folder to another
        assert "The folder /usr cannot be used" in error_of(own.spellq("up", SPELLQ_HOME="/usr"), 1)
        return
    os.chown(own.home, 12345, 12345)
    text = error_of(own.spellq("up"), 1)
    assert f"{own.home} belongs to uid12345, not to root. Set SPELLQ_HOME" in text
    os.chown(own.home, 0, 0)


def test_the_owner_is_the_user_whatever_the_environment_says(own: Installation) -> None:
    told = own.spellq("run", "-b", "true", LOGNAME="mallory", USER="mallory")
    assert told.returncode == 0, told.stderr
    assert json.loads(own.spellq("info", "1", "-o", "json").stdout)["owner"] == (
        pwd.getpwuid(os.getuid()).pw_name
    )


def test_slots_for_masters_are_a_setting(own: Installation, project: Path) -> None:
    assert "'many'" in error_of(own.spellq("up", SPELLQ_MASTER_SLOTS="many"), 1)
    own.spellq("up", SPELLQ_MASTER_SLOTS="0")
    text = error_of(own.spellq("workflow", "-b", "true", cwd=project), 1)
    assert "SPELLQ_MASTER_SLOTS=16" in text


def test_a_daemon_of_another_version_is_replaced_and_commands_run_on(
    own: Installation, project: Path
) -> None:
    own.spellq("run", "-b", "sleep 1.5; echo lived on", cwd=project)
    first = own.start()
    record = own.home / "daemon.json"
    record.write_text(record.read_text().replace(spellq.__version__, "0.0.1"))
    told = own.spellq("logs", "-f", "1")
    assert told.returncode == 0, told.stderr
    assert "lived on" in told.stdout.splitlines()
    assert told.stdout.splitlines()[-1] == "🎉 Run 1 complete"
    assert own.start().pid != first.pid


def test_inside_a_run_nothing_starts_a_daemon(own: Installation) -> None:
    told = own.spellq("ps", SPELL_RUN="7")
    assert told.returncode == 1
    assert not (own.home / "daemon.json").exists()


def test_the_command_is_installed_under_both_names() -> None:
    for name in ("spellq", "spell"):
        path = shutil.which(name, path=str(SPELLQ.parent))
        assert path is not None
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        assert spellq.__version__ in told.stdout
