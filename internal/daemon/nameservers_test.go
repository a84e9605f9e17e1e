package daemon

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNameservers(t *testing.T) {
	got := parseResolvConf("# x\nsearch a b\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\nnameserver\n" +
		"nameserver 192.0.2.2 # y\n")
	if diff := cmp.Diff([]string{"192.0.2.1", "192.0.2.2"}, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 192.0.2.1\n")
	f.Add("nameserver")
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range parseResolvConf(text) {
			if strings.HasPrefix(s, "127.") || strings.Contains(s, ":") {
				t.Errorf("%q gives %s", text, s)
			}
		}
	})
}
