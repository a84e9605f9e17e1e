package fleet

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// MaxTokenTime is the longest time for which a token can be used. A machine is set up in minutes; a token that lives
	// for longer can be found in a shell's history.
	MaxTokenTime = 15 * time.Minute
	// LeaseTime is the time for which a node's session holds after its last beat. A shorter one lets a slow network look
	// like a lost node; with a longer one a server that was killed waits for longer before the next one can begin.
	LeaseTime = 30 * time.Second

	// tokenPrefix begins the texts of tokens, so that they are recognised where they should not be.
	tokenPrefix = "cayn_"
	// maxVersion limits the text of a node's version, in bytes. Those of cay have some 40.
	maxVersion = 100
)

// Token lets one machine join, once.
type Token struct {
	Hash      string // hex SHA-256 of the secret
	Rejoin    ID     // the node that it lets join again, "" for a new node
	Settings  TokenSettings
	CreatedBy string // the id of an API key
}

// TokenSettings are the operator's settings of the node that joins with a token.
type TokenSettings struct {
	Name   string            `json:"name"` // "" is the name that the machine says
	Labels map[string]string `json:"labels"`
}

// Identity says who speaks: what a certificate has, which TLS has verified.
type Identity struct {
	Cluster string
	Node    ID
	KeySum  string // hex SHA-256 of the public key
}

// Lease tells a node for how long its session holds, and its orders.
type Lease struct {
	For    time.Duration // from when the node has sent the call
	Orders Orders
}

// JoinStore keeps tokens, what nodes have joined with them, and their leases. Each method is one transaction; all times
// are of the records' clock. The contract suite of package store tests every implementation.
type JoinStore interface {
	// AddToken adds a token and returns the end of its time. It returns NotFound, code "node_not_found", if it is to let
	// a node join again that does not exist. It drops tokens that have expired a day ago.
	AddToken(ctx context.Context, t Token, valid time.Duration) (expires time.Time, err error)
	// Join uses the token with a hash and adds the node n, with the settings of the token, or gives n's key to the node
	// that the token lets join again, and ends its session. A second use of the token with the same key returns the node
	// of the first, unless the node was removed or has got another key since. Errors are Unauthenticated, codes
	// "unauthenticated" for a token that does not exist and "token_expired"; Conflict, codes "token_used" and
	// "node_exists", if the name is taken; and Denied, code "node_refused".
	Join(ctx context.Context, tokenHash string, n Node, keySum string) (Node, error)
	// EnrollNode gives a node another key and ends its session. It returns Denied, code "node_refused", if there is none
	// or it was removed.
	EnrollNode(ctx context.Context, id ID, keySum string) error
	// CheckNode returns Denied, code "node_refused", unless the node exists, is not removed and has the key. Otherwise it
	// returns the node's newest session, also if its lease is over, or "" if it has begun none or has ended it.
	CheckNode(ctx context.Context, id ID, keySum string) (session string, err error)
	// BeginLease begins a session of a node, for which CheckNode holds. It returns a Conflict, code "node_in_use", while
	// the lease of another session holds.
	BeginLease(ctx context.Context, id ID, keySum, session string, lease time.Duration) (Node, error)
	// ExtendLease extends the lease of a node's session, and writes what the node says about its machine. It returns
	// Denied, code "node_refused", if CheckNode does or the node's session is another one.
	ExtendLease(ctx context.Context, id ID, keySum, session string, lease time.Duration, load Load) (Node, error)
	// EndLease ends the session of a node, so that another one can begin at once. Its errors are those of ExtendLease.
	EndLease(ctx context.Context, id ID, keySum, session string) error
	// RemoveNode removes a node, found as by GetNode, with its session. It returns a Conflict, code "node_in_use", while
	// the node has sandboxes that are not over, or snapshots.
	RemoveNode(ctx context.Context, idOrName string) error
}

// CA signs the certificates of nodes. An error of a request that is not valid is Invalid, field "csr".
type CA interface {
	// KeySum checks a request for a certificate and returns the [Identity.KeySum] of its key.
	KeySum(request string) (string, error)
	// Sign returns a certificate of a node for the key of a request.
	Sign(request string, node ID, now time.Time) (chain string, err error)
	// Authorities returns the certificates of the authorities to trust.
	Authorities() string
	// Fingerprint returns the SHA-256 of the signing authority's public key.
	Fingerprint() [sha256.Size]byte
	// Cluster returns the cluster of the certificates.
	Cluster() string
}

// Joined holds what a machine gets that has joined or renewed its certificate. The texts are PEM.
type Joined struct {
	Node        ID
	Cluster     string
	Certificate string
	Authorities string
}

// JoinRequest holds what a machine says that joins.
type JoinRequest struct {
	Token string
	CSR   string
	Name  string // used if the token has none
	About
}

// errNotFleet refuses calls about other machines on a server that takes none.
var errNotFleet = fault.New(fault.Conflict, fault.CodeFleetOff, "this server takes no other machines: set fleet.listen")

