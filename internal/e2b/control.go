package e2b

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

// maxBody bounds a JSON body, in bytes. It has room for an environment of 128 KiB and long
// network lists.
const maxBody = 1 << 20

// location says which server of a cluster does the calls of a route.
type location int

// The locations. The zero value is none, so that each route is decided about.
const (
	anywhere           location = iota + 1 // any server, from rows
	holder                                 // the node that has the sandbox
	holderUnlessLost                       // that node or, once it is lost, any server
	eachHolder                             // the nodes that have the sandboxes, each for its own
	placed                                 // a node with room for another sandbox
	builder                                // the node that builds templates
	snapshotOrTemplate                     // the node that has the snapshot of the name, or the builder without one
)

// route is an operation of the control API: which server does it, the scopes that a key needs, and its handler.
type route struct {
	at     location
	scopes []auth.Scope
	answer func(http.ResponseWriter, *http.Request) error
}

// tokenScopes are the scopes that a key needs to be given the token of a sandbox.
var tokenScopes = []auth.Scope{auth.Exec, auth.Files}

// olderBuilds is the reason for refusing the calls by which older clients build templates.
const olderBuilds = "templates are built with POST /v3/templates and what follows it, as newer clients do"

// notSupported returns a route that answers 501 with the text.
func notSupported(what string) route {
	return route{at: anywhere, answer: func(http.ResponseWriter, *http.Request) error { return unsupported(what) }}
}

// table returns all routes of the control API.
func (s *Handler) table() map[string]route {
	write := append([]auth.Scope{auth.SandboxesWrite}, tokenScopes...)
	read := []auth.Scope{auth.SandboxesRead}
	builds, admin := []auth.Scope{auth.TemplatesWrite}, []auth.Scope{auth.Admin}
	older := notSupported(olderBuilds)
	volumes, secrets := notSupported("this server has no volumes"), notSupported("this server keeps no secrets")
	return map[string]route{
		"POST /sandboxes":                            {placed, write, s.create(createV1)},
		"POST /v2/sandboxes":                         {placed, write, s.create(createV2)},
		"GET /sandboxes":                             {anywhere, read, s.list(listedAs(stateRunning))},
		"GET /v2/sandboxes":                          {anywhere, read, s.list(nil)},
		"GET /sandboxes/metrics":                     {eachHolder, read, s.latestMetrics},
		"GET /sandboxes/{id}":                        {anywhere, read, s.get},
		"DELETE /sandboxes/{id}":                     {holderUnlessLost, write[:1], s.kill},
		"POST /sandboxes/{id}/timeout":               {holder, write[:1], s.setTimeout},
		"POST /sandboxes/{id}/refreshes":             {holder, write[:1], s.refresh},
		"POST /sandboxes/{id}/pause":                 {holder, write[:1], s.pause},
		"POST /sandboxes/{id}/connect":               {holder, write, s.connect},
		"POST /v2/sandboxes/{id}/connect":            {holder, write, s.connect},
		"POST /sandboxes/{id}/resume":                {holder, write, s.resume},
		"GET /sandboxes/{id}/metrics":                {holder, read, s.metrics},
		"PUT /sandboxes/{id}/network":                {holder, write[:1], s.setNetwork},
		"GET /sandboxes/{id}/logs":                   {anywhere, read, s.logs(logsV1)},
		"GET /v2/sandboxes/{id}/logs":                {anywhere, read, s.logs(logsV2)},
		"POST /sandboxes/{id}/fork":                  {holder, write, s.fork},
		"POST /v2/sandboxes/{id}/fork":               {holder, write, s.fork},
		"POST /sandboxes/{id}/snapshots":             {holder, write[:1], s.snapshot},
		"GET /snapshots":                             {anywhere, read, s.listSnapshots},
		"DELETE /templates/{ref}":                    {snapshotOrTemplate, write[:1], s.deleteTemplate},
		"GET /templates":                             {anywhere, []auth.Scope{auth.TemplatesRead}, s.listTemplates},
		"GET /v2/templates":                          {anywhere, []auth.Scope{auth.TemplatesRead}, s.listTemplates},
		"GET /templates/aliases/{alias}":             {anywhere, []auth.Scope{auth.TemplatesRead}, s.templateAlias},
		"GET /templates/{ref}":                       older,
		"PATCH /templates/{ref}":                     notSupported("a template belongs to its organization: it cannot be published"),
		"PATCH /v2/templates/{ref}":                  notSupported("a template belongs to its organization: it cannot be published"),
		"POST /templates":                            older,
		"POST /v2/templates":                         older,
		"POST /v3/templates":                         {builder, builds, s.announce},
		"GET /templates/{ref}/files/{hash}":          {builder, builds, s.uploadLink},
		"POST /v2/templates/{ref}/builds/{build}":    {builder, builds, s.build},
		"GET /templates/{ref}/builds/{build}/status": {builder, []auth.Scope{auth.TemplatesRead}, s.buildStatus},
		"POST /templates/tags":                       {builder, builds, s.assignTags},
		"DELETE /templates/tags":                     {builder, builds, s.removeTags},
		"GET /templates/{ref}/{what}":                {anywhere, []auth.Scope{auth.TemplatesRead}, s.listTags},
		"/templates/{ref}/{rest...}":                 older,
		"/v2/templates/{rest...}":                    older,
		"POST /templates/{ref}":                      older,
		"/volumes":                                   volumes,
		"/volumes/":                                  volumes,
		"/secrets":                                   secrets,
		"/secrets/":                                  secrets,
		"/teams":                                     notSupported("organizations are read with GET /v1/me"),
		"/teams/":                                    notSupported("organizations are read with GET /v1/me"),
		"/api-keys":                                  notSupported("keys are made with POST /v1/api-keys or `cay keys create --format e2b`"),
		"/api-keys/":                                 notSupported("keys are made with POST /v1/api-keys or `cay keys create --format e2b`"),
		"/nodes":                                     notSupported("the operator reads GET /v1/pool and the metrics"),
		"/nodes/":                                    notSupported("the operator reads GET /v1/pool and the metrics"),
		"GET /events/sandboxes":                      {anywhere, read, s.allEvents},
		"GET /events/sandboxes/{id}":                 {anywhere, read, s.sandboxEvents},
		"POST /events/webhooks":                      {anywhere, admin, s.createWebhook},
		"GET /events/webhooks":                       {anywhere, admin, s.listWebhooks},
		"GET /events/webhooks/{webhook}":             {anywhere, admin, s.getWebhook},
		"PATCH /events/webhooks/{webhook}":           {anywhere, admin, s.changeWebhook},
		"DELETE /events/webhooks/{webhook}":          {anywhere, admin, s.deleteWebhook},
		"/events/webhooks/{webhook}/{rest...}":       notSupported("deliveries are read with GET /v1/webhooks/{webhook}/deliveries"),
		"/events/":                                   notSupported("this server does not know this call about events"),
	}
}

