package caytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"testing"
	"time"
)

// Authority signs certificates for the connections of a test.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes an authority.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{}
	own := &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}
	signed, err := a.sign(own)
	if err == nil {
		a.key = signed.PrivateKey.(*ecdsa.PrivateKey)
		a.cert, err = x509.ParseCertificate(signed.Certificate[0])
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// savedAuthority is the form in which another process of the test gets an authority.
type savedAuthority struct{ Cert, Key []byte }

// Save returns the authority for [LoadAuthority].
func (a *Authority) Save(t testing.TB) string {
	t.Helper()
	key, err := x509.MarshalECPrivateKey(a.key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(savedAuthority{a.cert.Raw, key})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// LoadAuthority returns the authority that another process of the test saved.
func LoadAuthority(text string) (*Authority, error) {
	var saved savedAuthority
	if err := json.Unmarshal([]byte(text), &saved); err != nil {
		return nil, fmt.Errorf("reading an authority: %w", err)
	}
	cert, err := x509.ParseCertificate(saved.Cert)
	if err != nil {
		return nil, fmt.Errorf("reading an authority: %w", err)
	}
	key, err := x509.ParseECPrivateKey(saved.Key)
	if err != nil {
		return nil, fmt.Errorf("reading an authority: %w", err)
	}
	return &Authority{cert, key}, nil
}

// sign makes a key and its certificate. The first certificate of an authority is signed with its own key.
func (a *Authority) sign(c *x509.Certificate) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making a key: %w", err)
	}
	number, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making a number: %w", err)
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = number, time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent, by := a.cert, a.key
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("signing a certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

func (a *Authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// ServerConfig returns the configuration of a TLS 1.3 server with the name. Clients may have a certificate of the
// authority.
func (a *Authority) ServerConfig(name string) (*tls.Config, error) {
	own, err := a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own}, ClientCAs: a.pool(),
		ClientAuth: tls.VerifyClientCertIfGiven, SessionTicketsDisabled: true, DynamicRecordSizingDisabled: true}, err
}

// ClientConfig returns the configuration of a TLS 1.3 client with the name, of a server with the name server.
func (a *Authority) ClientConfig(name, server string) (*tls.Config, error) {
	own, err := a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own}, RootCAs: a.pool(),
		ServerName: server, DynamicRecordSizingDisabled: true}, err
}

// Each returns a function that returns a configuration with protocols of ALPN, for each connection anew.
func Each(c *tls.Config, err error) func(protocols ...string) *tls.Config {
	if err != nil {
		panic(err)
	}
	return func(protocols ...string) *tls.Config {
		c := c.Clone()
		c.NextProtos = protocols
		return c
	}
}
