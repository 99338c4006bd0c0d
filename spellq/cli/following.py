"""Following a run's log to its end, and what is said when somebody stops watching."""

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from spellq.cli.rendering import log_view
from spellq.cli.screen import Screen, output

if TYPE_CHECKING:
    from spellq_sdk import AsyncClient
    from spellq_sdk.runs import Run

DETACHED_CODE: Final = 130


async def show_log(
    run: "Run",
    program: str,
    *,
    follow: bool,
    offset: int = 0,
    verbose: bool = False,
) -> None:
    """Write a run's log from `offset` (below 0: counted from the end); to its end with `follow`."""
    import anyio

    view = log_view(output(), run.id, program, verbose=verbose)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(view.spin)
        try:
            async with aclosing(run.logs(follow=follow, offset=offset)) as entries:
                async for entry in entries:
                    view.show(entry)
        finally:
            view.over()
        tasks.cancel_scope.cancel()


async def follow_to_the_end(
    client: "AsyncClient", number: int, program: str, *, verbose: bool
) -> int:
    """Follow a run; gives the exit code to leave with: the command's, 1 where there is none."""
    run = await client.runs.get(number)
    await show_log(run, program, follow=True, verbose=verbose)
    await run.refresh()
    return 1 if run.user_exit_code is None else run.user_exit_code


def say_what_lacks(screen: Screen, reason: str) -> None:
    """Said at once where a new run waits for more than its turn."""
    if reason.startswith("Waiting for ") and not reason.startswith("Waiting for a free "):
        screen.line(f"✨ {reason}")


def say_still_running(screen: Screen, number: int, program: str) -> None:
    """After ^C on a run that was launched here. Nothing was stopped."""
    screen.line()
    screen.line("✨ Your run is still running remotely.")
    screen.line(f"✨ Use '{program} stop {number}' to save outputs and stop your run.")
    screen.line(
        f"✨ Use '{program} kill {number}' to terminate your run. All outputs will be lost."
    )
    say_logs_again(screen, number, program)


def say_logs_again(screen: Screen, number: int, program: str) -> None:
    """How to come back to a log."""
    screen.line(f"✨ Use '{program} logs {number}' to view logs again")