func (s *Handler) routes() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusOK) })
	for pattern, route := range s.table() {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			callOf(r).names(sandboxID(r))
			if err := s.admitted(w, r, route); err != nil {
				s.front.Fail(w, r, err)
			}
		})
	}
	mux.HandleFunc("PUT /templates/{ref}/files/{hash}", func(w http.ResponseWriter, r *http.Request) {
		if err := s.upload(w, r); err != nil { // its URL is signed, and it has no key
			s.front.Fail(w, r, err)
		}
	})
	return mux
}

// answerControl answers a request of the control API.
func (s *Handler) answerControl(w http.ResponseWriter, r *http.Request) error {
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	if r.Header.Get("Origin") != "" {
		allowOrigins(w, r)
	}
	_, pattern := s.control.Handler(r)
	if pattern == "" {
		if err := s.authenticate(r); err != nil {
			return err
		}
		return fault.New(fault.NotFound, fault.CodeNoSuchRoute, "there is no %s %s", r.Method, r.URL.Path)
	}
	callOf(r).Route = pattern
	s.control.ServeHTTP(w, r)
	return nil
}

// admitted answers with the route if the key has its scopes.
func (s *Handler) admitted(w http.ResponseWriter, r *http.Request, route route) error {
	if err := s.authenticate(r); err != nil {
		return err
	}
	principal := callOf(r).Who
	if _, forwarded := httpserver.PassageOf(r.Context()); !forwarded { // otherwise the replica has taken it
		if err := s.Auth.Allow(principal); err != nil {
			return err
		}
	}
	for _, scope := range route.scopes {
		if err := may(r, scope); err != nil {
			return err
		}
	}
	if err := callOf(r).OpenAccount(s.Budget, r, principal.Org.ID, httpserver.CallCost); err != nil {
		return err
	}
	here, err := s.relay(w, r, route.at)
	if here == nil || err != nil {
		return err
	}
	return route.answer(w, here)
}

