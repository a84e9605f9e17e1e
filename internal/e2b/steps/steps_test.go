package steps

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
)

func directory(string, string) (Kind, error) { return Directory, nil }

// TestTranslate reads a translation as people do. What BuildKit reads in it is tested in
// cmd/cay-buildkit/readback.
func TestTranslate(t *testing.T) {
	all := []Step{
		{Type: "RUN", Args: []string{"npm ci"}},
		{Type: "RUN", Args: []string{"apt-get update", "root"}},
		{Type: "ENV", Args: []string{"A", `x "y"`, "PATH", "/opt/bin:$PATH"}},
		{Type: "WORKDIR", Args: []string{"/srv/a b"}},
		{Type: "COPY", Args: []string{"src", "app", "", ""}, FilesHash: "h"},
		{Type: "COPY", Args: []string{"src/*.py", "/srv/", "app:www", "0644"}, FilesHash: "i"},
		{Type: "USER", Args: []string{"app"}},
		{Type: "RUN", Args: []string{"a\nb"}, Force: true},
		{Type: "ENV", Args: []string{"B", "1\n2"}},
	}
	r, err := Translate(Base{Ref: "debian:12", Account: true, Foreign: true}, all, false, "bld_1", directory)
	if err != nil {
		t.Fatal(err)
	}
	lines := map[int]string{}
	for i, line := range strings.Split(r.Dockerfile, "\n") {
		if line = strings.NewReplacer(list("/bin/sh", "-c", shell), "SH", list("/bin/sh", "-c", shell+" # bld_1"), "SH1",
			list("/bin/sh", "-c", shell+" # bld_1", "a\nb"), "[a b]", list("/bin/sh", "-c", makeUser, "app"), "MAKE app",
			list("/bin/sh", "-c", makeUser, "user"), "MAKE user").Replace(line); line != "" {
			lines[i+1] = line
		}
	}
	want := map[int]string{
		1: "FROM debian:12 AS cay-0", 2: "SHELL SH", 3: "USER root", 4: "RUN MAKE user", 5: "USER user", 6: `WORKDIR "/home/user"`,
		9:  "RUN npm ci",
		17: "USER root", 18: "RUN apt-get update", 19: "USER user",
		25: `ENV A="x \"y\"" PATH="/opt/bin:$PATH"`,
		33: `WORKDIR "/srv/a b"`,
		41: `COPY --chown=user ["4/","app/"]`,
		49: `COPY --chown=app:www --chmod=0644 ["5/","/srv/"]`,
		57: "USER root", 58: "RUN MAKE app", 59: "USER app",
		65: "SHELL SH1", 66: "RUN [a b]",
		73: "ARG CAY_LF CAY_CR", 74: `ENV B="1${CAY_LF}2"`, 75: "FROM cay-0 AS cay-1", 76: "SHELL SH1",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("the Dockerfile (-want +got):\n%s", diff)
	}
	parts := []Part{{Upload: "h", From: "src", Dir: "4", Step: "step 5 (COPY)", Line: 41},
		{Upload: "i", From: "src", Dir: "5", Step: "step 6 (COPY)", Line: 49}}
	if diff := cmp.Diff(parts, r.Parts); diff != "" {
		t.Errorf("the parts (-want +got):\n%s", diff)
	}
	for line, step := range map[int]int{-1: -1, 0: -1, 1: 0, 8: 0, 9: 1, 16: 1, 17: 2, 76: 9} {
		if got := Of(line); got != step {
			t.Errorf("line %d is of step %d, not %d", line, got, step)
		}
	}
	for text, shown := range map[string]string{
		"RUN npm ci": "RUN npm ci",
		"RUN " + list("/bin/sh", "-c", shell, "a\nb"):        "RUN a\nb",
		"RUN " + list("/bin/sh", "-c", makeUser, "app", "x"): "making the user app",
		"RUN " + list("/bin/sh", "-c", shell, "a")[:40]:      "RUN " + list("/bin/sh", "-c", shell, "a")[:40],
		`RUN ["/bin/sh","-c",`:                               `RUN ["/bin/sh","-c",`,
	} {
		if got := Shown(text); got != shown {
			t.Errorf("%q is shown as %q, not %q", text, got, shown)
		}
	}
}

// TestForce checks that a build with force has no step that an earlier one had, and that builds
// without it are the same.
func TestForce(t *testing.T) {
	all := []Step{{Type: "RUN", Args: []string{"a"}}, {Type: "RUN", Args: []string{"b"}}}
	text := func(force bool, once string) string {
		r, err := Translate(Base{Ref: "debian", Account: true, Foreign: true}, all, force, once, directory)
		if err != nil {
			t.Fatal(err)
		}
		return r.Dockerfile
	}
	if text(false, "1") != text(false, "2") {
		t.Error("builds without force differ")
	}
	if text(true, "1") == text(true, "2") || strings.Count(text(true, "once"), "once") != 2 {
		t.Errorf("builds with force are alike: %s", text(true, "once"))
	}
}

