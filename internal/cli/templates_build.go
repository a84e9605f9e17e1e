package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	cay "github.com/cayhq/cay/sdk/go"
)

// templateFlags holds the flags that name the source of a template and describe its sandboxes.
type templateFlags struct {
	description  string
	dockerfile   string
	context      string
	image        string
	debian       []string
	suite        string
	buildArgs    []string
	target       string
	env          []string
	workdir      string
	user         string
	startCommand string
	readyPort    int
	readyCommand string
	readyHTTP    string
	readyTimeout time.Duration
	size         string
	diskSizeMB   int

	registry      string
	registryUser  string
	passwordStdin bool
	noWait        bool
}

// add adds the flags to those of a verb.
func (t *templateFlags) add(f *pflag.FlagSet) {
	f.StringVar(&t.dockerfile, "dockerfile", "", "build this Dockerfile; - is standard input, without a context")
	f.StringVar(&t.context, "context", "",
		"directory that the Dockerfile copies from; its .dockerignore applies (default the Dockerfile's)")
	f.StringVar(&t.image, "image", "",
		"take this OCI image: a reference, or the path of an archive or a layout that begins with ./ or /")
	f.StringSliceVar(&t.debian, "debian", nil, "install these Debian packages, separated by commas (repeatable)")
	f.StringVar(&t.suite, "suite", "", "Debian release; with --debian (default bookworm)")
	f.StringArrayVar(&t.buildArgs, "build-arg", nil,
		"value NAME=VALUE of an ARG; NAME alone passes your own value; with --dockerfile (repeatable)")
	f.StringVar(&t.target, "target", "", "stage to build; with --dockerfile (default the last)")
	f.StringVar(&t.description, "description", "", "description of the template")
	f.StringArrayVarP(&t.env, "env", "e", nil,
		"environment variable NAME=VALUE of its sandboxes; NAME alone passes your own value (repeatable)")
	f.StringVarP(&t.workdir, "workdir", "w", "", "default working directory (default the image's)")
	f.StringVarP(&t.user, "user", "u", "", "default user (default the image's, else root)")
	f.StringVar(&t.startCommand, "start-command", "",
		"shell command line to start with every sandbox; '' is none (default the image's ENTRYPOINT and CMD)")
	f.IntVar(&t.readyPort, "ready-port", 0, "a sandbox is ready when something listens on this TCP port")
	f.StringVar(&t.readyCommand, "ready-command", "", "a sandbox is ready when this shell command line succeeds")
	f.StringVar(&t.readyHTTP, "ready-http", "",
		"a sandbox is ready when PORT/PATH, such as 8000/healthz, answers with success")
	f.DurationVar(&t.readyTimeout, "ready-timeout", 0, "time in which a sandbox must be ready, 1s to 10m (default 1m)")
	f.StringVarP(&t.size, "size", "s", "", "default size, such as shared-cpu-2x")
	f.IntVar(&t.diskSizeMB, "disk-size-mb", 0, "default space that a sandbox may write to, in MiB")
	f.StringVar(&t.registry, "registry", "", "host of the registry that the credentials are for; needed with --dockerfile")
	f.StringVar(&t.registryUser, "registry-username", "",
		"user name at the registry; the password is $CAY_REGISTRY_PASSWORD")
	f.BoolVar(&t.passwordStdin, "registry-password-stdin", false, "read the password from standard input instead")
	f.BoolVar(&t.noWait, "no-wait", false, "return at once, without waiting for the build")
}

// source reads the build context that a create or a rebuild sends beside its JSON.
type source struct {
	io.ReadCloser
	what string // the text of its progress
	err  error  // the error of reading it
}

