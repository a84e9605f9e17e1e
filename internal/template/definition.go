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
)

// Definition is what a template is made from, as its TOML file says it: an OCI
// image if a registry gives it and it holds what is required, else Debian
// packages; then accounts and files are added and others removed.
type Definition struct {
	Name         string            `toml:"name"`
	Description  string            `toml:"description"`
	Env          map[string]string `toml:"env"` // over the image's own
	Workdir      string            `toml:"workdir"`
	User         string            `toml:"user"`
	StartCommand string            `toml:"start_command"`
	Size         string            `toml:"size"`
	DiskMB       int               `toml:"disk_size_mb"`

	Image   string    `toml:"image"`
	Debian  *Debian   `toml:"debian"`
	Require []string  `toml:"require"` // programs that must be there
	Users   []Account `toml:"users"`
	Files   []File    `toml:"files"`
	Remove  []string  `toml:"remove"` // path patterns, one element at a time
}

// Debian is a set of Debian packages.
type Debian struct {
	Suite    string   `toml:"suite"`
	Packages []string `toml:"packages"`
	Mirrors  []string `toml:"mirrors"` // one-line apt sources; none are Debian's own
	Exclude  []string `toml:"exclude"` // dpkg path-exclude patterns
	Include  []string `toml:"include"` // dpkg path-include patterns
}

// Account is a user with a group of the same name and number.
type Account struct {
	Name   string   `toml:"name"`
	UID    int      `toml:"uid"`
	Home   string   `toml:"home"`
	Shell  string   `toml:"shell"`
	Groups []string `toml:"groups"`
	Sudo   bool     `toml:"sudo"` // without a password
}

// File is a file that is written.
type File struct {
	Path    string `toml:"path"`
	Mode    uint32 `toml:"mode"` // 0 is 0644
	Content string `toml:"content"`
}

// MaxDefinition bounds a definition, in bytes.
const MaxDefinition = 1 << 20

var (
	namePattern    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	envPattern     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	accountPattern = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
)

// ParseDefinition reads a definition. Unknown fields are refused.
func ParseDefinition(text []byte) (Definition, error) {
	var d Definition
	if len(text) > MaxDefinition {
		return d, fmt.Errorf("definition is %d bytes; %d is the most", len(text), MaxDefinition)
	}
	meta, err := toml.Decode(string(text), &d)
	if err != nil {
		return Definition{}, fmt.Errorf("decoding definition: %w", err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return Definition{}, fmt.Errorf("definition has an unknown field %s", unknown[0])
	}
	// The decoder takes "Remove" for "remove" too, and of both in one text either.
	for _, key := range meta.Keys() {
		if key[0] != "env" && strings.ToLower(key.String()) != key.String() {
			return Definition{}, fmt.Errorf("definition has an unknown field %s", key)
		}
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
		return errors.New("name must be a-z, 0-9 and -, at most 63 long")
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
	for _, f := range d.Files {
		if err := absolute(f.Path); err != nil {
			return fmt.Errorf("file: %w", err)
		}
		if f.Mode > 0o7777 {
			return fmt.Errorf("file %s: mode %#o is none", f.Path, f.Mode)
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

// inputs names everything a definition says: another text, another name.
func (d Definition) inputs() string {
	b, err := json.Marshal(d)
	if err != nil {
		panic(err) // strings, numbers and maps of them always encode
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

//go:embed builtin/*.toml
var builtinFiles embed.FS

// Builtins returns the built-in definitions in the order they are built in.
func Builtins() ([]Definition, error) {
	var ds []Definition
	for _, name := range []string{"python", "base"} { // the first sandbox is usually a python
		text, err := builtinFiles.ReadFile("builtin/" + name + ".toml")
		if err != nil {
			return nil, fmt.Errorf("reading built-in template: %w", err)
		}
		d, err := ParseDefinition(text)
		if err != nil {
			return nil, fmt.Errorf("built-in template: %w", err)
		}
		ds = append(ds, d)
	}
	return ds, nil
}
