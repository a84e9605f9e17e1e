package agentapi

import "github.com/cayhq/cay/internal/fault"

// Port is the TCP port on which the agent listens inside the sandbox. It is E2B's; with another
// one E2B's clients would not reach the agent.
const Port = 49983

// EnvdVersion is the version of E2B's in-sandbox daemon whose behaviour the
// agent has. E2B's clients decide by it which calls they make.
const EnvdVersion = "0.6.13"

// Headers of the protocol. Codes have headers because the form of E2B's error
// bodies is fixed and has no field for them.
const (
	TokenHeader = "X-Access-Token"
	CodeHeader  = "Cay-Error-Code"  // one of the Code constants
	FieldHeader = "Cay-Error-Field" // "to", if that field is at fault and not the code's own
)

// TunnelProtocol names the protocol to which a connection is upgraded to carry bytes to a
// port of the sandbox: from the client to the server, and from the server to the agent.
const TunnelProtocol = "tcp"

// Codes of errors inside a sandbox, as users of the v1 API see them.
const (
	CodeFileNotFound     = "file_not_found"
	CodeIsDirectory      = "path_is_directory"
	CodeNotDirectory     = "path_not_directory"
	CodeNotEmpty         = "directory_not_empty"
	CodeInvalidPath      = "invalid_path"
	CodeFileDenied       = "file_denied"
	CodeWorkdirNotFound  = "workdir_not_found"
	CodeUnknownUser      = "unknown_user"
	CodeUnknownOwner     = "unknown_owner"
	CodeInvalidMode      = "invalid_mode"
	CodeInvalidEnv       = "invalid_env"
	CodeInvalidCommand   = "invalid_command"
	CodeDiskFull         = "disk_full"
	CodeTooManyProcesses = "too_many_processes"
	CodeUnreachable      = "sandbox_unreachable"
	CodeListingTooLarge  = "listing_too_large"
	CodeStartFailed      = "start_failed"
	CodePortClosed       = "port_closed"
	CodeTooManyTunnels   = "too_many_connections"
	CodeInvalidTar       = "invalid_tar"
	CodePathExists       = "path_exists"
	CodeProcessNotFound  = "process_not_found"
	CodeProcessEnded     = "process_ended"
	CodeTagInUse         = "tag_in_use"
	CodeStdinClosed      = "stdin_closed"
	CodeStdinBlocked     = "stdin_blocked"
	CodeNoTerminal       = "no_terminal"
	CodeOutputNotKept    = "output_not_kept"
	CodeInvalidOffset    = "invalid_offset"
	CodeOlderSandbox     = "sandbox_too_old" // the host finds it out; no agent sends it
)

// kinds maps each code of an agent to the kind of its error and to the field of
// the request that is at fault.
var kinds = map[string]struct {
	kind  fault.Kind
	field string
}{
	CodeFileNotFound:     {fault.NotFound, ""},
	CodeIsDirectory:      {fault.Invalid, "path"},
	CodeNotDirectory:     {fault.Invalid, "path"},
	CodeNotEmpty:         {fault.Invalid, "path"},
	CodeInvalidPath:      {fault.Invalid, "path"},
	CodeFileDenied:       {fault.Denied, ""},
	CodeWorkdirNotFound:  {fault.Invalid, "workdir"},
	CodeUnknownUser:      {fault.Invalid, "user"},
	CodeUnknownOwner:     {fault.Invalid, "owner"},
	CodeInvalidMode:      {fault.Invalid, "mode"},
	CodeInvalidEnv:       {fault.Invalid, "env"},
	CodeInvalidCommand:   {fault.Invalid, "command"},
	CodeDiskFull:         {fault.NoSpace, ""},
	CodeListingTooLarge:  {fault.TooLarge, ""},
	CodeTooManyProcesses: {fault.Unavailable, ""},
	CodeStartFailed:      {fault.Conflict, ""}, // the template does not allow the create
	CodeInvalidTar:       {fault.Invalid, ""},
	CodePathExists:       {fault.Conflict, ""},
	CodePortClosed:       {fault.Upstream, ""},
	CodeTooManyTunnels:   {fault.Exhausted, ""},
	CodeProcessNotFound:  {fault.NotFound, ""},
	CodeProcessEnded:     {fault.Conflict, ""},
	CodeTagInUse:         {fault.Conflict, "tag"},
	CodeStdinClosed:      {fault.Conflict, ""},
	CodeStdinBlocked:     {fault.Conflict, ""},
	CodeNoTerminal:       {fault.Conflict, ""},
	CodeOutputNotKept:    {fault.Conflict, ""},
	CodeInvalidOffset:    {fault.Invalid, "offset"},
}
