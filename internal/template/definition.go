package template

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/cayhq/cay/internal/sandbox"
)

// Definition describes the sources of a template and the settings of its sandboxes. It has one
// source: an OCI image, a Dockerfile or Debian packages. A built-in one may have both an image
// and packages, which are used if no registry has the image with all that is required. Then
// accounts and files are added and others removed.
type Definition struct {
	Name        string            `toml:"name" json:"name"`
	Description string            `toml:"description" json:"description,omitempty"`
	Env         map[string]string `toml:"env" json:"env,omitempty"` // overrides the image's own
	Workdir     string            `toml:"workdir" json:"workdir,omitempty"`
	User        string            `toml:"user" json:"user,omitempty"`
	// StartCommand is run by /bin/sh -c. "" is none; nil takes the image's.
	StartCommand *string        `toml:"start_command" json:"start_command,omitempty"`
	Ready        *sandbox.Ready `toml:"ready" json:"ready,omitempty"`
	Size         string         `toml:"size" json:"size,omitempty"`
	DiskMB       int            `toml:"disk_size_mb" json:"disk_size_mb,omitempty"`

	Image      string  `toml:"image" json:"image,omitempty"`  // reference, or path in the context
	Dockerfile string  `toml:"-" json:"dockerfile,omitempty"` // path in the context, or its text without a context
	Debian     *Debian `toml:"debian" json:"debian,omitempty"`

	BuildArgs map[string]string `toml:"-" json:"build_args,omitempty"` // arguments of the Dockerfile
	Target    string            `toml:"-" json:"target,omitempty"`     // stage of the Dockerfile; "" is the last
	// Instead names the template to use for an image of the Dockerfile whose registry does not answer.
	Instead map[string]string `toml:"-" json:"instead,omitempty"`
	Tags    []string          `toml:"-" json:"tags,omitempty"` // of the version that is built
	// TagsOnly makes the build give its version only the tags: creates that name no tag use the version from before.
	TagsOnly bool `toml:"-" json:"tags_only,omitempty"`

	Require []string  `toml:"require" json:"require,omitempty"` // programs that must be there
	Users   []Account `toml:"users" json:"users,omitempty"`
	Files   []File    `toml:"files" json:"files,omitempty"`
	Remove  []string  `toml:"remove" json:"remove,omitempty"` // path patterns, one element at a time
}

// Debian is a set of Debian packages.
type Debian struct {
	Suite    string   `toml:"suite" json:"suite"`
	Packages []string `toml:"packages" json:"packages,omitempty"`
	Mirrors  []string `toml:"mirrors" json:"mirrors,omitempty"` // one-line apt sources; without any Debian's own
	Exclude  []string `toml:"exclude" json:"exclude,omitempty"` // dpkg path-exclude patterns
	Include  []string `toml:"include" json:"include,omitempty"` // dpkg path-include patterns
}

// Account is a user with a group of the same name and number.
type Account struct {
	Name   string   `toml:"name" json:"name"`
	UID    int      `toml:"uid" json:"uid"`
	Home   string   `toml:"home" json:"home"`
	Shell  string   `toml:"shell" json:"shell"`
	Groups []string `toml:"groups" json:"groups,omitempty"`
	Sudo   bool     `toml:"sudo" json:"sudo,omitempty"` // without a password
}

// File is a file to be written.
type File struct {
	Path    string `toml:"path" json:"path"`
	Mode    uint32 `toml:"mode" json:"mode"` // 0 is 0644
	Content string `toml:"content" json:"content,omitempty"`
	From    string `toml:"from" json:"-"` // for a built-in template: the file beside it with the content
}

// MaxDefinition bounds a definition, in bytes.
const MaxDefinition = 1 << 20

var (
	namePattern    = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)
	envPattern     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	accountPattern = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
)

