#!/usr/bin/env bash
# Makes the root of a machine: a disk image, its kernel and its initrd.
#   root.sh SUITE ARCHITECTURE DIRECTORY PACKAGE...
set -euo pipefail
suite=$1 arch=$2 out=$3
shift 3
packages=(systemd systemd-sysv dbus udev kmod iproute2 curl ca-certificates procps psmisc openssh-server e2fsprogs jq
	busybox-static "$@")
root=$out/root
mmdebstrap --quiet --mode=root --variant=apt --architectures="$arch" --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--include="$(IFS=,; echo "${packages[*]}")" "$suite" "$root" 2>"$out/mmdebstrap.log" ||
	{ tail -n 20 "$out/mmdebstrap.log" >&2; exit 1; }

cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp "$root"/boot/initrd.img-* "$out/initrd"

echo host >"$root/etc/hostname"
cat >"$root/etc/hosts" <<END
127.0.0.1 localhost
127.0.1.1 host
::1 localhost
END
# The second is the disk with what the lab brings.
cat >"$root/etc/fstab" <<END
LABEL=root / ext4 noatime 0 1
LABEL=lab /mnt/lab ext4 ro 0 0
END
mkdir -p "$root/mnt/lab"
# What QEMU's user network has. It leads nowhere but to ssh.
cat >"$root/etc/systemd/network/10-lab.network" <<END
[Match]
Name=e*
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
DNS=10.0.2.3
END
rm -f "$root/etc/resolv.conf"
echo "nameserver 10.0.2.3" >"$root/etc/resolv.conf"
echo "AuthorizedKeysFile /mnt/lab/authorized_keys" >"$root/etc/ssh/sshd_config.d/lab.conf"
mkdir -p "$root/var/log/journal"
{
	chroot "$root" systemctl enable systemd-networkd
	for unit in docker.service docker.socket containerd.service firewalld.service ufw.service nftables.service; do
		if [[ -e $root/lib/systemd/system/$unit ]]; then chroot "$root" systemctl disable "$unit"; fi
	done
	chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer fstrim.timer e2scrub_all.timer
} &>>"$out/mmdebstrap.log"

mke2fs -q -t ext4 -L root -d "$root" "$out/root.img" 8G
rm -rf "$root"
