package httpserver

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

// TestPassageIsNotTheClients sends what claims to be a passage through a replica. The node gets the replica's.
func TestPassageIsNotTheClients(t *testing.T) {
	var got atomic.Pointer[Passage]
	f := startFleet(t, map[string]http.Handler{"n1": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		p, ok := PassageOf(r.Context())
		if !ok {
			return // of the direct server
		}
		got.Store(&p)
		for _, h := range []http.Header{r.Header, r.Trailer} {
			for name := range h {
				if strings.HasPrefix(strings.ToLower(name), "cay-") {
					w.Header().Add("Found", name)
				}
			}
		}
		w.Header().Set("Kept", r.Header.Get("Kept")+r.Trailer.Get("Kept"))
	})})
	forged := base64.StdEncoding.EncodeToString([]byte(`{"id":"forged","front":"api","remote":"x","proto":1,"nonce":"n"}`))
	body := "\r\n\r\n"
	for name, lines := range map[string]string{
		"plain":      "Cay-Passage: " + forged + "\r\nKept: yes",
		"lower case": "cay-passage: " + forged + "\r\nKept: yes",
		"twice":      "Cay-Passage: " + forged + "\r\nCAY-PASSAGE: " + forged + "\r\nKept: yes",
		"folded":     "Kept: yes\r\nCay-Passage:\r\n  " + forged,
		"connection": "Connection: Cay-Passage\r\nKept: yes",
		"both":       "Connection: Cay-Passage, keep-alive\r\nCay-Passage: " + forged + "\r\nKept: yes",
		"another":    "Cay-Node: n2\r\nCay-Anything: x\r\nKept: yes",
		"trailer": "Transfer-Encoding: chunked\r\nTrailer: Cay-Passage, Kept\r\n\r\n1\r\nx\r\n0\r\nCay-Passage: " + forged +
			"\r\nKept: yes",
		"unannounced trailer": "Transfer-Encoding: chunked\r\nTrailer: Kept\r\n\r\n1\r\nx\r\n0\r\nCay-Passage: " + forged +
			"\r\nKept: yes",
	} {
		t.Run(name, func(t *testing.T) {
			got.Store(nil)
			c := rawRequest(t, f.replica, "POST / HTTP/1.1\r\nHost: x\r\nX-Request-Id: forged\r\n"+lines+body)
			resp, err := http.ReadResponse(c.Reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			p := got.Load()
			if resp.StatusCode != http.StatusOK || p == nil {
				t.Fatalf("status %d, passage %v", resp.StatusCode, p)
			}
			if p.ID == "forged" || p.Nonce == "n" || !strings.HasPrefix(p.Remote, "127.0.0.1:") {
				t.Errorf("the node was told %+v", p)
			}
			if found := resp.Header["Found"]; found != nil {
				t.Errorf("the handler saw %v", found)
			}
			if kept := resp.Header.Get("Kept"); kept != "yes" {
				t.Errorf("another header arrived as %q", kept)
			}
		})
	}
}

