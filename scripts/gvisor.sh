#!/usr/bin/env bash
# Mends what gVisor's module has wrong and cay cannot live with, for the build of cay-runsc
# alone: makes a copy of the module with the patches of scripts/gvisor applied, and a go.mod that
# uses the copy, in a directory. go build takes that with -modfile.
#   gvisor.sh DIR
set -euo pipefail
patches=$(cd "$(dirname "$0")/gvisor" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
go mod download gvisor.dev/gvisor # on a new machine nothing has asked for it yet
from=$(go list -m -f '{{.Dir}}' gvisor.dev/gvisor)
version=$(go list -m -f '{{.Version}}' gvisor.dev/gvisor)
copy=$dir/$version-$(cat "$patches"/*.patch | sha256sum | cut -c1-8)
if [[ ! -e $copy ]]; then
	"$patches/../needs.sh" build
	find "$dir" -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} + # copies with other patches
	cp -r "$from" "$dir/new"
	chmod -R u+w "$dir/new"
	for patch in "$patches"/*.patch; do
		# The ceiling keeps git from taking the copy for a part of this repository.
		if ! GIT_CEILING_DIRECTORIES=$dir git -C "$dir/new" apply --whitespace=nowarn "$patch"; then
			echo "gvisor.sh: ${patch##*/} does not apply to $version: look whether it is still needed" >&2
			exit 1
		fi
	done
	mv "$dir/new" "$copy"
fi
cp go.sum "$dir/go.sum"
{ cat go.mod; echo "replace gvisor.dev/gvisor => $copy"; } >"$dir/go.mod"
