package image

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

func TestPullIsDownloadedOnce(t *testing.T) {
	h := newHub(t)
	img := picture(t, runtime.GOARCH, v1.Config{User: "app"}, archive(t, file("a", "1")), archive(t, file("b", "2")))
	ref := h.push(t, "lib/x:1", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	blobs := map[string]int{}
	const callers = 5
	gate := make(chan struct{})
	h.front = func(_ http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) {
			<-gate
			mu.Lock()
			blobs[r.URL.Path]++
			mu.Unlock()
		}
		return false
	}
	s := openStore(t)
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			l, err := s.Pull(t.Context(), ref, nil, quiet)
			if err != nil || l.Manifest != digest.String() || l.Reference != h.host+"/lib/x@"+digest.String() {
				t.Errorf("pulled %+v, %v", l, err)
			}
		})
	}
	for waiters := 0; waiters < callers; runtime.Gosched() { // until all wait for one download
		s.mu.Lock()
		waiters = 0
		for _, p := range s.pulls {
			p.mu.Lock()
			waiters += len(p.waiting)
			p.mu.Unlock()
		}
		s.mu.Unlock()
	}
	close(gate)
	wg.Wait()
	l, err := s.Pull(t.Context(), ref, nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if len(blobs) != 3 {
		t.Errorf("blobs downloaded: %v, want two layers and a configuration", blobs)
	}
	for path, n := range blobs {
		if n != 1 {
			t.Errorf("%s was downloaded %d times", path, n)
		}
	}
	built, err := s.Build(t.Context(), Source{Layout: &l}, quiet)
	if err != nil || built.Source != l.Reference || built.Config.User != "app" {
		t.Errorf("built %+v, %v", built, err)
	}
	leftovers(t, s)
}

// TestPullEndsWithItsLastCaller checks that a caller that leaves does not disturb the others, and
// that the download ends when the last one leaves.
func TestPullEndsWithItsLastCaller(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", "1"))))
	reached := make(chan struct{}, 10)
	gate := make(chan struct{})
	h.front = func(_ http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) {
			reached <- struct{}{}
			select {
			case <-gate:
			case <-r.Context().Done():
			}
		}
		return false
	}
	s := openStore(t)
	pull := func() (context.CancelFunc, chan error) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		joined := make(chan struct{}, 100)
		go func() {
			_, err := s.Pull(ctx, ref, nil, func(string) { joined <- struct{}{} })
			done <- err
		}()
		<-joined
		return cancel, done
	}
	leaveFirst, first := pull()
	<-reached
	stay, second := pull()
	defer stay()
	for waiters := 0; waiters < 2; runtime.Gosched() {
		s.mu.Lock()
		for _, p := range s.pulls {
			p.mu.Lock()
			waiters = len(p.waiting)
			p.mu.Unlock()
		}
		s.mu.Unlock()
	}
	leaveFirst()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("error of who left: %v", err)
	}
	close(gate)
	if err := <-second; err != nil {
		t.Errorf("error of who stayed: %v", err)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(s.cfg.Dir, layoutsDir)),
		os.Mkdir(filepath.Join(s.cfg.Dir, layoutsDir), 0o755)); err != nil {
		t.Fatal(err)
	}
	for len(reached) > 0 {
		<-reached
	}
	gate = make(chan struct{})
	leave, alone := pull()
	<-reached
	leave()
	if err := <-alone; !errors.Is(err, context.Canceled) {
		t.Errorf("error of who was alone: %v", err)
	}
	leftovers(t, s)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pulls) > 0 {
		t.Errorf("downloads under way: %v", s.pulls)
	}
}

