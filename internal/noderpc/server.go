package noderpc

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/pki"
)

const (
	// joinsPerSecond and joinBurst limit joins of all machines together: each signs a certificate. A fleet that starts at
	// once joins within minutes; more at once would let strangers keep the replica busy.
	joinsPerSecond, joinBurst = 5, 20
)

// Config holds the settings of a handler.
type Config struct {
	Nodes *fleet.Service
	// Failed is told the address of each machine that wants to join, since all but the first call with a token may be
	// guesses. It returns an error if the address has made too many such calls.
	Failed func(address string) error
	Log    *slog.Logger
}

// handler serves the calls of nodes.
type handler struct {
	Config
	joins *rate.Limiter
}

// NewHandler returns the handler of a replica's calls. Serve it with [pki.Keeper.ServerConfig], which verifies the
// certificates.
func NewHandler(cfg Config) http.Handler {
	h := &handler{Config: cfg, joins: rate.NewLimiter(joinsPerSecond, joinBurst)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathJoin, answering(h, h.mayJoin, h.join))
	mux.HandleFunc("POST "+pathRenew, asNode(h, h.renew))
	mux.HandleFunc("POST "+pathSession, asNode(h, h.session(cfg.Nodes.Begin)))
	mux.HandleFunc("POST "+pathBeat, asNode(h, h.beat))
	mux.HandleFunc("POST "+pathLeave, asNode(h, h.leave))
	return mux
}

// mayJoin refuses joins that are too many, before anything of them is read. Those of one address are counted first, so
// that it cannot keep the others out.
func (h *handler) mayJoin(r *http.Request) error {
	if err := h.Failed(r.RemoteAddr); err != nil {
		return err
	}
	if !h.joins.Allow() {
		return fault.New(fault.Exhausted, fault.CodeRateLimited, "too many machines join at once").After(time.Second)
	}
	return nil
}

func (h *handler) join(r *http.Request, in joinRequest) (joined, error) {
	j, err := h.Nodes.Join(r.Context(), fleet.JoinRequest{Token: in.Token, CSR: in.CSR, Name: in.Name,
		About: fleet.About{Version: in.Version, VCPUs: in.VCPUs, MemoryMB: in.MemoryMB, MaxSandboxes: in.MaxSandboxes}})
	return joinedOf(j), err
}

func (h *handler) renew(r *http.Request, who fleet.Identity, in renewRequest) (joined, error) {
	j, err := h.Nodes.Renew(r.Context(), who, in.Session, in.CSR)
	return joinedOf(j), err
}

func (h *handler) session(call func(context.Context, fleet.Identity, string) (fleet.Lease, error)) func(*http.Request,
	fleet.Identity, sessionRequest) (lease, error) {
	return func(r *http.Request, who fleet.Identity, in sessionRequest) (lease, error) {
		l, err := call(r.Context(), who, in.Session)
		return leaseOf(l), err
	}
}

// beat extends a lease.
func (h *handler) beat(r *http.Request, who fleet.Identity, in beatRequest) (lease, error) {
	l, err := h.Nodes.Beat(r.Context(), who, in.Session,
		fleet.Load{MemoryFreeMB: in.MemoryFreeMB, Sandboxes: in.Sandboxes, Starting: in.Starting})
	return leaseOf(l), err
}

func (h *handler) leave(r *http.Request, who fleet.Identity, in sessionRequest) (struct{}, error) {
	return struct{}{}, h.Nodes.Leave(r.Context(), who, in.Session)
}

// asNode returns the handler that calls f for the node of the request's certificate. It reads nothing of requests
// without one.
func asNode[In, Out any](h *handler, f func(*http.Request, fleet.Identity, In) (Out, error)) http.HandlerFunc {
	may := func(r *http.Request) error {
		_, err := identity(r)
		return err
	}
	return answering(h, may, func(r *http.Request, in In) (out Out, err error) {
		who, err := identity(r)
		if err != nil {
			return out, err
		}
		return f(r, who, in)
	})
}

