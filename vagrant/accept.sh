#!/bin/bash
# What has to hold on the hypervisor of the Vagrantfile: the service that is installed, and the whole way with real guests.
#
#   vagrant ssh hypervisor -c /vagrant/vagrant/accept.sh
set -euo pipefail

step() { # WHAT COMMAND...
    printf 'accept: %s\n' "$1"
    shift
    "$@" || {
        printf 'accept: FAILED: %s\n' "$*" >&2
        exit 1
    }
}

step "the daemon runs" systemctl is-active hvsnapd
step "it answers" sudo hvsnap status
step "the doctor finds no error" sudo hvsnap doctor --quiet
step "libvirt's hook is in place" sudo hvsnap hook-status
if grep -q '^url = "mqtt' /etc/hvsnap/hvsnap.toml; then
    step "the broker is connected" sudo bash -c 'hvsnap status | grep -q "^MQTT: *connected"'
fi
cd /vagrant
step "the demo: a guest under load, snapshots, back again, byte for byte" make demo
step "the installed daemon was not disturbed" systemctl is-active hvsnapd
echo "accept: all of it holds"