// ParseDefinition parses a definition. It refuses unknown fields.
func ParseDefinition(text []byte) (Definition, error) {
	var d Definition
	if len(text) > MaxDefinition {
		return d, fmt.Errorf("definition has %d bytes; at most %d are allowed", len(text), MaxDefinition)
	}
	meta, err := toml.Decode(string(text), &d)
	if err != nil {
		return Definition{}, fmt.Errorf("decoding definition: %w", err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return Definition{}, fmt.Errorf("definition has an unknown field %s", unknown[0])
	}
	// The decoder accepts "Remove" for "remove", and either of both in one text.
	for _, key := range meta.Keys() {
		if key[0] != "env" && strings.ToLower(key.String()) != key.String() {
			return Definition{}, fmt.Errorf("definition has an unknown field %s", key)
		}
	}
	if d.StartCommand == nil {
		d.StartCommand = new("") // the choice of the source must not affect it
	}
	for i := range d.Files {
		if d.Files[i].Mode == 0 {
			d.Files[i].Mode = 0o644
		}
	}
	if err := d.check(); err != nil {
		return Definition{}, fmt.Errorf("definition %q: %w", d.Name, err)
	}
	return d, nil
}

func (d Definition) check() error {
	if !namePattern.MatchString(d.Name) {
		return errors.New("name must be a-z, 0-9, - and _, at most 63 long")
	}
	if d.Image == "" && (d.Debian == nil || d.Debian.Suite == "") {
		return errors.New("needs an image, or a debian suite")
	}
	for k, v := range d.Env {
		if !envPattern.MatchString(k) || strings.ContainsRune(v, 0) {
			return fmt.Errorf("env %q is not a variable", k)
		}
	}
	if d.DiskMB < 0 {
		return errors.New("disk_size_mb is negative")
	}
	for _, u := range d.Users {
		if !accountPattern.MatchString(u.Name) || u.UID < 1 || u.UID > 60000 {
			return fmt.Errorf("user %q with uid %d is not an account", u.Name, u.UID)
		}
		if err := absolute(u.Home); err != nil {
			return fmt.Errorf("home of user %s: %w", u.Name, err)
		}
		if err := absolute(u.Shell); err != nil {
			return fmt.Errorf("shell of user %s: %w", u.Name, err)
		}
	}
	if d.StartCommand != nil {
		if err := (sandbox.Start{Command: *d.StartCommand, Ready: d.Ready}).Check(); err != nil {
			return err
		}
	}
	for _, f := range d.Files {
		if err := absolute(f.Path); err != nil {
			return fmt.Errorf("file: %w", err)
		}
		if f.From != "" && (f.Content != "" || path.Base(f.From) != f.From) {
			return fmt.Errorf("file %s: from is the name of a file, and stands for its content", f.Path)
		}
		if f.Mode > 0o7777 {
			return fmt.Errorf("file %s: mode %#o is not a mode", f.Path, f.Mode)
		}
	}
	for _, p := range d.Remove {
		if err := absolute(p); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
	}
	return nil
}

func absolute(p string) error {
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p || p == "/" || strings.ContainsAny(p, "\x00\n:") {
		return fmt.Errorf("%q is not a plain absolute path", p)
	}
	return nil
}

// inputs returns the hash of everything that a template is made from. A different definition or context has a different
// hash. Tags do not count, since they only name the result.
func (d Definition) inputs(context string) string {
	d.Tags, d.TagsOnly = nil, false
	return digest(d, context)
}

// sameRequest reports whether another build would give what b does, and the same tags.
func (b Build) sameRequest(other Build) bool {
	return digest(b.Definition, b.Context) == digest(other.Definition, other.Context)
}

// fileInputs returns the hash of what the root file system is made from. Templates with equal
// ones can share a build.
func (d Definition) fileInputs(context string, refresh bool) string {
	d.Name, d.Description, d.Env, d.Workdir, d.User, d.StartCommand, d.Ready, d.Size, d.DiskMB = "", "", nil, "", "", nil,
		nil, "", 0
	d.Tags, d.TagsOnly = nil, false
	return digest(d, context, refresh)
}

func digest(parts ...any) string {
	b, err := json.Marshal(parts)
	if err != nil {
		panic(err) // strings, numbers and maps of them always encode
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

//go:embed builtin
var builtinFiles embed.FS

// Builtins returns the built-in definitions in the order they are built in.
func Builtins() ([]Definition, error) {
	var ds []Definition
	// The first sandbox is usually a python.
	for _, name := range []string{"python", "base", "node", "go", "code-interpreter"} {
		text, err := builtinFiles.ReadFile("builtin/" + name + ".toml")
		if err != nil {
			return nil, fmt.Errorf("reading built-in template: %w", err)
		}
		d, err := ParseDefinition(text)
		if err != nil {
			return nil, fmt.Errorf("built-in template: %w", err)
		}
		for i, f := range d.Files {
			if f.From == "" {
				continue
			}
			content, err := builtinFiles.ReadFile("builtin/" + f.From)
			if err != nil {
				return nil, fmt.Errorf("reading built-in template %s: %w", name, err)
			}
			d.Files[i].Content, d.Files[i].From = string(content), ""
		}
		ds = append(ds, d)
	}
	return ds, nil
}
