package store

import (
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

func FuzzParseCursor(f *testing.F) {
	for _, seed := range []string{"", "AXM", "not base64!",
		cursor{listSandboxes, 1, "sbx_abc"}.String(), cursor{listSandboxes, -1, "x"}.String(),
		cursor{listEvents, 7, "sbx_abc"}.String(), cursor{listSandboxes, 1 << 62, "sbx_ABC'; DROP"}.String()} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseCursor(listSandboxes, text)
		if err != nil {
			if fe := fault.As(err); fe == nil || fe.Kind != fault.Invalid || fe.Field != "cursor" {
				t.Fatalf("%q: %v is not Invalid in field cursor", text, err)
			}
			return
		}
		if c.String() != text || c.list != listSandboxes || c.id == "" || len(c.id) > maxCursorID {
			t.Fatalf("%q parsed to %+v, whose text is %q", text, c, c.String())
		}
	})
}

func TestCursorBelongsToOneListing(t *testing.T) {
	text := cursor{listKeys, 5, "key_abc"}.String()
	if _, err := parseCursor(listKeys, text); err != nil {
		t.Error(err)
	}
	if _, err := parseCursor(listOrgs, text); !fault.Is(err, fault.Invalid) {
		t.Errorf("parsing a cursor of keys as one of organizations: %v", err)
	}
}
