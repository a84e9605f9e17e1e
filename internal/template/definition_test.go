package template

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestBuiltinDefinitions checks that the built-in definitions have what the documentation
// promises.
func TestBuiltinDefinitions(t *testing.T) {
	ds, err := Builtins()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range ds {
		names = append(names, d.Name)
		kernels := d.Name == "code-interpreter"
		alone := kernels || d.Name == "base" // from Debian packages only: no image is known that has all of it
		if (d.Image == "") != alone || d.Debian == nil || len(d.Debian.Packages) == 0 {
			t.Errorf("%s: needs an OCI image and Debian packages", d.Name)
		}
		if kernels && (*d.StartCommand == "" || d.Ready == nil || d.Ready.HTTP == nil || d.Ready.HTTP.Port != 49999 ||
			d.Ready.HTTP.Path != "/health") {
			t.Errorf("%s starts with %q, ready as %+v", d.Name, *d.StartCommand, d.Ready)
		}
		if len(d.Users) != 1 || d.Users[0].Name != "user" || d.Users[0].UID != 1000 || d.Users[0].Home != "/home/user" ||
			!d.Users[0].Sudo {
			t.Errorf("%s: users are %+v, want user with uid 1000 and sudo", d.Name, d.Users)
		}
		if d.User != "root" {
			t.Errorf("%s: commands run as %q by default, want root", d.Name, d.User)
		}
		has := map[string]bool{}
		for _, p := range d.Require {
			has[p] = true
		}
		want := append([]string{"bash", "python3", "curl", "git", "sudo", "tput", "ps"}, map[string][]string{
			"base": {"python", "pip", "node", "npm", "npx", "gcc", "g++", "make", "rg", "jq"}, "python": {"python", "pip"}, "node": {"node", "npm", "npx"}, "go": {"go", "gofmt"}, "code-interpreter": {"python", "pip"}}[d.Name]...)
		for _, p := range want {
			if !has[p] {
				t.Errorf("%s: does not require %s", d.Name, p)
			}
		}
		files := map[string]bool{}
		for _, f := range d.Files {
			files[f.Path] = f.Mode == 0o644
		}
		for _, f := range []string{"/etc/resolv.conf", "/etc/hosts", "/etc/hostname"} {
			if !files[f] {
				t.Errorf("%s: %s is not a plain file of mode 0644", d.Name, f)
			}
		}
	}
	if diff := cmp.Diff([]string{"python", "base", "node", "go", "code-interpreter"}, names); diff != "" {
		t.Errorf("built-in templates (-want +got):\n%s", diff)
	}
	seen := map[string]bool{}
	for _, d := range ds {
		if seen[d.inputs("")] || d.inputs("") == d.inputs("context") {
			t.Error("two definitions have the same inputs")
		}
		seen[d.inputs("")] = true
	}
}

func TestParseDefinition(t *testing.T) {
	got, err := ParseDefinition([]byte(`
name = "x"
env = { A = "1" }
disk_size_mb = 100
remove = ["/var/lib/apt/lists/*"]
[debian]
suite = "bookworm"
packages = ["git"]
[[files]]
path = "/etc/motd"
content = "hello"
[[files]]
path = "/usr/bin/x"
mode = 0o755
`))
	want := Definition{Name: "x", StartCommand: new(""), Env: map[string]string{"A": "1"}, DiskMB: 100,
		Remove: []string{"/var/lib/apt/lists/*"}, Debian: &Debian{Suite: "bookworm", Packages: []string{"git"}},
		Files: []File{{Path: "/etc/motd", Mode: 0o644, Content: "hello"}, {Path: "/usr/bin/x", Mode: 0o755}}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("definition (-want +got):\n%s%v", diff, err)
	}
}

func TestBadDefinitionsAreRefused(t *testing.T) {
	const good = "name = \"x\"\nimage = \"y\"\n"
	if _, err := ParseDefinition([]byte(good)); err != nil {
		t.Fatalf("what the others are made from: %v", err)
	}
	tests := []struct{ name, text, want string }{
		{"not TOML", "name = ", "decoding"},
		{"no name", `image = "y"`, "name must be"},
		{"bad name", "name = \"A b\"\nimage = \"y\"", "name must be"},
		{"no source", `name = "x"`, "needs an image"},
		{"no suite", "name = \"x\"\n[debian]\npackages = [\"a\"]", "needs an image"},
		{"unknown field", good + `immage = "z"`, "unknown field immage"},
		{"unknown field below", good + "[debian]\nsuit = \"z\"", "unknown field debian.suit"},
		{"bad variable", good + `env = { "A B" = "1" }`, "is not a variable"},
		{"negative disk", good + `disk_size_mb = -1`, "negative"},
		{"relative file", good + "[[files]]\npath = \"etc/x\"", "plain absolute path"},
		{"dots in a file", good + "[[files]]\npath = \"/etc/../x\"", "plain absolute path"},
		{"file mode", good + "[[files]]\npath = \"/x\"\nmode = 0o10000", "mode"},
		{"removing the root", good + `remove = ["/"]`, "plain absolute path"},
		{"user without a name", good + "[[users]]\nuid = 5", "not an account"},
		{"root again", good + "[[users]]\nname = \"root\"\nuid = 0", "not an account"},
		{"user without a home", good + "[[users]]\nname = \"a\"\nuid = 5", "home"},
		{"user without a shell", good + "[[users]]\nname = \"a\"\nuid = 5\nhome = \"/h\"", "shell"},
		{"too long", good + "#" + strings.Repeat("x", MaxDefinition), "are allowed"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := ParseDefinition([]byte(tc.text)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want one with %q", err, tc.want)
			}
		})
	}
}

func FuzzParseDefinition(f *testing.F) {
	for _, name := range []string{"builtin/base.toml", "builtin/python.toml"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("name = \"x\"\nimage = \"y\"\n"))
	f.Add([]byte("name = \"x\"\nimage = \"y\"\nImage = \"z\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDefinition(b)
		if err != nil {
			return
		}
		if err := d.check(); err != nil {
			t.Errorf("accepted and then refused: %v", err)
		}
		if again, err := ParseDefinition(b); err != nil || again.inputs("") != d.inputs("") {
			t.Errorf("one text gives two definitions: %v", err)
		}
	})
}