// Read implements [io.Reader].
func (s *source) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// templateRequest returns the call that the flags ask for, and the context to send, nil for none. The caller closes the
// context.
func (a *app) templateRequest(t templateFlags, f *pflag.FlagSet) (cay.RebuildTemplateRequest, *source, error) {
	r := cay.RebuildTemplateRequest{Description: given(t.description), Target: given(t.target),
		Workdir: given(t.workdir), User: given(t.user), Size: given(t.size)}
	var err error
	if r.Env, err = pairs("--env", t.env, a.getenv); err != nil {
		return r, nil, err
	}
	if r.BuildArgs, err = pairs("--build-arg", t.buildArgs, a.getenv); err != nil {
		return r, nil, err
	}
	if f.Changed("start-command") {
		r.StartCommand = &t.startCommand
	}
	if f.Changed("disk-size-mb") {
		r.DiskSizeMB = &t.diskSizeMB
	}
	if r.Ready, err = t.ready(f); err != nil {
		return r, nil, err
	}
	if r.Credentials, err = a.credentials(t); err != nil {
		return r, nil, err
	}
	given := 0
	for _, flag := range []string{"dockerfile", "image", "debian"} {
		if f.Changed(flag) {
			given++
		}
	}
	if given > 1 {
		return r, nil, errors.New("--dockerfile, --image, --debian: only one of them")
	}
	if f.Changed("debian") || t.suite != "" {
		r.Debian = &cay.DebianSource{Packages: t.debian, Suite: nil}
		if t.suite != "" {
			r.Debian.Suite = &t.suite
		}
	}
	s, err := a.templateSource(t, &r)
	return r, s, err
}

// templateSource opens the files of the source that the flags name, nil for none, and names the source in r.
func (a *app) templateSource(t templateFlags, r *cay.RebuildTemplateRequest) (*source, error) {
	switch {
	case t.dockerfile == "-":
		if t.context != "" {
			return nil, errors.New("--context: a Dockerfile from standard input has none")
		}
		text, err := io.ReadAll(a.in)
		if err != nil {
			return nil, fmt.Errorf("reading the Dockerfile: %w", err)
		}
		r.Dockerfile = new(string(text))
		return nil, nil
	case t.dockerfile != "":
		dir := first(t.context, filepath.Dir(t.dockerfile))
		b, name, err := openContext(dir, t.dockerfile)
		if err != nil {
			return nil, err
		}
		r.Dockerfile = &name
		return &source{ReadCloser: b.stream(), what: "sending " + dir + ":"}, nil
	case t.context != "":
		return nil, errors.New("--context: is for --dockerfile")
	case strings.HasPrefix(t.image, ".") || strings.HasPrefix(t.image, "/"):
		r.Image = new(".") // the context is the image
		info, err := os.Stat(t.image)
		if err != nil {
			return nil, fmt.Errorf("--image: %w", err)
		}
		if info.IsDir() {
			b, _, err := openContext(t.image, "")
			if err != nil {
				return nil, err
			}
			return &source{ReadCloser: b.stream(), what: "sending " + t.image + ":"}, nil
		}
		file, err := os.Open(t.image)
		if err != nil {
			return nil, fmt.Errorf("--image: %w", err)
		}
		return &source{ReadCloser: file, what: "sending " + t.image + ":"}, nil
	case t.image != "":
		r.Image = &t.image
	}
	return nil, nil
}

// ready returns the ready check that the flags ask for, nil for none.
func (t templateFlags) ready(f *pflag.FlagSet) (*cay.ReadyCheck, error) {
	r := &cay.ReadyCheck{Command: given(t.readyCommand)}
	if f.Changed("ready-port") {
		r.Port = &t.readyPort
	}
	if t.readyHTTP != "" {
		port, path, _ := strings.Cut(strings.TrimPrefix(t.readyHTTP, ":"), "/")
		n, err := strconv.Atoi(port)
		if err != nil {
			return nil, fmt.Errorf("--ready-http: %q is not PORT/PATH such as 8000/healthz", t.readyHTTP)
		}
		r.HTTP = &cay.ReadyHTTP{Port: n, Path: "/" + path}
	}
	if f.Changed("ready-timeout") {
		r.Timeout = new(t.readyTimeout.String())
	}
	if *r == (cay.ReadyCheck{}) {
		return nil, nil
	}
	return r, nil
}