// TestRefused checks that a step which cannot be translated is refused by its number.
func TestRefused(t *testing.T) {
	lost := errors.New("the upload is lost")
	long := strings.Repeat("x", maxLine)
	for name, s := range map[string]Step{
		"no type": {}, "unknown type": {Type: "ADD", Args: []string{"a", "b"}}, "a type with a line break": {Type: "RUN\nRUN id"},
		"no command": {Type: "RUN"}, "an empty command": {Type: "RUN", Args: []string{" \n"}}, "NUL": {Type: "RUN", Args: []string{"a\x00"}},
		"no text": {Type: "RUN", Args: []string{"a\xff"}}, "a long command": {Type: "RUN", Args: []string{long}},
		"user with a line break": {Type: "RUN", Args: []string{"a", "root\nRUN id"}}, "three arguments": {Type: "RUN", Args: []string{"a", "root", "b"}},
		"odd environment": {Type: "ENV", Args: []string{"A"}}, "no environment": {Type: "ENV"}, "a name with =": {Type: "ENV", Args: []string{"A=B", "c"}},
		"an empty name": {Type: "ENV", Args: []string{"", "c"}}, "a long value": {Type: "ENV", Args: []string{"A", long}},
		"no directory": {Type: "WORKDIR"}, "an empty directory": {Type: "WORKDIR", Args: []string{""}}, "a directory of two lines": {Type: "WORKDIR", Args: []string{"/a\nRUN id"}},
		"no user": {Type: "USER"}, "user with a variable": {Type: "USER", Args: []string{"$A"}}, "user with a flag": {Type: "USER", Args: []string{"--x"}},
		"no hash": {Type: "COPY", Args: []string{"a", "b"}}, "no destination": {Type: "COPY", Args: []string{"a"}, FilesHash: "h"},
		"a source above": {Type: "COPY", Args: []string{"../a", "b"}, FilesHash: "h"}, "a source in a circle": {Type: "COPY", Args: []string{"a/../../b", "b"}, FilesHash: "h"},
		"an absolute source": {Type: "COPY", Args: []string{"/etc", "b"}, FilesHash: "h"}, "an absolute pattern": {Type: "COPY", Args: []string{"/*", "b"}, FilesHash: "h"},
		"a destination of two lines": {Type: "COPY", Args: []string{"a", "b\nc"}, FilesHash: "h"}, "owner with a flag": {Type: "COPY", Args: []string{"a", "b", "x --from=y"}, FilesHash: "h"},
		"a wrong mode": {Type: "COPY", Args: []string{"a", "b", "", "u+x"}, FilesHash: "h"}, "a long destination": {Type: "COPY", Args: []string{"a", long}, FilesHash: "h"},
		"a lost upload": {Type: "COPY", Args: []string{"a", "b"}, FilesHash: "lost"},
	} {
		_, err := Translate(Base{Ref: "base"}, []Step{{Type: "RUN", Args: []string{"true"}}, s}, false, "1", func(upload,
			_ string) (Kind, error) {
			if upload == "lost" {
				return 0, lost
			}
			return Directory, nil
		})
		f := fault.As(err)
		if name == "a lost upload" {
			if !errors.Is(err, lost) || !strings.HasPrefix(err.Error(), "step 2 (COPY)") {
				t.Errorf("%s: %v", name, err)
			}
		} else if f == nil || f.Kind != fault.Invalid || f.Field != "steps[1]" || !strings.HasPrefix(f.Detail, "step 2 (") ||
			len(f.Detail) > 1000 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Translate(Base{Ref: "base"}, make([]Step, MaxSteps+1), false, "1", directory); !fault.Is(err,
		fault.Invalid) {
		t.Errorf("too many steps: %v", err)
	}
}

func TestRoot(t *testing.T) {
	for source, root := range map[string]string{"a": "a", "./a/": "a", "a/../b": "b", ".": ".", "*": ".", "a/*.py": "a",
		"a/**/b": "a", "a/b[1]/c": "a",
		"a{b,c}": ".", "../a": "../a", "/": "/", "/a": "/a", "/*": "/", "a/..": "."} {
		if got := Root(source); got != root {
			t.Errorf("the root of %q is %q, not %q", source, got, root)
		}
	}
}

// TestTranslationIsBounded checks that a request of some KB makes no Dockerfile of many MB.
func TestTranslationIsBounded(t *testing.T) {
	var pairs []string
	for range 100_000 {
		pairs = append(pairs, "A", "")
	}
	var feeds []Step
	for range MaxSteps {
		feeds = append(feeds, Step{Type: "ENV", Args: []string{"A", "\n"}}, Step{Type: "RUN",
			Args: []string{strings.Repeat("x", 10_000)}})
	}
	for name, steps := range map[string][]Step{"pairs": {{Type: "ENV", Args: pairs}}, "lines": feeds[:MaxSteps]} {
		recipe, err := Translate(Base{Ref: "base"}, steps, true, "bld_1", nil)
		if !fault.Is(err, fault.Invalid) || len(recipe.Dockerfile) > 0 {
			t.Errorf("%s: %v, %d bytes", name, err, len(recipe.Dockerfile))
		}
	}
}
