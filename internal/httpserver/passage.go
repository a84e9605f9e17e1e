package httpserver

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/cayhq/cay/internal/auth"
)

// Headers between servers. A caller's headers that begin with the prefix go no further than the first server.
const (
	ownPrefix     = "Cay-"
	passageHeader = "Cay-Passage"
	nodeHeader    = "Cay-Node"
	sandboxHeader = "Cay-Sandbox" // of an answer: the sandbox that a call made
)

// noNode stands for the name of a node in the header Cay-Node of a refusal. It is the name of none.
const noNode = "-"

// maxPassage bounds the content of the header Cay-Passage, in bytes of JSON. The names and scopes that it has take less
// than 2 KiB.
const maxPassage = 8 << 10

// Passage says what a replica has decided about a request that it forwards to a node. It travels in a header of the
// request, and holds no secret of the caller.
type Passage struct {
	ID      string         `json:"id"`                // of the request
	Front   string         `json:"front"`             // the handler that serves it, such as "api" or "e2b.traffic"
	Who     auth.Principal `json:"who"`               // zero without a key; the key's hash and prefix do not travel
	Org     string         `json:"org"`               // pays for the request
	Quota   auth.Quota     `json:"quota"`             // of Org
	Sandbox string         `json:"sandbox,omitempty"` // that the request is for
	Port    int            `json:"port,omitempty"`    // of the sandbox, for traffic
	Shared  bool           `json:"shared,omitempty"`  // the host name that the caller used does not name the port
	Offered bool           `json:"offered,omitempty"` // another node may do it if this one has no room

	// Forward sets the rest.

	Remote string `json:"remote"` // address of the caller
	Proto  int    `json:"proto"`  // major version of HTTP that the caller speaks; gRPC needs 2
	TLS    bool   `json:"tls"`    // the caller's connection is TLS
	// Nonce is known to the two servers alone, so that no program in a sandbox can answer with the header Cay-Node.
	Nonce string `json:"nonce"`
}

// sealed returns the passage of a request as the content of the header.
func (p Passage) sealed(r *http.Request) (content, nonce string, err error) {
	p.Who.Key.Hash, p.Who.Key.Prefix = nil, ""
	p.Remote, p.Proto, p.TLS, p.Nonce = r.RemoteAddr, r.ProtoMajor, r.TLS != nil, rand.Text()
	b, err := json.Marshal(p)
	if err != nil {
		return "", "", fmt.Errorf("encoding a passage: %w", err)
	}
	if len(b) > maxPassage {
		return "", "", fmt.Errorf("the passage of a request has %d bytes, over %d", len(b), maxPassage)
	}
	return base64.StdEncoding.EncodeToString(b), p.Nonce, nil
}

// readPassage reads the content of the header.
func readPassage(content string) (Passage, error) {
	if len(content) > base64.StdEncoding.EncodedLen(maxPassage) {
		return Passage{}, fmt.Errorf("the passage has more than %d bytes", maxPassage)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(content)
	if err != nil {
		return Passage{}, errors.New("the passage is not base64")
	}
	var p Passage
	if err := json.Unmarshal(b, &p); err != nil {
		return Passage{}, fmt.Errorf("decoding a passage: %w", err)
	}
	switch {
	case !saneID.MatchString(p.ID):
		return Passage{}, errors.New("id is not the id of a request")
	case p.Front == "":
		return Passage{}, errors.New("front is missing")
	case p.Remote == "":
		return Passage{}, errors.New("remote is missing")
	case p.Proto != 1 && p.Proto != 2:
		return Passage{}, fmt.Errorf("proto is %d, not 1 or 2", p.Proto)
	case p.Nonce == "":
		return Passage{}, errors.New("nonce is missing")
	}
	return p, nil
}

type passageKey struct{}

// PassageOf returns the passage of a forwarded request, which [Admit] put into its context.
func PassageOf(ctx context.Context) (Passage, bool) {
	p, ok := ctx.Value(passageKey{}).(Passage)
	return p, ok
}

// Admit returns the handler of requests that replicas forward. It takes each request's passage; next sees the request
// as the replica did, with the caller's address and version of HTTP. Only connections of replicas may lead to it: the
// passage grants the request its rights. It answers 403 to a request without a passage, and to one whose connection has
// no verified certificate that is a replica's by the function.
func Admit(replica func(*x509.Certificate) error, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := admitted(replica, r)
		if err != nil {
			http.Error(w, "forwarding refused: "+err.Error(), http.StatusForbidden)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), passageKey{}, p))
		withoutOwn(r.Header)
		r.RemoteAddr, r.TLS = p.Remote, nil
		if p.TLS {
			r.TLS = &tls.ConnectionState{} // of which the replica alone knows more
		}
		if p.Proto == 2 {
			r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
			// An answer over HTTP/2 may begin before the request has ended. The writers of tests do not have it, so the error
			// is ignored.
			_ = http.NewResponseController(w).EnableFullDuplex()
		}
		next.ServeHTTP(w, r)
	})
}

func admitted(replica func(*x509.Certificate) error, r *http.Request) (Passage, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return Passage{}, errors.New("the connection has no certificate")
	}
	if err := replica(r.TLS.PeerCertificates[0]); err != nil {
		return Passage{}, err
	}
	content := r.Header[passageHeader]
	if len(content) != 1 {
		return Passage{}, fmt.Errorf("the request has %d passages, not one", len(content))
	}
	return readPassage(content[0])
}

// withoutOwn removes the headers that only servers send to each other.
func withoutOwn(h http.Header) {
	for name := range h {
		if isOwn(name) {
			delete(h, name)
		}
	}
}

// isOwn reports whether only servers send the header to each other.
func isOwn(name string) bool {
	return len(name) >= len(ownPrefix) && strings.EqualFold(name[:len(ownPrefix)], ownPrefix)
}

// Misdirect answers a forwarded request with the node that has what it asks for; see [Misdirected].
func Misdirect(w http.ResponseWriter, r *http.Request, node string) {
	if p, ok := PassageOf(r.Context()); ok {
		w.Header().Set(nodeHeader, p.Nonce+" "+node)
	}
	w.WriteHeader(http.StatusMisdirectedRequest)
}
