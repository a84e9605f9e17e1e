// Package steps translates a template that E2B's clients describe into a Dockerfile, and says where
// in its context the files of copies belong.
//
// Everything that it is given is untrusted. A value becomes one word of one instruction and never
// another instruction; the parser of BuildKit reads back what was given. What cannot be written
// like that is refused with the name of the step. The package is safe for concurrent use.
package steps

import (
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/fault"
)

// Step is one step, as clients send it.
type Step struct {
	Type      string   `json:"type"` // COPY, RUN, ENV, WORKDIR or USER
	Args      []string `json:"args"`
	FilesHash string   `json:"filesHash"` // names the upload of a COPY
	Force     bool     `json:"force"`     // this step and those after it do not use the cache
}

// Base describes what a template begins from.
type Base struct {
	Ref     string // the template or image, in a form that FROM takes
	User    string // that steps run as if Account is false; "" is root
	Account bool   // the steps run as the user of E2B's templates, in its home
	Foreign bool   // the image may lack that user, which is then made
}

// Kind is the kind of the files that a COPY brings.
type Kind int

// The kinds of files.
const (
	Directory Kind = iota // its content is copied
	File
	Link // a symbolic link, which is copied as a link
)

// Part is the place of an upload in the context.
type Part struct {
	Upload string // its name
	From   string // what is taken of it: a path, or a directory whose content is taken
	Dir    string // the directory in the context
	As     string // the name of a File or a Link there; "" for a Directory
	Step   string // of the COPY, for errors
	Line   int    // the first line of the COPY
}

// Recipe is a translated template.
type Recipe struct {
	Dockerfile string
	Parts      []Part
	Args       map[string]string // arguments of the Dockerfile
}

// User is the user that steps and sandboxes run as unless a template says otherwise, as in E2B's.
const User = "user"

const (
	home = "/home/user"
	// MaxSteps bounds the steps of a template. Every step may become a layer; the kernel stacks no
	// more than 500 without BuildKit copying them.
	MaxSteps = 1000
	// maxLine bounds a line of a Dockerfile, in bytes. BuildKit's parser refuses longer ones without
	// naming a step.
	maxLine = 65_000
	// maxDockerfile bounds the Dockerfile, in bytes. A request has at most 1 MiB, which quoting makes
	// longer.
	maxDockerfile = 4 << 20
	// linesPerStep is the number of lines that each step has in the Dockerfile, so that a line tells
	// its step. The first lines are those of the base.
	linesPerStep = 8
	// lineFeed is the argument that holds a line feed, which no line of a Dockerfile can.
	lineFeed = "CAY_LF"
)

// shell runs a command like E2B does, in a login shell of bash. Images without bash use their sh.
const shell = `if [ -x /bin/bash ]; then exec /bin/bash -l -c "$0"; fi; exec /bin/sh -l -c "$0"`

// makeUser makes the user $0 if there is none, and lets the one of E2B's templates use sudo.
const makeUser = `set -e
if ! grep -q "^$0:" /etc/passwd 2>/dev/null; then
  sh=/bin/sh; [ ! -x /bin/bash ] || sh=/bin/bash
  if command -v useradd >/dev/null 2>&1; then useradd --create-home --user-group --shell "$sh" "$0"
  elif command -v adduser >/dev/null 2>&1; then adduser -D -s "$sh" "$0"
  else n=1000; while grep -q "^[^:]*:[^:]*:$n:" /etc/passwd 2>/dev/null; do n=$((n+1)); done
    echo "$0:x:$n:$n::/home/$0:$sh" >>/etc/passwd; echo "$0:x:$n:" >>/etc/group
    mkdir -p "/home/$0"; chown "$n:$n" "/home/$0"
  fi
fi
if [ "$0" = user ] && [ -d /etc/sudoers.d ]; then
  echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/user; chmod 0440 /etc/sudoers.d/user
fi`

