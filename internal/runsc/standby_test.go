package runsc

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestStandbyDoesAsItsOwnProcess compares a process that waited with one that a start made.
func TestStandbyDoesAsItsOwnProcess(t *testing.T) {
	program := filepath.Join(t.TempDir(), "runsc")
	script := `#!/bin/sh
args=$*
if [ "$1" = await ]; then read -r args <&3; printf . >&3; exec 3<&-; fi
case $args in *sbx_slow*) exec sleep 60;; *sbx_bad*) exit 7;; esac
`
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	run := func(r *Runtime, id string) error {
		within := time.Minute
		if id == "sbx_slow" { // which only its deadline ends
			within = 300 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := r.Run(ctx, Container{ID: id, Bundle: t.TempDir(), Spec: NewSpec(SandboxSpec{})})
		return err
	}
	plain := &Runtime{Program: program, Root: t.TempDir()}
	for id, wanted := range map[string]func(error) bool{
		"sbx_slow": func(err error) bool {
			return errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "killed")
		},
		"sbx_bad": func(err error) bool { return strings.Contains(err.Error(), "exit status 7") },
		// It succeeds and writes no process ID.
		"sbx_good": func(err error) bool { return errors.Is(err, os.ErrNotExist) },
	} {
		standby := NewStandby(program)
		w := <-standby.ready
		standby.Close()
		// keep would start the process a moment later; here it waits from the beginning.
		kept := &Standby{program: program, ready: make(chan *waiting, 1)}
		kept.ready <- w
		with := &Runtime{Program: program, Root: plain.Root, Standby: kept}
		for _, r := range []*Runtime{plain, with} {
			if err := run(r, id); err == nil || !wanted(err) {
				t.Errorf("%s, standby %v: %v", id, r.Standby != nil, err)
			}
		}
		if len(kept.ready) > 0 || w.cmd.ProcessState == nil {
			t.Errorf("%s: the standby process was not used", id)
		}
	}
}
