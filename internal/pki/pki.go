// Package pki makes the keys and certificates of a cluster: its authority, which signs; the certificates of nodes and
// of API replicas, which live for a day; and the settings of TLS with which the two ends of a connection know each
// other.
//
// It owns the form of certificates. Whether a node may still speak is decided by others, from rows: a certificate says
// only whose key it is. Keys are ECDSA on P-256. An identity is a URI, cay://CLUSTER/ROLE/ID, and the only one in its
// certificate. A certificate of a node is for clients alone and one of a replica for servers alone, so a node can never
// pass for a replica.
//
// An [Authority] does not change and a [Keeper] is safe for concurrent use. After an error nothing has changed.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"time"
)

const (
	// Lifetime is the time for which a certificate is valid. A shorter one would make a node that was away for a night
	// join again; with a longer one, a stolen key without a row that refuses it works for longer.
	Lifetime = 24 * time.Hour
	// backdate sets how long before its signing a certificate begins to be valid, for machines whose clocks are behind.
	// With less, a node whose clock is wrong by minutes could not connect right after it has joined.
	backdate = time.Hour
	// authorityLifetime is the time for which an authority is valid. A cluster gets a new one before; a shorter time would
	// end a cluster whose operator forgot.
	authorityLifetime = 10 * 365 * 24 * time.Hour
	// MaxPEM limits the texts that this package decodes, in bytes. A chain of two certificates has some 1,500; the limit
	// keeps a peer from having megabytes parsed.
	MaxPEM = 16 << 10
)

// Role says what the owner of a certificate is.
type Role string

// The roles. Their names are in certificates: never change one.
const (
	Node    Role = "node"
	Replica Role = "api"
)

// Identity is the part of a certificate that says whose it is.
type Identity struct {
	Cluster string // as the records have it
	Role    Role
	ID      string // of the node or replica, 1 to 32 characters of a-z and 0-9
	KeySum  string // hex SHA-256 of the public key, as PKIX encodes it
	Serial  string // hex, for logs
	// NotAfter is the end of the certificate's validity.
	NotAfter time.Time
}

// The forms of a cluster's and of an owner's id in a certificate.
var (
	clusterForm = regexp.MustCompile(`^[A-Za-z0-9]{1,63}$`)
	ownerForm   = regexp.MustCompile(`^[a-z0-9]{1,32}$`)
)

// check returns an error if the identity cannot be in a certificate.
func (id Identity) check() error {
	switch {
	case !clusterForm.MatchString(id.Cluster):
		return fmt.Errorf("the cluster of a certificate must have the form %s", clusterForm)
	case id.Role != Node && id.Role != Replica:
		return fmt.Errorf("a certificate has no role %q", id.Role)
	case !ownerForm.MatchString(id.ID):
		return fmt.Errorf("the owner of a certificate must have the form %s", ownerForm)
	}
	return nil
}

// uri returns the identity as certificates have it.
func (id Identity) uri() *url.URL {
	return &url.URL{Scheme: "cay", Host: id.Cluster, Path: "/" + string(id.Role) + "/" + id.ID}
}

// name returns the DNS name in the certificate, which TLS compares. All replicas of a cluster have one name, since a
// node does not care which of them it talks to.
func (id Identity) name() string {
	if id.Role == Replica {
		return replicaName(id.Cluster)
	}
	return "n-" + id.ID + "." + strings.ToLower(id.Cluster)
}

func replicaName(cluster string) string { return "api." + strings.ToLower(cluster) }

// IdentityOf returns the identity in a certificate. It does not verify the certificate: TLS does.
func IdentityOf(c *x509.Certificate) (Identity, error) {
	if len(c.URIs) != 1 {
		return Identity{}, fmt.Errorf("the certificate has %d URIs, want one", len(c.URIs))
	}
	text := c.URIs[0].String()
	rest, ok := strings.CutPrefix(text, "cay://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 {
		return Identity{}, errors.New("the URI of the certificate is not cay://CLUSTER/ROLE/ID")
	}
	id := Identity{Cluster: parts[0], Role: Role(parts[1]), ID: parts[2], KeySum: keySum(c.RawSubjectPublicKeyInfo),
		NotAfter: c.NotAfter}
	if c.SerialNumber != nil {
		id.Serial = c.SerialNumber.Text(16)
	}
	if err := id.check(); err != nil {
		return Identity{}, err
	}
	return id, nil
}

// keySum returns the hex SHA-256 of a public key in PKIX form.
func keySum(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// NewKey returns a new private key.
func NewKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	return key, nil
}

const (
	pemCertificate = "CERTIFICATE"
	pemRequest     = "CERTIFICATE REQUEST"
	pemKey         = "PRIVATE KEY"
)

// EncodeKey returns a private key as PEM.
func EncodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

// ParseKey returns the private key that [EncodeKey] encoded.
func ParseKey(text []byte) (*ecdsa.PrivateKey, error) {
	der, err := onePEM(text, pemKey)
	if err != nil {
		return nil, err
	}
	return parseKey(der)
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("reading a key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("the key is not ECDSA on P-256")
	}
	return key, nil
}

// onePEM decodes a text that has one block of a kind.
func onePEM(text []byte, kind string) ([]byte, error) {
	if len(text) > MaxPEM {
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(text), MaxPEM)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != kind || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, fmt.Errorf("it is not one block of PEM of the type %s", kind)
	}
	return block.Bytes, nil
}

// parseCertificates decodes a text of certificates, at least one.
func parseCertificates(text string) ([]*x509.Certificate, error) {
	if len(text) > MaxPEM {
		return nil, fmt.Errorf("certificates have %d bytes, more than %d", len(text), MaxPEM)
	}
	var all []*x509.Certificate
	for rest := []byte(text); len(strings.TrimSpace(string(rest))) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != pemCertificate {
			return nil, errors.New("certificates are not PEM")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading a certificate: %w", err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no certificate")
	}
	return all, nil
}

func encodeCertificate(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der}))
}

// NewRequest returns a request for a certificate of a key, as PEM. It names nobody: the authority decides the names.
func NewRequest(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der}), nil
}

// RequestKeySum checks a request for a certificate and returns the [Identity.KeySum] of its key. The request must be
// signed with its own key, which must be ECDSA on P-256, and must ask for no extensions.
func RequestKeySum(request []byte) (string, error) {
	r, err := parseRequest(request)
	if err != nil {
		return "", err
	}
	return keySum(r.RawSubjectPublicKeyInfo), nil
}

func parseRequest(request []byte) (*x509.CertificateRequest, error) {
	der, err := onePEM(request, pemRequest)
	if err != nil {
		return nil, err
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	key, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("its key is not ECDSA on P-256")
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("it is not signed with its key: %w", err)
	}
	if len(r.Extensions) > 0 {
		return nil, errors.New("it asks for extensions, which the authority decides")
	}
	return r, nil
}
