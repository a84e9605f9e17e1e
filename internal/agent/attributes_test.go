package agent_test

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/agent"
	"github.com/cayhq/cay/internal/agentapi"
)

// attributeList returns a list of attributes as images have it. The keys are pairs of file and attribute.
func attributeList(t *testing.T, values map[[2]string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for key, value := range values {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: key[0], Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr." + key[1]: value}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestFileCapabilitiesOfTheImage runs a program whose file has a capability, as a user without capabilities.
func TestFileCapabilitiesOfTheImage(t *testing.T) {
	// CAP_NET_BIND_SERVICE=ep
	const bind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	s := startSandbox(t, options{disk: "64m",
		attributes: attributeList(t, map[[2]string]string{{"bin/probe", "security.capability"}: bind})})
	res := s.exec(agentapi.ExecuteRequest{Command: "probe status CapEff; cat /proc/self/status | grep CapEff",
		User: "user"})
	if got, want := string(res.Stdout), "CapEff:\t0000000000000400\nCapEff:\t0000000000000000\n"; got != want {
		t.Errorf("capabilities are %q, want %q", got, want)
	}
}

func TestSetAttributes(t *testing.T) {
	root := t.TempDir()
	list := filepath.Join(root, "list")
	if err := agent.SetAttributes(root, list); err != nil {
		t.Errorf("without a list: %v", err)
	}
	for what, tc := range map[string]struct {
		list []byte
		want string
	}{
		"a file that is not there": {attributeList(t, map[[2]string]string{{"none", "user.a"}: "1"}), `user.a of "none": no such file`},
		"no tar":                   {bytes.Repeat([]byte("x"), 1024), "reading the list"},
	} {
		if err := os.WriteFile(list, tc.list, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := agent.SetAttributes(root, list); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error is %v, want one with %q", what, err, tc.want)
		}
	}
}
