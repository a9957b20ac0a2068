"""The daemon as tests start it: ``python -m tests.run_daemon CONFIG``."""

from __future__ import annotations

import sys
from pathlib import Path

from hvsnap import config, daemon
from hvsnap.errors import HvsnapError


def main() -> int:
    try:
        daemon.run(config.load(Path(sys.argv[1])), lambda: config.load(Path(sys.argv[1])))
    except HvsnapError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
