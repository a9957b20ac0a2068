"""The daemon as a user who may do nothing on this host: ``python -m tests.unprivileged_daemon CONFIG``.

For requests that nobody has looked at beforehand: what they name, it cannot harm.
"""

from __future__ import annotations

import os
import pwd
import sys

from tests import run_daemon

USER = "nobody"


def main() -> int:
    user = pwd.getpwnam(USER)
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.umask(0o077)
    return run_daemon.main()


if __name__ == "__main__":
    sys.exit(main())
