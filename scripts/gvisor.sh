#!/usr/bin/env bash
# Prepares gVisor's module for the build of cay-runsc, and for nothing else. It makes a copy of the module in
# a directory, applies the patches of scripts/gvisor, which fix defects that break cay's promises, and
# compiles the seccomp programs of sentry and gofer, the former as gVisor's releases do. It writes a go.mod
# that uses the copy, which go build takes with -modfile, and a go.work for tools that know only GOWORK.
#   gvisor.sh DIR
set -euo pipefail
patches=$(cd "$(dirname "$0")/gvisor" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
go mod download gvisor.dev/gvisor # a new machine has not downloaded it yet
from=$(go list -m -f '{{.Dir}}' gvisor.dev/gvisor)
version=$(go list -m -f '{{.Version}}' gvisor.dev/gvisor)
copy=$dir/$version-$(cat "$patches"/*.patch "$patches/filters/main.go" | sha256sum | cut -c1-8)
# use DIR writes a go.mod and a go.work that use the copy in DIR.
use() {
	cp go.sum "$dir/go.sum"
	{ cat go.mod; echo "replace gvisor.dev/gvisor => $1"; } >"$dir/go.mod"
	{ grep '^go ' go.mod; echo "use $PWD"; echo "replace gvisor.dev/gvisor => $1"; } >"$dir/go.work"
}
if [[ ! -e $copy ]]; then
	"$patches/../needs.sh" build
	find "$dir" -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} + # copies with other patches
	cp -r "$from" "$dir/new"
	chmod -R u+w "$dir/new"
	for patch in "$patches"/*.patch; do
		# The ceiling keeps git from treating the copy as part of this repository.
		if ! GIT_CEILING_DIRECTORIES=$dir git -C "$dir/new" apply --whitespace=nowarn "$patch"; then
			echo "gvisor.sh: ${patch##*/} does not apply to $version: check whether it is still needed" >&2
			exit 1
		fi
	done
	use "$dir/new"
	# The programs depend on the architecture. A build for another one has none, and compiles at every start.
	arch=$(go env GOHOSTARCH)
	env -u GOOS -u GOARCH CGO_ENABLED=0 go build -modfile "$dir/go.mod" -trimpath -o "$dir/filters" "$patches/filters"
	for program in sentry:boot gofer:fsgofer; do
		compiled=$dir/new/runsc/${program#*:}/filter/compiled_$arch.go
		"$dir/filters" "${program%:*}" >"$compiled"
		if ! "$dir/filters" "${program%:*}" | cmp -s - "$compiled"; then
			echo "gvisor.sh: a seccomp rule of the ${program%:*} depends on the process that compiles it, most likely on its ID" >&2
			exit 1
		fi
	done
	mv "$dir/new" "$copy"
fi
use "$copy"
