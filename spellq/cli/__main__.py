"""Where the command starts: `spellq`, `spell`, or `python -m spellq.cli`."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from spellq.cli.app import run

    sys.exit(run(sys.argv[1:], sys.argv[0]))


if __name__ == "__main__":
    main()
