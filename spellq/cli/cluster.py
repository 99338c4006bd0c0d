"""`spellq server` and `spellq agent`: the processes of a cluster."""

import os
from collections.abc import Callable
from typing import TypeVar

import click

from spellq.cli.errors import CliError
from spellq.cli.screen import output

T = TypeVar("T")


@click.command(epilog="Example: spellq server --port 7735")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Where to serve.  [default: 7735, or a free one]"
)
def server(port: int | None) -> None:
    """Serve the API of a cluster, until ^C.

    SPELLQ_AMQP_URL, SPELLQ_REDIS_URL and SPELLQ_ARTIFACTS_URL say which. Who brings
    SPELLQ_ADMIN_TOKEN as their token may do everything.
    """
    from spellq.compose.cluster import run_gateway
    from spellq.settings import read_cluster_settings, read_config, setting
    from spellq_sdk.settings import spellq_home

    def serve() -> None:
        home = spellq_home()
        asked = setting("SPELLQ_PORT", None if port is None else str(port), read_config(home))
        admin_token = os.environ.get("SPELLQ_ADMIN_TOKEN")
        run_gateway(read_cluster_settings(home), asked, admin_token, _say)

    _until_refused(serve)


@click.command(epilog="Example: spellq agent --machine-type cpu=8 --machine-type t4=1")
@click.option(
    "--machine-type",
    "machine_types",
    metavar="NAME[=SLOTS]",
    multiple=True,
    help="What this machine offers, and how many runs of it at once; repeatable.  [default: cpu]",
)
def agent(machine_types: tuple[str, ...]) -> None:
    """Execute runs of a cluster on this machine, until ^C; commands under way run on.

    SPELLQ_AMQP_URL, SPELLQ_REDIS_URL and SPELLQ_ARTIFACTS_URL say of which, SPELLQ_URL where
    its workflow scripts find the API.
    """
    from spellq.compose.cluster import run_agent
    from spellq.settings import read_cluster_settings, read_settings
    from spellq_sdk.settings import spellq_home

    def serve() -> None:
        home = spellq_home()
        gateway_url = os.environ.get("SPELLQ_URL")
        if not gateway_url:
            raise CliError("SPELLQ_URL is missing. Set it to where 'spellq server' serves.")
        offer = read_settings(home, machine_types=",".join(machine_types) or None)
        run_agent(read_cluster_settings(home), home, offer, gateway_url, _say)

    _until_refused(serve)


def _say(text: str) -> None:
    output().line(f"✨ {text}")


def _until_refused(serve: Callable[[], None]) -> None:
    """What keeps a process from serving is one sentence."""
    from spellq.compose.refusals import REFUSALS, only_error

    try:
        serve()
    except (*REFUSALS, BaseExceptionGroup) as error:
        refusal = only_error(error)
        if not isinstance(refusal, REFUSALS):
            raise
        raise CliError(str(refusal)) from error
