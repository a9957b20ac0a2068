#!/bin/bash
# Makes a machine of the Vagrantfile what it is to be. Run again, it brings it up to date.
#
#   provision.sh hypervisor [ADDRESS OF THE SERVICES]
#   provision.sh services OWN-ADDRESS
set -euo pipefail

SOURCE=/vagrant
ENVIRONMENT=/opt/hvsnap
export DEBIAN_FRONTEND=noninteractive

say() { printf 'provision: %s\n' "$*"; }

hypervisor() { # [ADDRESS]
    local services=${1:-}
    say "packages and the environment of the demo"
    (cd "$SOURCE" && scripts/setup.sh demo)
    say "hvsnap in $ENVIRONMENT"
    [ -x "$ENVIRONMENT/bin/python" ] || /usr/bin/python3 -m venv --system-site-packages "$ENVIRONMENT"
    "$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check "$SOURCE"
    ln -sf "$ENVIRONMENT/bin/hvsnap" /usr/local/bin/hvsnap
    systemctl enable --now libvirtd
    hvsnap install
    [ -z "$services" ] || use_services "$services"
    systemd-sysusers
    systemd-tmpfiles --create
    systemctl daemon-reload
    hvsnap hook-install
    # libvirtd looks only at its start whether there is any hook for guests.
    systemctl restart libvirtd
    systemctl enable hvsnap-recover
    systemctl enable hvsnapd
    systemctl restart hvsnapd
    hvsnap doctor || say "the doctor found errors: see above"
}

use_services() { # ADDRESS: write the configuration that names them, once
    local file=/etc/hvsnap/hvsnap.toml
    grep -q "$1" "$file" 2>/dev/null && return
    say "broker and store are on $1"
    install -m 0600 /dev/stdin /etc/hvsnap/s3-secret <<<TESTSECRET
    install -m 0600 /dev/stdin /etc/hvsnap/mqtt-password <<<hvsnap
    cat >"$file" <<TOML
socket_group = "hvsnap"

[store]
url = "s3://hvsnap/vagrant"

[store.s3]
endpoint = "http://$1:7480"
access_key = "TESTACCESS"
secret_key_file = "/etc/hvsnap/s3-secret"

[mqtt]
# Without TLS: the two machines share a private network of this computer. docs/mqtt.md says how it is done elsewhere.
url = "mqtt://$1"
username = "hvsnap"
password_file = "/etc/hvsnap/mqtt-password"
TOML
}

services() { # OWN-ADDRESS
    say "packages"
    (cd "$SOURCE" && scripts/setup.sh test)
    apt-get install --yes --quiet --no-install-recommends socat
    say "the broker, at $1:1883"
    mosquitto_passwd -b -c /etc/mosquitto/passwords hvsnap hvsnap
    chown mosquitto: /etc/mosquitto/passwords
    cat >/etc/mosquitto/conf.d/hvsnap.conf <<CONF
listener 1883 $1
password_file /etc/mosquitto/passwords
allow_anonymous false
CONF
    systemctl enable mosquitto
    systemctl restart mosquitto
    say "S3, at $1:7480"
    cat >/etc/systemd/system/hvsnap-s3.service <<UNIT
[Unit]
Description=A one-node Ceph with its S3 gateway, for trying hvsnap
After=network-online.target

[Service]
ExecStart=$SOURCE/vagrant/s3.sh $1 7480
WorkingDirectory=$SOURCE
Restart=on-failure

[Install]
WantedBy=multi-user.target
UNIT
    systemctl daemon-reload
    systemctl enable --now hvsnap-s3
    local tries
    for tries in $(seq 60); do
        ! (exec 3<>"/dev/tcp/$1/7480") 2>/dev/null || return 0
        sleep 2
    done
    say "S3 does not answer after $tries tries: journalctl -u hvsnap-s3"
    return 1
}

case ${1:-} in
hypervisor) hypervisor "${2:-}" ;;
services) services "${2:?the address to listen at}" ;;
*)
    say "hypervisor or services?"
    exit 2
    ;;
esac