// identity returns the node whose certificate the request has. TLS has verified the certificate when the connection
// began; the connection may have outlived it.
func identity(r *http.Request) (fleet.Identity, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return fleet.Identity{}, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated,
			"this call needs a node's certificate")
	}
	return NodeOf(r.TLS.PeerCertificates[0])
}

// NodeOf returns the node whose certificate TLS has verified. It returns Denied, code "node_refused", for a certificate
// that is not a node's or has expired since.
func NodeOf(c *x509.Certificate) (fleet.Identity, error) {
	id, err := pki.IdentityOf(c)
	switch {
	case err != nil:
		return fleet.Identity{}, fault.New(fault.Denied, fault.CodeNodeRefused, "%s", err)
	case id.Role != pki.Node:
		return fleet.Identity{}, fleet.Refused("its certificate is not that of a node")
	case time.Now().After(id.NotAfter):
		return fleet.Identity{}, fleet.Refused("its certificate has expired since it connected")
	}
	return fleet.Identity{Cluster: id.Cluster, Node: id.ID, KeySum: id.KeySum}, nil
}

// answering returns the handler that reads a body for f, unless may returns an error, and writes f's answer.
func answering[In, Out any](h *handler, may func(*http.Request) error,
	f func(*http.Request, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		out, err := *new(Out), may(r)
		if err == nil {
			err = readBody(w, r, &in)
		}
		if err == nil {
			out, err = f(r, in)
		}
		if err != nil {
			h.fail(w, r, err)
			return
		}
		write(w, http.StatusOK, out)
	}
}

func readBody(w http.ResponseWriter, r *http.Request, into any) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return fault.New(fault.TooLarge, fault.CodeBodyTooLarge, "the body has more than %d bytes", maxBody)
	case err != nil:
		return fault.New(fault.Invalid, fault.CodeIncompleteBody, "the body ended early")
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fault.New(fault.Invalid, fault.CodeInvalidJSON, "the body is not the JSON object of this call")
	}
	return nil
}

// fail answers with an error. The texts of errors without a kind are for the log alone.
func (h *handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	f := fault.As(err)
	if f == nil || f.Kind == fault.Internal {
		h.Log.ErrorContext(r.Context(), "a call of a node failed", "path", r.URL.Path, "remote", r.RemoteAddr, "error", err)
		f = fault.New(fault.Internal, fault.CodeInternal, "the replica failed; its log has the cause")
	} else {
		level := slog.LevelInfo
		if (r.TLS == nil || len(r.TLS.VerifiedChains) == 0) && f.Kind != fault.Conflict {
			level = slog.LevelDebug // strangers must not fill the log
		}
		h.Log.Log(r.Context(), level, "refused a call of a node", "path", r.URL.Path, "remote", r.RemoteAddr, "code", f.Code,
			"detail", f.Detail)
	}
	write(w, f.Kind.Status(), problem{Code: f.Code, Detail: f.Detail, Field: f.Field,
		RetryAfterMs: f.RetryAfter.Milliseconds()})
}

func write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails if the node has left
}

// CA is a [fleet.CA] that signs with an authority of package pki.
type CA struct {
	Signer *pki.Authority
	// Trusted has the certificates of all authorities to trust, as PEM.
	Trusted string
}

// KeySum implements [fleet.CA].
func (c CA) KeySum(request string) (string, error) {
	sum, err := pki.RequestKeySum([]byte(request))
	if err != nil {
		return "", fault.InvalidField("csr", "%s", err)
	}
	return sum, nil
}

// Sign implements [fleet.CA].
func (c CA) Sign(request string, node fleet.ID, now time.Time) (string, error) {
	chain, _, err := c.Signer.Sign([]byte(request), pki.Identity{Cluster: c.Cluster(), Role: pki.Node, ID: node}, now)
	return chain, err
}

// Authorities implements [fleet.CA].
func (c CA) Authorities() string { return c.Trusted }

// Fingerprint implements [fleet.CA].
func (c CA) Fingerprint() [32]byte { return c.Signer.Fingerprint() }

// Cluster implements [fleet.CA].
func (c CA) Cluster() string { return c.Signer.Cluster() }
