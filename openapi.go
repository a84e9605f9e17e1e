// Package cay holds the contract of the HTTP API, openapi.yaml, so that the
// server can serve the very file its code is generated from.
//
// Nothing else belongs here: programs that talk to a server use the package
// [github.com/cayhq/cay/sdk/go].
package cay

import _ "embed"

// OpenAPI is openapi.yaml. Not to be changed.
//
//go:embed openapi.yaml
var OpenAPI []byte