// credentials returns the credentials for a registry, nil for none. No flag has the password, since other users of this
// machine can read command lines.
func (a *app) credentials(t templateFlags) (*cay.RegistryCredentials, error) {
	if t.registryUser == "" {
		if t.registry != "" || t.passwordStdin {
			return nil, errors.New("--registry-username: is needed for credentials")
		}
		return nil, nil
	}
	password := a.getenv("CAY_REGISTRY_PASSWORD")
	if t.passwordStdin {
		if t.dockerfile == "-" {
			return nil, errors.New("--registry-password-stdin: standard input is the Dockerfile already")
		}
		var err error
		if password, err = a.readSecret("the password"); err != nil {
			return nil, err
		}
	}
	if password == "" {
		return nil, errors.New(
			"--registry-username: there is no password: set CAY_REGISTRY_PASSWORD or give --registry-password-stdin")
	}
	return &cay.RegistryCredentials{Registry: given(t.registry), Username: t.registryUser, Password: password}, nil
}

// templatesCreateCommand returns the verb that makes a template.
func (a *app) templatesCreateCommand() *cobra.Command {
	var flags templateFlags
	var egress egressFlags
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a template from a Dockerfile, an image or Debian packages",
		Long: `Make a template and wait until it is built.

Give one of --dockerfile, --image and --debian as the source. The directory of a
Dockerfile is sent to the server, except what its .dockerignore names. FROM looks for
your own and built-in templates by name before any registry.

The steps of the build are shown; Ctrl-C stops showing them, not the build. If the
build fails, cay exits with status 1.`,
		Example: `  cay templates create my-app --dockerfile Dockerfile
  cay templates create my-app --dockerfile build/Dockerfile --context . --build-arg VERSION=3
  cay templates create alpine --image docker.io/library/alpine:3.22
  cay templates create tools --debian git,jq,ripgrep --egress-mode deny_all
  cay templates create web --dockerfile Dockerfile --start-command 'python3 -m http.server 8000' --ready-http 8000/`,
		Args: theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, source, err := a.templateRequest(flags, cmd.Flags())
			if err != nil {
				return err
			}
			in := cay.CreateTemplateRequest{Name: args[0], Description: r.Description, Image: r.Image,
				Dockerfile: r.Dockerfile, Debian: r.Debian,
				BuildArgs: r.BuildArgs, Target: r.Target, Credentials: r.Credentials, Env: r.Env, Workdir: r.Workdir, User: r.User,
				StartCommand: r.StartCommand, Ready: r.Ready, Size: r.Size, DiskSizeMB: r.DiskSizeMB, Egress: egress.policy()}
			return a.buildTemplate(cmd.Context(), source, flags.noWait,
				func(c *cay.Client, body io.Reader) (*cay.Template, error) {
					return c.CreateTemplate(cmd.Context(), in, body)
				})
		},
	}
	flags.add(cmd.Flags())
	egress.add(cmd.Flags(), " (default allow_all)")
	return cmd
}

