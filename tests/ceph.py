"""A real Ceph cluster of one node with its S3 gateway, on loopback: a monitor, an OSD, radosgw. Up in some seconds.

Needs Debian's ``ceph-mon ceph-osd radosgw``. ``python -m tests.ceph DIRECTORY`` runs one until it is interrupted.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import obstore

from hvsnap.store.s3 import Place, connect
from tests.ports import free_port

ACCESS_KEY = "TESTACCESS"
SECRET_KEY = "TESTSECRET"
START_TIMEOUT_S = 60.0

_CONFIG = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}/0
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
auth_allow_insecure_global_id_reclaim = false
run_dir = {directory}/run
admin_socket = {directory}/run/$name.asok
pid_file =
log_file = {directory}/log/$name.log
crash_dir = {directory}/log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_warn = 1
mon_data_avail_crit = 1
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
[mon.a]
mon_data = {directory}/mon
[osd]
osd_data = {directory}/osd
# filestore: up in half the time of bluestore; memstore never resumes writes after a restart of the OSD.
osd_objectstore = filestore
osd_journal = {directory}/osd/journal
osd_journal_size = 200
osd_max_object_name_len = 256
osd_max_object_namespace_len = 64
osd_memory_target = 939524096
[client.rgw.a]
rgw_data = {directory}
# Without tcp_nodelay many answers take 44 ms.
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 5
"""


class Ceph:
    """Starts with :meth:`start`; ``directory`` must have a short path (admin sockets)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._config = directory / "ceph.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Ceph:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def place(self, bucket: str, prefix: str = "", endpoint: str = "") -> Place:
        return Place(bucket, prefix, endpoint or self.endpoint, "default", ACCESS_KEY, SECRET_KEY)

    def start(self) -> None:
        for name in ("mon", "osd", "run", "log"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        fsid, mon_port = str(uuid.uuid4()), free_port()
        self._config.write_text(_CONFIG.format(fsid=fsid, mon_port=mon_port, directory=self.directory, port=self.port))
        monmap = str(self.directory / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}/0]", monmap)
        self._run("ceph-mon", "-c", str(self._config), "-i", "a", "--mkfs", "--monmap", monmap)
        self.run_daemon("ceph-mon", "-i", "a")
        self._until("the monitor", lambda: self._quiet("ceph", "--connect-timeout", "2", "mon", "stat"))
        osd = str(uuid.uuid4())
        self._ceph("osd", "new", osd, "0")
        self._run("ceph-osd", "-c", str(self._config), "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.run_daemon("ceph-osd", "-i", "0")
        self._until("the OSD", self._osd_active)
        self.run_daemon("radosgw", "-n", "client.rgw.a")
        self._until("the gateway", self._gateway_answers)
        self._run(
            *("radosgw-admin", "-c", str(self._config), "user", "create", "--uid=test", "--display-name=test"),
            *(f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}"),
        )

    def run_daemon(self, program: str, *arguments: str) -> None:
        """Start (again) one of its daemons."""
        if not arguments:
            arguments = {"ceph-mon": ("-i", "a"), "ceph-osd": ("-i", "0"), "radosgw": ("-n", "client.rgw.a")}[program]
        with (self.directory / "log" / f"{program}.out").open("ab") as out:
            self._processes[program] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", program, "-c", str(self._config), *arguments, "-f"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def signal(self, program: str, number: signal.Signals) -> None:
        self._processes[program].send_signal(number)

    def kill(self, program: str) -> None:
        """SIGKILL one of its daemons."""
        self._processes[program].kill()
        self._processes[program].wait()

    def stop(self) -> None:
        """End it: the gateway first, or the OSD waits for it."""
        for program in ("radosgw", "ceph-osd", "ceph-mon"):
            process = self._processes.pop(program, None)
            if process is None:
                continue
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def admin(self, *words: str) -> bytes:
        """Ask the gateway's own tool."""
        return self._run("radosgw-admin", "-c", str(self._config), *words)

    # -- inside -----------------------------------------------------------------------------------

    def _run(self, *argv: str) -> bytes:
        done = subprocess.run(argv, capture_output=True, timeout=START_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"{argv[0]} failed: {done.stderr.decode(errors='replace')[-1000:]}")
        return done.stdout

    def _ceph(self, *words: str) -> bytes:
        return self._run("ceph", "-c", str(self._config), *words)

    def _quiet(self, program: str, *words: str) -> bool:
        argv = [program, "-c", str(self._config), *words]
        return subprocess.run(argv, capture_output=True, timeout=START_TIMEOUT_S).returncode == 0

    def _osd_active(self) -> bool:
        asok = self.directory / "run" / "osd.0.asok"
        with contextlib.suppress(ValueError, subprocess.TimeoutExpired):
            done = subprocess.run(["ceph", "--admin-daemon", str(asok), "status"], capture_output=True, timeout=10)
            return bool(json.loads(done.stdout or b"{}").get("state") == "active")
        return False

    def _gateway_answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.endpoint}/", timeout=2).status_code == 200
        return False

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            for program, process in self._processes.items():
                if process.poll() is not None:
                    log = (self.directory / "log" / f"{program}.out").read_text(errors="replace")
                    raise RuntimeError(f"{program} ended with {process.returncode}: {log[-1000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} of Ceph did not come up within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)


def make_bucket(ceph: Ceph, bucket: str) -> None:
    """Create a bucket: a PUT of nothing, which obstore can sign but has no call for."""
    url = obstore.sign(connect(ceph.place(bucket)), "PUT", "", timedelta(seconds=60))
    httpx.put(url, timeout=START_TIMEOUT_S).raise_for_status()


if __name__ == "__main__":
    with Ceph(Path(sys.argv[1])) as cluster:
        make_bucket(cluster, "hvsnap")
        print(f"endpoint {cluster.endpoint}, bucket hvsnap, keys {ACCESS_KEY} {SECRET_KEY}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
