package api

import (
	"strings"

	"github.com/cayhq/cay/internal/auth"
)

// access tells which keys may call a route and which parameters its query may have. The zero value
// requires a valid key and allows no parameters.
type access struct {
	open  bool       // needs no key
	scope auth.Scope // the key must have it; "" accepts any valid key
	query []string   // known parameters; one that ends in "." stands for all with that prefix
	many  string     // the only parameter that may be repeated
	timed bool       // answers have a Server-Timing header
}

// routes lists all routes with their access. A test compares it with openapi.yaml. Requests for
// other routes are refused.
var routes = map[string]access{
	"POST /v1/sandboxes":                 {scope: auth.SandboxesWrite, timed: true, query: []string{"wait"}},
	"GET /v1/sandboxes":                  {scope: auth.SandboxesRead, query: []string{"status", "limit", "cursor", "metadata."}, many: "status"},
	"GET /v1/sandboxes/{id}":             {scope: auth.SandboxesRead},
	"DELETE /v1/sandboxes/{id}":          {scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/keepalive":  {scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/wake":       {scope: auth.SandboxesWrite, timed: true},
	"POST /v1/sandboxes/{id}/suspend":    {scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/checkpoint": {scope: auth.SandboxesWrite},
	"PUT /v1/sandboxes/{id}/egress":      {scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/snapshots":  {scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/fork":       {scope: auth.SandboxesWrite},
	"GET /v1/sandboxes/{id}/events":      {scope: auth.SandboxesRead, query: []string{"limit", "cursor"}},

	"POST /v1/sandboxes/{id}/tunnel":           {scope: auth.Exec, query: []string{"port"}},
	"GET /v1/sandboxes/{id}/ports":             {scope: auth.SandboxesRead},
	"GET /v1/sandboxes/{id}/ports/{port}":      {scope: auth.SandboxesRead},
	"PUT /v1/sandboxes/{id}/ports/{port}":      {scope: auth.SandboxesWrite},
	"POST /v1/sandboxes/{id}/ports/{port}/url": {scope: auth.Exec},
	"GET /v1/snapshots":                        {scope: auth.SandboxesRead, query: []string{"sandbox", "name", "limit", "cursor"}},
	"GET /v1/snapshots/{snapshot}":             {scope: auth.SandboxesRead},
	"DELETE /v1/snapshots/{snapshot}":          {scope: auth.SandboxesWrite},

	"POST /v1/sandboxes/{id}/execute":                    {scope: auth.Exec, timed: true},
	"POST /v1/sandboxes/{id}/processes":                  {scope: auth.Exec},
	"GET /v1/sandboxes/{id}/processes":                   {scope: auth.Exec},
	"GET /v1/sandboxes/{id}/processes/{process}":         {scope: auth.Exec},
	"DELETE /v1/sandboxes/{id}/processes/{process}":      {scope: auth.Exec},
	"GET /v1/sandboxes/{id}/processes/{process}/wait":    {scope: auth.Exec, query: []string{"timeout"}},
	"GET /v1/sandboxes/{id}/processes/{process}/output":  {scope: auth.Exec, query: []string{"offset"}},
	"POST /v1/sandboxes/{id}/processes/{process}/stdin":  {scope: auth.Exec, query: []string{"close"}},
	"POST /v1/sandboxes/{id}/processes/{process}/signal": {scope: auth.Exec},
	"POST /v1/sandboxes/{id}/processes/{process}/resize": {scope: auth.Exec},
	"GET " + terminalRoute:                               {scope: auth.Exec, query: []string{"cols", "rows", "command", "user", "workdir", "term", "grace", "process", "offset"}},

	"PUT /v1/sandboxes/{id}/files":      {scope: auth.Files, query: []string{"path", "mode", "owner"}},
	"GET /v1/sandboxes/{id}/files":      {scope: auth.Files, query: []string{"path"}},
	"DELETE /v1/sandboxes/{id}/files":   {scope: auth.Files, query: []string{"path", "recursive"}},
	"GET /v1/sandboxes/{id}/files/list": {scope: auth.Files, query: []string{"path", "depth"}},

	"GET /v1/sandboxes/{id}/files/stat":    {scope: auth.Files, query: []string{"path"}},
	"POST /v1/sandboxes/{id}/files/mkdir":  {scope: auth.Files},
	"POST /v1/sandboxes/{id}/files/rename": {scope: auth.Files},
	"GET /v1/sandboxes/{id}/files/watch":   {scope: auth.Files, query: []string{"path", "recursive"}},
	"GET /v1/sandboxes/{id}/files/tar":     {scope: auth.Files, query: []string{"path"}},
	"PUT /v1/sandboxes/{id}/files/tar":     {scope: auth.Files, query: []string{"path", "owner"}},

	"GET /v1/templates":                     {scope: auth.TemplatesRead, query: []string{"limit", "cursor"}},
	"POST /v1/templates":                    {scope: auth.TemplatesWrite},
	"GET /v1/templates/{template}":          {scope: auth.TemplatesRead},
	"DELETE /v1/templates/{template}":       {scope: auth.TemplatesWrite, query: []string{"force"}},
	"POST /v1/templates/{template}/rebuild": {scope: auth.TemplatesWrite},
	"POST /v1/templates/{template}/cancel":  {scope: auth.TemplatesWrite},
	"GET /v1/templates/{template}/logs":     {scope: auth.TemplatesRead},

	// eventScopes limits which events a key may see.
	"GET /v1/events": {query: []string{"after", "type", "sandbox", "limit", "cursor"}, many: "type"},

	"POST /v1/webhooks":                     {scope: auth.Admin},
	"GET /v1/webhooks":                      {scope: auth.Admin, query: []string{"limit", "cursor"}},
	"GET /v1/webhooks/{webhook}":            {scope: auth.Admin},
	"PATCH /v1/webhooks/{webhook}":          {scope: auth.Admin},
	"DELETE /v1/webhooks/{webhook}":         {scope: auth.Admin},
	"POST /v1/webhooks/{webhook}/test":      {scope: auth.Admin},
	"GET /v1/webhooks/{webhook}/deliveries": {scope: auth.Admin, query: []string{"status", "limit", "cursor"}},
	"POST /v1/webhooks/{webhook}/replay":    {scope: auth.Admin},

	"GET /v1/sizes":             {},
	"GET /v1/me":                {},
	"GET /v1/pool":              {scope: auth.Admin},
	"GET /v1/nodes":             {scope: auth.Admin},
	"GET /v1/nodes/{node}":      {scope: auth.Admin},
	"POST /v1/api-keys":         {scope: auth.Admin},
	"GET /v1/api-keys":          {scope: auth.Admin, query: []string{"limit", "cursor"}},
	"DELETE /v1/api-keys/{key}": {}, // a key may revoke itself; auth requires admin for other keys
	"POST /v1/orgs":             {scope: auth.Admin},
	"GET /v1/orgs":              {scope: auth.Admin, query: []string{"limit", "cursor"}},

	"POST /v1/nodes/tokens":          {scope: auth.Admin},
	"DELETE /v1/nodes/{node}":        {scope: auth.Admin},
	"POST /v1/nodes/{node}/cordon":   {scope: auth.Admin},
	"POST /v1/nodes/{node}/uncordon": {scope: auth.Admin},
	"POST /v1/nodes/{node}/drain":    {scope: auth.Admin},

	"GET /healthz":      {open: true},
	"GET /readyz":       {open: true},
	"GET /openapi.yaml": {open: true},
	"GET /metrics":      {scope: auth.Admin},
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
