// Package readback tests that BuildKit's own parser reads from translated templates what clients
// gave. It is here since this module alone links BuildKit.
package readback

import (
	"bytes"
	"cmp"
	"encoding/json"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"

	"github.com/cayhq/cay/internal/e2b/steps"
)

// environment implements [shell.EnvGetter].
type environment map[string]string

func (e environment) Get(name string) (string, bool) { v, ok := e[name]; return v, ok }
func (e environment) Keys() []string                 { return slices.Sorted(maps.Keys(e)) }

// world holds what an interpreter of the steps has seen.
type world struct {
	env     environment
	user    string
	workdir string
	runs    []ran
	copies  []copied
}

type ran struct {
	Args []string // of the program
	User string
}

type copied struct{ From, To, Owner, Mode string }

// read interprets a Dockerfile with BuildKit's parser and its replacement of variables.
func read(t *testing.T, r steps.Recipe) world {
	t.Helper()
	tree, err := parser.Parse(strings.NewReader(r.Dockerfile))
	if err != nil {
		t.Fatalf("BuildKit cannot parse it: %v\n%q", err, r.Dockerfile)
	}
	stages, _, err := instructions.Parse(tree.AST, nil)
	if err != nil {
		t.Fatalf("BuildKit cannot understand it: %v\n%q", err, r.Dockerfile)
	}
	lex := shell.NewLex('\\')
	w := world{env: environment{"PATH": "/bin"}}
	var sh []string
	for i, stage := range stages {
		if i > 0 && stage.BaseName != stages[i-1].Name {
			t.Fatalf("stage %d begins from %q", i, stage.BaseName)
		}
		args := environment{} // of this stage alone
		expand := func(s string) (string, error) {
			all := maps.Clone(args)
			maps.Copy(all, w.env)
			out, _, err := lex.ProcessWord(s, all)
			return out, err
		}
		for _, c := range stage.Commands {
			if e, ok := c.(instructions.SupportsSingleWordExpansion); ok {
				if err := e.Expand(expand); err != nil {
					t.Fatalf("BuildKit cannot replace variables in %q: %v", c, err)
				}
			}
			switch c := c.(type) {
			case *instructions.ArgCommand:
				for _, a := range c.Args {
					args[a.Key] = r.Args[a.Key]
				}
			case *instructions.EnvCommand:
				for _, kv := range c.Env {
					w.env[kv.Key] = kv.Value
				}
			case *instructions.WorkdirCommand:
				w.workdir = c.Path
			case *instructions.UserCommand:
				w.user = c.User
			case *instructions.ShellCommand:
				sh = c.Shell
			case *instructions.RunCommand:
				if len(args) > 0 || len(c.Files) > 0 || len(c.FlagsUsed) > 0 {
					t.Fatalf("a RUN has arguments %v, files or flags %v", args, c.FlagsUsed)
				}
				line := c.CmdLine
				if c.PrependShell {
					line = append(slices.Clone(sh), line...)
				}
				w.runs = append(w.runs, ran{line, w.user})
			case *instructions.CopyCommand:
				if len(c.SourcePaths) != 1 || len(c.SourceContents) > 0 || c.From != "" {
					t.Fatalf("a COPY of %v %v", c.SourcePaths, c.SourceContents)
				}
				w.copies = append(w.copies, copied{c.SourcePaths[0], c.DestPath, c.Chown, c.Chmod})
			default:
				t.Fatalf("an instruction that nobody asked for: %T %v", c, c)
			}
		}
	}
	return w
}

var variable = regexp.MustCompile(`\\\$|` +
	`\$([A-Za-z_][A-Za-z0-9_]*)|\$\{([A-Za-z_][A-Za-z0-9_]*)(:[-+][A-Za-z0-9_./:@,=+ -]*)?\}`)

// replaced is the value of a text with variables, by an implementation of its own.
func replaced(text string, env environment) string {
	return variable.ReplaceAllStringFunc(text, func(m string) string {
		if m == `\$` {
			return "$"
		}
		name := strings.Trim(m, "${}")
		name, other, has := strings.Cut(name, ":")
		v := env[name]
		switch {
		case !has:
			return v
		case other[0] == '-' && v == "":
			return other[1:]
		case other[0] == '+' && v != "":
			return other[1:]
		case other[0] == '+':
			return ""
		}
		return v
	})
}