// NewToken returns a token for one machine, and the end of its time. It is shown once: the records have its hash. by is
// the id of the API key that makes it. rejoin is the name or id of a node that is to get another key, "" for a new
// node.
func (s *Service) NewToken(ctx context.Context, by, rejoin string, settings TokenSettings,
	valid time.Duration) (text string, expires time.Time, err error) {
	switch {
	case s.cfg.CA == nil:
		return "", expires, errNotFleet
	case valid < time.Second || valid > MaxTokenTime:
		return "", expires, fault.InvalidField("expires_in", "must be between 1s and %s, not %s", MaxTokenTime, valid)
	case settings.Name != "" && CheckName(settings.Name) != nil:
		return "", expires, fault.InvalidField("name", "%s", CheckName(settings.Name))
	case rejoin != "" && (settings.Name != "" || len(settings.Labels) > 0):
		return "", expires, fault.InvalidField("rejoin", "keeps the node's name and labels, so none can be given")
	}
	if err := checkLabels(settings.Labels); err != nil {
		return "", expires, fault.InvalidField("labels", "%s", err)
	}
	if rejoin != "" {
		n, err := s.store.GetNode(ctx, rejoin)
		if err != nil {
			return "", expires, err
		}
		if n.JoinedAt.IsZero() || n.Address != "" {
			return "", expires, fault.InvalidField("rejoin", "the node %s has not joined with a token", n.Name)
		}
		rejoin = n.ID
	}
	secret := tokenPrefix + strings.ToLower(rand.Text())
	t := Token{Hash: hashOf(secret), Rejoin: rejoin, Settings: settings, CreatedBy: by}
	expires, err = s.store.AddToken(ctx, t, valid)
	if err != nil {
		return "", expires, err
	}
	fingerprint := s.cfg.CA.Fingerprint()
	s.cfg.Log.InfoContext(ctx, "made a token for a machine", "key", by, "rejoin", rejoin, "expires", expires)
	return secret + "." + base64.RawURLEncoding.EncodeToString(fingerprint[:]), expires, nil
}

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// tokenForm matches the secret of a token: its prefix and 26 base32 characters, 130 random bits.
var tokenForm = regexp.MustCompile(`^` + tokenPrefix + `[a-z2-7]{26}$`)

// ParseToken returns the secret of a token, and the fingerprint of the authority that a machine with the token trusts.
func ParseToken(text string) (secret string, fingerprint [sha256.Size]byte, err error) {
	secret, sum, ok := strings.Cut(text, ".")
	raw, decodeErr := base64.RawURLEncoding.Strict().DecodeString(sum)
	if !ok || len(text) > 100 || !tokenForm.MatchString(secret) || decodeErr != nil || len(raw) != len(fingerprint) ||
		strings.ContainsAny(sum, "\r\n") { // which the decoder skips
		return "", fingerprint, fault.InvalidField("token", "is not a token of cay nodes token")
	}
	return secret, [sha256.Size]byte(raw), nil
}

// Join lets a machine join with a token. It is safe to repeat with the same key.
func (s *Service) Join(ctx context.Context, r JoinRequest) (Joined, error) {
	if s.cfg.CA == nil {
		return Joined{}, errNotFleet
	}
	secret, fingerprint, err := ParseToken(r.Token)
	if err == nil && fingerprint != s.cfg.CA.Fingerprint() {
		err = fault.New(fault.Unauthenticated, fault.CodeUnauthenticated, "the token is of another cluster")
	}
	if err != nil {
		return Joined{}, err
	}
	if err := r.check(); err != nil {
		return Joined{}, err
	}
	keySum, err := s.cfg.CA.KeySum(r.CSR)
	if err != nil {
		return Joined{}, err
	}
	n := Node{ID: strings.ToLower(rand.Text()[:6]), Name: r.Name, About: r.About}
	n, err = s.store.Join(ctx, hashOf(secret), n, keySum)
	if err != nil {
		return Joined{}, err
	}
	s.cfg.Log.InfoContext(ctx, "a machine has joined", "node", n.ID, "name", n.Name, "key", keySum)
	return s.sign(r.CSR, n.ID)
}

// check refuses what no machine may say.
func (r JoinRequest) check() error {
	if err := CheckName(r.Name); err != nil {
		return fault.InvalidField("name", "%s", err)
	}
	for field, n := range map[string]int{"vcpus": r.VCPUs, "memory_mb": r.MemoryMB, "max_sandboxes": r.MaxSandboxes} {
		if n < 0 || n > 1<<30 {
			return fault.InvalidField(field, "must be between 0 and %d", 1<<30)
		}
	}
	if len(r.Version) > maxVersion {
		return fault.InvalidField("version", "has more than %d bytes", maxVersion)
	}
	return nil
}

func (s *Service) sign(request string, id ID) (Joined, error) {
	chain, err := s.cfg.CA.Sign(request, id, s.cfg.Now())
	if err != nil {
		return Joined{}, err
	}
	return Joined{Node: id, Cluster: s.cfg.CA.Cluster(), Certificate: chain, Authorities: s.cfg.CA.Authorities()}, nil
}
