// Package agentapi is the wire between the host and the agent inside a sandbox,
// and the host's side of it.
//
// The wire is E2B's envd protocol (Connect services process.Process and
// filesystem.Filesystem, plain HTTP for files, init and health), so that E2B's
// clients can be passed through to the agent as they are, plus what cay's own API
// needs: one-shot execution in a single call, processes whose output can be followed
// from any offset, files that appear whole or not at all, and relief of memory. The sub-packages hold the generated messages; run
// generate.sh after changing a .proto file.
//
// A [Client] is safe for concurrent use. Its calls return errors of the fault
// room where a caller decides by them, and leave nothing behind after an error
// except what their comments say. What the agent answers is not trusted: whoever
// is root in a sandbox may answer in its place, so sizes and counts are
// bounded here again.
package agentapi

//go:generate ./generate.sh
