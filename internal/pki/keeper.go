package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Keeper has the present certificate of a key, and the authorities that its owner trusts.
type Keeper struct {
	key *ecdsa.PrivateKey

	mu sync.Mutex
	// +checklocks:mu
	kept kept
}

// kept holds what a renewal replaces. It does not change.
type kept struct {
	cert  *tls.Certificate
	pool  *x509.CertPool
	id    Identity
	begin time.Time // when the certificate was signed
}

// NewKeeper returns a Keeper of a key with its certificate chain and the authorities to trust, as PEM. It refuses a
// certificate of another key, and one that the authorities have not signed.
func NewKeeper(key *ecdsa.PrivateKey, chain, authorities string) (*Keeper, error) {
	k := &Keeper{key: key}
	if err := k.Replace(chain, authorities); err != nil {
		return nil, err
	}
	return k, nil
}

// Replace makes new connections use another certificate of the same key and other authorities. Connections that there
// are go on.
func (k *Keeper) Replace(chain, authorities string) error {
	certs, err := parseCertificates(chain)
	if err != nil {
		return err
	}
	trusted, err := parseCertificates(authorities)
	if err != nil {
		return err
	}
	leaf := certs[0]
	id, err := IdentityOf(leaf)
	if err != nil {
		return err
	}
	if !k.key.PublicKey.Equal(leaf.PublicKey) {
		return errors.New("the certificate is of another key")
	}
	next := kept{pool: x509.NewCertPool(), id: id, begin: leaf.NotBefore.Add(backdate),
		cert: &tls.Certificate{PrivateKey: k.key, Leaf: leaf}}
	for _, c := range trusted {
		next.pool.AddCert(c)
	}
	for _, c := range certs {
		next.cert.Certificate = append(next.cert.Certificate, c.Raw)
	}
	// An expired one may be kept, to say so; it is verified as of its own time.
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: next.pool, CurrentTime: leaf.NotBefore,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("no trusted authority has signed the certificate: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = next
	return nil
}

func (k *Keeper) now() kept {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.kept
}

// Identity returns the identity of the present certificate.
func (k *Keeper) Identity() Identity { return k.now().id }

// Request returns a certificate request of the key, as PEM.
func (k *Keeper) Request() ([]byte, error) { return NewRequest(k.key) }

const (
	// firstRetry and lastRetry bound the waits after a renewal that failed. There are twelve hours for it: shorter waits
	// would trouble a replica that is away, longer ones could miss the last hour.
	firstRetry = 10 * time.Second
	lastRetry  = 10 * time.Minute
	// lookEvery is the longest time between two looks at the clock. Timers do not notice that it was set, or that the
	// machine was paused.
	lookEvery = time.Minute
)

// Run renews the certificate whenever half of its time is over, until ctx ends or the certificate has expired, and
// returns why it stopped. renew gets a request for a certificate and returns the new one and the authorities, as PEM.
// If it fails, failed gets the error, and Run tries again.
func (k *Keeper) Run(ctx context.Context, renew func(ctx context.Context, request []byte) (chain, authorities string,
	err error), failed func(error)) error {
	wait := firstRetry
	for {
		now := k.now()
		half := now.begin.Add(now.id.NotAfter.Sub(now.begin) / 2)
		pause := min(time.Until(half), lookEvery)
		if pause <= 0 {
			if time.Now().After(now.id.NotAfter) {
				return errors.New("the certificate has expired and cannot be renewed any more")
			}
			err := k.renew(ctx, renew)
			if err == nil {
				wait = firstRetry
				continue
			}
			failed(err)
			// All nodes ask a replica that comes back; some of them later.
			pause = wait/2 + rand.N(wait/2)
			wait = min(2*wait, lastRetry)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

func (k *Keeper) renew(ctx context.Context, renew func(context.Context, []byte) (string, string, error)) error {
	request, err := k.Request()
	if err != nil {
		return err
	}
	before := k.Identity()
	chain, authorities, err := renew(ctx, request)
	if err != nil {
		return fmt.Errorf("renewing the certificate: %w", err)
	}
	if err := k.Replace(chain, authorities); err != nil {
		return fmt.Errorf("renewing the certificate: %w", err)
	}
	if after := k.Identity(); !after.NotAfter.After(before.NotAfter) {
		return errors.New("renewing the certificate: the new one is not valid for longer")
	}
	return nil
}

// common returns the settings that all connections have. Session tickets are off, since a resumed session would carry
// the certificate of an earlier one. Small records would cost a download a third of its speed.
func common(protocols []string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: protocols, SessionTicketsDisabled: true,
		DynamicRecordSizingDisabled: true}
}

// ServerConfig returns the settings of a replica's listener. A client may come without a certificate, as a machine that
// joins does; one that it presents must be a node's, of an authority that k trusts when the connection begins.
func (k *Keeper) ServerConfig(protocols ...string) *tls.Config {
	c := common(protocols)
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := k.now()
		c := common(protocols)
		c.Certificates, c.ClientCAs, c.ClientAuth = []tls.Certificate{*now.cert}, now.pool, tls.VerifyClientCertIfGiven
		return c, nil
	}
	return c
}

// ClientConfig returns the settings of a node's next connection to a replica of its cluster. They have the present
// certificate and authorities: ask for them for each connection.
func (k *Keeper) ClientConfig(protocols ...string) *tls.Config {
	now := k.now()
	c := common(protocols)
	c.Certificates, c.RootCAs, c.ServerName = []tls.Certificate{*now.cert}, now.pool, replicaName(now.id.Cluster)
	return c
}

// JoinConfig returns the settings of the connection on which a machine joins a cluster. It trusts the authority with a
// fingerprint, whose certificate the replica must send, and a replica of that authority's cluster.
func JoinConfig(fingerprint [sha256.Size]byte, protocols ...string) *tls.Config {
	c := common(protocols)
	// The authority is not known before the replica has sent it, so TLS cannot verify by a pool: VerifyConnection does.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(s tls.ConnectionState) error {
		for _, authority := range s.PeerCertificates {
			if sha256.Sum256(authority.RawSubjectPublicKeyInfo) != fingerprint {
				continue
			}
			cluster, err := clusterOf(authority)
			if err != nil {
				return err
			}
			pool := x509.NewCertPool()
			pool.AddCert(authority)
			_, err = s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: replicaName(cluster),
				KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		}
		return errors.New("the server does not belong to the cluster that the token is of")
	}
	return c
}
