"""Where the command starts: `spellq`, `spell`, or `python -m spellq.cli`."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        from spellq.cli.app import run

        code = run(sys.argv[1:], sys.argv[0])
    except KeyboardInterrupt:  # while something was being imported
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
