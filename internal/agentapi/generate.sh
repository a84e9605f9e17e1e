#!/bin/sh
# Generates the Go code of the two protocols. Needs protoc and its well-known types
# (Debian packages protobuf-compiler and libprotobuf-dev); the plugins are built at
# the versions tools/go.mod pins.
set -eu
cd "$(dirname "$0")"
command -v protoc >/dev/null || { echo "generate: protoc is missing (apt-get install protobuf-compiler libprotobuf-dev)" >&2; exit 1; }

plugins=$(mktemp -d)
trap 'rm -rf "$plugins"' EXIT
GOBIN="" GOFLAGS=-trimpath CGO_ENABLED=0 go build -modfile=../../tools/go.mod -o "$plugins/" \
	google.golang.org/protobuf/cmd/protoc-gen-go \
	connectrpc.com/connect/cmd/protoc-gen-connect-go

# The messages and their Connect code share a package each: one noun, one import.
PATH="$plugins:$PATH" protoc -I. \
	--go_out=. --go_opt=module=github.com/cayhq/cay/internal/agentapi \
	--connect-go_out=. --connect-go_opt=module=github.com/cayhq/cay/internal/agentapi,package_suffix \
	process.proto filesystem.proto

# The comment with the version of protoc differs between distributions; the code does not.
sed -i '/^\/\/ \tprotoc  /d' process/*.pb.go filesystem/*.pb.go
