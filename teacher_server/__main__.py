"""`teacher-server`, or `python -m teacher_server`: says so when driftline-client was removed."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line."""
    try:
        from teacher_server.cli import main as run

        return run()
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in {"teacher_client", "teacher_wire"}:
            raise
        sys.exit("teacher-server: the distribution driftline-client is missing; install it again")


if __name__ == "__main__":
    sys.exit(main())
