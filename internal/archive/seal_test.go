package archive

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
)

// put writes an object, also over another one.
func (w *world) put(t *testing.T, key string, data []byte) {
	t.Helper()
	if _, err := objects.Write(t.Context(), w.bucket, key, data, objects.Condition{}); err != nil {
		t.Fatal(err)
	}
}

// sealOf returns the seal of a copy in the bucket.
func (w *world) sealOf(t *testing.T, c sandbox.StoredCheckpoint) seal {
	t.Helper()
	data, _, err := objects.Read(t.Context(), w.bucket, home(c)+sealName, maxSeal)
	if err != nil {
		t.Fatal(err)
	}
	s, err := openSeal(w.cfg.Key, data, c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// withSums returns the seal of a copy in the bucket as earlier versions wrote it: with sums, and MACs beside them in
// later ones. The files have one piece each.
func (w *world) withSums(t *testing.T, s seal, c sandbox.StoredCheckpoint, macs bool) seal {
	t.Helper()
	s.Files = slices.Clone(s.Files)
	for i := range s.Files {
		f := &s.Files[i]
		data, _, err := objects.Read(t.Context(), w.bucket, home(c)+f.Name, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		f.Sums = []objects.Sum{sumOf(data)}
		if !macs {
			f.Salt, f.MACs = nil, nil
		}
	}
	return s
}

// TestCopyOfEarlierVersion fetches a copy that a version without MACs made. Its objects and its row are in testdata.
func TestCopyOfEarlierVersion(t *testing.T) {
	w := newWorld(t, directory(t))
	w.stop()
	dir := filepath.Join("testdata", "earlier")
	data, err := os.ReadFile(filepath.Join(dir, "row.json"))
	if err != nil {
		t.Fatal(err)
	}
	var row sandbox.StoredCheckpoint
	if err := json.Unmarshal(data, &row); err != nil {
		t.Fatal(err)
	}
	files := []string{"config.json", "empty", "manifest.json", "pages.img"}
	for _, name := range append(files, sealName) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		w.put(t, home(row)+name, data)
	}
	if got, err := w.fetch(t, row); err != nil || got != "the memory of a sandbox" {
		t.Errorf("fetched %q, %v", got, err)
	}
	for _, file := range w.sealOf(t, row).Files {
		if len(file.MACs) != 0 || len(file.Salt) != 0 {
			t.Errorf("%s has MACs, so the test shows nothing", file.Name)
		}
	}
	w.put(t, home(row)+"pages.img", []byte("the memory of a sandbux"))
	if _, err := w.fetch(t, row); !errors.Is(err, objects.ErrDamaged) {
		t.Errorf("with another byte: %v", err)
	}
}

// begun uploads a checkpoint, but does not record that, and ends the process. It returns the row.
func (w *world) begun(t *testing.T) (row sandbox.StoredCheckpoint, made time.Time) {
	t.Helper()
	id := w.sandbox(t)
	w.stop()
	cfg := w.cfg
	cfg.Records = &failingEnd{CheckpointStore: w.db, fail: true}
	w.Archive = New(cfg)
	made = w.save(t, id, "text")
	if err := w.upload(t.Context(), id); err == nil || w.Stored(id, made) {
		t.Fatalf("the row was not written: %v, stored %t", err, w.Stored(id, made))
	}
	data, _, err := objects.Read(t.Context(), w.bucket, home(w.rows(t)[0])+sealName, maxSeal)
	if err != nil {
		t.Fatal(err)
	}
	row = w.rows(t)[0]
	row.Sum = sumOf(data).String()
	cfg.Records = w.db
	w.Archive = New(cfg)
	return row, made
}

// TestArchiveKeepsEarlierSeal continues a copy whose seal was written with other salts, or by an earlier version.
func TestArchiveKeepsEarlierSeal(t *testing.T) {
	for _, name := range []string{"the same version", "a version with sums and MACs", "a version without MACs"} {
		w := newWorld(t, directory(t))
		row, made := w.begun(t)
		s := w.sealOf(t, row)
		if name != "the same version" {
			s = w.withSums(t, s, row, name == "a version with sums and MACs")
		}
		earlier, err := s.encode(w.cfg.Key)
		if err != nil {
			t.Fatal(err)
		}
		w.put(t, home(row)+sealName, earlier)
		if err := w.upload(t.Context(), row.Name); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		row = w.copied(t, row.Name, made)
		if row.Sum != sumOf(earlier).String() {
			t.Errorf("%s: the row has the sum %s; the seal has %s", name, row.Sum, sumOf(earlier))
		}
		var size int64
		for _, key := range w.keys(t, home(row)) {
			info, err := w.bucket.Stat(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			size += info.Size
		}
		if row.Bytes != size {
			t.Errorf("%s: the row has %d bytes; the objects have %d", name, row.Bytes, size)
		}
		if got, err := w.fetch(t, row); err != nil || got != "text" {
			t.Errorf("%s: fetched %q, %v", name, got, err)
		}
	}
}

// TestArchiveRefusesForeignSeal finds a seal at the key that this copy's is to have, which is not one of this copy. A
// row with its sum would make it valid.
func TestArchiveRefusesForeignSeal(t *testing.T) {
	w := newWorld(t, directory(t))
	row, made := w.begun(t)
	own := w.sealOf(t, row)
	lessFiles, otherCopy := own, own
	lessFiles.Files = own.Files[1:]
	otherCopy.Number++
	otherSums, otherMACs := w.withSums(t, own, row, false), w.withSums(t, own, row, true)
	otherSums.Files[0].Sums = []objects.Sum{{1}}
	otherMACs.Files[0].MACs = []objects.MAC{{1}}
	otherSize, otherName := w.withSums(t, own, row, true), w.withSums(t, own, row, true)
	otherSize.Files[0].Size++
	otherName.Files[0].Name += "x"
	for name, c := range map[string]struct {
		seal seal
		key  []byte
	}{
		"another key":     {own, []byte("a guess")},
		"other sums":      {otherSums, w.cfg.Key},
		"other MACs":      {otherMACs, w.cfg.Key},
		"a file less":     {lessFiles, w.cfg.Key},
		"another name":    {otherName, w.cfg.Key},
		"another size":    {otherSize, w.cfg.Key},
		"of another copy": {otherCopy, w.cfg.Key},
	} {
		data, err := c.seal.encode(c.key)
		if err != nil {
			t.Fatal(err)
		}
		w.put(t, home(row)+sealName, data)
		if err := w.upload(t.Context(), row.Name); err == nil || w.Stored(row.Name, made) {
			t.Errorf("a seal with %s: %v, stored %t", name, err, w.Stored(row.Name, made))
		}
	}
	w.put(t, home(row)+sealName, []byte("{}"))
	if err := w.upload(t.Context(), row.Name); err == nil || w.Stored(row.Name, made) {
		t.Errorf("an empty seal: %v, stored %t", err, w.Stored(row.Name, made))
	}
	data, err := own.encode(w.cfg.Key)
	if err != nil {
		t.Fatal(err)
	}
	w.put(t, home(row)+sealName, data)
	if err := w.upload(t.Context(), row.Name); err != nil || !w.Stored(row.Name, made) {
		t.Errorf("the seal of this copy: %v, stored %t", err, w.Stored(row.Name, made))
	}
}
