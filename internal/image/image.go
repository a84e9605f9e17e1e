// Package image makes root file systems: one read-only EROFS file each, named
// by the SHA-256 of its bytes.
//
// It owns the directory of finished images, the shared cache beside it, the OCI
// images that were pulled, how an OCI image or a set of Debian packages becomes an
// EROFS file and how that becomes an OCI image again, and the removal of files
// nobody uses. It does not know what an image is for: callers say what goes in
// ([Source]), which registries may be asked ([Config]) and which images they still
// need.
//
// A [Store] is safe for concurrent use. An image or a pulled layout appears whole
// under its final name or not at all, and never changes afterwards; after an error
// or a crash only the directory "tmp" may hold leftovers, which the next [Open]
// removes.
//
// What comes in is a stranger's: every size, count and name is bounded, and what
// is refused says which entry and why. Device nodes below /dev are left out,
// counted and said, since gVisor mounts a /dev of its own; elsewhere they are
// refused. gVisor's EROFS cannot hold extended attributes, file capabilities among
// them: they stand in a file of the image (see [AttributesPath]) that the first
// process inside applies.
package image

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Errors that callers decide by: both mean that the image must be built again.
var (
	ErrMissing = errors.New("image is not in the store")
	ErrCorrupt = errors.New("image is corrupt")
)

// Defaults of [Config].
const (
	// DefaultRegistryTimeout bounds how long a registry may take to be reached
	// (name, connection, TLS) before the Debian packages are used instead. Too
	// short and a slow network never gets OCI images; too long and a machine
	// without a registry waits for nothing before its first build.
	DefaultRegistryTimeout = 5 * time.Second

	// DefaultMovingFor is how long a result of inputs that change by themselves
	// (a tag, a Debian suite) counts as current. Longer saves builds, shorter
	// brings security updates sooner.
	DefaultMovingFor = 7 * 24 * time.Hour

	// DefaultMaxSize bounds the regular files of one image, in bytes, so that a
	// hostile image (a compressed stream of zeros) cannot fill the disk.
	DefaultMaxSize = 64 << 30

	// DefaultBudget bounds what pulled OCI images take on the disk, in bytes. Less
	// downloads the same again sooner.
	DefaultBudget = 20 << 30
)

// Config says where images live.
type Config struct {
	// Dir holds the images. It belongs to one process at a time.
	Dir string
	// CacheDir is a second place where finished images are kept, shared by any
	// number of processes and never depended on; "" is none.
	CacheDir string

	RegistryTimeout time.Duration // 0 is DefaultRegistryTimeout
	MovingFor       time.Duration // 0 is DefaultMovingFor
	MaxSize         int64         // 0 is DefaultMaxSize
	Budget          int64         // of pulled OCI images, bytes; 0 is DefaultBudget

	// Dial decides about every connection to a registry, what it redirects to and
	// its token service included, by the address a name gave; its error is told to
	// whoever named the registry. nil allows all. A proxy of the environment is the
	// operator's and not asked about; names behind it are the proxy's to judge.
	Dial func(netip.AddrPort) error
	// PlainHTTP lists registries as references name them ("127.0.0.1:5000") that
	// speak plain HTTP and are not subject to Dial.
	PlainHTTP []string

	// Now replaces the clock in tests; nil is time.Now.
	Now func() time.Time
}

// Source is what an image is made from: at most one of Image, Layout and Archive,
// if it can be had and holds every program of Require, else Debian. At least one
// must be set.
type Source struct {
	Image string `json:"image,omitempty"` // OCI reference
	// Auth is what the registry of Image wants; nil asks anonymously. What was
	// built with it is given again only to who may pull the same image.
	Auth *Auth `json:"-"`
	// Layout is an OCI image that lies on the disk.
	Layout *Layout `json:"layout,omitempty"`
	// Archive is the path of a tar, plain or gzip, of an OCI image layout or of
	// what docker save writes. With Within that is in the tar: a file that is such a
	// tar, or the directory of a layout.
	Archive string `json:"-"`
	Within  string `json:"-"` // a path in Archive; "" is the whole of it

	Debian  *Debian  `json:"debian,omitempty"`
	Setup   Setup    `json:"setup"`             // done to either
	Require []string `json:"require,omitempty"` // programs that must be on the usual PATH

	// Fresh uses no result that was made while an Image or a Debian suite was
	// something else, however lately.
	Fresh bool `json:"-"`
	// MaxSize bounds the regular files, in bytes; 0, or more than the store's, is
	// the store's.
	MaxSize int64 `json:"max_size,omitempty"`
}

