#!/bin/sh
# Get QEMU of a newer Debian release, with all its libraries, into a directory; nothing of the system is changed.
#
#   tests/guest/newer_qemu.sh DIRECTORY [RELEASE]
#
# Afterwards DIRECTORY/bin has qemu-system-x86_64, qemu-img, qemu-io and qemu-nbd, which start the newer programs with
# their own libraries. A directory that is complete is left as it is. Exit status 3: the mirror cannot be had.
set -eu

directory=$1
release=${2:-trixie}
packages="qemu-system-x86 qemu-utils"

[ -e "$directory/complete" ] && exit 0
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
exec 9> "$directory/lock"
flock 9
[ -e "$directory/complete" ] && exit 0

# The host's own mirror, and its keys, which Debian ships for the next release, too.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2> /dev/null | grep -v security | head -n 1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
if [ -z "$mirror" ] || [ ! -e "$keys" ]; then
    echo "newer QEMU: this host has no Debian mirror, or not its keys" >&2
    exit 3
fi

# An apt of its own: with an empty status every library is taken, down to libc.
apt="$directory/apt"
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/etc"
: > "$apt/status"
echo "deb [signed-by=$keys] $mirror $release main" > "$apt/etc/sources.list"
apt_get() {
    apt-get -qq -o Dir::Etc::sourcelist="$apt/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::State="$apt" -o Dir::State::status="$apt/status" \
        -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt" -o Dir::Cache::archives="$apt/archives" \
        -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Acquire::Retries=2 \
        -o Acquire::http::Timeout=20 -o APT::Update::Error-Mode=any "$@"
}
echo "newer QEMU: getting $packages of $release into $directory" >&2
# shellcheck disable=SC2086
if ! apt_get update || ! apt_get -y --download-only install $packages; then
    echo "newer QEMU: the packages of $release cannot be had from the mirror" >&2
    exit 3
fi

root="$directory/root"
rm -rf "$root"
mkdir -p "$root" "$directory/bin"
for package in "$apt"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --no-same-owner
done
libraries="$root/usr/lib/x86_64-linux-gnu"
for program in qemu-system-x86_64 qemu-img qemu-io qemu-nbd; do
    # What is in no module of its own it looks for in the system's, of another QEMU, and aborts: its path leads nowhere.
    LC_ALL=C sed -i 's#/usr/lib/x86_64-linux-gnu/qemu#/usr/lib/x86_64-linux-gnu/none#g' "$root/usr/bin/$program"
    data=""
    [ "$program" = qemu-system-x86_64 ] && data="-L '$root/usr/share/qemu' -L '$root/usr/share/seabios'"
    cat > "$directory/bin/$program" << END
#!/bin/sh
export QEMU_MODULE_DIR='$libraries/qemu'
exec '$libraries/ld-linux-x86-64.so.2' --library-path '$libraries' '$root/usr/bin/$program' $data "\$@"
END
    chmod 755 "$directory/bin/$program"
done
"$directory/bin/qemu-system-x86_64" --version > "$directory/version"
rm -rf "$apt"
chmod -R a+rX "$directory"
touch "$directory/complete"
