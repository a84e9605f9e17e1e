#!/usr/bin/env bash
# Installs the Debian packages that the host lacks for a purpose.
#   needs.sh build|run|test|hosts|generate
set -euo pipefail

declare -A package=(
	[mmdebstrap]=mmdebstrap # makes root file systems where no image registry can be reached
	[ip]=iproute2           # tests inspect the host with it
	[nft]=nftables          # tests inspect the rules with it
	[fsck.erofs]=erofs-utils # tests check images with it
	[protoc]=protobuf-compiler
	[curl]=curl
	[chromium]=chromium # a test opens a terminal in it
	[node]=nodejs # tests run E2B's own packages with it
	[npm]=npm
	[qemu-system-x86_64]=qemu-system-x86 # runs the machines of make test-hosts
	[qemu-img]=qemu-utils
	[faketime]=faketime # slows the clock of emulated ones
	[mke2fs]=e2fsprogs
	[git]=git # patches gVisor; ADD in Dockerfiles fetches repositories with it
)
case ${1:-} in
build) programs=(git) ;;
run) programs=(mmdebstrap curl) ;;
test) programs=(mmdebstrap curl ip nft fsck.erofs git chromium node npm) ;;
hosts) programs=(mmdebstrap git qemu-system-x86_64 qemu-img faketime mke2fs) ;;
generate) programs=(protoc) ;;
*) echo "usage: $0 build|run|test|hosts|generate" >&2; exit 2 ;;
esac

missing=()
for program in "${programs[@]}"; do
	PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
# Debian's keys, which other distributions do not install.
if [[ $1 == @(run|test|hosts) && ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]]; then
	missing+=(debian-archive-keyring)
fi
# Protocol Buffers' own definitions, which are not in the compiler's package.
if [[ $1 == generate && ! -e /usr/include/google/protobuf/timestamp.proto ]]; then
	missing+=(libprotobuf-dev)
fi
# Debian's package would also start a server of its own, which nothing of cay uses.
if [[ $1 == test ]] && ! compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then
	missing+=(postgresql)
	if [[ $EUID -eq 0 && ! -e /etc/postgresql-common/createcluster.conf ]]; then
		mkdir -p /etc/postgresql-common
		echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
	fi
fi
if [[ $1 == test ]]; then
	# A program for test sandboxes that needs no library, and what E2B's Python package speaks with.
	for name in busybox-static python3-httpx python3-h2; do
		dpkg -s "$name" >/dev/null 2>&1 || missing+=("$name")
	done
fi
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $EUID -ne 0 ]]; then
	echo "root is needed to install these packages: ${missing[*]}" >&2
	exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# A fresh machine may be installing updates of its own.
apt-get -o DPkg::Lock::Timeout=300 update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