// may returns an error if the key lacks a scope.
func may(r *http.Request, scope auth.Scope) error {
	if !callOf(r).Who.May(scope) {
		return httpserver.MissingScope(scope)
	}
	return nil
}

func (s *Handler) authenticate(r *http.Request) error {
	principal, forwarded, err := httpserver.CallerOf(r)
	if !forwarded {
		principal, err = s.Auth.Authenticate(r.Context(), r.Header.Get("X-API-Key"))
	}
	if fault.Is(err, fault.Unauthenticated) {
		return fault.New(fault.Unauthenticated, fault.CodeUnauthenticated,
			"a valid API key is needed in the header X-API-Key")
	}
	callOf(r).Who = principal
	return err
}

// caller returns the caller as the core knows it.
func caller(r *http.Request) sandbox.Caller {
	org := callOf(r).Who.Org
	return sandbox.Caller{OrgID: org.ID, Quota: sandbox.Quota(org.Quota)}
}

func orgOf(r *http.Request) string { return callOf(r).Who.Org.ID }

// read decodes the JSON body into dst; an empty body is an empty object. It refuses fields that
// dst does not have: a client of a newer API that sends one expects an effect.
func read(w http.ResponseWriter, r *http.Request, dst any) error {
	b, err := httpserver.ReadBody(w, r, maxBody)
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err = d.Decode(dst)
	if err == nil && d.More() {
		err = errors.New("data after the object")
	}
	var wrong *json.UnmarshalTypeError
	switch {
	case err == nil, err == io.EOF:
		return nil
	case errors.As(err, &wrong):
		return fault.InField(fault.CodeInvalidBody, wrong.Field, "cannot be a JSON %s", wrong.Value)
	case strings.HasPrefix(err.Error(), "json: unknown field "):
		return unsupported("this server does not know the field " + strings.TrimPrefix(err.Error(), "json: unknown field "))
	}
	return fault.New(fault.Invalid, fault.CodeInvalidBody, "the body is not a JSON object: %s", err)
}

// sandboxID returns the core's id of the sandbox in the path. A malformed one is the id of no
// sandbox.
func sandboxID(r *http.Request) sandbox.ID {
	return sandbox.ID(idPrefix + r.PathValue("id"))
}

func shown(id sandbox.ID) string { return strings.TrimPrefix(string(id), idPrefix) }

func noSandbox(id sandbox.ID) error {
	return fault.New(fault.NotFound, fault.CodeSandboxNotFound, "sandbox %q was not found", shown(id))
}

// present returns a sandbox of the caller's organization. One that has ended, or that belongs to
// another organization, is not found.
func (s *Handler) present(r *http.Request, id sandbox.ID) (sandbox.Sandbox, error) {
	sb, err := s.Rows.Get(r.Context(), orgOf(r), id)
	if err != nil {
		return sb, hidden(err, id)
	}
	if stateOf(sb) == "" {
		return sb, noSandbox(id)
	}
	return sb, nil
}

// hidden returns err, or a not-found error if it concerns another organization's sandbox.
func hidden(err error, id sandbox.ID) error {
	if f := fault.As(err); f != nil && (f.Kind == fault.NotFound || f.Code == fault.CodeNotYourSandbox) {
		return noSandbox(id)
	}
	return err
}

// ended returns err, or a not-found error if the sandbox does not run, as E2B reports it.
func ended(err error, id sandbox.ID) error {
	if f := fault.As(err); f != nil && (f.Code == fault.CodeSandboxNotRunning || f.Code == fault.CodeSandboxState) {
		return noSandbox(id)
	}
	return hidden(err, id)
}

// seconds converts a timeout of the wire. It cuts values that no sandbox may have, so that the
// result cannot overflow.
func seconds(n int64) time.Duration {
	const most = math.MaxInt64 / int64(time.Second)
	return time.Duration(min(max(n, -1), most)) * time.Second
}

// tooLong returns an error for a timeout above the longest that a sandbox may have.
func tooLong(timeout time.Duration) error {
	if timeout > sandbox.MaxTimeout {
		return fault.InvalidField("timeout", "cannot be greater than %d hours", sandbox.MaxTimeout/time.Hour)
	}
	return nil
}
