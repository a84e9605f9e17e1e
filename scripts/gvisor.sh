#!/usr/bin/env bash
# Makes gVisor's module ready for the build of cay-runsc alone: a copy with the patches of
# scripts/gvisor applied, which mend what cay cannot live with, and with the seccomp programs of sentry
# and gofer compiled, the former as gVisor's releases have it; and a go.mod that uses the copy, in a
# directory. go build takes that with -modfile.
#   gvisor.sh DIR
set -euo pipefail
patches=$(cd "$(dirname "$0")/gvisor" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
go mod download gvisor.dev/gvisor # on a new machine nothing has asked for it yet
from=$(go list -m -f '{{.Dir}}' gvisor.dev/gvisor)
version=$(go list -m -f '{{.Version}}' gvisor.dev/gvisor)
copy=$dir/$version-$(cat "$patches"/*.patch "$patches/filters/main.go" | sha256sum | cut -c1-8)
# use DIR: writes the go.mod.
use() {
	cp go.sum "$dir/go.sum"
	{ cat go.mod; echo "replace gvisor.dev/gvisor => $1"; } >"$dir/go.mod"
}
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
	use "$dir/new"
	# They are the processor's: a build for another one goes without, and compiles at every start.
	arch=$(go env GOHOSTARCH)
	env -u GOOS -u GOARCH CGO_ENABLED=0 go build -modfile "$dir/go.mod" -trimpath -o "$dir/filters" "$patches/filters"
	for program in sentry:boot gofer:fsgofer; do
		compiled=$dir/new/runsc/${program#*:}/filter/compiled_$arch.go
		"$dir/filters" "${program%:*}" >"$compiled"
		if ! "$dir/filters" "${program%:*}" | cmp -s - "$compiled"; then
			echo "gvisor.sh: a seccomp rule of the ${program%:*} takes something from the process that compiles it, its ID most likely" >&2
			exit 1
		fi
	done
	mv "$dir/new" "$copy"
fi
use "$copy"
