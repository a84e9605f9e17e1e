package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"
)

// Authority signs the certificates of a cluster.
type Authority struct {
	cluster string
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
}

// NewAuthority makes an authority of a cluster.
func NewAuthority(cluster string, now time.Time) (*Authority, error) {
	if !clusterForm.MatchString(cluster) {
		return nil, fmt.Errorf("making an authority: the cluster must have the form %s", clusterForm)
	}
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "cay authority " + cluster},
		URIs:      []*url.URL{{Scheme: "cay", Host: cluster, Path: "/authority"}},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLifetime),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making an authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("making an authority: %w", err)
	}
	return &Authority{cluster: cluster, cert: cert, key: key}, nil
}

// newSerial returns a random serial number of 128 bits.
func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	return serial, nil
}

// Cluster returns the cluster of the authority.
func (a *Authority) Cluster() string { return a.cluster }

// Certificate returns the authority's own certificate as PEM, which is no secret.
func (a *Authority) Certificate() string { return encodeCertificate(a.cert.Raw) }

// Fingerprint returns the SHA-256 of the authority's public key, by which a machine that joins knows it.
func (a *Authority) Fingerprint() [sha256.Size]byte {
	return sha256.Sum256(a.cert.RawSubjectPublicKeyInfo)
}

// Sign returns a certificate for the key of a request, valid from now for [Lifetime], with the authority's behind it,
// as PEM. All that it says comes from id: of the request it takes the key alone. KeySum, Serial and NotAfter of id are
// not used.
func (a *Authority) Sign(request []byte, id Identity, now time.Time) (chain string, notAfter time.Time, err error) {
	if err := id.check(); err != nil {
		return "", time.Time{}, err
	}
	if id.Cluster != a.cluster {
		return "", time.Time{}, errors.New("signing a certificate for another cluster")
	}
	r, err := parseRequest(request)
	if err != nil {
		return "", time.Time{}, err
	}
	serial, err := newSerial()
	if err != nil {
		return "", time.Time{}, err
	}
	usage := x509.ExtKeyUsageClientAuth
	if id.Role == Replica {
		usage = x509.ExtKeyUsageServerAuth
	}
	template := &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{id.uri()}, DNSNames: []string{id.name()},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(Lifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, r.PublicKey, a.key)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("signing a certificate: %w", err)
	}
	return encodeCertificate(der) + a.Certificate(), template.NotAfter, nil
}

const (
	// MinSecret is the least length of the secret that seals an authority's key, in bytes. A shorter one could be found
	// by trying.
	MinSecret = 32
	// sealForm begins a sealed key, so that a later form can be told from this one.
	sealForm = "v1."
	saltSize = 32
)

// Seal returns the authority's key, sealed with a secret of at least [MinSecret] bytes. Only [OpenAuthority] with the
// same secret and the certificate of the same cluster opens it.
func (a *Authority) Seal(secret []byte) (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return "", fmt.Errorf("sealing the authority's key: %w", err)
	}
	salt := make([]byte, saltSize)
	if _, err := rand.Read(salt); err != nil {
		return "", fmt.Errorf("sealing the authority's key: %w", err)
	}
	aead, err := sealer(secret, salt)
	if err != nil {
		return "", fmt.Errorf("sealing the authority's key: %w", err)
	}
	return sealForm + base64.RawStdEncoding.EncodeToString(aead.Seal(salt, nil, der, []byte(a.cluster))), nil
}

// sealer returns the cipher of a secret and a salt: AES-256-GCM with a key from HKDF-SHA256. It puts a random nonce
// before what it seals.
func sealer(secret, salt []byte) (cipher.AEAD, error) {
	if len(secret) < MinSecret {
		return nil, fmt.Errorf("the secret has %d bytes, less than %d", len(secret), MinSecret)
	}
	key, err := hkdf.Key(sha256.New, secret, salt, "cay authority key", 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// OpenAuthority returns the authority that has a certificate and a key that [Authority.Seal] sealed.
func OpenAuthority(secret []byte, certificate, sealed string) (*Authority, error) {
	certs, err := parseCertificates(certificate)
	if err != nil {
		return nil, fmt.Errorf("opening the authority: %w", err)
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("opening the authority: it has %d certificates, want one", len(certs))
	}
	cluster, err := clusterOf(certs[0])
	if err != nil {
		return nil, fmt.Errorf("opening the authority: %w", err)
	}
	text, ok := strings.CutPrefix(sealed, sealForm)
	raw, err := base64.RawStdEncoding.DecodeString(text)
	if !ok || err != nil || len(raw) < saltSize {
		return nil, errors.New("opening the authority: its key is not sealed in a form that this cay knows")
	}
	aead, err := sealer(secret, raw[:saltSize])
	if err != nil {
		return nil, fmt.Errorf("opening the authority: %w", err)
	}
	der, err := aead.Open(nil, nil, raw[saltSize:], []byte(cluster))
	if err != nil {
		return nil, errors.New("opening the authority: its key was sealed with another secret, or for another cluster")
	}
	key, err := parseKey(der)
	if err != nil {
		return nil, fmt.Errorf("opening the authority: %w", err)
	}
	if !key.PublicKey.Equal(certs[0].PublicKey) {
		return nil, errors.New("opening the authority: the sealed key is not that of its certificate")
	}
	return &Authority{cluster: cluster, cert: certs[0], key: key}, nil
}

// clusterOf returns the cluster of an authority's certificate.
func clusterOf(c *x509.Certificate) (string, error) {
	if c.IsCA && len(c.URIs) == 1 && c.URIs[0].Path == "/authority" && clusterForm.MatchString(c.URIs[0].Host) {
		return c.URIs[0].Host, nil
	}
	return "", errors.New("the certificate is not that of an authority of cay")
}