// wanted interprets steps without a Dockerfile.
func wanted(base steps.Base, all []steps.Step) world {
	w := world{env: environment{"PATH": "/bin"}, user: base.User}
	if base.Account {
		w.user, w.workdir = steps.User, "/home/user"
	}
	for _, s := range all {
		switch s.Type {
		case "ENV":
			before := maps.Clone(w.env)
			for i := 0; i < len(s.Args); i += 2 {
				w.env[s.Args[i]] = replaced(s.Args[i+1], before)
			}
		case "WORKDIR":
			w.workdir = replaced(s.Args[0], w.env)
		case "USER":
			w.user = s.Args[0]
		case "RUN":
			user := w.user
			if len(s.Args) > 1 && s.Args[1] != "" {
				user = s.Args[1]
			}
			w.runs = append(w.runs, ran{[]string{s.Args[0]}, user})
		}
	}
	return w
}

// check translates steps, and compares what BuildKit reads with what was given. It returns false if
// the steps are refused.
func check(t *testing.T, base steps.Base, all []steps.Step, kind steps.Kind) bool {
	t.Helper()
	r, err := steps.Translate(base, all, false, "once", func(_, _ string) (steps.Kind, error) { return kind, nil })
	if err != nil {
		if !strings.Contains(err.Error(), "step") {
			t.Fatalf("an error that names no step: %v", err)
		}
		return false
	}
	got, want := read(t, r), wanted(base, all)
	if !base.Account { // nothing says who runs the first steps
		got.user = cmp.Or(got.user, base.User)
		for i := range got.runs {
			got.runs[i].User = cmp.Or(got.runs[i].User, base.User)
		}
	}
	if !maps.Equal(got.env, want.env) {
		t.Fatalf("the environment is %q, not %q\n%q", got.env, want.env, r.Dockerfile)
	}
	if got.workdir != want.workdir {
		t.Fatalf("the working directory is %q, not %q\n%q", got.workdir, want.workdir, r.Dockerfile)
	}
	if want.user != "" && got.user != want.user {
		t.Fatalf("the user is %q, not %q", got.user, want.user)
	}
	var runs []ran // without those that make users
	for _, run := range got.runs {
		if !strings.HasPrefix(run.Args[2], "set -e") {
			runs = append(runs, run)
		} else if run.User != "root" {
			t.Fatalf("%q makes a user", run.User)
		}
	}
	if len(runs) != len(want.runs) {
		t.Fatalf("%d commands, not %d\n%q", len(runs), len(want.runs), r.Dockerfile)
	}
	for i, run := range runs {
		if len(run.Args) != 4 || !strings.HasPrefix(run.Args[2], "if [ -x /bin/bash ]") ||
			run.Args[3] != want.runs[i].Args[0] || orRoot(run.User) != orRoot(want.runs[i].User) {
			t.Fatalf("ran %q, not %q\n%q", run, want.runs[i], r.Dockerfile)
		}
	}
	checkCopies(t, r, all, got, want.env)
	lines := strings.Split(r.Dockerfile, "\n")
	for i, line := range lines {
		if n := steps.Of(i + 1); line != "" && n > len(all) {
			t.Fatalf("line %d is of step %d of %d", i+1, n, len(all))
		}
	}
	return true
}

func orRoot(user string) string {
	if user == "" {
		return "root"
	}
	return user
}

