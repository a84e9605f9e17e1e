package api

import (
	"strings"

	"github.com/cayhq/cay/internal/auth"
)

// place says which server of a cluster does the calls of a route.
type place int

// The places. The zero value is none, so that each route is decided about.
const (
	anywhere         place = iota + 1 // any server, from rows
	holder                            // the node that has the sandbox
	holderUnlessLost                  // that node or, once it is lost, any server
	holderOrRows                      // that node or, while it cannot be reached, any server
	placed                            // a node with room for another sandbox
	snapshotHolder                    // the node that has the snapshot
	builder                           // the node that builds templates
	rowsOrBuilder                     // any server; a stream is the builder's
	eachNode                          // the nodes that take sandboxes, each for itself
)

// access tells which server does the calls of a route, which keys may make them, and which parameters
// their query may have. The zero value requires a valid key and allows no parameters.
type access struct {
	at    place
	open  bool       // needs no key
	scope auth.Scope // the key must have it; "" accepts any valid key
	query []string   // known parameters; one that ends in "." stands for all with that prefix
	many  string     // the only parameter that may be repeated
	timed bool       // answers have a Server-Timing header

	endless bool // calls may have no end of their own: a replica that stops breaks those that it forwards
}

// routes lists all routes with their access. A test compares it with openapi.yaml. Requests for
// other routes are refused.
var routes = map[string]access{
	"POST /v1/sandboxes":                 {at: placed, scope: auth.SandboxesWrite, timed: true, query: []string{"wait"}},
	"GET /v1/sandboxes":                  {at: anywhere, scope: auth.SandboxesRead, query: []string{"status", "limit", "cursor", "metadata."}, many: "status"},
	"GET /v1/sandboxes/{id}":             {at: holderOrRows, scope: auth.SandboxesRead},
	"DELETE /v1/sandboxes/{id}":          {at: holderUnlessLost, scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/keepalive":  {at: holder, scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/wake":       {at: holder, scope: auth.SandboxesWrite, timed: true},
	"POST /v1/sandboxes/{id}/suspend":    {at: holder, scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/checkpoint": {at: holder, scope: auth.SandboxesWrite},
	"PUT /v1/sandboxes/{id}/egress":      {at: holder, scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/snapshots":  {at: holder, scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/fork":       {at: holder, scope: auth.SandboxesWrite},
	"GET /v1/sandboxes/{id}/events":      {at: anywhere, scope: auth.SandboxesRead, query: []string{"limit", "cursor"}},

	"POST /v1/sandboxes/{id}/tunnel":           {at: holder, scope: auth.Exec, query: []string{"port"}, endless: true},
	"GET /v1/sandboxes/{id}/ports":             {at: anywhere, scope: auth.SandboxesRead},
	"GET /v1/sandboxes/{id}/ports/{port}":      {at: anywhere, scope: auth.SandboxesRead},
	"PUT /v1/sandboxes/{id}/ports/{port}":      {at: anywhere, scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/ports/{port}/url": {at: anywhere, scope: auth.Exec},
	"GET /v1/snapshots":                        {at: anywhere, scope: auth.SandboxesRead, query: []string{"sandbox", "name", "limit", "cursor"}},
	"GET /v1/snapshots/{snapshot}":             {at: anywhere, scope: auth.SandboxesRead},
	"DELETE /v1/snapshots/{snapshot}":          {at: snapshotHolder, scope: auth.SandboxesWrite},

	"POST /v1/sandboxes/{id}/execute":                    {at: holder, scope: auth.Exec, timed: true},
	"POST /v1/sandboxes/{id}/processes":                  {at: holder, scope: auth.Exec},
	"GET /v1/sandboxes/{id}/processes":                   {at: holder, scope: auth.Exec},
	"GET /v1/sandboxes/{id}/processes/{process}":         {at: holder, scope: auth.Exec},
	"DELETE /v1/sandboxes/{id}/processes/{process}":      {at: holder, scope: auth.Exec},
	"GET /v1/sandboxes/{id}/processes/{process}/wait":    {at: holder, scope: auth.Exec, query: []string{"timeout"}},
	"GET /v1/sandboxes/{id}/processes/{process}/output":  {at: holder, scope: auth.Exec, query: []string{"offset"}, endless: true},
	"POST /v1/sandboxes/{id}/processes/{process}/stdin":  {at: holder, scope: auth.Exec, query: []string{"close"}},
	"POST /v1/sandboxes/{id}/processes/{process}/signal": {at: holder, scope: auth.Exec},
	"POST /v1/sandboxes/{id}/processes/{process}/resize": {at: holder, scope: auth.Exec},
	"GET " + terminalRoute:                               {at: holder, scope: auth.Exec, query: []string{"cols", "rows", "command", "user", "workdir", "term", "grace", "process", "offset"}, endless: true},

	"PUT /v1/sandboxes/{id}/files":      {at: holder, scope: auth.Files, query: []string{"path", "mode", "owner"}},
	"GET /v1/sandboxes/{id}/files":      {at: holder, scope: auth.Files, query: []string{"path"}},
	"DELETE /v1/sandboxes/{id}/files":   {at: holder, scope: auth.Files, query: []string{"path", "recursive"}},
	"GET /v1/sandboxes/{id}/files/list": {at: holder, scope: auth.Files, query: []string{"path", "depth"}},

	"GET /v1/sandboxes/{id}/files/stat":    {at: holder, scope: auth.Files, query: []string{"path"}},
	"POST /v1/sandboxes/{id}/files/mkdir":  {at: holder, scope: auth.Files},
	"POST /v1/sandboxes/{id}/files/rename": {at: holder, scope: auth.Files},
	"GET /v1/sandboxes/{id}/files/watch":   {at: holder, scope: auth.Files, query: []string{"path", "recursive"}, endless: true},
	"GET /v1/sandboxes/{id}/files/tar":     {at: holder, scope: auth.Files, query: []string{"path"}},
	"PUT /v1/sandboxes/{id}/files/tar":     {at: holder, scope: auth.Files, query: []string{"path", "owner"}},

	"GET /v1/templates":                     {at: anywhere, scope: auth.TemplatesRead, query: []string{"limit", "cursor"}},
	"POST /v1/templates":                    {at: builder, scope: auth.TemplatesWrite},
	"GET /v1/templates/{template}":          {at: anywhere, scope: auth.TemplatesRead},
	"DELETE /v1/templates/{template}":       {at: builder, scope: auth.TemplatesWrite, query: []string{"force"}},
	"POST /v1/templates/{template}/rebuild": {at: builder, scope: auth.TemplatesWrite},
	"POST /v1/templates/{template}/cancel":  {at: builder, scope: auth.TemplatesWrite},
	"GET /v1/templates/{template}/logs":     {at: rowsOrBuilder, scope: auth.TemplatesRead, endless: true},

	// eventScopes limits which events a key may see.
	"GET /v1/events": {at: anywhere, query: []string{"after", "type", "sandbox", "limit", "cursor"}, many: "type"},

	"POST /v1/webhooks":                     {at: anywhere, scope: auth.Admin},
	"GET /v1/webhooks":                      {at: anywhere, scope: auth.Admin, query: []string{"limit", "cursor"}},
	"GET /v1/webhooks/{webhook}":            {at: anywhere, scope: auth.Admin},
	"PATCH /v1/webhooks/{webhook}":          {at: anywhere, scope: auth.Admin},
	"DELETE /v1/webhooks/{webhook}":         {at: anywhere, scope: auth.Admin},
	"POST /v1/webhooks/{webhook}/test":      {at: anywhere, scope: auth.Admin},
	"GET /v1/webhooks/{webhook}/deliveries": {at: anywhere, scope: auth.Admin, query: []string{"status", "limit", "cursor"}},
	"POST /v1/webhooks/{webhook}/replay":    {at: anywhere, scope: auth.Admin},

	"GET /v1/sizes":             {at: anywhere},
	"GET /v1/me":                {at: anywhere},
	"GET /v1/pool":              {at: eachNode, scope: auth.Admin},
	"GET /v1/nodes":             {at: anywhere, scope: auth.Admin},
	"GET /v1/nodes/{node}":      {at: anywhere, scope: auth.Admin},
	"POST /v1/api-keys":         {at: anywhere, scope: auth.Admin},
	"GET /v1/api-keys":          {at: anywhere, scope: auth.Admin, query: []string{"limit", "cursor"}},
	"DELETE /v1/api-keys/{key}": {at: anywhere}, // a key may revoke itself; auth requires admin for other keys
	"POST /v1/orgs":             {at: anywhere, scope: auth.Admin},
	"GET /v1/orgs":              {at: anywhere, scope: auth.Admin, query: []string{"limit", "cursor"}},

	"POST /v1/nodes/tokens":          {at: anywhere, scope: auth.Admin},
	"DELETE /v1/nodes/{node}":        {at: anywhere, scope: auth.Admin},
	"POST /v1/nodes/{node}/cordon":   {at: anywhere, scope: auth.Admin},
	"POST /v1/nodes/{node}/uncordon": {at: anywhere, scope: auth.Admin},
	"POST /v1/nodes/{node}/drain":    {at: anywhere, scope: auth.Admin},

	"GET /healthz":      {at: anywhere, open: true},
	"GET /readyz":       {at: anywhere, open: true},
	"GET /openapi.yaml": {at: anywhere, open: true},
	"GET /metrics":      {at: anywhere, scope: auth.Admin},
}

// takes reports whether the route has the query parameter.
func (a access) takes(parameter string) bool {
	for _, known := range a.query {
		if known == parameter || strings.HasSuffix(known, ".") && strings.HasPrefix(parameter, known) {
			return true
		}
	}
	return false
}