// guarded makes a registry require credentials: basic authentication, or a bearer token from a
// token service.
func guarded(h *hub, auth Auth, bearer bool) {
	h.front = func(w http.ResponseWriter, r *http.Request) bool {
		name, password, basic := r.BasicAuth()
		right := basic && name == auth.Username && password == auth.Password
		switch {
		case r.URL.Path == "/token":
			if !right {
				http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"not `+password+`"}]}`, http.StatusUnauthorized)
				return true
			}
			_ = json.NewEncoder(w).Encode(map[string]string{"token": auth.Token})
		case bearer && r.Header.Get("Authorization") == "Bearer "+auth.Token, !bearer && right:
			return false
		default:
			challenge := `Basic realm="test"`
			if bearer {
				challenge = fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, h.host)
			}
			w.Header().Set("WWW-Authenticate", challenge)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"not `+password+`"}]}`, http.StatusUnauthorized)
		}
		return true
	}
}

func TestCredentials(t *testing.T) {
	right := Auth{Username: "user", Password: "pass word/+\"", Token: "secret-token"}
	for _, bearer := range []bool{false, true} {
		t.Run(fmt.Sprintf("bearer %v", bearer), func(t *testing.T) {
			h := newHub(t)
			ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("private", "1"))))
			guarded(h, right, bearer)
			right := Auth{Username: right.Username, Password: right.Password}
			s := openStore(t, func(c *Config) { c.CacheDir = filepath.Join(t.TempDir(), "cache") })
			wrong := Auth{Username: "user", Password: "wr\"ong+pass"}
			for _, auth := range []*Auth{nil, &wrong} {
				_, err := s.Pull(t.Context(), ref, auth, quiet)
				if err == nil {
					t.Fatalf("pulled with %v", auth)
				}
				tellsNothing(t, err.Error(), wrong)
			}
			var lines record
			img, err := s.Build(t.Context(), Source{Image: ref, Auth: &right}, lines.line)
			if err != nil {
				t.Fatal(err)
			}
			tellsNothing(t, strings.Join(lines, "\n"), right)
			// A caller without the credentials does not get the image, though the store has it.
			if _, err := s.Build(t.Context(), Source{Image: ref}, quiet); err == nil {
				t.Error("an image that needs credentials was given without them")
			}
			if _, err := s.Pull(t.Context(), ref, nil, quiet); err == nil {
				t.Error("a layout that needs credentials was given without them")
			}
			before := len(h.host)
			again, err := s.Build(t.Context(), Source{Image: ref, Auth: &right}, lines.line)
			if err != nil || again.Digest != img.Digest || before == 0 {
				t.Errorf("built again: %+v, %v", again, err)
			}
			lines.has(t, "earlier build with the same inputs")
			err = filepath.WalkDir(s.cfg.Dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				b, err := os.ReadFile(path)
				tellsNothing(t, string(b), right)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			leftovers(t, s)
		})
	}
	t.Run("a token of the caller's", func(t *testing.T) {
		h := newHub(t)
		ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("private", "1"))))
		guarded(h, right, true)
		if _, err := openStore(t).Pull(t.Context(), ref, &Auth{Token: right.Token}, quiet); err != nil {
			t.Error(err)
		}
	})
	t.Run("printed", func(t *testing.T) {
		var b bytes.Buffer
		src := Source{Image: "x", Auth: &right}
		slog.New(slog.NewTextHandler(&b, nil)).Info("x", "source", src, "auth", right, "pointer", &right)
		slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "source", src, "auth", right, "pointer", &right)
		fmt.Fprintf(&b, "%v %+v %#v %s %q %v", right, right, right, right, &right, src)
		tellsNothing(t, b.String(), right)
	})
}

func tellsNothing(t *testing.T, text string, auth Auth) {
	t.Helper()
	for _, secret := range []string{auth.Password, auth.Token,
		base64.StdEncoding.EncodeToString([]byte(auth.Username + ":" + auth.Password))} {
		quoted := fmt.Sprintf("%q", secret)
		if secret != "" && (strings.Contains(text, secret) || strings.Contains(text, quoted[1:len(quoted)-1])) {
			t.Errorf("a secret is in %q", text)
		}
	}
}

// noLoopback is a Dial policy as the wiring has it.
func noLoopback(to netip.AddrPort) error {
	if to.Addr().IsLoopback() {
		return errors.New("loopback addresses are this machine's own")
	}
	return errors.New("no tests on other machines")
}

