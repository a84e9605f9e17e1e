package store

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/sandbox"
)

// insertBeforeShapes writes a sandbox with an id, an organization and a time as a version before the
// migration to shapes did.
const insertBeforeShapes = `INSERT INTO sandboxes (id, org_id, mode, state, run, template, template_id,
	template_version, image, size, vcpus, memory_mb, dedicated, disk_mb, env, metadata, egress, run_as, workdir,
	timeout, idle_timeout, recovery_interval, created_at, destroy_reason, error, source, token)
	VALUES ($1, $2, 'ephemeral', 'creating', 'run1', 'python', 'tpl_python', 3, 'abcdef', 'performance-2x', 2, 4096,
	TRUE, 2048, '{"A":"ü\"\\"}', '{}', '{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"allow_ports":[80]}', 'o"k\',
	'/srv', 0, 0, 0, $3, '', '', 'cold', 'secret')`

// TestMigrateShapes migrates sandboxes, snapshots and pooled sandboxes from version 9 of the schema.
func TestMigrateShapes(t *testing.T) {
	path, old := openOld(t, 9)
	id, snap := sandbox.NewID(), sandbox.NewSnapshotID()
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := old.Exec(query, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(insertBeforeShapes, id, "org_a", at(start))
	exec(`INSERT INTO snapshots (id, org_id, name, state, sandbox_id, template, template_id, template_version, image,
		size, vcpus, memory_mb, dedicated, disk_mb, env, egress, run_as, workdir, bytes, created_at)
		SELECT $1, org_id, 'mine', 'ready', id, template, template_id, template_version, image, size, vcpus, memory_mb,
		dedicated, disk_mb, env, egress, run_as, workdir, 7, created_at FROM sandboxes`, snap)
	for _, started := range []string{"", "0123"} {
		exec(`INSERT INTO pool (id, run, token, org_id, template, template_id, template_version, image, size, vcpus,
			memory_mb, dedicated, disk_mb, started, created_at) VALUES ($1, 'run2', 'secret', 'org_a', 'python', 'tpl_python',
			3, 'abcdef', 'performance-2x', 2, 4096, FALSE, 2048, $2, $3)`, "sbx_pooled"+started, started, at(start))
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}

	db := openAt(t, path)
	plain := sandbox.Shape{Image: "abcdef", DiskMB: 2048,
		Size: sandbox.Size{Name: "performance-2x", VCPUs: 2, MemoryMB: 4096}}
	full := plain
	full.Size.Dedicated, full.Env, full.User, full.Workdir = true, map[string]string{"A": `ü"\`}, `o"k\`, "/srv"
	full.Egress = sandbox.Egress{Mode: sandbox.DenyAll, AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		AllowPorts: []uint16{80}}
	if got, err := db.Get(t.Context(), id); err != nil || cmp.Diff(full, got.Shape, prefixes) != "" {
		t.Errorf("the sandbox (-want +got), %v:\n%s", err, cmp.Diff(full, got.Shape, prefixes))
	}
	if got, err := db.GetSnapshot(t.Context(), snap); err != nil || cmp.Diff(full, got.Shape, prefixes) != "" {
		t.Errorf("the snapshot (-want +got), %v:\n%s", err, cmp.Diff(full, got.Shape, prefixes))
	}
	// The row of a pooled sandbox with a start command does not say with which it began.
	if got, err := db.ListPooled(t.Context()); err != nil || len(got) != 1 || got[0].ID != "sbx_pooled" ||
		cmp.Diff(plain, got[0].Shape, prefixes) != "" {
		t.Errorf("the pooled sandboxes are %+v, %v", got, err)
	}
}
