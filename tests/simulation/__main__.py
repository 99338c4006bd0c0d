"""`make simulate SEED=n`: replay one history and print what happened."""

import sys

from tests.simulation.history import run_history


def main() -> None:
    history = run_history(int(sys.argv[1]))
    print("\n".join(history.lines))
    for violation in history.violations:
        print(f"VIOLATION ({violation.kind}): {violation}")
    print(f"seed {history.seed}: {history.runs} runs, {history.crashes} crashes")


main()
