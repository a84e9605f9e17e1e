#!/usr/bin/env bash
# Checks the code without running the product, after make build. The flags are those of the build, so that
# nothing is compiled twice.
set -euo pipefail
export GOFLAGS=-trimpath
tool() { go tool -modfile=tools/go.mod "$@"; }
# patched COMMAND... runs a command that loads the main module with the patched gVisor.
patched() { GOWORK=$PWD/bin/gvisor/go.work "$@"; }
step() { echo "check: $*"; }

step formatting
unformatted=$(gofmt -l $(git ls-files --cached --others --exclude-standard '*.go'))
if [[ -n $unformatted ]]; then
	echo "not formatted as gofmt does (gofmt -w): $unformatted" >&2
	exit 1
fi
for script in $(git ls-files --cached --others --exclude-standard '*.sh' .ci/run); do
	bash -n "$script"
done

step modules are tidy
go mod tidy -diff

step vet
patched go vet ./...

step staticcheck
patched "$(tool -n staticcheck)" ./...

step locks
# Only annotated fields: guesses about others are wrong too often.
patched "$(tool -n checklocks)" -inferred=false -test=false \
	$(go list ./internal/... ./cmd/cay-agent)

# check_module DIR checks a module of its own below DIR as the steps above check the main one.
check_module() (
	tools=$PWD/tools/go.mod
	cd "$1"
	go mod tidy -diff
	go vet ./...
	go tool -modfile="$tools" staticcheck ./...
	go tool -modfile="$tools" checklocks -inferred=false -test=false ./...
)

step the Go client, which is a module of its own
check_module sdk/go

step the builder, which is a module of its own
check_module cmd/cay-buildkit

step "imports, prose and links"
go test -count=1 .

step generated files are current
before=$(git status --porcelain; git diff; git ls-files --others --exclude-standard -z | xargs -0 -r sha256sum)
make -s generate
after=$(git status --porcelain; git diff; git ls-files --others --exclude-standard -z | xargs -0 -r sha256sum)
if [[ $before != "$after" ]]; then
	echo "generated files were out of date; make generate has updated them" >&2
	git status --short >&2
	exit 1
fi
