package httpserver

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
)

// fullPassage returns a passage in which every field that a caller of Forward sets has a value.
func fullPassage() Passage {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	return Passage{
		ID: "req_1", Front: "api",
		Who: auth.Principal{
			Org: auth.Org{ID: "org_1", Name: "one", Quota: auth.Quota{Sandboxes: 1, VCPUs: 2, MemoryMB: 3}, CreatedAt: at},
			Key: auth.Key{ID: "key_1", OrgID: "org_1", Name: "ci", Hash: []byte("hash"), Prefix: "cay_ab",
				Scopes: []auth.Scope{auth.Admin}, CreatedAt: at, ExpiresAt: at, RevokedAt: at, LastUsedAt: at},
		},
		Org: "org_1", Quota: auth.Quota{Sandboxes: 1, VCPUs: 2, MemoryMB: 3}, Sandbox: "sbx_1",
		Port: 80, Shared: true, Offered: true,
	}
}

// TestPassageArrives seals and reads a passage in which every field is set.
func TestPassageArrives(t *testing.T) {
	sent := fullPassage()
	r := httptest.NewRequest("GET", "https://host/", nil)
	r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
	content, nonce, err := sent.sealed(r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := readPassage(content)
	if err != nil {
		t.Fatal(err)
	}
	want := sent
	want.Who.Key.Hash, want.Who.Key.Prefix = nil, ""
	want.Remote, want.Proto, want.TLS, want.Nonce = r.RemoteAddr, 2, true, nonce
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if empty := caytest.ZeroFields(got); !cmp.Equal(empty, []string{"Who.Key.Hash", "Who.Key.Prefix"}) {
		t.Errorf("these fields are not covered: %v", empty)
	}
	if sent.Who.Key.Hash == nil {
		t.Error("the caller's own value was changed")
	}
}

func TestPassageIsBounded(t *testing.T) {
	p := fullPassage()
	p.Who.Org.Name = strings.Repeat("x", maxPassage)
	if _, _, err := p.sealed(httptest.NewRequest("GET", "/", nil)); err == nil {
		t.Error("a passage that is too long was sent")
	}
	if _, err := readPassage(strings.Repeat("A", 1<<20)); err == nil {
		t.Error("a passage that is too long was read")
	}
}

// FuzzPassage reads what another server may send.
func FuzzPassage(f *testing.F) {
	content, _, err := fullPassage().sealed(httptest.NewRequest("GET", "/", nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Add("")
	for _, text := range []string{`{}`, `null`, `{"id":"req_1","front":"api","remote":"a","proto":3,"nonce":"n"}`,
		`{"id":"a b","front":"api","remote":"a","proto":1,"nonce":"n"}`, `[1]`, "\xff"} {
		f.Add(base64.StdEncoding.EncodeToString([]byte(text)))
	}
	f.Fuzz(func(t *testing.T, content string) {
		p, err := readPassage(content)
		if err != nil {
			if p.ID != "" || p.Who.Org.ID != "" {
				t.Error("a refused passage says something")
			}
			return
		}
		if !saneID.MatchString(p.ID) || p.Front == "" || p.Remote == "" || p.Nonce == "" || p.Proto < 1 || p.Proto > 2 {
			t.Errorf("%+v was read", p)
		}
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr, r.ProtoMajor = p.Remote, p.Proto
		again, _, err := p.sealed(r)
		if err != nil {
			return // JSON may be longer when it is written again
		}
		got, err := readPassage(again)
		p.Who.Key.Hash, p.Who.Key.Prefix, p.TLS, p.Nonce = nil, "", false, got.Nonce
		if err != nil || got.ID != p.ID || got.Front != p.Front || got.Remote != p.Remote || got.Org != p.Org ||
			got.Sandbox != p.Sandbox || got.Quota != p.Quota {
			t.Errorf("%+v became %+v, %v", p, got, err)
		}
	})
}

// TestAdmitRefuses sends requests to a node that no replica forwards.
func TestAdmitRefuses(t *testing.T) {
	content, _, err := fullPassage().sealed(httptest.NewRequest("GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	isReplica := func(c *x509.Certificate) error {
		if c.Subject.CommonName != replicaName {
			return errors.New("not a replica")
		}
		return nil
	}
	a := caytest.NewAuthority(t)
	for name, c := range map[string]struct {
		tls     string // the name in the certificate of the connection; "" is none
		passage []string
		want    int
	}{
		"forwarded":               {replicaName, []string{content}, http.StatusNoContent},
		"no TLS":                  {"", []string{content}, http.StatusForbidden},
		"a node's certificate":    {"n2", []string{content}, http.StatusForbidden},
		"no passage":              {replicaName, nil, http.StatusForbidden},
		"two passages":            {replicaName, []string{content, content}, http.StatusForbidden},
		"a passage and a half":    {replicaName, []string{content + ", " + content}, http.StatusForbidden},
		"not base64":              {replicaName, []string{"!"}, http.StatusForbidden},
		"an empty passage":        {replicaName, []string{""}, http.StatusForbidden},
		"a passage says nothing":  {replicaName, []string{"e30="}, http.StatusForbidden},
		"a passage is very large": {replicaName, []string{strings.Repeat("A", 60<<10)}, http.StatusForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			reached := false
			h := Admit(isReplica, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				reached = true
				w.WriteHeader(http.StatusNoContent)
			}))
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["Cay-Passage"] = c.passage
			if c.tls != "" {
				r.TLS = stateOf(t, a, c.tls)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != c.want || reached != (c.want == http.StatusNoContent) {
				t.Errorf("status %d, %q; the handler was reached: %v", w.Code, w.Body, reached)
			}
		})
	}
}
