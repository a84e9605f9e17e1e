package template

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Limits of a request, which keep rows and builds readable for people.
const (
	MaxDescription = 1024 // bytes
	MaxDockerfile  = 512 << 10
	MaxPath        = 4096 // bytes; Linux allows no longer ones
	MaxReference   = 512  // bytes
	MaxPackages    = 500
	MaxCredential  = 16 << 10 // bytes of a user name or a password; tokens are long

	// DefaultSuite is the Debian suite if none is named.
	DefaultSuite = "bookworm"
)

// Request describes a new template, or a new build of an existing one.
type Request struct {
	Definition                  // without the fields of built-in ones
	Egress      *sandbox.Egress // nil is allow_all
	Credentials *Credentials
}

// onlyCredentials reports whether the request has nothing but credentials for a registry.
func (r Request) onlyCredentials() bool {
	return r.Egress == nil && digest(r.Definition) == digest(Definition{Name: r.Name})
}

// Forms of the fields of a definition.
var (
	runAsPattern   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)
	suitePattern   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)
	packagePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,127}(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+)?$`)
	targetPattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	hostPattern    = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?$`)
	// The grammar of references as Docker and the OCI define it.
	referencePattern = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?/)?` +
		`[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*` +
		`(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$`)
)

// CheckReference returns an error for a text that is no reference of an image.
func CheckReference(ref string) error {
	if len(ref) > MaxReference || !referencePattern.MatchString(ref) {
		return invalid("image", "%.200q is not a reference such as docker.io/library/alpine:3.22 or ghcr.io/a/b@sha256:…",
			ref)
	}
	return nil
}

func invalid(field, detail string, args ...any) error {
	return fault.InvalidField(field, detail, args...)
}

// check refuses an invalid request, and fills in defaults. withContext reports whether the
// request has a context.
func (r *Request) check(cfg Config, withContext bool) error {
	if err := checkName(r.Name); err != nil {
		return err
	}
	if len(r.Description) > MaxDescription || !utf8.ValidString(r.Description) {
		return invalid("description", "must be text of at most %d bytes", MaxDescription)
	}
	if err := r.checkSource(withContext); err != nil {
		return err
	}
	if err := r.checkCredentials(); err != nil {
		return err
	}
	if err := sandbox.CheckEnv(r.Env); err != nil {
		return err
	}
	if r.Workdir != "" && (!path.IsAbs(r.Workdir) || len(r.Workdir) > MaxPath || strings.ContainsRune(r.Workdir, 0)) {
		return invalid("workdir", "must be an absolute path of at most %d bytes", MaxPath)
	}
	if r.User != "" && !runAsPattern.MatchString(r.User) {
		return invalid("user", "must be the name or number of a user")
	}
	if err := checkSize(cfg, r.Size, r.DiskMB); err != nil {
		return err
	}
	return r.checkStart()
}

// idPrefix begins the ID of each template.
const idPrefix = "tpl_"

// checkName refuses a name that no template may have. One like an ID would hide another template.
func checkName(name string) error {
	if !namePattern.MatchString(name) {
		return invalid("name", "must be 1 to 63 of a-z, 0-9, - and _, and not begin with - or _")
	}
	if strings.HasPrefix(name, idPrefix) {
		return invalid("name", "must not begin with %s, as the IDs of templates do", idPrefix)
	}
	return nil
}

func checkSize(cfg Config, size string, diskMB int) error {
	if size != "" && !slices.Contains(cfg.Sizes, size) {
		return invalid("size", "%.100q is not one of the sizes in GET /v1/sizes", size)
	}
	if diskMB != 0 && (diskMB < sandbox.MinDiskMB || diskMB > cfg.MaxDiskMB) {
		return invalid("disk_size_mb", "must be between %d and %d", sandbox.MinDiskMB, cfg.MaxDiskMB)
	}
	return nil
}

func (r *Request) checkSource(withContext bool) error {
	given := 0
	for _, is := range []bool{r.Image != "", r.Dockerfile != "", r.Debian != nil} {
		if is {
			given++
		}
	}
	if given != 1 {
		return fault.New(fault.Invalid, fault.CodeInvalidSource,
			"one of image, dockerfile and debian is needed, and no more than one")
	}
	switch {
	case r.Dockerfile != "" && withContext:
		if err := checkInContext("dockerfile", r.Dockerfile); err != nil {
			return err
		}
	case r.Dockerfile != "":
		if len(r.Dockerfile) > MaxDockerfile || !utf8.ValidString(r.Dockerfile) || strings.ContainsRune(r.Dockerfile, 0) {
			return invalid("dockerfile", "must be the text of a Dockerfile of at most %d bytes when no context comes with it",
				MaxDockerfile)
		}
		if !strings.Contains(strings.ToUpper(r.Dockerfile), "FROM") {
			return invalid("dockerfile", "has no FROM: without a context it is the text of the Dockerfile, not its path")
		}
	case r.Image != "" && withContext:
		if err := checkInContext("image", r.Image); err != nil {
			return err
		}
	case r.Image != "":
		if err := CheckReference(r.Image); err != nil {
			return err
		}
	default:
		if err := r.checkDebian(withContext); err != nil {
			return err
		}
	}
	if r.Dockerfile == "" && len(r.BuildArgs) > 0 {
		return invalid("build_args", "are for a dockerfile")
	}
	if r.Dockerfile == "" && r.Target != "" {
		return invalid("target", "is for a dockerfile")
	}
	if r.Target != "" && !targetPattern.MatchString(r.Target) {
		return invalid("target", "must be the name or number of a stage")
	}
	if err := sandbox.CheckEnv(r.BuildArgs); err != nil {
		f := fault.As(err)
		return invalid("build_args"+strings.TrimPrefix(f.Field, "env"), "%s", f.Detail)
	}
	return nil
}

// checkInContext refuses paths that lead out of a context.
func checkInContext(field, p string) error {
	if p != path.Clean(p) || p == "." && field != "image" || path.IsAbs(p) || p == ".." || strings.HasPrefix(p, "../") ||
		len(p) > MaxPath || strings.ContainsRune(p, 0) || !utf8.ValidString(p) {
		return invalid(field, "must be a path in the context, such as %s, without .. and without ./ before it",
			map[string]string{"dockerfile": "Dockerfile or build/Dockerfile",
				"image": "image.tar, or . for the context itself"}[field])
	}
	return nil
}

func (r *Request) checkDebian(withContext bool) error {
	if withContext {
		return invalid("context", "is for a dockerfile or an image")
	}
	d := Debian{Suite: r.Debian.Suite, Packages: r.Debian.Packages}
	if d.Suite == "" {
		d.Suite = DefaultSuite
	}
	r.Debian = &d
	if !suitePattern.MatchString(d.Suite) {
		return invalid("debian.suite", "%.100q is not a suite such as bookworm", d.Suite)
	}
	if len(d.Packages) > MaxPackages {
		return invalid("debian.packages", "has %d entries; at most %d", len(d.Packages), MaxPackages)
	}
	for i, p := range d.Packages {
		if !packagePattern.MatchString(p) {
			return invalid(fmt.Sprintf("debian.packages[%d]", i),
				"%.100q is not the name of a package, with =VERSION if need be", p)
		}
	}
	return nil
}

func (r *Request) checkCredentials() error {
	c := r.Credentials
	switch {
	case c == nil:
		return nil
	case r.Debian != nil:
		return invalid("credentials", "are for an image or a dockerfile")
	case c.Username == "" || len(c.Username) > MaxCredential:
		return invalid("credentials.username", "must be 1 to %d bytes", MaxCredential)
	case c.Password == "" || len(c.Password) > MaxCredential:
		return invalid("credentials.password", "must be 1 to %d bytes", MaxCredential)
	case c.Registry != "" && !hostPattern.MatchString(c.Registry):
		return invalid("credentials.registry", "must be the host of a registry such as ghcr.io or registry.example.com:5000")
	case c.Registry == "" && r.Dockerfile != "":
		return invalid("credentials.registry",
			"is needed with a dockerfile: it says which of the registries it names may see them")
	}
	return nil
}

func (r *Request) checkStart() error {
	start := sandbox.Start{Ready: r.Ready}
	if r.StartCommand != nil {
		start.Command = *r.StartCommand
	} else if r.Ready != nil && r.Debian == nil {
		start.Command = "what the image says"
	}
	return start.Check()
}
