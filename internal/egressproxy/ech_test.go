package egressproxy

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// echConfig returns a key for encrypted ClientHellos with the outer name, and the configuration
// list that a client needs.
func echConfig(t *testing.T, outer string) (tls.EncryptedClientHelloKey, []byte) {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	vector := func(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }
	body := []byte{7, 0, 0x20} // its id, DHKEM(X25519)
	body = append(body, vector(key.PublicKey().Bytes())...)
	body = append(body, vector([]byte{0, 1, 0, 1})...) // HKDF-SHA256, AES-128-GCM
	body = append(body, 64, byte(len(outer)))
	body = append(append(body, outer...), 0, 0)
	config := append([]byte{0xfe, 0x0d}, vector(body)...)
	return tls.EncryptedClientHelloKey{Config: config, PrivateKey: key.Bytes(), SendAsRetry: true}, vector(config)
}

// TestEncryptedHello checks what the documentation says: of an encrypted ClientHello the outer
// name counts, and the inner one is not seen.
func TestEncryptedHello(t *testing.T) {
	r := newRig(t, 0)
	for outer, want := range map[string]bool{"allowed.example": true, "other.example": false} {
		key, list := echConfig(t, outer)
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, r.TLS.ServerName)
		}))
		server.TLS = &tls.Config{MinVersion: tls.VersionTLS13, EncryptedClientHelloKeys: []tls.EncryptedClientHelloKey{key}}
		server.StartTLS()
		defer server.Close()
		r.redirectTo(server.Listener)
		inner := "hidden.example"
		if !want {
			inner = "allowed.example" // an allowed one inside does not help
		}
		c := tls.Client(dial(t, r.proxy), &tls.Config{ServerName: inner, MinVersion: tls.VersionTLS13,
			EncryptedClientHelloConfigList: list,
			InsecureSkipVerify:             true})
		err := c.Handshake()
		if got := err == nil; got != want {
			t.Errorf("outer name %s: %v, want to pass: %v", outer, err, want)
		}
		if err != nil {
			continue
		}
		if !c.ConnectionState().ECHAccepted {
			t.Error("the ClientHello was not encrypted: the test proves nothing")
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(answer), inner) {
			t.Errorf("answered %q, %v", answer, err)
		}
	}
}
