package runsc

import (
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestSpec compares the OCI spec of a sandbox with a file, so that a reviewer reads each
// change of its isolation.
func TestSpec(t *testing.T) {
	for name, limits := range map[string]Limits{
		"shared": {CgroupsPath: "/cay-abc123/sbx_x", MemoryBytes: 512 << 20, PauseBytes: 544 << 20,
			CPUShares: 1024, PIDs: 2048},
		"dedicated": {CgroupsPath: "/cay-abc123/sbx_x", MemoryBytes: 2 << 30, PauseBytes: 1995 << 20,
			CPUShares: 2048, CPUQuota: 2 * CPUPeriod, PIDs: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			spec := NewSpec(SandboxSpec{
				HostUID: 2_005_000_042, Hostname: "x",
				Root:  Root{Image: "/images/i.erofs", Overlay: "/sandboxes/sbx_x", MaxBytes: 100 << 20},
				Binds: []Bind{{From: "/programs/1", To: "/.cay"}}, Args: []string{"/.cay/cay-agent"}, Env: []string{"A=b"},
				Namespace: "/run/netns/n", Limits: limits, ShmBytes: 256 << 20,
			})
			got, err := json.MarshalIndent(spec, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.TrimSpace(string(want)), string(got)); diff != "" {
				t.Errorf("the spec changed (-update writes it anew):\n%s", diff)
			}
		})
	}
}

// TestRunReportsWhatRunscSays checks that an error of Run quotes a program that fails as runsc does.
func TestRunReportsWhatRunscSays(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "runsc")
	script := `#!/bin/sh
for a in "$@"; do case $a in --log=*) echo '{"msg":"no such image"}' > ${a#--log=};; esac; done
exit 128
`
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	r := &Runtime{Program: program, Root: filepath.Join(dir, "root"), Flags: Flags("systrap")}
	_, err := r.Run(context.Background(), Container{ID: "sbx_x", Bundle: dir, Spec: NewSpec(SandboxSpec{})})
	if err == nil || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("got %v", err)
	}
	info, err := os.Stat(filepath.Join(dir, specFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the spec's mode is %v, %v", info.Mode(), err)
	}
}

func TestStateIsFoundAndRemoved(t *testing.T) {
	r := &Runtime{Root: t.TempDir()}
	for _, name := range []string{"sbx_a_sandbox:sbx_a.state", "sbx_a_sandbox:sbx_a.lock", "runsc-sbx_a.sock",
		"sbx_b_sandbox:sbx_b.state", "other"} {
		if err := os.WriteFile(filepath.Join(r.Root, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ids, err := r.IDs()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"sbx_a", "sbx_b"}, ids); diff != "" {
		t.Error(diff)
	}
	for range 2 { // again, of nothing
		if err := r.Remove("sbx_a"); err != nil {
			t.Error(err)
		}
	}
	left, err := os.ReadDir(r.Root)
	if err != nil || len(left) != 2 {
		t.Errorf("left are %v, %v", left, err)
	}
	if ids, err := (&Runtime{Root: filepath.Join(r.Root, "none")}).IDs(); err != nil || len(ids) != 0 {
		t.Errorf("no state gives %v, %v", ids, err)
	}
}

func TestPID(t *testing.T) {
	for text, want := range map[string]int{"4711": 4711, "": 0, "x": 0, "-3": 0, "1": 0} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, pidFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := PID(dir)
		if (err == nil) != (want != 0) || err == nil && got != want {
			t.Errorf("%q: got %d, %v", text, got, err)
		}
	}
}

// TestErrorsNameTheReason checks that errors quote the beginning of messages that are long.
func TestErrorsNameTheReason(t *testing.T) {
	dir := t.TempDir()
	log := strings.Repeat("an older one\n", 1000) +
		"the save failed: some reason, for object " + strings.Repeat("x", 1<<20) + "\nthe end\n"
	if err := os.WriteFile(filepath.Join(dir, logFile), []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	got := lastMessages(dir)
	if !strings.Contains(got, "an older one\nthe save failed: some reason") ||
		!strings.HasSuffix(got, "xxx…\nthe end") || len(got) > 2*mostQuoted {
		t.Errorf("%d bytes: %.3000s", len(got), got)
	}
	// runsc's own messages follow one another on one line.
	log = `{"msg":"an older one ` + strings.Repeat("x", 2*mostOfLine) + `","level":"error"}` +
		`{"msg":"saving: no \"space\"","level":"error"}`
	if err := os.WriteFile(filepath.Join(dir, logFile), []byte(log+"\na panic\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := lastMessages(dir); !strings.HasPrefix(got, "an older one xxx") ||
		!strings.HasSuffix(got, "xxx…\nsaving: no \"space\"\na panic") {
		t.Errorf("got %s", got)
	}
	// A sentry may write what it likes before it ends.
	f, err := os.Create(filepath.Join(dir, panicLog))
	if err != nil {
		t.Fatal(err)
	}
	const long = 64 << 20
	if _, err := f.WriteAt([]byte("}\n"+`{"msg":"the last but one"}{"msg":"the last"}`), long); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, logFile)); err != nil {
		t.Fatal(err)
	}
	if got := lastMessages(dir); got != "the last but one\nthe last" {
		t.Errorf("of a log of %d bytes: %q", int64(long), got)
	}
	if got := lastMessages(t.TempDir()); got != "" {
		t.Errorf("without logs: %q", got)
	}
}
