package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

const cluster = "ABCDEFGHIJKLMNOPQRSTUVWX23"

var secret = []byte(strings.Repeat("s", MinSecret))

func authority(t testing.TB, cluster string) *Authority {
	t.Helper()
	a, err := NewAuthority(cluster, time.Now().Add(-48*time.Hour)) // before any certificate that the tests sign
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// keeperOf returns a Keeper with a certificate that a signs now.
func keeperOf(t testing.TB, a *Authority, role Role, id string) *Keeper {
	t.Helper()
	return keeperAt(t, a, role, id, time.Now())
}

func keeperAt(t testing.TB, a *Authority, role Role, id string, now time.Time) *Keeper {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	request, err := NewRequest(key)
	if err != nil {
		t.Fatal(err)
	}
	chain, _, err := a.Sign(request, Identity{Cluster: a.Cluster(), Role: role, ID: id}, now)
	if err != nil {
		t.Fatal(err)
	}
	k, err := NewKeeper(key, chain, a.Certificate())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// requestOf returns a certificate request with a content that NewRequest never makes.
func requestOf(t *testing.T, template *x509.CertificateRequest, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der})
}

// TestCSRDecidesNothing signs requests that ask for names and rights, and checks that a certificate has what the
// authority decides and nothing else, or that the request is refused.
func TestCSRDecidesNothing(t *testing.T) {
	a := authority(t, cluster)
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	id := Identity{Cluster: cluster, Role: Node, ID: "abc123"}
	now := time.Now().Truncate(time.Second)
	named := requestOf(t, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "api." + strings.ToLower(cluster),
		Organization: []string{"admins"}}}, key)
	chain, notAfter, err := a.Sign(named, id, now)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := parseCertificates(chain)
	if err != nil || len(certs) != 2 {
		t.Fatalf("%d certificates, %v", len(certs), err)
	}
	c := certs[0]
	if c.Subject.String() != "" || c.IsCA || !slices.Equal(c.DNSNames, []string{"n-abc123." + strings.ToLower(cluster)}) ||
		len(c.URIs) != 1 || len(c.IPAddresses)+len(c.EmailAddresses) > 0 ||
		!slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) ||
		c.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("the certificate is %+v", c)
	}
	if !c.NotBefore.Equal(now.Add(-time.Hour)) || !c.NotAfter.Equal(now.Add(Lifetime)) || !notAfter.Equal(c.NotAfter) {
		t.Errorf("valid from %s to %s, signed at %s", c.NotBefore, c.NotAfter, now)
	}
	got, err := IdentityOf(c)
	sum, sumErr := RequestKeySum(named)
	if err != nil || sumErr != nil || got.Cluster != cluster || got.Role != Node || got.ID != "abc123" ||
		got.KeySum != sum || len(got.Serial) < 20 || !got.NotAfter.Equal(c.NotAfter) {
		t.Errorf("the identity is %+v, %v, %v", got, err, sumErr)
	}

	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := requestOf(t, &x509.CertificateRequest{}, key)
	block, _ := pem.Decode(forged)
	block.Bytes[len(block.Bytes)-1] ^= 1
	u := &url.URL{Scheme: "cay", Host: cluster, Path: "/api/abc123"}
	for name, request := range map[string][]byte{
		"RSA":            requestOf(t, &x509.CertificateRequest{}, small),
		"P-224":          requestOf(t, &x509.CertificateRequest{}, other),
		"DNS names":      requestOf(t, &x509.CertificateRequest{DNSNames: []string{"api." + strings.ToLower(cluster)}}, key),
		"URIs":           requestOf(t, &x509.CertificateRequest{URIs: []*url.URL{u}}, key),
		"addresses":      requestOf(t, &x509.CertificateRequest{IPAddresses: []net.IP{{127, 0, 0, 1}}}, key),
		"an authority":   requestOf(t, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{isCA(t)}}, key),
		"not its key's":  pem.EncodeToMemory(block),
		"empty":          nil,
		"a certificate":  []byte(a.Certificate()),
		"two requests":   append(slices.Clone(named), named...),
		"a megabyte":     append(slices.Clone(named), make([]byte, 1<<20)...),
		"not PEM":        []byte("-----BEGIN CERTIFICATE REQUEST-----\nMIIB"),
		"nothing inside": pem.EncodeToMemory(&pem.Block{Type: pemRequest}),
	} {
		if _, _, err := a.Sign(request, id, now); err == nil {
			t.Errorf("signed a request: %s", name)
		}
		if _, err := RequestKeySum(request); err == nil {
			t.Errorf("accepted a request: %s", name)
		}
	}
	for _, id := range []Identity{
		{Cluster: "OTHER", Role: Node, ID: "abc123"}, {Cluster: cluster, Role: "authority", ID: "abc123"},
		{Cluster: cluster, Role: Node}, {Cluster: cluster, Role: Node, ID: "a/b"}, {Role: Node, ID: "abc123"},
	} {
		if _, _, err := a.Sign(named, id, now); err == nil {
			t.Errorf("signed for %+v", id)
		}
	}
}

