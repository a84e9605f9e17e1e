package webhook_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/webhook"
	"github.com/cayhq/cay/internal/webhook/sender"
)

const good = "https://example.com/hook?a=b"

// unstarted returns a service that makes no deliveries, and may not call private addresses.
func unstarted(t *testing.T) *webhook.Service {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	post := sender.New(sender.Config{Permit: func(to netip.AddrPort) error {
		if to.Addr().IsPrivate() || to.Addr().IsLoopback() {
			return errors.New("it is private")
		}
		return nil
	}})
	return webhook.New(webhook.Config{MaxPerOrg: 2, Concurrency: 4, Log: slog.New(slog.DiscardHandler)}, db, nil, post,
		map[webhook.Format]webhook.Wire{webhook.Standard: webhook.NewStandard(encode)})
}

// TestRefused checks what a webhook may be.
func TestRefused(t *testing.T) {
	s := unstarted(t)
	key := func(n int) webhook.Secret {
		return webhook.Secret("whsec_" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, n)))
	}
	for name, c := range map[string]struct {
		request webhook.NewWebhook
		field   string // "" is accepted
	}{
		"long name":         {webhook.NewWebhook{URL: good, Name: strings.Repeat("ü", 129)}, "name"},
		"control in name":   {webhook.NewWebhook{URL: good, Name: "a\x1b[2J"}, "name"},
		"no URL":            {webhook.NewWebhook{}, "url"},
		"another scheme":    {webhook.NewWebhook{URL: "file:///etc/passwd"}, "url"},
		"no host":           {webhook.NewWebhook{URL: "https:///x"}, "url"},
		"opaque":            {webhook.NewWebhook{URL: "https:example.com"}, "url"},
		"user":              {webhook.NewWebhook{URL: "https://a:b@example.com/"}, "url"},
		"fragment":          {webhook.NewWebhook{URL: "https://example.com/#a"}, "url"},
		"empty fragment":    {webhook.NewWebhook{URL: "https://example.com/#"}, "url"},
		"space":             {webhook.NewWebhook{URL: "https://example.com/a b"}, "url"},
		"line break":        {webhook.NewWebhook{URL: "https://example.com/a\nb"}, "url"},
		"not ASCII":         {webhook.NewWebhook{URL: "https://exämple.com/"}, "url"},
		"port 0":            {webhook.NewWebhook{URL: "https://example.com:0/"}, "url"},
		"large port":        {webhook.NewWebhook{URL: "https://example.com:65536/"}, "url"},
		"long":              {webhook.NewWebhook{URL: "https://example.com/" + strings.Repeat("a", 2048)}, "url"},
		"loopback":          {webhook.NewWebhook{URL: "http://127.0.0.1/"}, "url"},
		"IPv6 loopback":     {webhook.NewWebhook{URL: "http://[::1]:80/"}, "url"},
		"mapped loopback":   {webhook.NewWebhook{URL: "http://[::ffff:127.0.0.1]/"}, "url"},
		"private":           {webhook.NewWebhook{URL: "http://10.1.2.3:8080/"}, "url"},
		"unknown type":      {webhook.NewWebhook{URL: good, Types: []string{"sandbox.flew"}}, "types"},
		"the type of tests": {webhook.NewWebhook{URL: good, Types: []string{webhook.TestType}}, "types"},
		"many types":        {webhook.NewWebhook{URL: good, Types: make([]string, 101)}, "types"},
		"no prefix":         {webhook.NewWebhook{URL: good, Secret: key(32)[6:]}, "secret"},
		"short secret":      {webhook.NewWebhook{URL: good, Secret: key(23)}, "secret"},
		"long secret":       {webhook.NewWebhook{URL: good, Secret: key(65)}, "secret"},
		"no base64":         {webhook.NewWebhook{URL: good, Secret: "whsec_!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!"}, "secret"},
		"secret of 24":      {webhook.NewWebhook{URL: good, Secret: key(24)}, ""},
		"secret of 64":      {webhook.NewWebhook{URL: "http://192.0.2.1:8080", Secret: key(64)}, ""},
	} {
		c.request.Format = webhook.Standard
		w, err := s.Create(t.Context(), "org_"+strings.ReplaceAll(name, " ", ""), c.request)
		switch f := fault.As(err); {
		case c.field == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.field != "" && (f == nil || f.Kind != fault.Invalid || f.Field != c.field):
			t.Errorf("%s: got %+v, %v", name, w, err)
		case c.request.Secret != "" && err != nil && strings.Contains(err.Error(), string(c.request.Secret)):
			t.Errorf("%s: the error has the secret: %v", name, err)
		}
	}
}

// TestSecrets checks the secrets that the service makes, and that none is printed.
func TestSecrets(t *testing.T) {
	s := unstarted(t)
	for i := range 3 {
		w, err := s.Create(t.Context(), "org_a", webhook.NewWebhook{URL: good, Format: webhook.Standard,
			Types: []string{"sandbox.failed", "sandbox.failed"}})
		if i == 2 {
			if !fault.Is(err, fault.Exhausted) {
				t.Errorf("a third one: %v", err)
			}
			continue
		}
		if err != nil || len(w.Types) != 1 || len(w.ID) != 24 || len(w.Secret) != len("whsec_")+44 {
			t.Errorf("got %+v, %v", w, err)
		}
		secret := ""
		changed, err := s.Change(t.Context(), "org_a", w.ID, webhook.Change{Secret: (*webhook.Secret)(&secret)})
		if err != nil || changed.Secret == w.Secret || len(changed.Secret) != len(w.Secret) {
			t.Errorf("with another secret: %+v, %v", changed, err)
		}
		_, err = s.Change(t.Context(), "org_a", w.ID, webhook.Change{URL: new("http://127.0.0.1/")})
		if f := fault.As(err); f == nil || f.Field != "url" {
			t.Errorf("changed to an address that may not be called: %v", err)
		}
		if text := fmt.Sprintf("%v %+v %#v %s", w, w, w, w.Secret); strings.Contains(text, string(w.Secret)[6:]) {
			t.Errorf("printed it is %s", text)
		}
	}
}