// checkCopies compares copies with their steps. A name may change its variables' values before the
// copy, so it is compared only where no variable is in it.
func checkCopies(t *testing.T, r steps.Recipe, all []steps.Step, got world, env environment) {
	t.Helper()
	n := 0
	for _, s := range all {
		if s.Type != "COPY" {
			continue
		}
		c, part := got.copies[n], r.Parts[n]
		n++
		if !strings.HasPrefix(c.From, part.Dir+"/") || strings.ContainsAny(part.Dir, `./*?[\`) {
			t.Fatalf("copies %q of the part %+v", c.From, part)
		}
		if strings.Contains(s.Args[1], "$") {
			continue
		}
		to := c.To
		if part.As != "" && part.As != path.Base(part.From) || c.From == part.Dir+"/" && part.As != "" {
			to = path.Join(to, part.As)
		}
		asked := s.Args[1]
		if part.As != "" && c.From == part.Dir+"/" && (strings.HasSuffix(asked, "/") || path.Base(asked) == ".") {
			asked = path.Join(asked, part.As)
		}
		if path.Clean(to) != path.Clean(asked) {
			t.Fatalf("copies to %q, not %q\n%q", to, asked, r.Dockerfile)
		}
	}
	if n != len(got.copies) || n != len(r.Parts) {
		t.Fatalf("%d copies and %d parts of %d", len(got.copies), len(r.Parts), n)
	}
}

// nasty are values that mean something in a Dockerfile, a shell or JSON.
var nasty = []string{
	"a", "a b", `"`, `'`, `\`, `a\`, `\\`, "$", "$$", "$PATH", "${PATH}", "x${PATH:-y}z", "${NO:+a}", `\$PATH`, "$1", "${", "${}", "${a",
	"a\nRUN id", "a\r\nRUN id", "\n", "#", "# escape=`", "<<EOF", "<<'EOF'\nRUN x\nEOF", `["a","b"]`, `[ -f x ] && y`, "--mount=type=bind,x", "-x",
	" a ", "\ta", "a\t", "\u2028", "é", "\ufeffa", "a\\\nb", "`id`", "$(id)", "a=b c=d", "a\u00a0", "\v", "\x01", "%s", "${CAY_LF}", "a/../../b",
}

func TestValuesAreReadBack(t *testing.T) {
	base := steps.Base{Ref: "base", Account: true}
	for _, v := range nasty {
		for _, all := range [][]steps.Step{
			{{Type: "RUN", Args: []string{v}}, {Type: "RUN", Args: []string{"true", "root"}}},
			{{Type: "ENV", Args: []string{"A", v, "B", "$A"}}, {Type: "ENV", Args: []string{"C", "${A}x"}}, {Type: "RUN", Args: []string{"env"}}},
			{{Type: "WORKDIR", Args: []string{"/" + v}}},
			{{Type: "USER", Args: []string{v}}, {Type: "RUN", Args: []string{"id"}}},
		} {
			refused := !check(t, base, all, steps.Directory)
			allowed := all[0].Type == "USER" || strings.TrimSpace(v) == "" || all[0].Type == "WORKDIR" &&
				(strings.ContainsAny(v, "\n\r"))
			if refused && !allowed {
				t.Errorf("%s with %q is refused", all[0].Type, v)
			}
		}
		for _, kind := range []steps.Kind{steps.Directory, steps.File, steps.Link} {
			check(t, base, []steps.Step{{Type: "COPY", Args: []string{"a", v, "", ""}, FilesHash: "h"}}, kind)
			check(t, base, []steps.Step{{Type: "COPY", Args: []string{v, "/x/", "root", "0644"}, FilesHash: "h"}}, kind)
			check(t, base, []steps.Step{{Type: "COPY", Args: []string{"a", "/x", v, v}, FilesHash: "h"}}, kind)
		}
	}
}

func FuzzTranslate(f *testing.F) {
	for _, v := range nasty {
		for _, kind := range []string{"RUN", "ENV", "WORKDIR", "USER", "COPY"} {
			seed, err := json.Marshal([]steps.Step{{Type: kind, Args: []string{"A", v}, FilesHash: "h"}, {Type: kind,
				Args: []string{v}},
				{Type: "ENV", Args: []string{"A", v, "B", v}}})
			if err != nil {
				f.Fatal(err)
			}
			f.Add(seed, byte(0))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, kind byte) {
		var all []steps.Step
		if !utf8.Valid(data) || json.NewDecoder(bytes.NewReader(data)).Decode(&all) != nil {
			return
		}
		for i := range all {
			all[i].Type, all[i].Force = strings.ToUpper(all[i].Type), false
		}
		check(t, steps.Base{Ref: "base", Account: kind&4 == 0, User: "app"}, all, steps.Kind(kind%3))
	})
}
