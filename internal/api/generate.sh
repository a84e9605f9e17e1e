#!/bin/sh
# Generates server and client from openapi.yaml. Run by `make generate`.
set -eu
cd "$(dirname "$0")/../.."
for config in internal/api/oapi-codegen.yaml sdk/go/models.yaml sdk/go/wire.yaml; do
	go tool -modfile=tools/go.mod oapi-codegen -config "$config" openapi.yaml
done
# The generator exports all that it makes.
go run ./scripts/hide sdk/go
