package image

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestKeysOfAWS pulls with keys of AWS, from a registry that takes only the password that a server gives
// for a request with their signature.
func TestKeysOfAWS(t *testing.T) {
	keys := Auth{Username: "AKIDEXAMPLE", Password: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", AWSRegion: "eu-west-1"}
	password := Auth{Username: "AWS", Password: "the-password-of-12-hours"}
	h := newHub(t)
	ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("private", "1"))))
	guarded(h, password, false)
	answer := ""
	aws := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || string(body) != "{}" || r.URL.Path != "/" || r.Method != http.MethodPost ||
			r.Header.Get("Content-Type") != "application/x-amz-json-1.1" ||
			r.Header.Get("X-Amz-Target") != "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken" {
			t.Errorf("%s %s with %v and %q, %v", r.Method, r.URL, r.Header, body, err)
		}
		if got, want := r.Header.Get("Authorization"), awsSignature(t, r, body, keys); got != want {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"__type":"com.amazon.coral.service#InvalidSignatureException","message":"The request signature `+
				`we calculated does not match"}`)
			return
		}
		fmt.Fprint(w, answer)
	}))
	defer aws.Close()
	s := openStore(t, func(c *Config) { c.ECR = aws.URL })
	token := func(text string) string {
		return `{"authorizationData":[{"authorizationToken":"` + base64.StdEncoding.EncodeToString([]byte(text)) +
			`","expiresAt":1.7E9,"proxyEndpoint":"https://1.dkr.ecr.eu-west-1.amazonaws.com"}]}`
	}
	for _, c := range []struct{ name, answer, want string }{
		{"no JSON", "<html>", "no token"},
		{"no token", `{"authorizationData":[]}`, "no token"},
		{"not in base64", `{"authorizationData":[{"authorizationToken":"%"}]}`, "not NAME:PASSWORD in base64"},
		{"no password", token("AWS"), "not NAME:PASSWORD in base64"},
		{"more than a token may have", `{"a":"` + strings.Repeat("x", maxToken) + `"}`, "no token"},
		{"a password that the registry does not take", token("AWS:other"), "asking the registry"},
	} {
		answer = c.answer
		_, err := s.Pull(t.Context(), ref, &keys, quiet)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	answer = token(password.Username + ":" + password.Password)
	wrong := keys
	wrong.Password = "another/secret"
	_, err := s.Pull(t.Context(), ref, &wrong, quiet)
	if err == nil || !strings.Contains(err.Error(), "400 Bad Request: InvalidSignatureException: The request") {
		t.Errorf("with another secret: %v", err)
	}
	tellsNothing(t, err.Error(), wrong)
	var lines record
	img, err := s.Build(t.Context(), Source{Image: ref, Auth: &keys}, lines.line)
	if err != nil || img.Digest == "" {
		t.Fatalf("built %+v, %v", img, err)
	}
	for _, secret := range []Auth{keys, password} {
		tellsNothing(t, strings.Join(lines, "\n"), secret)
	}
	if _, err := s.Build(t.Context(), Source{Image: ref}, quiet); err == nil {
		t.Error("an image that needs keys was given without them")
	}
	leftovers(t, s)
}

// awsSignature returns the header that AWS's documentation of its fourth signature asks for.
func awsSignature(t *testing.T, r *http.Request, body []byte, keys Auth) string {
	t.Helper()
	at := r.Header.Get("X-Amz-Date")
	if made, err := time.Parse("20060102T150405Z", at); err != nil || time.Since(made).Abs() > time.Hour {
		t.Errorf("the request is of %q, %v", at, err)
		return ""
	}
	hash := func(b []byte) string { sum := sha256.Sum256(b); return hex.EncodeToString(sum[:]) }
	sign := func(key []byte, text string) []byte {
		m := hmac.New(sha256.New, key)
		m.Write([]byte(text))
		return m.Sum(nil)
	}
	const names = "content-length;content-type;host;x-amz-date;x-amz-target"
	headers := fmt.Sprintf("content-length:%d\ncontent-type:%s\nhost:%s\nx-amz-date:%s\nx-amz-target:%s\n", len(body),
		r.Header.Get("Content-Type"), r.Host, at, r.Header.Get("X-Amz-Target"))
	request := strings.Join([]string{r.Method, "/", "", headers, names, hash(body)}, "\n")
	scope := at[:8] + "/" + keys.AWSRegion + "/ecr/aws4_request"
	key := []byte("AWS4" + keys.Password)
	for _, part := range strings.Split(scope, "/") {
		key = sign(key, part)
	}
	text := strings.Join([]string{"AWS4-HMAC-SHA256", at, scope, hash([]byte(request))}, "\n")
	return fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x", keys.Username, scope, names,
		sign(key, text))
}
