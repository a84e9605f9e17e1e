package node

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestRecordHasShape fails if the record for an adoption loses a field of the shape, also one that is
// added later.
func TestRecordHasShape(t *testing.T) {
	n := &Node{cfg: Config{Dir: t.TempDir()}}
	b := &instance{node: n, record: record{ID: sandbox.NewID(), Run: "run1"}}
	caytest.Fill(&b.record.Shape, 7)
	dir := n.dir(b.record.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.writeRecord(); err != nil {
		t.Fatal(err)
	}
	got, err := readRecord(dir)
	if diff := cmp.Diff(b.record, got, cmpopts.EquateComparable(netip.Prefix{})); err != nil || diff != "" {
		t.Errorf("recorded and read back, %v (-want +got):\n%s", err, diff)
	}
}

// TestOldRecord reads a record that was written before records had shapes.
func TestOldRecord(t *testing.T) {
	dir := t.TempDir()
	old := `{"id":"sbx_aaaaaaaaaaaaaaaaaaaa","org":"org_a","run":"run1","token":"secret","handshake":true,"slot":3,
		"uid":70001,"memory_mb":256,"cpu_weight":2048,"programs":{},"flags":[],"egress":{"mode":"deny_all"}}`
	if err := os.WriteFile(filepath.Join(dir, recordFile), []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := readRecord(dir)
	if err != nil || l.Slot != 3 || l.Shape.Size.MemoryMB != 256 || cpuWeight(l.Shape) != 2048 ||
		l.Shape.Egress.Mode != sandbox.DenyAll {
		t.Errorf("an old record is read as %+v, %v", l, err)
	}
}
