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
	CodeHeader  = "Cay-Error-Code"  // a code of package fault
	FieldHeader = "Cay-Error-Field" // "to", if that field is at fault and not the code's own
)

// TunnelProtocol names the protocol to which a connection is upgraded to carry bytes to a
// port of the sandbox: from the client to the server, and from the server to the agent.
const TunnelProtocol = "tcp"

// kinds maps each code of an agent to the kind of its error and to the field of
// the request that is at fault.
var kinds = map[string]struct {
	kind  fault.Kind
	field string
}{
	fault.CodeFileNotFound:       {fault.NotFound, ""},
	fault.CodePathIsDirectory:    {fault.Invalid, "path"},
	fault.CodePathNotDirectory:   {fault.Invalid, "path"},
	fault.CodeDirectoryNotEmpty:  {fault.Invalid, "path"},
	fault.CodeInvalidPath:        {fault.Invalid, "path"},
	fault.CodeFileDenied:         {fault.Denied, ""},
	fault.CodeWorkdirNotFound:    {fault.Invalid, "workdir"},
	fault.CodeUnknownUser:        {fault.Invalid, "user"},
	fault.CodeUnknownOwner:       {fault.Invalid, "owner"},
	fault.CodeInvalidMode:        {fault.Invalid, "mode"},
	fault.CodeInvalidEnv:         {fault.Invalid, "env"},
	fault.CodeInvalidCommand:     {fault.Invalid, "command"},
	fault.CodeDiskFull:           {fault.NoSpace, ""},
	fault.CodeListingTooLarge:    {fault.TooLarge, ""},
	fault.CodeTooManyProcesses:   {fault.Unavailable, ""},
	fault.CodeStartFailed:        {fault.Conflict, ""}, // the template does not allow the create
	fault.CodeInvalidTar:         {fault.Invalid, ""},
	fault.CodePathExists:         {fault.Conflict, ""},
	fault.CodePortClosed:         {fault.Upstream, ""},
	fault.CodeTooManyConnections: {fault.Exhausted, ""},
	fault.CodeProcessNotFound:    {fault.NotFound, ""},
	fault.CodeProcessEnded:       {fault.Conflict, ""},
	fault.CodeTagInUse:           {fault.Conflict, "tag"},
	fault.CodeStdinClosed:        {fault.Conflict, ""},
	fault.CodeStdinBlocked:       {fault.Conflict, ""},
	fault.CodeNoTerminal:         {fault.Conflict, ""},
	fault.CodeOutputNotKept:      {fault.Conflict, ""},
	fault.CodeInvalidOffset:      {fault.Invalid, "offset"},
}
