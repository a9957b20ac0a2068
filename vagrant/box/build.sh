#!/bin/bash
# Builds the base box `hvsnap/debian-12` from Debian's packages alone, and adds it to Vagrant.
#
#   build.sh [IMAGE]     with IMAGE: makes the box of that bootable qcow2 image, and only packs it
#
# Needs root, loop devices and device-mapper for the image: apt-get install vmdb2 qemu-utils vagrant vagrant-libvirt
set -euo pipefail
cd "$(dirname "$0")"

NAME=hvsnap/debian-12
SIZE_GIB=20

say() { printf 'box: %s\n' "$*"; }

if [ $# -gt 0 ]; then
    qemu-img convert -O qcow2 "$1" box.img
else
    say "building the image: some minutes"
    cp "$(dpkg -L vagrant | grep 'keys/vagrant\.pub$')" vagrant.pub
    vmdb2 --verbose --output disk.img --rootfs-tarball rootfs.tar.gz debian-12.vmdb
    qemu-img convert -c -O qcow2 disk.img box.img
    rm disk.img vagrant.pub
fi
qemu-img resize -q box.img "${SIZE_GIB}G" 2>/dev/null || true
printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": %d}\n' "$SIZE_GIB" >metadata.json
cat >Vagrantfile <<'RUBY'
Vagrant.configure("2") do |config|
  config.vm.provider(:libvirt) { |libvirt| libvirt.disk_bus = "virtio" }
end
RUBY
tar czf debian-12.box metadata.json Vagrantfile box.img
rm metadata.json Vagrantfile box.img
vagrant box add --force --name "$NAME" debian-12.box
say "$NAME is there: vagrant up"
