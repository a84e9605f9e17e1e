package portproxy

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cayhq/cay/internal/agentapi"
)

// someSecrets has one of each form.
func someSecrets() map[string]string {
	s := NewSigner("secret")
	ends := time.Unix(1_790_000_000, 0)
	return map[string]string{
		"key":             aKey,
		"key of E2B":      "e2b_" + aKey[4:],
		"signature":       s.Sign(anID, 8080, ends),
		"older signature": olderSignature(s, ends),
		"token":           "cayt_" + aKey[4:],
		"file signature":  agentapi.Signature("GET", url.Values{"path": {"/a"}}, aKey),
	}
}

// encodings are the forms that a secret may have in a header.
var encodings = map[string]func(string) string{
	"as it is":                func(s string) string { return s },
	"in capitals":             strings.ToUpper, // only for keys, see encode
	"percent-encoded":         url.QueryEscape,
	"percent-encoded wholly":  percent,
	"percent-encoded twice":   func(s string) string { return url.QueryEscape(percent(s)) },
	"base64":                  func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	"base64 for URLs":         func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte("x " + s)) },
	"base64 of percent":       func(s string) string { return base64.StdEncoding.EncodeToString([]byte("?" + percent(s))) },
	"password of Basic":       func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte("me:"+s)) },
	"user of Basic":           func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s+":")) },
	"an address":              func(s string) string { return "https://x.example/a?b=1&" + TokenParam + "=" + s + "&c#d" },
	"an address within one":   func(s string) string { return "/p?to=" + url.QueryEscape("https://x/?signature="+url.QueryEscape(s)) },
	"among other words":       func(s string) string { return "a; b=" + s + ", c" },
	"in quotes":               func(s string) string { return `{"key":"` + s + `"}` },
	"behind what is no digit": func(s string) string { return "%zz%" + s },
}

func percent(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		b.WriteString("%" + hex.EncodeToString([]byte{c}))
	}
	return b.String()
}

// encode returns a secret in an encoding. It does not put base64 in capitals, which would change
// its meaning.
func encode(name, secret string) string {
	if name == "in capitals" && !strings.HasPrefix(secret, "cay") {
		name = "as it is"
	}
	return encodings[name](secret)
}

// places are the places in the head of a request that may hold a text.
var places = map[string]func(r *http.Request, text string){
	"Referer":        func(r *http.Request, s string) { r.Header.Set("Referer", "http://h/v1/x?"+TokenParam+"="+s) },
	"X-Original-URI": func(r *http.Request, s string) { r.Header.Set("X-Original-Uri", s) },
	"X-Orig-Url":     func(r *http.Request, s string) { r.Header.Set("X-Orig-Url", s) },
	"forwarded": func(r *http.Request, s string) {
		r.Header.Set("X-Forwarded-For", s)
		r.Header.Set("X-Forwarded-Uri", s)
	},
	"Authorization": func(r *http.Request, s string) { r.Header.Set("Authorization", s) },
	"second value":  func(r *http.Request, s string) { r.Header["X-Many"] = []string{"one", s} },
	"Origin":        func(r *http.Request, s string) { r.Header.Set("Origin", "https://"+s+".example, "+s) },
	"User-Agent":    func(r *http.Request, s string) { r.Header.Set("User-Agent", s) },
	"cookie": func(r *http.Request, s string) {
		r.Header.Set("Cookie", "a=1; k="+strings.NewReplacer(";", "", ",", "").Replace(s)+"; b=2")
	},
	"our cookie": func(r *http.Request, s string) {
		r.Header.Set("Cookie", TokenCookie+"="+strings.NewReplacer(";", "", ",", "").Replace(s))
	},
	"query":      func(r *http.Request, s string) { r.URL.RawQuery = "a=1&b=" + queryOf(s) + "&c=2" },
	"query name": func(r *http.Request, s string) { r.URL.RawQuery = queryOf(s) + "&c=2" },
	"our query":  func(r *http.Request, s string) { r.URL.RawQuery = "c%61y_token=" + queryOf(s) },
	"path":       func(r *http.Request, s string) { r.URL.Path = "/a;k=" + s + "/b" },
	"subprotocol": func(r *http.Request, s string) {
		r.Header.Set("Sec-WebSocket-Protocol", "chat, "+s)
	},
}

// queryOf returns a text as a query can hold it.
func queryOf(s string) string {
	return strings.NewReplacer(" ", "+", "#", "", "&", "", `"`, "").Replace(s)
}

