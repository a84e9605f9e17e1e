// Package image makes root file systems, each a read-only EROFS file named by the SHA-256 of its
// bytes.
//
// It owns the directory of finished images, the shared cache beside it, the pulled OCI images,
// the conversion of an OCI image or a set of Debian packages to an EROFS file and back to an OCI
// image, and the removal of unused files. It does not know what an image is for: callers decide
// what goes in ([Source]), which registries may be asked ([Config]) and which images they still
// need.
//
// A [Store] is safe for concurrent use. An image or a pulled layout appears whole under its final
// name or not at all, and never changes afterwards. After an error or a crash only the directory
// "tmp" may hold leftovers, which the next [Open] removes. [Store.Close] ends what goes on without a
// caller: the fetches from a [Remote] and the checks of files.
//
// All input is untrusted: every size, count and name is bounded, and a refusal names the entry
// and the reason. Device nodes below /dev are left out, counted and reported, since gVisor mounts
// a /dev of its own; elsewhere they are refused. gVisor's EROFS cannot hold extended attributes,
// file capabilities among them. They are in a file of the image (see [AttributesPath]), which the
// first process inside applies.
package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Errors that callers decide by. Both mean that the image must be built again.
var (
	ErrMissing = errors.New("image is not in the store")
	ErrCorrupt = errors.New("image is corrupt")
)

// Defaults of [Config].
const (
	// DefaultRegistryTimeout bounds the time to reach a registry (name, connection, TLS) before
	// Debian packages are used instead. With a shorter one a slow network never gets OCI images;
	// with a longer one a machine without a registry waits before its first build.
	DefaultRegistryTimeout = 5 * time.Second

	// DefaultMovingFor is the time for which a result of inputs that change by themselves (a tag,
	// a Debian suite) is used again. A longer one saves builds, a shorter one brings security
	// updates sooner.
	DefaultMovingFor = 7 * 24 * time.Hour

	// DefaultMaxSize bounds the regular files of one image, in bytes, so that a hostile image (a
	// compressed stream of zeros) cannot fill the disk.
	DefaultMaxSize = 64 << 30

	// DefaultBudget bounds the space of pulled OCI images on the disk, in bytes. With a smaller
	// one images are downloaded again sooner.
	DefaultBudget = 20 << 30

	// DefaultCacheBudget bounds the images in the shared cache, in bytes. With a smaller one images are built again
	// sooner.
	DefaultCacheBudget = 10 << 30
)

// Config configures a Store.
type Config struct {
	// Dir is the directory of the images. One process at a time may use it.
	Dir string
	// CacheDir is a second directory for finished images. Any number of processes may share it,
	// and it may be lost. "" means none.
	CacheDir string

	RegistryTimeout time.Duration // 0: DefaultRegistryTimeout
	MovingFor       time.Duration // 0: DefaultMovingFor
	MaxSize         int64         // 0: DefaultMaxSize
	Budget          int64         // of pulled OCI images, bytes; 0: DefaultBudget
	CacheBudget     int64         // of images in CacheDir, bytes; 0: DefaultCacheBudget

	// Dial decides about every connection to a registry, to its redirects and its token service,
	// by the address that the name was resolved to. The user who named the registry sees its
	// error. nil allows all. A proxy in the environment belongs to the operator and is not
	// checked; it must check the names behind it.
	Dial func(netip.AddrPort) error
	// PlainHTTP lists registries, as references name them ("127.0.0.1:5000"), that speak plain
	// HTTP and are not subject to Dial.
	PlainHTTP []string
	// ECR is the URL of the API of AWS's registries; "" is AWS's own in the region of the credentials.
	ECR string

	// Now replaces the clock in tests; nil is time.Now.
	Now func() time.Time
}

// Source tells what to make an image from: at most one of Image, Layout and Archive, if it is
// available and has every program of Require, or else Debian. At least one must be set.
type Source struct {
	Image string `json:"image,omitempty"` // OCI reference
	// Auth holds the credentials for the registry of Image; nil is anonymous. A result built with
	// them is given again only to callers that may pull the same image.
	Auth *Auth `json:"-"`
	// Layout is an OCI image on the disk.
	Layout *Layout `json:"layout,omitempty"`
	// Archive is the path of a tar, plain or gzip, of an OCI image layout or of the output of
	// docker save. With Within, the image is at a path in the tar: a file that is such a tar, or
	// the directory of a layout.
	Archive string `json:"-"`
	Within  string `json:"-"` // a path in Archive; "" is the whole archive

	Debian  *Debian  `json:"debian,omitempty"`
	Setup   Setup    `json:"setup"`             // applied to any of them
	Require []string `json:"require,omitempty"` // programs that must be on the usual PATH

	// Fresh ignores earlier results of inputs that change by themselves, an Image or a Debian
	// suite, however recent.
	Fresh bool `json:"-"`
	// Made, if not nil, is called when all files are there and the image is written next.
	Made func() `json:"-"`
	// MaxSize bounds the regular files, in bytes. 0, or more than the store's bound, takes the
	// store's.
	MaxSize int64 `json:"max_size,omitempty"`
}