// isCA returns the extension that makes a certificate that of an authority.
func isCA(t *testing.T) pkix.Extension {
	t.Helper()
	value, err := asn1.Marshal(struct{ IsCA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: value}
}

// TestSealNeedsSecret checks that rows of the database open no authority without the secret file.
func TestSealNeedsSecret(t *testing.T) {
	a, b := authority(t, cluster), authority(t, "OTHER")
	sealed, err := a.Seal(secret)
	if err != nil {
		t.Fatal(err)
	}
	ofB, err := b.Seal(secret)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := a.Seal(secret); err != nil || again == sealed {
		t.Errorf("sealed twice to the same text, %v", err)
	}
	opened, err := OpenAuthority(secret, a.Certificate(), sealed)
	if err != nil || opened.Cluster() != cluster || opened.Fingerprint() != a.Fingerprint() || !opened.key.Equal(a.key) {
		t.Fatalf("opened %+v, %v", opened, err)
	}
	wrong := []byte(strings.Repeat("t", MinSecret))
	broken := sealed[:len(sealed)-4] + "AAAA"
	for name, c := range map[string]struct {
		secret      []byte
		certificate string
		sealed      string
	}{
		"no secret":                     {nil, a.Certificate(), sealed},
		"a short secret":                {secret[:MinSecret-1], a.Certificate(), sealed},
		"another secret":                {wrong, a.Certificate(), sealed},
		"another cluster's certificate": {secret, b.Certificate(), sealed},
		"another cluster's key":         {secret, a.Certificate(), ofB},
		"a changed key":                 {secret, a.Certificate(), broken},
		"another form":                  {secret, a.Certificate(), "v2." + strings.TrimPrefix(sealed, sealForm)},
		"nothing":                       {secret, a.Certificate(), ""},
		"a short text":                  {secret, a.Certificate(), "v1.AAAA"},
		"no certificate":                {secret, "", sealed},
		"two certificates":              {secret, a.Certificate() + b.Certificate(), sealed},
	} {
		if _, err := OpenAuthority(c.secret, c.certificate, c.sealed); err == nil {
			t.Errorf("opened an authority with %s", name)
		}
	}
	if _, err := a.Seal(secret[:MinSecret-1]); err == nil {
		t.Error("sealed with a short secret")
	}
	// Another authority of the same cluster: the key is not that of its certificate.
	if _, err := OpenAuthority(secret, authority(t, cluster).Certificate(), sealed); err == nil {
		t.Error("opened a key with the certificate of another one")
	}
	leaf, _, err := a.Sign(must(t)(NewRequest(a.key)), Identity{Cluster: cluster, Role: Node, ID: "a"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(secret, strings.TrimSuffix(leaf, a.Certificate()), sealed); err == nil {
		t.Error("opened a node's certificate as an authority")
	}
}

func must(t *testing.T) func(b []byte, err error) []byte {
	return func(b []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// shake makes a connection of TLS between two ends and returns the errors of both. The server's end reads, since with
// TLS 1.3 a client learns with its first read that the server refuses its certificate.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer conn.Close()
		c := tls.Server(conn, server)
		_ = conn.SetDeadline(time.Now().Add(90 * time.Second))
		_, err = c.Write([]byte{1})
		done <- err
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(90 * time.Second))
	c := tls.Client(conn, client)
	_, clientErr = c.Read(make([]byte, 1))
	return <-done, clientErr
}

// TestNodeCertIsNoServer makes connections with the wrong certificate at each end. A node's certificate serves nobody,
// and a replica's is no client's.
func TestNodeCertIsNoServer(t *testing.T) {
	a, foreign := authority(t, cluster), authority(t, cluster) // the same name, another key
	node, replica := keeperOf(t, a, Node, "aaaaaa"), keeperOf(t, a, Replica, "bbbbbb")
	now := time.Now()
	over, early := now.Add(-Lifetime-time.Second), now.Add(2*time.Hour)
	old := keeperAt(t, a, Replica, "bbbbbb", over)
	for name, c := range map[string]struct {
		server, client *tls.Config
		works          bool
	}{
		"a node to a replica":       {replica.ServerConfig(), node.ClientConfig(), true},
		"no certificate":            {replica.ServerConfig(), withoutCertificate(node), true},
		"a join":                    {replica.ServerConfig(), JoinConfig(a.Fingerprint()), true},
		"a node to a node":          {node.ServerConfig(), node.ClientConfig(), false},
		"a replica to a replica":    {replica.ServerConfig(), replica.ClientConfig(), false},
		"a join to a node":          {node.ServerConfig(), JoinConfig(a.Fingerprint()), false},
		"a join to another cluster": {replica.ServerConfig(), JoinConfig(foreign.Fingerprint()), false},
		"a node of another authority": {replica.ServerConfig(),
			trusting(keeperOf(t, foreign, Node, "aaaaaa"), replica), false},
		"a replica of another authority": {keeperOf(t, foreign, Replica, "bbbbbb").ServerConfig(),
			node.ClientConfig(), false},
		"a node whose certificate is over": {replica.ServerConfig(),
			keeperAt(t, a, Node, "aaaaaa", over).ClientConfig(), false},
		"a node whose certificate is to be": {replica.ServerConfig(),
			keeperAt(t, a, Node, "aaaaaa", early).ClientConfig(), false},
		"a replica whose certificate is old": {old.ServerConfig(), node.ClientConfig(), false},
	} {
		serverErr, clientErr := shake(t, c.server, c.client)
		if err := errors.Join(serverErr, clientErr); (err == nil) != c.works {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The certificate of an authority is not a replica's.
	if _, err := NewKeeper(a.key, a.Certificate(), a.Certificate()); err == nil {
		t.Error("kept an authority's certificate as an identity")
	}
}

func withoutCertificate(k *Keeper) *tls.Config {
	c := k.ClientConfig()
	c.Certificates = nil
	return c
}

// trusting returns the settings of a client with k's certificate that trusts the authorities of another.
func trusting(k, other *Keeper) *tls.Config {
	c := k.ClientConfig()
	c.RootCAs = other.now().pool
	return c
}

// FuzzIdentityOf reads identities from certificates with any URIs. One that is accepted is the same when it is written
// again.
func FuzzIdentityOf(f *testing.F) {
	for _, s := range []string{"cay://A/node/b", "cay://A/api/b", "cay://A/node/b/", "cay://A/node/b?x",
		"cay://A/node/b#x", "cay://u@A/node/b", "cay://A:1/node/b", "cay:A/node/b", "CAY://A/node/b", "cay://A/node/%62",
		"cay:///node/b", "cay://A//node/b", "cay://A/authority", "https://A/node/b"} {
		f.Add(s, "")
	}
	f.Add("cay://A/node/b", "cay://A/api/b")
	f.Fuzz(func(t *testing.T, one, two string) {
		c := &x509.Certificate{RawSubjectPublicKeyInfo: []byte(one)}
		for _, text := range []string{one, two} {
			if u, err := url.Parse(text); err == nil && text != "" {
				c.URIs = append(c.URIs, u)
			}
		}
		id, err := IdentityOf(c)
		if err != nil {
			return
		}
		if len(c.URIs) != 1 || id.uri().String() != c.URIs[0].String() || id.check() != nil || len(id.KeySum) != 64 {
			t.Errorf("%q, %q is the identity %+v", one, two, id)
		}
	})
}

// TestKeys checks that keys are read as they were written, and that other texts are refused.
func TestKeys(t *testing.T) {
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	text := must(t)(EncodeKey(key))
	if got, err := ParseKey(text); err != nil || !got.Equal(key) {
		t.Errorf("read %v, %v", got, err)
	}
	der := must(t)(x509.MarshalPKCS8PrivateKey(must384(t)))
	for name, bad := range map[string][]byte{"empty": nil, "two": append(slices.Clone(text), text...),
		"P-384":         pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}),
		"a certificate": []byte(authority(t, "A").Certificate())} {
		if _, err := ParseKey(bad); err == nil {
			t.Errorf("read a key: %s", name)
		}
	}
}

func must384(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
