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

// withoutMACs returns a seal as an earlier version wrote it.
func (s seal) withoutMACs() seal {
	s.Files = slices.Clone(s.Files)
	for i := range s.Files {
		s.Files[i].Salt, s.Files[i].MACs = nil, nil
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

// TestSealForEarlierVersions reads a seal as an earlier version does, which knows one format and the sums.
func TestSealForEarlierVersions(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	row := w.copied(t, id, w.save(t, id, "text"))
	data, _, err := objects.Read(t.Context(), w.bucket, home(row)+sealName, maxSeal)
	if err != nil {
		t.Fatal(err)
	}
	var e envelope
	var s struct {
		Format int `json:"format"`
		Files  []struct {
			Name   string        `json:"name"`
			Size   int64         `json:"size"`
			Pieces []objects.Sum `json:"sha256"`
		} `json:"files"`
	}
	if err := errors.Join(json.Unmarshal(data, &e), json.Unmarshal(e.Seal, &s)); err != nil {
		t.Fatal(err)
	}
	if s.Format != 1 || len(s.Files) != 4 {
		t.Errorf("the seal has the format %d and %d files", s.Format, len(s.Files))
	}
	for _, file := range s.Files {
		content, _, err := objects.Read(t.Context(), w.bucket, home(row)+file.Name, maxSeal)
		if err != nil {
			t.Fatal(err)
		}
		if file.Size != int64(len(content)) || !slices.Equal(file.Pieces, []objects.Sum{sumOf(content)}) {
			t.Errorf("%s has %d bytes and the sums %v; the object has %d bytes", file.Name, file.Size, file.Pieces, len(content))
		}
	}
	for _, file := range w.sealOf(t, row).Files {
		if len(file.MACs) != 1 {
			t.Errorf("%s has the MACs %v", file.Name, file.MACs)
		}
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

// TestArchiveKeepsEarlierSeal continues a copy whose seal was written with other salts, or without MACs.
func TestArchiveKeepsEarlierSeal(t *testing.T) {
	for name, change := range map[string]func(seal) seal{
		"the same version":   func(s seal) seal { return s },
		"an earlier version": seal.withoutMACs,
	} {
		w := newWorld(t, directory(t))
		row, made := w.begun(t)
		earlier, err := change(w.sealOf(t, row)).encode(w.cfg.Key)
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
	otherFiles, lessFiles, otherCopy := own.withoutMACs(), own, own
	otherFiles.Files[0].Sums = []objects.Sum{{1}}
	lessFiles.Files = own.Files[1:]
	otherCopy.Number++
	otherSize := own.withoutMACs()
	otherSize.Files[0].Size++
	otherName := own.withoutMACs()
	otherName.Files[0].Name += "x"
	for name, c := range map[string]struct {
		seal seal
		key  []byte
	}{
		"another key":     {own, []byte("a guess")},
		"other files":     {otherFiles, w.cfg.Key},
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