func TestDialDecidesAboutConnections(t *testing.T) {
	h, other := newHub(t), newHub(t)
	ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", "1"))))
	port := h.host[strings.LastIndex(h.host, ":"):]
	open := func(plain ...string) *Store {
		return openStore(t, func(c *Config) { c.Dial, c.PlainHTTP = noLoopback, plain })
	}
	denied := func(s *Store, ref, want string) {
		t.Helper()
		asked := other.asked.Load()
		_, err := s.Pull(t.Context(), ref, nil, quiet)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
		if other.asked.Load() != asked {
			t.Error("the other machine was asked")
		}
	}
	denied(open(), ref, "not one of those that the operator lists")
	denied(open(), "198.51.100.7:5000/x:1", "the registry may not be used: no tests on other machines")
	denied(open(), "[::1]"+port+"/x:1", "not one of those that the operator lists")
	if _, err := open(h.host).Pull(t.Context(), ref, nil, quiet); err != nil {
		t.Errorf("a listed registry: %v", err)
	}
	h.front = func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) {
			http.Redirect(w, r, "http://"+other.host+r.URL.Path+"?X-Signature=of-somebody", http.StatusTemporaryRedirect)
			return true
		}
		return false
	}
	denied(open(h.host), ref, "loopback addresses are this machine's own")
	if _, err := open(h.host).Pull(t.Context(), ref, nil, quiet); err == nil ||
		strings.Contains(err.Error(), "of-somebody") {
		t.Errorf("the error tells what signs a redirect: %v", err)
	}
	h.front = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, other.host))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	denied(open(h.host), ref, "realm") // the library refuses it before Dial is asked
}

func TestChangedBlobsAreRefused(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"truncated": func(b []byte) []byte { return b[:len(b)-1] },
		"longer":    func(b []byte) []byte { return append(bytes.Clone(b), 0) },
		"empty":     func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", strings.Repeat("a", 10000)))))
			changed := 0
			h.tamper = func(w http.ResponseWriter, r *http.Request, b []byte) []byte {
				if !isBlob(r) {
					return b
				}
				changed++
				w.Header().Del("Content-Length")
				return change(b)
			}
			s := openStore(t)
			if _, err := s.Pull(t.Context(), ref, nil, quiet); err == nil || changed == 0 {
				t.Errorf("error is %v after %d changes", err, changed)
			}
			leftovers(t, s)
			if entries, err := os.ReadDir(filepath.Join(s.cfg.Dir, layoutsDir)); err != nil || len(entries) > 0 {
				t.Errorf("kept %v, %v", entries, err)
			}
		})
	}
}

func TestPulledLayoutsFitTheBudget(t *testing.T) {
	h := newHub(t)
	clock := time.Now()
	s := openStore(t, func(c *Config) { c.Now, c.Budget = func() time.Time { return clock }, 1 })
	pull := func(tag string) Layout {
		t.Helper()
		l, err := s.Pull(t.Context(), h.push(t, tag, picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", tag)))),
			nil, quiet)
		if err != nil {
			t.Fatal(err)
		}
		clock = clock.Add(time.Minute)
		return l
	}
	there := func(want bool, l Layout) {
		t.Helper()
		if _, err := os.Stat(filepath.Join(l.Dir, "index.json")); (err == nil) != want {
			t.Errorf("looking for %s: %v, want it there: %v", l.Reference, err, want)
		}
	}
	one, two := pull("x:1"), pull("x:2")
	there(true, one) // over the budget, but used just now
	release := s.Hold(one)
	clock = clock.Add(collectGrace)
	three := pull("x:3")
	there(true, one) // held
	there(false, two)
	there(true, three)
	release()
	clock = clock.Add(collectGrace)
	s.cfg.Budget = treeSize(one.Dir) // room for one
	if _, _, err := s.Collect(nil, nil); err != nil {
		t.Fatal(err)
	}
	there(true, one) // used last, since it was held until just now
	there(false, three)
	if _, err := s.Build(t.Context(), Source{Layout: &one}, quiet); err != nil {
		t.Errorf("building from what is left: %v", err)
	}
	leftovers(t, s)
}