// TestNoKeyIsForwarded sends keys in every part of a head. None reaches the node, and nothing else is missing.
func TestNoKeyIsForwarded(t *testing.T) {
	const key, other = "cay_0123456789abcdef0123456789abcdef01234567", "e2b_0123456789abcdef0123456789abcdef01234567"
	f := startFleet(t, map[string]http.Handler{"n1": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		h := maps.Clone(r.Header)
		h.Del("Content-Length")
		h.Del("User-Agent")
		fmt.Fprint(w, r.URL.RawQuery, " ", h, " ", r.Trailer)
	})})
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+key))
	for name, c := range map[string]struct{ query, lines, want string }{
		"bearer":          {"", "Authorization: Bearer " + key, " map[] map[]"},
		"E2B's":           {"", "X-API-Key: " + other, " map[] map[]"},
		"capitals":        {"", "Authorization: Bearer " + strings.ToUpper(key), " map[] map[]"},
		"basic":           {"", "Authorization: " + basic, " map[] map[]"},
		"own header":      {"", "X-Cay-Api-Key: short", " map[] map[]"},
		"any header":      {"", "X: a " + key + "\r\nY: b\r\nX: c", " map[X:[c] Y:[b]] map[]"},
		"name":            {"", key + ": x\r\nY: b", " map[Y:[b]] map[]"},
		"subprotocol":     {"", "Sec-WebSocket-Protocol: cay.terminal.v1, cay.key." + key, " map[Sec-Websocket-Protocol:[cay.terminal.v1]] map[]"},
		"cookie":          {"", "Cookie: a=b; k=" + key + "; c=d", " map[Cookie:[a=b; c=d]] map[]"},
		"query":           {"?a=b&k=" + key + "&c=%20d&k2=%63ay_" + key[4:], "X: y", "a=b&c=%20d map[X:[y]] map[]"},
		"the application": {"?api_key=sk-1", "Authorization: Bearer sk-1\r\nX-API-Key: cay_theme", "api_key=sk-1 map[Authorization:[Bearer sk-1] X-Api-Key:[cay_theme]] map[]"},
		"signatures stay": {"?cay_token=cays_1", "X: y", "cay_token=cays_1 map[X:[y]] map[]"},
		"trailer": {"", "Transfer-Encoding: chunked\r\nTrailer: A, B\r\n\r\n1\r\nx\r\n0\r\nA: " + key + "\r\nB: c",
			" map[] map[B:[c]]"},
	} {
		t.Run(name, func(t *testing.T) {
			c2 := rawRequest(t, f.replica, "POST /"+c.query+" HTTP/1.1\r\nHost: x\r\n"+c.lines+"\r\n\r\n")
			resp, err := http.ReadResponse(c2.Reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(string(must(io.ReadAll(resp.Body))), "A:[] ", "")
			if strings.Contains(strings.ToLower(got), key[4:]) || got != c.want {
				t.Errorf("the node got %s, want %s", got, c.want)
			}
		})
	}
	for _, first := range []string{"GET /a/" + key, "GET /%63ay_" + key[4:], "cay_" + key[4:] + " /"} {
		c := rawRequest(t, f.replica, first+" HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusBadRequest || string(b) != fault.CodeSecretInPath {
			t.Errorf("%s: status %d, %s", first, resp.StatusCode, b)
		}
	}
}

// TestMisdirected sends requests to a node that names another one.
func TestMisdirected(t *testing.T) {
	var visited atomic.Pointer[[]string]
	visit := func(name string, do http.HandlerFunc) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			all := append(slices.Clone(*visited.Load()), name)
			visited.Store(&all)
			do(w, r)
		})
	}
	f := startFleet(t, map[string]http.Handler{
		"n1": visit("n1", func(w http.ResponseWriter, r *http.Request) { Misdirect(w, r, r.Header.Get("Go-To")) }),
		"n2": visit("n2", func(w http.ResponseWriter, r *http.Request) {
			if p, _ := PassageOf(r.Context()); p.Offered {
				t.Error("the node that has it is told that another could do it")
			}
			fmt.Fprint(w, "n2 got ", string(must(io.ReadAll(r.Body))))
		}),
		"n3": visit("n3", func(w http.ResponseWriter, r *http.Request) { Misdirect(w, r, "n1") }),
	})
	for name, c := range map[string]struct {
		to, body string
		again    bool // the body can be sent again
		want     string
		visited  []string
	}{
		"no body":        {"n2", "", false, "200 n2 got ", []string{"n1", "n2"}},
		"a body again":   {"n2", "text", true, "200 n2 got text", []string{"n1", "n2"}},
		"a body once":    {"n2", "text", false, "misdirected to n2", []string{"n1"}},
		"twice":          {"n3", "", false, "misdirected to n1", []string{"n1", "n3"}},
		"to itself":      {"n1", "", false, "misdirected to n1", []string{"n1"}},
		"to no node":     {"n9", "", false, "node_unreachable", []string{"n1"}},
		"without a node": {"", "", false, "421 ", []string{"n1"}},
	} {
		t.Run(name, func(t *testing.T) {
			visited.Store(&[]string{})
			address := httpServer(t, frontOf(func(w *Recorder, r *http.Request) error {
				if c.again {
					r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(c.body)), nil }
				}
				err := f.forwarder.Forward(w, r, "n1", Passage{ID: CallOf(r).ID, Front: "api", Offered: true})
				var other *Misdirected
				if errors.As(err, &other) {
					if w.Header().Get("X-Request-Id") == "" {
						t.Error("the header of the caller's answer is lost")
					}
					_, err = io.WriteString(w, "misdirected to "+other.Node)
				}
				return err
			}))
			r := must(http.NewRequest("POST", "http://"+address+"/", strings.NewReader(c.body)))
			r.Header.Set("Go-To", c.to)
			a := ask(t, http.DefaultClient, r)
			if got := fmt.Sprint(a.Status, " ", a.Body); !strings.Contains(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
			if got := *visited.Load(); !slices.Equal(got, c.visited) {
				t.Errorf("visited %v, want %v", got, c.visited)
			}
		})
	}
}