// TestNoSecretArrives sends a secret of each form, in any encoding, in any places of the head of
// a request, and looks for it at the port.
func TestNoSecretArrives(t *testing.T) {
	var mu sync.Mutex
	var seen string // guarded by mu
	d := newDoor(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		_ = r.Write(&b)
		mu.Lock()
		seen = b.String()
		mu.Unlock()
	}), Destination{})
	secrets := someSecrets()
	try := func(t interface{ Errorf(string, ...any) }, secret, encoding string, where []string) {
		seen = ""
		r, err := http.NewRequest("GET", d.url+"/p", nil)
		if err != nil {
			t.Errorf("%v", err)
			return
		}
		for _, place := range where {
			places[place](r, encode(encoding, secrets[secret]))
		}
		resp, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			t.Errorf("%s, %s, in %q: %v", secret, encoding, where, err)
			return
		}
		resp.Body.Close()
		mu.Lock()
		defer mu.Unlock()
		if leaks(seen, secrets[secret]) {
			t.Errorf("%s, %s, in %q: inside came\n%s", secret, encoding, where, seen)
		}
		if inPath := strings.Contains(strings.Join(where, " "), "path"); !inPath && !strings.HasPrefix(seen, "GET /p") {
			t.Errorf("%s, %s, in %q: the request did not come in", secret, encoding, where)
		}
		for len(d.errs) > 0 {
			<-d.errs
		}
	}
	for secret := range secrets {
		for encoding := range encodings {
			for place := range places {
				try(t, secret, encoding, []string{place})
			}
		}
	}
	if t.Failed() {
		return
	}
	rapid.Check(t, func(t *rapid.T) {
		try(t, rapid.SampledFrom(keysOf(secrets)).Draw(t, "secret"), rapid.SampledFrom(keysOf(encodings)).Draw(t, "encoding"),
			rapid.SliceOfN(rapid.SampledFrom(keysOf(places)), 1, 4).Draw(t, "places"))
	})
}

// leaks reports whether a reader who tries every decoding finds the secret. It does not use the
// code under test.
func leaks(head, secret string) bool {
	// The last character of base64 may depend on the next ones.
	core := strings.ToLower(secret[len(secret)-36 : len(secret)-1])
	texts := []string{head}
	for range 3 {
		for _, text := range texts {
			if strings.Contains(strings.ToLower(text), core) {
				return true
			}
		}
		var next []string
		for _, text := range texts {
			for _, word := range strings.FieldsFunc(text,
				func(c rune) bool { return strings.ContainsRune(" \r\n:;,=&?\"", c) }) {
				if plain, err := url.PathUnescape(strings.ReplaceAll(word, "%zz", "")); err == nil && plain != word {
					next = append(next, plain)
				}
				for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
					if plain, err := e.DecodeString(word); err == nil && len(plain) > 30 {
						next = append(next, string(plain))
					}
				}
			}
		}
		texts = next
	}
	return false
}

func keysOf[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// TestOtherTextsAreKept has texts of applications that look a little like a secret.
func TestOtherTextsAreKept(t *testing.T) {
	for _, text := range []string{
		"cay_dark", "cay_token", "cay_token=", "", "v1_users", "v2.0", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
		"Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
		"Bearer eyJhbGciOiJIUzI1NiJ9.e30.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
		"GA1.2.1234567890.1700000000", "sha256-" + base64.StdEncoding.EncodeToString(make([]byte, 32)), strings.Repeat("a", 400),
		"/v1_Assets/" + strings.Repeat("x", 43), "/static/main.abcdef." + strings.Repeat("x", 43), "W/\"0123456789abcdef0123456789abcdef01234567\"",
		"Basic " + base64.StdEncoding.EncodeToString([]byte("someone@example.com:a long password of theirs")),
		"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
	} {
		if HasSecret(text) {
			t.Errorf("%q is taken for a secret", text)
		}
	}
}

// FuzzHasSecret puts a secret between any bytes.
func FuzzHasSecret(f *testing.F) {
	f.Add("", "", uint8(0))
	f.Add("Basic ", "==", uint8(1))
	f.Add("%", "%zz", uint8(2))
	f.Add("https://x/?a=", "&b", uint8(3))
	f.Fuzz(func(t *testing.T, before, after string, how uint8) {
		secret := aKey
		switch how % 4 {
		case 1:
			secret = percent(secret)
		case 2:
			secret = base64.StdEncoding.EncodeToString([]byte(before + secret + after))
			before, after = before+" ", " "+after
		case 3:
			secret = url.QueryEscape(percent(secret))
		}
		if text := before + secret + after; !HasSecret(text) {
			t.Errorf("%q has a key", text)
		}
	})
}

func BenchmarkHasSecret(b *testing.B) {
	for name, text := range map[string]string{
		"short":  "keep-alive",
		"agent":  "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
		"cookie": "session=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U; theme=dark",
		"worst":  strings.Repeat("MDEyMzQ1Njc4OWFiY2RlZjAx", 64<<10/24),
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if HasSecret(text) {
					b.Fatal("it has none")
				}
			}
		})
	}
}

// TestHasKey tells API keys from what opens one sandbox.
func TestHasKey(t *testing.T) {
	const digits = "0123456789abcdef0123456789abcdef01234567"
	for text, want := range map[string]bool{
		"cay_" + digits:                  true,
		"x=e2b_" + digits + "&y":         true,
		"CAY_" + digits:                  true,
		"%63ay%5f" + digits:              true,
		"cays_" + digits + "89abcdef":    false,
		"cayt_" + digits:                 false,
		"cay_token=cays_" + digits:       false,
		"cay_theme":                      false,
		"v1_" + strings.Repeat("aB", 30): false,
		base64.StdEncoding.EncodeToString([]byte("user:cay_" + digits)):  true,
		base64.StdEncoding.EncodeToString([]byte("user:cayt_" + digits)): false,
	} {
		if got := HasKey(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
