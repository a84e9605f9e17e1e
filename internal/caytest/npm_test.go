package caytest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestNPMKeepsWhatIsComplete has npm install an optional package with a program from a registry of
// its own, which fails at first: npm reports success without the package.
func TestNPMKeepsWhatIsComplete(t *testing.T) {
	RequireProgram(t, "npm")
	pack := packed(t, map[string]string{"package/package.json": `{"name":"p","version":"1.0.0","bin":{"p":"p.js"}}`,
		"package/p.js": "#!/usr/bin/env node\n"})
	var failures, asked atomic.Int64
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) <= failures.Load() {
			http.Error(w, "gone", http.StatusNotFound) // npm does not try such an answer again by itself
			return
		}
		_, _ = w.Write(pack) // a client that is gone is no failure of the registry
	}))
	t.Cleanup(registry.Close)
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("npm_config_registry", registry.URL)
	t.Setenv("npm_config_cache", filepath.Join(t.TempDir(), "npm"))

	sum := sha512.Sum512(pack)
	dir := t.TempDir()
	for name, text := range map[string]string{
		"package.json": `{"name":"t","version":"1.0.0","optionalDependencies":{"p":"1.0.0","q":"1.0.0"}}`,
		lockFile: fmt.Sprintf(`{"name":"t","version":"1.0.0","lockfileVersion":3,"packages":{
			"":{"name":"t","version":"1.0.0","optionalDependencies":{"p":"1.0.0","q":"1.0.0"}},
			"node_modules/q":{"version":"1.0.0","resolved":%[1]q,"integrity":%[2]q,"optional":true,"os":["win32"]},
			"node_modules/p":{"version":"1.0.0","resolved":%[1]q,"integrity":%[2]q,"optional":true,
			"os":"linux","cpu":[%[3]q],"bin":{"p":"p.js"}}}}`,
			registry.URL+"/p.tgz", "sha512-"+base64.StdEncoding.EncodeToString(sum[:]), nodeArch()),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	program := func(installed string) string { return filepath.Join(installed, "node_modules", "p", "p.js") }

	failures.Store(2)
	if installed, err := NPM(t.Context(), dir); err == nil ||
		!strings.Contains(err.Error(), "left out node_modules/p/p.js") {
		t.Errorf("without the package twice: %q, %v", installed, err)
	}
	if kept, err := filepath.Glob(filepath.Join(cache, "cay", "npm", "*")); err != nil || len(kept) > 0 {
		t.Errorf("kept %v, %v", kept, err)
	}
	asked.Store(0)
	failures.Store(1)
	installed, err := NPM(t.Context(), dir)
	if err != nil {
		t.Fatalf("without the package once: %v", err)
	}
	if _, err := os.Stat(program(installed)); err != nil {
		t.Error(err)
	}
	before := asked.Load()
	if again, err := NPM(t.Context(), dir); err != nil || again != installed || asked.Load() != before {
		t.Errorf("the second time: %q, %v, and %d requests", again, err, asked.Load()-before)
	}
	// What an older cay kept is installed again.
	if err := os.Remove(program(installed)); err != nil {
		t.Fatal(err)
	}
	if _, err := NPM(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program(installed)); err != nil {
		t.Error(err)
	}
}

// packed returns a package as registries send it.
func packed(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	for name, text := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
