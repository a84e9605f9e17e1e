package portproxy

import (
	"encoding/base64"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const anID = "sbx_abcdefghij0123456789"

func TestNames(t *testing.T) {
	n := Names{Domain: "boxes.example.com:8443", Scheme: "https"}
	if got := n.Of(anID, 8080); got != "https://8080-abcdefghij0123456789.boxes.example.com:8443" {
		t.Error(got)
	}
	for _, host := range []string{"8080-abcdefghij0123456789.boxes.example.com",
		"8080-ABCDEFGHIJ0123456789.Boxes.Example.com:1", "8080-abcdefghij0123456789.boxes.example.com."} {
		if port, id, ok := n.Parse(host); !ok || port != 8080 || id != anID {
			t.Errorf("%s: %d %s %v", host, port, id, ok)
		}
	}
	for _, host := range []string{"", "boxes.example.com", "8080-abcdefghij0123456789.example.com",
		"8080-abcdefghij0123456789.boxes.example.com.evil.org",
		"080-abcdefghij0123456789.boxes.example.com", "70000-abcdefghij0123456789.boxes.example.com", "8080-abcdefghij012345678.boxes.example.com",
		"8080-sbx_abcdefghij0123456789.boxes.example.com", "x.8080-abcdefghij0123456789.boxes.example.com", "[::1]:80"} {
		if port, id, ok := n.Parse(host); ok {
			t.Errorf("%q is %d of %s", host, port, id)
		}
	}
	if _, _, ok := (Names{}).Parse("8080-abcdefghij0123456789."); ok || (Names{}).Of(anID, 1) != "" {
		t.Error("no domain has names")
	}
}

func TestSigner(t *testing.T) {
	s, now := NewSigner(NewSecret()), time.Now()
	ends := now.Add(time.Minute).Truncate(time.Second)
	good := s.Sign(anID, 80, ends)
	if got, err := s.Check(good, anID, 80, now); err != nil || !got.Equal(ends) {
		t.Errorf("%v, %v", got, err)
	}
	if !regexp.MustCompile(`^cays_[0-9a-f]{48}$`).MatchString(good) {
		t.Errorf("HasSecret does not recognise the signature %s", good)
	}
	other := "f"
	if good[12] == 'f' {
		other = "0"
	}
	for name, c := range map[string]struct {
		signature, id string
		port          int
		now           time.Time
		code          string
	}{
		"expired":         {good, anID, 80, ends, "signature_expired"},
		"another port":    {good, anID, 81, now, "invalid_signature"},
		"another sandbox": {good, "sbx_bbcdefghij0123456789", 80, now, "invalid_signature"},
		"another end":     {good[:12] + other + good[13:], anID, 80, now, "invalid_signature"},
		"cut":             {good[:len(good)-1], anID, 80, now, "invalid_signature"},
		"no sum":          {good[:13], anID, 80, now, "invalid_signature"},
		"longer":          {good + "0", anID, 80, now, "invalid_signature"},
		"capitals":        {"cays_" + strings.ToUpper(good[5:]), anID, 80, now, "invalid_signature"},
		"empty":           {"", anID, 80, now, "invalid_signature"},
		"another server":  {NewSigner(NewSecret()).Sign(anID, 80, ends), anID, 80, now, "invalid_signature"},
	} {
		if _, err := s.Check(c.signature, c.id, c.port, c.now); !fault.Is(err, fault.Unauthenticated) ||
			fault.As(err).Code != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

// TestOlderSignatures checks signatures of the form that servers made before cays_: links live for
// a day, and a server that is replaced must not break them.
func TestOlderSignatures(t *testing.T) {
	s := NewSigner("secret")
	ends := time.Unix(2_000_000_000, 0)
	older := olderSignature(s, ends)
	if got, err := s.Check(older, anID, 80, ends.Add(-time.Second)); err != nil || !got.Equal(ends) {
		t.Errorf("%v, %v", got, err)
	}
	for name, err := range map[string]error{
		"expired":      second(s.Check(older, anID, 80, ends)),
		"another port": second(s.Check(older, anID, 81, ends.Add(-time.Second))),
		"cut":          second(s.Check(older[:len(older)-1], anID, 80, ends.Add(-time.Second))),
	} {
		if !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// olderSignature returns a signature of the older form that opens port 80 of anID.
func olderSignature(s Signer, ends time.Time) string {
	at := strconv.FormatInt(ends.Unix(), 36)
	return at + "." + base64.RawURLEncoding.EncodeToString(s.mac("port "+anID, 80, at))
}

func second(_ time.Time, err error) error { return err }

func FuzzNames(f *testing.F) {
	n := Names{Domain: "a.example", Scheme: "https"}
	for _, seed := range []string{"8080-abcdefghij0123456789.a.example", "1-aaaaaaaaaaaaaaaaaaaa.A.EXAMPLE.:9", "[::1]",
		"x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, host string) {
		port, id, ok := n.Parse(host)
		if !ok {
			return
		}
		if again, same, ok := n.Parse(strings.TrimPrefix(n.Of(id, port), "https://")); !ok || again != port || same != id ||
			port < 1 || port > 65535 {
			t.Errorf("%q is %d of %s, which is %d of %s", host, port, id, again, same)
		}
	})
}

func FuzzSignature(f *testing.F) {
	s := NewSigner("secret")
	ends := time.Unix(2_000_000_000, 0)
	f.Add(s.Sign(anID, 80, ends))
	f.Add("x.y")
	f.Add(s.Sign(anID, 80, ends)[:20] + "\n" + s.Sign(anID, 80, ends)[20:])
	f.Fuzz(func(t *testing.T, text string) {
		got, err := s.Check(text, anID, 80, time.Unix(1_900_000_000, 0))
		if err == nil && text != s.Sign(anID, 80, got) {
			t.Errorf("%q opens the port and is no signature of ours", text)
		}
	})
}
