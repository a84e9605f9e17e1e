#!/usr/bin/env bash
# Mends what gVisor's module has wrong and cay cannot live with, for the build of cay-runsc
# alone: makes a copy of the module with it mended, and a go.mod that uses the copy, in a
# directory. go build takes that with -modfile.
#   gvisor.sh DIR
#
# A connection that is being made while a sandbox is saved is given up when it is restored,
# and waits for all established ones to be restored before that, on the one thread that
# restores them: if one of these comes later in the list the restore never ends. There is
# nothing to wait for, since what is given up takes no port.
set -euo pipefail
mkdir -p "$1"
dir=$(cd "$1" && pwd)
go mod download gvisor.dev/gvisor # on a new machine nothing has asked for it yet
from=$(go list -m -f '{{.Dir}}' gvisor.dev/gvisor)
version=$(go list -m -f '{{.Version}}' gvisor.dev/gvisor)
if [[ ! -e $dir/$version ]]; then
	rm -rf "$dir/new"
	cp -r "$from" "$dir/new"
	chmod -R u+w "$dir/new"
	file=pkg/tcpip/transport/tcp/endpoint_state.go
	sed -i '/^\tif epState\.handshake() {$/,/^\t}$/d' "$dir/new/$file"
	removed=$(diff "$from/$file" "$dir/new/$file" | grep '^<' | tr -d '<\t ' || true)
	if [[ $removed != $'ifepState.handshake(){\nconnectedLoading.Wait()\nlistenLoading.Wait()\n}' ]]; then
		echo "gvisor.sh: $from/$file is not what it was: look whether it still has to be mended" >&2
		exit 1
	fi
	mv "$dir/new" "$dir/$version"
fi
cp go.sum "$dir/go.sum"
{ cat go.mod; echo "replace gvisor.dev/gvisor => $dir/$version"; } >"$dir/go.mod"
