#!/bin/bash
# Makes a fresh Debian ready for hvsnap's demo, tests or bench: packages with one apt-get, then .venv.
#
#   scripts/setup.sh [demo] [test] [bench]      (default: demo test)
#
# It says what it does, asks nothing, and does only what is not done yet: a second run takes under a second.
set -euo pipefail
cd "$(dirname "$0")/.."

# What hvsnap itself uses on a host, and what the test guest is built of and run with:
# - QEMU, libvirt and their tools; the Python of libvirt and libnbd has to match the distribution's libraries
HOST=(qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients
    python3 python3-venv python3-libvirt python3-libnbd nbdkit nbdkit-plugin-python)
# - kernel (unpacked, not installed: lz4, kmod, binutils), initramfs (busybox, cpio, the agent, a C program), disks
GUEST=(busybox-static qemu-guest-agent lz4 kmod binutils cpio gcc libc6-dev e2fsprogs)
# - a broker; private namespaces for a libvirtd beside the host's
AROUND=(mosquitto mosquitto-clients util-linux mount procps ca-certificates)

DEMO=("${HOST[@]}" "${GUEST[@]}" "${AROUND[@]}")
# A one-node Ceph with its S3 gateway; faults at system calls; TLS for the broker; an independent look at images; what
# systemd says of our units, Prometheus of our metrics and rules, man and mandoc of our page, Vagrant of our machines;
# libguestfs, without what it only recommends: files in snapshots.
TEST=(ceph-mon ceph-osd ceph-common radosgw strace openssl libnbd-bin systemd prometheus man-db mandoc vagrant vagrant-libvirt
    python3-guestfs)
# The peers that are compared with.
BENCH=(virtnbdbackup fio libnbd-bin)

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

check_distribution() {
    local ID="" VERSION_ID="" PRETTY_NAME="an unknown system"
    [ ! -r /etc/os-release ] || . /etc/os-release
    if [ "$ID" != debian ] || [ "${VERSION_ID:-0}" -lt 12 ]; then
        fail "this is $PRETTY_NAME; the set-up knows Debian 12 and later" \
            "install these by hand: ${WANTED[*]}; then: python3 -m venv --system-site-packages .venv && .venv/bin/pip install -e '.[dev]'"
    fi
    [ "$(uname -m)" = x86_64 ] || fail "this is $(uname -m); the test guest is an x86-64 one" \
        "use a 64-bit PC, bare or virtual; KVM is not needed"
}

collect() { # SET...: the packages of the sets, into WANTED
    WANTED=()
    local set
    for set in "$@"; do
        case $set in
        demo) WANTED+=("${DEMO[@]}") ;;
        test) WANTED+=("${DEMO[@]}" "${TEST[@]}") ;;
        bench) WANTED+=("${DEMO[@]}" "${BENCH[@]}") ;;
        *) fail "$set is no set of packages" "choose from: demo test bench" ;;
        esac
    done
    mapfile -t WANTED < <(printf '%s\n' "${WANTED[@]}" | sort -u)
}

missing_packages() { # into MISSING
    local installed
    installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${WANTED[@]}" 2>/dev/null |
        sed -n 's/^installed //p' | sort -u) || true
    mapfile -t MISSING < <(comm -23 <(printf '%s\n' "${WANTED[@]}") <(printf '%s\n' "$installed"))
}

become_root() { # into SUDO
    SUDO=()
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null || fail "installing packages needs root, and there is no sudo" \
        "run this as root: apt-get install --no-install-recommends ${MISSING[*]}"
    SUDO=(sudo)
    say "using sudo for apt-get"
}

# The test guest's kernel is fetched with `apt-get download`, which needs the lists, too.
has_lists() { compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }

install_packages() {
    missing_packages
    if [ ${#MISSING[@]} = 0 ] && has_lists; then
        say "packages: all ${#WANTED[@]} installed"
        return
    fi
    become_root
    say "apt-get update"
    "${SUDO[@]}" apt-get -q=2 update
    [ -n "$(apt-cache show --no-all-versions linux-image-cloud-amd64 2>/dev/null)" ] ||
        fail "apt knows no linux-image-cloud-amd64" "enable the main archive of Debian in /etc/apt"
    [ ${#MISSING[@]} != 0 ] || return 0
    say "apt-get install ${MISSING[*]}"
    # Services that the packages bring are not needed: a machine without systemd will do.
    "${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q=2 -y --no-install-recommends \
        -o Dpkg::Options::=--force-confold -o Dpkg::Use-Pty=0 install "${MISSING[@]}"
}

# What of pyproject.toml decides over the environment: not the sections of the tools.
recipe() {
    /usr/bin/python3 - <<'PYTHON'
import hashlib, json, pathlib, sys, tomllib
known = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
wanted = [sys.version, str(pathlib.Path.cwd()), known["build-system"], known["project"]]
print(hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest())
PYTHON
}

build_venv() {
    local wanted made=.venv/.made-of
    wanted=$(recipe)
    if [ -x .venv/bin/python ] && [ "$(cat $made 2>/dev/null)" = "$wanted" ]; then
        say ".venv: up to date"
        return
    fi
    # A Python that was upgraded leaves an environment that cannot run.
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        say ".venv: made by /usr/bin/python3, which libvirt's and libnbd's bindings are installed for"
        /usr/bin/python3 -m venv --clear --system-site-packages .venv
    fi
    say ".venv: pip install -e '.[dev]'"
    rm -f $made
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -e '.[dev]'
    .venv/bin/python -c 'import libvirt, nbd, hvsnap' ||
        fail ".venv cannot import libvirt, nbd and hvsnap" "remove .venv and run this again"
    printf '%s\n' "$wanted" >$made
}

[ $# != 0 ] || set -- demo test
collect "$@"
check_distribution
install_packages
build_venv
