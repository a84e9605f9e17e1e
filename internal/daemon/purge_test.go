package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// dataDir makes a data directory in which no server was started, with some files.
func dataDir(t *testing.T, names ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	for _, name := range names {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestPurgeKeepsOtherFiles purges data directories with and without files of a user.
func TestPurgeKeepsOtherFiles(t *testing.T) {
	own := dataDir(t, "images/layer", keyFile)
	if left, err := Purge(t.Context(), own); left || err != nil {
		t.Errorf("a directory with the server's files alone: left %t, %v", left, err)
	}
	if _, err := os.Stat(own); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
	if left, err := Purge(t.Context(), own); left || err != nil {
		t.Errorf("a directory that does not exist: left %t, %v", left, err)
	}
	home := dataDir(t, "images/layer", keyFile, "notes.txt")
	if left, err := Purge(t.Context(), home); !left || err != nil {
		t.Errorf("a directory with another file: left %t, %v", left, err)
	}
	entries, err := os.ReadDir(home)
	if err != nil || len(entries) != 1 || entries[0].Name() != "notes.txt" {
		t.Errorf("the directory has %v, %v; want notes.txt alone", entries, err)
	}
}

// TestDead finds the records of servers that do not run, and not that of one that does.
func TestDead(t *testing.T) {
	runDir := t.TempDir()
	dirs := map[string]string{"live00": dataDir(t, "x"), "dead00": dataDir(t, "x"), "gone00": dataDir(t)}
	for instance, dir := range dirs {
		if err := (ServerRecord{Instance: instance, DataDir: dir}).write(runDir); err != nil {
			t.Fatal(err)
		}
	}
	lock, err := lockDir(dirs["live00"], 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	dead, err := Dead(runDir)
	if err != nil {
		t.Fatal(err)
	}
	for instance, want := range map[string]string{"dead00": dirs["dead00"], "gone00": ""} {
		if got, ok := dead[instance]; !ok || got != want {
			t.Errorf("%s: found %t with the data directory %q, want %q", instance, ok, got, want)
		}
	}
	if dir, ok := dead["live00"]; ok {
		t.Errorf("the server that runs counts as dead, with the data directory %q", dir)
	}
}
