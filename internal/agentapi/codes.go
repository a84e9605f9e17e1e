package agentapi

import "github.com/cayhq/cay/internal/fault"

// Port is the TCP port the agent listens on inside the sandbox, E2B's.
const Port = 49983

// EnvdVersion is the version of E2B's in-sandbox daemon whose behaviour the
// agent has; E2B's clients decide by it what they may ask for.
const EnvdVersion = "0.6.13"

// Headers of the wire. The codes travel beside E2B's error bodies, whose form
// is fixed and has no room for them.
const (
	TokenHeader = "X-Access-Token"
	CodeHeader  = "Cay-Error-Code"  // one of the Code constants
	FieldHeader = "Cay-Error-Field" // "to", where a code's own field is not the one at fault
)

// TunnelProtocol is what a connection is upgraded to that is to carry bytes to a port of
// the sandbox, on both stretches of its way.
const TunnelProtocol = "tcp"

// Codes of what can go wrong inside, as users of the v1 API see them.
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
	CodeOlderSandbox     = "sandbox_too_old" // the host's own
)

// kinds says what a caller can do about each code, and which field of its
// request is at fault.
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
	CodeStartFailed:      {fault.Conflict, ""}, // it is the template that does not allow the create
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
