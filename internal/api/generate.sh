#!/bin/sh
# Generates server and client from openapi.yaml. Run by `make generate`.
set -eu
cd "$(dirname "$0")/../.."
for config in internal/api/oapi-codegen.yaml client/oapi-codegen.yaml; do
	go tool -modfile=tools/go.mod oapi-codegen -config "$config" openapi.yaml
done
# The generated layer that makes requests is for the package client alone: its
# users have Client. The generator has no option to unexport it.
sed -i -E \
	-e 's/\bWire\b/wire/g' \
	-e 's/\bNewClient\b/newWire/g' \
	-e 's/\bNew([A-Za-z]+)Request(WithBody)?\(/new\1Request\2(/g' \
	-e 's/\bClientOption\b/wireOption/g' \
	-e 's/\bClientInterface\b/wireInterface/g' \
	-e 's/\bWith(HTTPClient|RequestEditorFn|BaseURL)\b/wireWith\1/g' \
	-e 's/\bRequestEditorFn\b/requestEditor/g' \
	-e 's/\bHttpRequestDoer\b/doer/g' \
	client/client.gen.go
gofmt -w client/client.gen.go
