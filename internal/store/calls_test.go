package store

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// TestCallsAreNamed checks that each exported method that uses the database is measured under its own name.
func TestCallsAreNamed(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	upper := regexp.MustCompile(`[A-Z]`)
	names := map[string]bool{}
	fset := token.NewFileSet()
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			call, ok := d.(*ast.FuncDecl)
			if !ok || call.Recv == nil || !call.Name.IsExported() || len(call.Type.Params.List) == 0 {
				continue
			}
			var receiver, first strings.Builder
			if err := printer.Fprint(&receiver, fset, call.Recv.List[0].Type); err != nil {
				t.Fatal(err)
			}
			if err := printer.Fprint(&first, fset, call.Type.Params.List[0].Type); err != nil {
				t.Fatal(err)
			}
			// Calls of Alone and Lead last as long as what they call, and Expect asks the database nothing.
			apart := slices.Contains([]string{"StartSession", "JoinSession", "Alone", "Lead", "Expect"}, call.Name.Name)
			if receiver.String() != "*DB" || first.String() != "context.Context" || apart {
				continue
			}
			name := upper.ReplaceAllStringFunc(call.Name.Name, func(s string) string { return "_" + strings.ToLower(s) })[1:]
			names[name] = true
			var got strings.Builder
			if err := printer.Fprint(&got, fset, call.Body.List[0]); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("defer db.took(%q, time.Now())", name); got.String() != want {
				t.Errorf("%s begins with %s, want %s", call.Name, got.String(), want)
			}
		}
	}
	if len(names) < 50 || len(names) > 110 {
		t.Errorf("there are %d names of calls", len(names))
	}
}

// TestCallsAreMeasured checks that calls that succeed and calls that fail are told with their durations.
func TestCallsAreMeasured(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			db, _ := open(t)
			var mu sync.Mutex
			calls := map[string]time.Duration{}
			db.OnCall(func(call string, took time.Duration) {
				mu.Lock()
				defer mu.Unlock()
				calls[call] += took
			})
			mustInsert(t, db, small("org_a", 0))
			if _, err := db.Get(t.Context(), "sbx_none"); !fault.Is(err, fault.NotFound) {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if len(calls) != 2 || calls["insert"] <= 0 || calls["get"] <= 0 {
				t.Errorf("the calls are %v", calls)
			}
		})
	}
}
