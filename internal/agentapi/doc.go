// Package agentapi defines the protocol between the host and the agent inside a
// sandbox, and implements the host's side of it.
//
// The protocol is E2B's envd protocol (Connect services process.Process and
// filesystem.Filesystem, plain HTTP for files, init and health), so that requests of
// E2B's clients can be passed to the agent unchanged. Additions serve cay's own API:
// one-shot execution in a single call, processes whose output can be followed from
// any offset, files that appear whole or not at all, and relief of memory. The
// sub-packages hold the generated messages; run generate.sh after changing a .proto
// file.
//
// A [Client] is safe for concurrent use. Its calls return errors of the fault
// package where a caller decides by them, and leave nothing behind after an error
// except what their comments say. The agent's answers are not trusted: a process of
// root in a sandbox may answer in the agent's place, so the client bounds sizes and
// counts again.
package agentapi

//go:generate ./generate.sh
