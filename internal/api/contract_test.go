package api

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
)

// operations calls f for every operation of the document, with its route pattern.
func operations(spec *openapi3.T, f func(pattern, path string, op *openapi3.Operation,
	parameters openapi3.Parameters)) {
	for path, item := range spec.Paths.Map() {
		for method, op := range item.Operations() {
			f(method+" "+path, path, op, slices.Concat(item.Parameters, op.Parameters))
		}
	}
}

func TestSpecIsValid(t *testing.T) {
	if err := loadSpec(t).Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestRoutesAreTheDocument checks that the routes and openapi.yaml list the same operations, with
// the same scopes and parameters.
func TestRoutesAreTheDocument(t *testing.T) {
	documented := map[string]access{}
	operations(loadSpec(t), func(pattern, _ string, op *openapi3.Operation, parameters openapi3.Parameters) {
		var a access
		a.open = op.Security != nil && len(*op.Security) == 0
		scope, has := op.Extensions["x-cay-scope"].(string)
		if has == a.open {
			t.Errorf("%s: x-cay-scope must be set if and only if a key is needed", pattern)
		}
		for _, p := range parameters {
			if p.Value.In == "query" {
				a.query = append(a.query, p.Value.Name)
				if p.Value.Schema.Value.Type.Is("array") {
					a.many = p.Value.Name
				}
			}
		}
		if op.OperationID == "listSandboxes" {
			a.query = append(a.query, metadataPrefix) // OpenAPI cannot describe parameters whose names vary
		}
		for _, answer := range op.Responses.Map() {
			a.timed = a.timed || answer.Value.Headers["Server-Timing"] != nil
		}
		if routes[pattern].at == 0 {
			t.Errorf("%s: the table does not say which server does it", pattern)
		}
		if got := routes[pattern]; string(got.scope) != scope || got.open != a.open || got.many != a.many {
			t.Errorf("%s: the table has %+v, the document scope %q, %+v", pattern, got, scope, a)
		}
		slices.Sort(a.query)
		documented[pattern] = a
	})
	table := map[string]access{}
	for pattern, a := range routes {
		a.scope, a.at, a.endless = "", 0, false
		a.query = slices.Sorted(slices.Values(a.query))
		table[pattern] = a
	}
	if diff := cmp.Diff(documented, table, cmp.AllowUnexported(access{})); diff != "" {
		t.Errorf("openapi.yaml (-) and the table of routes (+) differ:\n%s", diff)
	}

	// The generated code registers the operations of the document in the mux. Routes that are in the
	// mux but not in the table would be refused, so compare the mux with the table too.
	s := &server{mux: http.NewServeMux()}
	HandlerFromMux(s, s.mux)
	for pattern := range routes {
		method, path, _ := strings.Cut(pattern, " ")
		r, err := http.NewRequest(method, strings.NewReplacer("{", "", "}", "").Replace(path), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, got := s.mux.Handler(r); got != pattern {
			t.Errorf("%s is answered by %q", pattern, got)
		}
	}
}

// TestDocumentIsComplete checks that all parts of the document have a description.
func TestDocumentIsComplete(t *testing.T) {
	spec := loadSpec(t)
	ids := map[string]string{}
	operations(spec, func(pattern, path string, op *openapi3.Operation, parameters openapi3.Parameters) {
		if op.OperationID == "" || op.Summary == "" || op.Description == "" || len(op.Tags) == 0 {
			t.Errorf("%s: needs an operationId, a summary, a description and a tag", pattern)
		}
		if twin := ids[op.OperationID]; twin != "" {
			t.Errorf("%s and %s are both %s", pattern, twin, op.OperationID)
		}
		ids[op.OperationID] = pattern
		for _, p := range parameters {
			if p.Value.Description == "" {
				t.Errorf("%s: parameter %s has no description", pattern, p.Value.Name)
			}
		}
		for _, status := range []string{"400", "500"} {
			if op.Responses.Value(status) == nil {
				t.Errorf("%s: answers %s, which is not documented", pattern, status)
			}
		}
		if op.Security == nil || len(*op.Security) > 0 {
			for _, status := range []string{"401", "429"} {
				if op.Responses.Value(status) == nil {
					t.Errorf("%s: answers %s, which is not documented", pattern, status)
				}
			}
		}
		if strings.HasPrefix(path, "/v1/") && op.RequestBody != nil &&
			op.RequestBody.Value.Content["application/json"] != nil {
			for _, status := range []string{"413", "415"} {
				if op.Responses.Value(status) == nil {
					t.Errorf("%s: answers %s, which is not documented", pattern, status)
				}
			}
		}
	})
	for name, schema := range spec.Components.Schemas {
		describe(t, name, schema)
	}
}

func describe(t *testing.T, name string, ref *openapi3.SchemaRef) {
	s := ref.Value
	if s.Description == "" {
		t.Errorf("schema %s has no description", name)
	}
	if s.Type.Is("object") && len(s.Properties) > 0 && (s.AdditionalProperties.Has == nil || *s.AdditionalProperties.Has) {
		t.Errorf("schema %s does not exclude other fields", name)
	}
	for field, p := range s.Properties {
		if p.Ref == "" {
			describe(t, name+"."+field, p)
		}
	}
}

func TestServesTheDocument(t *testing.T) {
	h := newTestServer(t)
	r := h.send(t, "GET", "/openapi.yaml", "", "")
	if r.status != 200 || string(r.body) != string(cay.OpenAPI) {
		t.Errorf("status %d, %d bytes; want the file of %d bytes", r.status, len(r.body), len(cay.OpenAPI))
	}
}
