// Module cay is the Go client of cay servers. It is apart from the server's module so that a program that uses it
// depends on none of the server's parts.
module github.com/cayhq/cay/sdk/go

go 1.26.3

require (
	github.com/coder/websocket v1.8.15
	github.com/oapi-codegen/runtime v1.8.0
)

require (
	github.com/apapsch/go-jsonmerge/v2 v2.0.0 // indirect
	github.com/google/uuid v1.6.0 // indirect
)