// Layout is an OCI image in a directory (https://github.com/opencontainers/image-spec, image-layout.md).
type Layout struct {
	Dir string `json:"-"`
	// Manifest is the digest of the image's manifest, "sha256:…". Empty in a
	// Source means the one of Dir's index that is for this machine's architecture.
	Manifest string `json:"manifest"`
	// Reference names the image by digest where it came from a registry, else "".
	Reference string `json:"reference,omitempty"`
}

// Debian is a set of Debian packages with all they depend on.
type Debian struct {
	Suite    string   `json:"suite"` // e.g. "bookworm"
	Packages []string `json:"packages"`
	// Variant is mmdebstrap's; "" is minbase.
	Variant string `json:"variant,omitempty"`
	// Mirrors are one-line apt sources; none are Debian's own for the suite, with
	// its security updates.
	Mirrors []string `json:"mirrors,omitempty"`
	// Exclude are dpkg path-exclude patterns; they stay in force inside.
	Exclude []string `json:"exclude,omitempty"`
	Include []string `json:"include,omitempty"` // path-include patterns
}

// Setup is what is changed after the files are together. It runs no code.
type Setup struct {
	Users  []User   `json:"users,omitempty"`
	Files  []File   `json:"files,omitempty"`
	Remove []string `json:"remove,omitempty"` // path patterns as in path.Match; what matches goes with all below it
}

// User is an account with a home directory and a group of the same name. It
// replaces an account of the same name or number.
type User struct {
	Name   string   `json:"name"`
	UID    int      `json:"uid"` // and GID
	Home   string   `json:"home"`
	Shell  string   `json:"shell"`
	Groups []string `json:"groups,omitempty"` // joined where they exist
	Sudo   bool     `json:"sudo,omitempty"`   // may run anything through sudo, without a password
}

// File is a regular file; its parents are made, what is there is replaced.
type File struct {
	Path    string `json:"path"`
	Mode    uint32 `json:"mode"`
	UID     int    `json:"uid,omitempty"`
	GID     int    `json:"gid,omitempty"`
	Content string `json:"content,omitempty"`
}

// Runtime is what an OCI image says about starting it; empty for Debian.
type Runtime struct {
	Env        []string `json:"env,omitempty"` // NAME=value
	User       string   `json:"user,omitempty"`
	Workdir    string   `json:"workdir,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
}

// Image is a finished image.
type Image struct {
	Digest string `json:"digest"` // hex SHA-256 of the file
	Size   int64  `json:"size"`   // bytes
	// Source says what it was made from: "debian:bookworm", an OCI reference by
	// digest, or "oci:" and the digest of a manifest that has no reference; with the
	// reason when the OCI image was not used.
	Source string  `json:"source"`
	Config Runtime `json:"config"`
}

// Store is a directory of images.
type Store struct {
	cfg Config
	log *slog.Logger

	// turn holds one token: builds run one at a time, because each uses all the
	// disk and processor there is.
	turn chan struct{}

	mu sync.Mutex
	// +checklocks:mu
	verified map[string]*verification // by digest: in this process's life
	// +checklocks:mu
	used map[string]time.Time // by digest: last handed out
	// +checklocks:mu
	held map[string]int // by name of a pulled layout: who reads it now
	// +checklocks:mu
	pulls map[string]*pull // by name of the layout: downloads under way
}

// Open opens a store, makes its directories and removes what a crash left.
func Open(cfg Config, log *slog.Logger) (*Store, error) {
	if cfg.RegistryTimeout == 0 {
		cfg.RegistryTimeout = DefaultRegistryTimeout
	}
	if cfg.MovingFor == 0 {
		cfg.MovingFor = DefaultMovingFor
	}
	if cfg.MaxSize == 0 {
		cfg.MaxSize = DefaultMaxSize
	}
	if cfg.Budget == 0 {
		cfg.Budget = DefaultBudget
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Store{cfg: cfg, log: log, verified: map[string]*verification{}, used: map[string]time.Time{},
		held: map[string]int{}, pulls: map[string]*pull{}}
	s.turn = make(chan struct{}, 1)
	if err := os.RemoveAll(s.tmpDir()); err != nil {
		return nil, fmt.Errorf("removing leftovers of builds: %w", err)
	}
	for _, dir := range []string{cfg.Dir, s.tmpDir(), filepath.Join(cfg.Dir, inputsDir), filepath.Join(cfg.Dir, layoutsDir)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("making image directory: %w", err)
		}
	}
	return s, nil
}

// Build makes the image of a source, or finds it where the same inputs were
// built before. progress is called with lines for people, from one goroutine at a
// time. Builds run one at a time; waiting for the turn ends with ctx. A failed
// step is a *[StepError].