var (
	accountPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)
	ownerPattern   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?$`)
	modePattern    = regexp.MustCompile(`^[0-7]{3,4}$`)
	namePattern    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	// variable matches what a Dockerfile replaces by the value of a variable.
	variable = regexp.MustCompile(`^\$([A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*(:[-+][A-Za-z0-9_./:@,=+ -]*)?\})`)
)

// Of returns the number of the step that a line of a Dockerfile belongs to, from 1; 0 is the base.
// It returns -1 if line is not a line of one.
func Of(line int) int {
	if line < 1 {
		return -1
	}
	return (line - 1) / linesPerStep
}

// translation is a translation under way.
type translation struct {
	out    strings.Builder
	lines  int
	user   string
	known  map[string]bool // users that exist
	shell  string
	stage  int
	look   func(upload, from string) (Kind, error)
	recipe Recipe
}

// Translate translates a template. look returns the kind of what an upload has at a path; its error
// is returned with the step. Steps from the first forced one on, all with force, are built anew if
// once is a text that no earlier build had.
func Translate(from Base, steps []Step, force bool, once string,
	look func(upload, from string) (Kind, error)) (Recipe, error) {
	if len(steps) > MaxSteps {
		return Recipe{}, fault.InvalidField("steps", "has %d steps; at most %d are allowed", len(steps), MaxSteps)
	}
	t := &translation{user: from.User, known: map[string]bool{"root": true, "": true, from.User: true}, shell: shell,
		look: look}
	if force {
		t.shell += " # " + once
	}
	t.line("FROM " + from.Ref + " AS " + t.stageName())
	t.line("SHELL " + list("/bin/sh", "-c", t.shell))
	if from.Account {
		t.line("USER root")
		if from.Foreign {
			t.ensure(User, once, force)
		}
		t.known[User] = true
		t.setUser(User)
		t.line(`WORKDIR "` + home + `"`)
	}
	t.fill(0)
	for i, s := range steps {
		if s.Force && !force {
			force = true
			t.shell += " # " + once
			t.line("SHELL " + list("/bin/sh", "-c", t.shell))
		}
		if err := t.step(i, s); err != nil {
			return Recipe{}, inStep(i, s, err)
		}
		t.fill(i + 1)
		if t.out.Len() > maxDockerfile {
			return Recipe{}, inStep(i, s, refused("the steps up to this one are longer than %d MiB", maxDockerfile>>20))
		}
	}
	t.recipe.Dockerfile = t.out.String()
	return t.recipe, nil
}

// Error is the error of a step.
type Error struct {
	Line  int    // the first line of the step in the Dockerfile
	Type  string // of the step, at most 20 characters
	Cause error  // without the step
}

func (e *Error) name() string { return fmt.Sprintf("step %d (%s)", Of(e.Line), e.Type) }

func (e *Error) Error() string { return e.name() + ": " + e.Cause.Error() }

// Unwrap returns the cause. If the caller is at fault, it names the step and its field.
func (e *Error) Unwrap() error {
	f := fault.As(e.Cause)
	if f == nil {
		return e.Cause
	}
	named := f.Because(e.Cause)
	named.Field = fmt.Sprintf("steps[%d]", Of(e.Line)-1)
	named.Detail = e.name() + ": " + f.Detail
	return named
}

// inStep returns an error with its step.
func inStep(i int, s Step, err error) error {
	return &Error{Line: lineOf(i), Type: fmt.Sprintf("%.20s", s.Type), Cause: err}
}

// lineOf returns the first line of a step, which is counted from 0 here.
func lineOf(i int) int { return (i+1)*linesPerStep + 1 }

func stepName(i int, s Step) string { return fmt.Sprintf("step %d (%.20s)", i+1, s.Type) }

func refused(why string, args ...any) error {
	return fault.InvalidField("steps", why, args...)
}

// line writes one line.
func (t *translation) line(text string) {
	t.out.WriteString(text)
	t.out.WriteByte('\n')
	t.lines++
}

// fill writes empty lines up to the end of a step's lines.
func (t *translation) fill(step int) {
	for t.lines < (step+1)*linesPerStep {
		t.line("")
	}
}

func (t *translation) stageName() string { return fmt.Sprintf("cay-%d", t.stage) }

func (t *translation) setUser(name string) {
	t.user = name
	t.line("USER " + name)
}

// ensure writes a step that makes a user if there is none. The user must be root.
func (t *translation) ensure(name, once string, force bool) {
	args := []string{"/bin/sh", "-c", makeUser, name}
	if force {
		args = append(args, once)
	}
	t.line("RUN " + list(args...))
}

func (t *translation) step(i int, s Step) error {
	for _, a := range s.Args {
		if !utf8.ValidString(a) || strings.ContainsRune(a, 0) {
			return refused("its arguments must be text without NUL")
		}
	}
	switch strings.ToUpper(s.Type) {
	case "RUN":
		return t.run(s.Args)
	case "ENV":
		return t.env(s.Args)
	case "WORKDIR":
		return t.workdir(s.Args)
	case "USER":
		return t.setsUser(s.Args)
	case "COPY":
		return t.copy(i, s)
	}
	return refused("its type must be COPY, RUN, ENV, WORKDIR or USER")
}

// run translates [command, user].
func (t *translation) run(args []string) error {
	if len(args) < 1 || len(args) > 2 || strings.TrimSpace(args[0]) == "" {
		return refused("needs a command, and may name a user")
	}
	line := "RUN " + args[0]
	if !plain(args[0]) {
		line = "RUN " + list("/bin/sh", "-c", t.shell, args[0])
	}
	if len(line) > maxLine {
		return refused("the command is longer than %d bytes: copy a script instead", maxLine)
	}
	before := t.user
	if len(args) == 2 && args[1] != "" && args[1] != t.user {
		if !accountPattern.MatchString(args[1]) {
			return refused("%.100q is not the name or number of a user", args[1])
		}
		t.setUser(args[1])
		defer t.setUser(orRoot(before))
	}
	t.line(line)
	return nil
}

func orRoot(user string) string {
	if user == "" {
		return "root"
	}
	return user
}

// plain reports whether the rest of a RUN line is read back as it is.
func plain(command string) bool {
	for _, r := range command {
		if unicode.IsControl(r) && r != '\t' || r == '\u2028' || r == '\u2029' || r == utf8.RuneError || r == '\ufeff' {
			return false
		}
	}
	return strings.TrimSpace(command) == command && !strings.Contains(command, "<<") &&
		!strings.HasSuffix(command, `\`) && command[0] != '[' && command[0] != '-' && command[0] != '\\'
}

// env translates [name, value, name, value, …].
func (t *translation) env(args []string) error {
	if len(args) == 0 || len(args)%2 != 0 {
		return refused("needs pairs of a name and a value")
	}
	var text strings.Builder
	text.WriteString("ENV")
	feeds := false
	for i := 0; i < len(args); i += 2 {
		if !namePattern.MatchString(args[i]) {
			return refused("%.100q is not the name of a variable: letters, digits and _", args[i])
		}
		feeds = feeds || strings.ContainsAny(args[i+1], "\n\r")
		text.WriteString(" " + args[i] + "=" + quoted(args[i+1]))
		if text.Len() > maxLine {
			return refused("the variables have more than %d bytes together", maxLine)
		}
	}
	line := text.String()
	if !feeds {
		t.line(line)
		return nil
	}
	// The argument must not reach the environment of later steps, so they are another stage.
	if t.recipe.Args == nil {
		t.recipe.Args = map[string]string{lineFeed: "\n", carriageReturn: "\r"}
	}
	t.line("ARG " + lineFeed + " " + carriageReturn)
	t.line(line)
	from := t.stageName()
	t.stage++
	t.line("FROM " + from + " AS " + t.stageName())
	t.line("SHELL " + list("/bin/sh", "-c", t.shell))
	return nil
}

// carriageReturn is the argument that holds a carriage return, which ends a line like a line feed.
const carriageReturn = "CAY_CR"

// workdir translates [path].
func (t *translation) workdir(args []string) error {
	if len(args) != 1 || args[0] == "" {
		return refused("needs a path")
	}
	if err := onOneLine(args[0]); err != nil {
		return err
	}
	t.line("WORKDIR " + quoted(args[0]))
	return nil
}

// setsUser translates [name]. Like E2B it makes a user that does not exist.
func (t *translation) setsUser(args []string) error {
	if len(args) < 1 || !accountPattern.MatchString(args[0]) {
		return refused("needs the name or number of a user")
	}
	name := args[0]
	if !t.known[name] && strings.Trim(name, "0123456789") != "" {
		t.line("USER root")
		t.ensure(name, "", false)
		t.known[name] = true
	}
	t.setUser(name)
	return nil
}

// copy translates [source, destination, owner, mode].
func (t *translation) copy(i int, s Step) error {
	if len(s.Args) < 2 || len(s.Args) > 4 || s.Args[0] == "" || s.Args[1] == "" {
		return refused("needs a source and a destination, and may have an owner and a mode")
	}
	owner, mode := "", ""
	if len(s.Args) > 2 {
		owner = s.Args[2]
	}
	if len(s.Args) > 3 {
		mode = s.Args[3]
	}
	from, dest := Root(s.Args[0]), s.Args[1]
	switch {
	case s.FilesHash == "":
		return refused("has no filesHash, which names its files")
	case path.IsAbs(from) || from == ".." || strings.HasPrefix(from, "../"):
		return refused("the source %.200q leads out of the directory of files", s.Args[0])
	case owner != "" && !ownerPattern.MatchString(owner):
		return refused("the owner %.100q is not a user, or a user and a group joined by a colon", owner)
	case mode != "" && !modePattern.MatchString(mode):
		return refused("the mode %.20q is not 3 or 4 octal digits", mode)
	}
	if err := onOneLine(dest); err != nil {
		return err
	}
	kind, err := t.look(s.FilesHash, from)
	if err != nil {
		return err
	}
	part := Part{Upload: s.FilesHash, From: from, Dir: fmt.Sprint(i), Step: stepName(i, s), Line: lineOf(i)}
	source := part.Dir + "/"
	switch kind {
	case File:
		part.As = path.Base(from)
		source += "*" // the name itself could be a pattern
	case Link:
		if part.As, dest, err = linkPlace(from, dest); err != nil {
			return err
		}
	default:
		dest = strings.TrimSuffix(dest, "/") + "/"
	}
	flags := ""
	if owner == "" {
		owner = t.user
	}
	if owner != "" && owner != "root" {
		flags += " --chown=" + owner
	}
	if mode != "" && kind != Link {
		flags += " --chmod=" + mode
	}
	line := "COPY" + flags + " " + list(source, word(dest))
	if len(line) > maxLine {
		return refused("the destination is too long")
	}
	t.line(line)
	t.recipe.Parts = append(t.recipe.Parts, part)
	return nil
}

// linkPlace returns the name that a symbolic link gets, and the directory that it is copied to. A
// copy of the link itself would copy what it leads to.
func linkPlace(from, dest string) (name, dir string, err error) {
	if strings.HasSuffix(dest, "/") || path.Base(dest) == "." {
		return path.Base(from), strings.TrimSuffix(dest, "/") + "/", nil
	}
	dir, name = path.Split(dest)
	if strings.ContainsAny(name, `$\`) || name == ".." {
		return "", "", refused("the name of a symbolic link must be written out in the destination")
	}
	if dir == "" {
		dir = "./"
	}
	return name, dir, nil
}

// Root returns the part of a source of files before its first element with a pattern. Clients resolve
// patterns themselves.
func Root(source string) string {
	elements := strings.Split(source, "/")
	for i, e := range elements {
		if strings.ContainsAny(e, `*?[{\`) {
			elements = elements[:i]
			break
		}
	}
	if len(elements) == 1 && elements[0] == "" {
		return "/" // absolute, which is refused
	}
	return path.Clean(strings.Join(elements, "/"))
}

func onOneLine(p string) error {
	if strings.ContainsAny(p, "\n\r") || strings.HasPrefix(p, "\ufeff") {
		return refused("a path must not have line breaks or begin with a byte order mark")
	}
	return nil
}

// list writes the words of an instruction as JSON.
func list(words ...string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(words); err != nil { // strings always encode
		panic(err)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// quoted writes a value in double quotes; variables in it are replaced as in a Dockerfile.
func quoted(value string) string {
	return `"` + escaped(value, `"`) + `"`
}

// word writes a value without quotes around it. With << it could begin a document.
func word(value string) string { return escaped(value, `"'<`) }

// escaped writes a value so that BuildKit reads it back. Variables stay, `\$` is a dollar sign, and
// everything else stands for itself.
func escaped(value, quotes string) string {
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		c := value[i]
		switch {
		case c == '$':
			if v := variable.FindString(value[i:]); v != "" {
				b.WriteString(v)
				i += len(v) - 1
				// The name must not continue with what follows.
				continue
			}
			b.WriteString(`\$`)
		case c == '\\' && i+1 < len(value) && value[i+1] == '$':
			b.WriteString(`\$`)
			i++
		case c == '\\' || strings.IndexByte(quotes, c) >= 0:
			b.WriteByte('\\')
			b.WriteByte(c)
		case c == '\n':
			b.WriteString("${" + lineFeed + "}")
		case c == '\r':
			b.WriteString("${" + carriageReturn + "}")
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// Shown returns the text of a step of a Dockerfile for people: a command instead of the words that
// run it.
func Shown(step string) string {
	const begin = `RUN ["/bin/sh","-c",`
	rest, ok := strings.CutPrefix(step, begin)
	if !ok {
		return step
	}
	d := json.NewDecoder(strings.NewReader("[" + rest))
	words := []string{}
	if _, err := d.Token(); err != nil {
		return step
	}
	for d.More() && len(words) < 2 {
		var w string
		if d.Decode(&w) != nil {
			break
		}
		words = append(words, w)
	}
	switch {
	case len(words) < 2:
		return step // cut off
	case words[0] == makeUser:
		return "making the user " + words[1]
	}
	return "RUN " + words[1]
}