// Layout is an OCI image in a directory (https://github.com/opencontainers/image-spec,
// image-layout.md).
type Layout struct {
	Dir string `json:"-"`
	// Manifest is the digest of the image's manifest, "sha256:…". If it is empty in a Source, the
	// manifest in Dir's index for this machine's architecture is used.
	Manifest string `json:"manifest"`
	// Reference names the image by digest if it came from a registry, or is "".
	Reference string `json:"reference,omitempty"`
}

// Debian is a set of Debian packages with all their dependencies.
type Debian struct {
	Suite    string   `json:"suite"` // e.g. "bookworm"
	Packages []string `json:"packages"`
	// Variant is mmdebstrap's variant; "" is minbase.
	Variant string `json:"variant,omitempty"`
	// Mirrors are one-line apt sources. Without any, Debian's own for the suite are used, with
	// its security updates.
	Mirrors []string `json:"mirrors,omitempty"`
	// Exclude are dpkg path-exclude patterns. They stay in force inside.
	Exclude []string `json:"exclude,omitempty"`
	Include []string `json:"include,omitempty"` // path-include patterns
}

// Setup describes the changes to the files after they are together. It runs no code.
type Setup struct {
	Users  []User   `json:"users,omitempty"`
	Files  []File   `json:"files,omitempty"`
	Remove []string `json:"remove,omitempty"` // patterns as in path.Match; removes what matches and all below it
}

// User is an account with a home directory and a group of the same name. It replaces an account
// of the same name or number.
type User struct {
	Name   string   `json:"name"`
	UID    int      `json:"uid"` // and GID
	Home   string   `json:"home"`
	Shell  string   `json:"shell"`
	Groups []string `json:"groups,omitempty"` // groups to join, if they exist
	Sudo   bool     `json:"sudo,omitempty"`   // may run anything through sudo, without a password
}

// File is a regular file. Its parents are made, and an existing file is replaced.
type File struct {
	Path    string `json:"path"`
	Mode    uint32 `json:"mode"`
	UID     int    `json:"uid,omitempty"`
	GID     int    `json:"gid,omitempty"`
	Content string `json:"content,omitempty"`
}

// Runtime holds an OCI image's settings for starting it. It is empty for Debian.
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
	// Source tells what the image was made from: "debian:bookworm", an OCI reference by digest,
	// or "oci:" and the digest of a manifest without a reference; with the reason if the OCI
	// image was not used.
	Source string  `json:"source"`
	Config Runtime `json:"config"`
}

// Store is a directory of images.
type Store struct {
	cfg Config
	log *slog.Logger

	// turn holds one token, so that builds run one at a time, since each uses all of the disk and
	// processor.
	turn chan struct{}

	remote Remote                   // nil: none; constant after [Store.UseRemote]
	inUse  func(digest string) bool // nil: none
	hits   atomic.Uint64

	ctx       context.Context // of the verifications; ends with Close
	end       context.CancelCauseFunc
	verifying sync.WaitGroup // the verifications under way

	mu sync.Mutex
	// +checklocks:mu
	verified map[string]*verification // by digest: those under way, and those that found a good file
	// +checklocks:mu
	used map[string]time.Time // time of the last use, by digest
	// +checklocks:mu
	keepHere map[string]bool // images that are not evicted, by digest
	// +checklocks:mu
	held map[string]int // number of readers, by name of a pulled layout
	// +checklocks:mu
	pulls map[string]*pull // downloads under way, by name of the layout
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
	if cfg.CacheBudget == 0 {
		cfg.CacheBudget = DefaultCacheBudget
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Store{cfg: cfg, log: log, verified: map[string]*verification{}, used: map[string]time.Time{},
		held: map[string]int{}, pulls: map[string]*pull{}}
	s.turn = make(chan struct{}, 1)
	s.ctx, s.end = context.WithCancelCause(context.Background())
	if err := os.RemoveAll(s.tmpDir()); err != nil {
		return nil, fmt.Errorf("removing leftovers of builds: %w", err)
	}
	for _, dir := range []string{cfg.Dir, s.tmpDir(), filepath.Join(cfg.Dir, inputsDir),
		filepath.Join(cfg.Dir, layoutsDir)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("making image directory: %w", err)
		}
	}
	return s, nil
}

// errClosed ends what is under way when the store is closed.
var errClosed = errors.New("the store of images is closed")

// Close ends the verifications and the fetches, and waits for them. No later call verifies or fetches an image.
func (s *Store) Close() {
	s.mu.Lock()
	s.end(errClosed) // under mu, so that none begins beside Wait
	s.mu.Unlock()
	s.verifying.Wait()
}
