#!/bin/bash
# Runs a one-node Ceph with its S3 gateway (tests/ceph.py) with the bucket `hvsnap`, reachable at ADDRESS:PORT.
#
#   s3.sh ADDRESS PORT [DIRECTORY]
#
# The cluster is made anew at each start: it is for trying, and keeps nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

address=$1 port=$2 directory=${3:-/var/lib/hvsnap-s3}
rm -rf "$directory"
mkdir -p "$directory"
exec .venv/bin/python - "$address" "$port" "$directory" <<'PYTHON'
import signal
import subprocess
import sys
from pathlib import Path

from tests.ceph import Ceph, make_bucket

address, port, directory = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with Ceph(Path(directory)) as ceph:
    make_bucket(ceph, "hvsnap")
    print(f"S3 at http://{address}:{port}, bucket hvsnap", flush=True)
    relay = subprocess.Popen(
        ["socat", f"TCP-LISTEN:{port},bind={address},fork,reuseaddr", f"TCP:127.0.0.1:{ceph.port}"]
    )
    try:
        sys.exit(relay.wait())
    finally:
        relay.terminate()
PYTHON