// templatesRebuildCommand returns the verb that builds a template again.
func (a *app) templatesRebuildCommand() *cobra.Command {
	var flags templateFlags
	cmd := &cobra.Command{
		Use:   "rebuild NAME",
		Short: "Build a template again",
		Long: `Build a template again and wait until it is built. The last ready version stays in use
until then, and if the build fails.

Without flags the inputs are the same, and those that change by themselves, a tag or a
Debian release, are looked up again. With --dockerfile, --image or --debian these are the
inputs, and a setting without a flag gets its default, not its former value. What its
sandboxes may reach does not change.`,
		Example: `  cay templates rebuild my-app
  cay templates rebuild my-app --dockerfile Dockerfile`,
		Args:              theArgs("NAME"),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, source, err := a.templateRequest(flags, cmd.Flags())
			if err != nil {
				return err
			}
			in := &r
			anything := false
			cmd.Flags().Visit(func(f *pflag.Flag) {
				anything = anything || f.Name != "no-wait" && cmd.InheritedFlags().Lookup(f.Name) == nil
			})
			if !anything {
				in = nil
			}
			return a.buildTemplate(cmd.Context(), source, flags.noWait,
				func(c *cay.Client, body io.Reader) (*cay.Template, error) {
					return c.RebuildTemplate(cmd.Context(), args[0], in, body)
				})
		},
	}
	flags.add(cmd.Flags())
	return cmd
}

// buildTemplate asks for a build, shows its log until its end unless noWait is set, and prints the template.
func (a *app) buildTemplate(ctx context.Context, s *source, noWait bool,
	ask func(*cay.Client, io.Reader) (*cay.Template, error)) error {
	p := a.progress()
	defer p.done()
	var body io.Reader
	if s != nil {
		defer s.Close()
		body = &counting{Reader: s, p: p, what: s.what}
	}
	c, err := a.client(ctx)
	if err != nil {
		return err
	}
	t, err := ask(c, body)
	if err != nil && s != nil && s.err != nil && ctx.Err() == nil {
		return s.err // it broke the connection
	}
	if err != nil {
		return err
	}
	p.done()
	if !noWait {
		name := t.Name
		if t, err = followTemplate(ctx, c, t.ID, p.logLine); err != nil {
			p.done()
			if ctx.Err() != nil {
				fmt.Fprintf(a.err, "the build goes on: see cay templates logs -f %s, or cay templates cancel %s\n", name, name)
			}
			return err
		}
		p.done()
	}
	if err := a.show(t, func() error {
		if t.Status == "ready" {
			fmt.Fprintf(a.err, "%s version %d is ready: %s from %s\n", t.Name, t.Version, bytesText(deref(t.ImageSizeBytes)),
				printable(deref(t.Source)))
		}
		_, err := fmt.Fprintln(a.out, t.ID)
		return err
	}); err != nil {
		return err
	}
	if t.Status == "failed" && !noWait {
		return a.buildFailed(t)
	}
	return nil
}

// buildFailed prints the last lines of a failed build and returns its error.
func (a *app) buildFailed(t *cay.Template) error {
	if e := t.BuildError; e != nil {
		for _, line := range e.Tail {
			fmt.Fprintln(a.err, "  "+printable(line))
		}
	}
	text := fmt.Sprintf("building template %s failed: %s", t.Name,
		first(printable(buildErrorText(t.BuildError)), "no reason is known"))
	if t.Version > 0 {
		text += fmt.Sprintf("; version %d stays in use", t.Version)
	}
	return errors.New(text)
}

// logLine shows a line of a build's log. On a terminal it keeps the headings of steps and replaces the last other line;
// elsewhere it prints every line.
func (p *progress) logLine(l cay.TemplateLogLine) error {
	switch {
	case p.live && l.Heading:
		p.done()
		fmt.Fprintln(p.w, printable(l.Text))
	case p.live:
		p.tick("  %s", l.Text)
	default:
		fmt.Fprintln(p.w, printable(l.Text))
	}
	return nil
}

// followTemplate calls emit with the lines of a build's log until the build ends, and goes on after a restart of the
// server.
func followTemplate(ctx context.Context, c *cay.Client, name string,
	emit func(cay.TemplateLogLine) error) (t *cay.Template, err error) {
	err = followOn(ctx, "", func(last string, reached func(id string)) error {
		t, err = c.FollowTemplate(ctx, name, last, func(id string, l cay.TemplateLogLine) error {
			reached(id)
			return emit(l)
		})
		return err
	})
	return t, err
}
