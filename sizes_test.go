package cay_test

import (
	"go/ast"
	"maps"
	"slices"
	"strings"
	"testing"
)

// Sizes in lines. Longer functions and files cannot be read as a whole; smaller limits would part what belongs
// together.
const (
	maxFunctionLines = 80
	maxFileLines     = 600
)

// oversized lists, by reason, the functions and files that are longer. A file stands for itself, and a function as its
// file and its name. All of them are tests and what tests use.
var oversized = map[string][]string{
	"tests of one subject, which share their fixtures": {
		"e2e/ports_test.go", "e2e/templates_test.go", "internal/api/answered_test.go", "internal/archive/archive_test.go",
		"internal/auth/service_test.go", "internal/image/image_test.go", "internal/image/oci_test.go",
		"internal/image/store_test.go", "internal/network/network_test.go", "internal/objects/mirror_test.go",
		"internal/sandbox/pool_test.go", "internal/store/sandbox_test.go", "internal/template/build_test.go",
		"internal/template/drafts_test.go", "internal/template/service_test.go",
	},
	"a table of cases or of calls": {
		"e2e/attacks_requests_test.go TestSmuggling", "e2e/evil/main.go init", "e2e/templates_test.go TestDockerfiles",
		"internal/agent/image_sandbox_test.go TestAnyImageBoots", "internal/api/refused_test.go TestCreateRefused",
		"internal/api/refused_test.go TestSandboxCallsRefused", "internal/api/templates_test.go TestTemplatesRefused",
		"internal/cli/fake_test.go newFakeAPI", "internal/egressproxy/proxy_test.go TestHTTP",
		"internal/egressproxy/resolver_test.go TestResolver", "internal/image/oci_test.go TestBadLayoutsAreRefused",
		"internal/network/isolation_test.go TestNever", "internal/store/sqlite_plan_test.go TestPlans",
	},
	"short cases that share one sandbox or one server": {
		"e2e/hostile_test.go TestMemory", "e2e/ports_test.go TestPorts", "e2e/survive_test.go TestSentryKilled",
		"e2e/trees_test.go TestTrees", "internal/agent/detached_test.go TestDetachedProcesses",
		"internal/agent/wire_test.go TestE2BProcess",
	},
	"one story, in which each step needs the ones before": {
		"e2e/attacks_tenants_test.go TestCursorsOfOthers", "e2e/attacks_tenants_test.go TestQuotaRaces",
		"e2e/events_test.go TestEvents", "e2e/events_test.go TestFollowerAcrossRestarts",
		"e2e/files_test.go TestFilesInBucket", "e2e/trees_test.go TestCopy", "e2e/upgrade_test.go TestUpgrade",
		"internal/agent/files_test.go TestE2BFiles", "internal/api/feed_test.go TestFeedHasEveryFact",
		"internal/e2b/events_test.go TestEvents", "internal/e2b/tags_test.go TestTags",
		"internal/network/packet_test.go TestICMPErrors", "internal/network/services_test.go TestServices",
		"internal/node/hurry_test.go TestCallsHurry", "internal/node/uid_test.go TestOwnUID",
		"internal/store/checkpoint_test.go testCheckpointStore",
		"internal/store/postgres_restore_test.go TestPostgresRestored",
		"internal/store/session_test.go TestPostgresGeneration", "internal/store/template_test.go templateTags",
		"internal/template/drafts_test.go TestDrafts", "internal/template/drafts_test.go TestTagsOfBuilds",
		"internal/template/tags_test.go TestTagsOnly", "scripts/hide/main_test.go TestHide",
	},
	"one switch over the steps of a random test":         {"internal/sandbox/random_test.go take"},
	"the wiring of a whole server, one part a few lines": {"internal/api/harness_test.go newTestServer"},
}

// TestSizes fails for a function or a file of Go that is too long and not listed, and for an entry of the list that is
// not needed. Generated files have any size.
func TestSizes(t *testing.T) {
	long := map[string]int{}
	for file, text := range writtenFiles(t) {
		if n := strings.Count(text, "\n"); n > maxFileLines {
			long[file] = n
		}
		// Positions of a file that is parsed alone begin at 1.
		lines := func(n ast.Node) int { return strings.Count(text[n.Pos()-1:n.End()-1], "\n") + 1 }
		for _, d := range parse(t, file, 0).Decls {
			if f, ok := d.(*ast.FuncDecl); ok && lines(f) > maxFunctionLines {
				long[file+" "+f.Name.Name] = lines(f)
			}
		}
	}
	for why, all := range oversized {
		for _, one := range all {
			if long[one] == 0 {
				t.Errorf("%s is not too long: take it off the list of %q", one, why)
			}
			delete(long, one)
		}
	}
	for _, one := range slices.Sorted(maps.Keys(long)) {
		t.Errorf("%s has %d lines, and may have %d as a function or %d as a file", one, long[one], maxFunctionLines,
			maxFileLines)
	}
}
