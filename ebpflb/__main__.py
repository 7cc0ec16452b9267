"""The entry point, of `ebpflb` and of `python -m ebpflb`."""

import sys


def main() -> int:
    """Run the command that was typed; its exit status."""
    try:
        from ebpflb import cli
    except KeyboardInterrupt:  # before there is anybody to say it in one line
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
