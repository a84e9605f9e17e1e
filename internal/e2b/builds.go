package e2b

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/e2b/steps"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// A client builds a template in four calls: it announces the build, asks for each copy whether its
// files are there, uploads those that are not, and sends the steps. Then it polls the state.

func builderOf(r *http.Request) template.Caller { return template.Caller{OrgID: orgOf(r)} }

// announceBody is E2B's TemplateBuildRequest.
type announceBody struct {
	Name          string   `json:"name"`
	Alias         string   `json:"alias"` // the name, of older clients
	Tags          []string `json:"tags"`
	TeamID        string   `json:"teamID"` // the key says whose it is
	CPUCount      int      `json:"cpuCount"`
	MemoryMB      int      `json:"memoryMB"`
	MinFreeDiskMB int      `json:"minFreeDiskMb"`
}

// announce answers POST /v3/templates.
func (s *Handler) announce(w http.ResponseWriter, r *http.Request) error {
	var in announceBody
	if err := read(w, r, &in); err != nil {
		return err
	}
	if in.Name == "" {
		in.Name = in.Alias
	}
	if in.Name == "" {
		return fault.InvalidField("name", "is needed")
	}
	name, tag := templateRef(strings.ToLower(in.Name)) // as in E2B
	if tag != "" {
		in.Tags = append(in.Tags, tag)
	}
	given := tagsOf(in.Tags)
	if len(given) == 0 {
		given = []string{template.DefaultTag}
	}
	tags := slices.DeleteFunc(slices.Clone(given), func(tag string) bool { return tag == template.DefaultTag })
	size, err := sizeFor(s.Rows.Sizes(), in.CPUCount, in.MemoryMB)
	if err != nil {
		return err
	}
	a := template.Announcement{Name: name, Size: size, Tags: tags, TagsOnly: len(tags) == len(given)}
	if in.MinFreeDiskMB != 0 {
		a.DiskMB = max(in.MinFreeDiskMB, sandbox.MinDiskMB)
	}
	d, err := s.Templates.Announce(r.Context(), builderOf(r), a)
	if err != nil {
		return inOwnWords(err, map[string]string{"disk_size_mb": "minFreeDiskMb"})
	}
	reply(w, r, http.StatusAccepted, map[string]any{"templateID": d.TemplateID, "buildID": d.BuildID, "public": false,
		"names": []string{d.Name}, "aliases": []string{d.Name}, "tags": given})
	return nil
}

// inOwnWords gives the field of an error the name that it has in this API.
func inOwnWords(err error, names map[string]string) error {
	f := fault.As(err)
	if f == nil || names[f.Field] == "" {
		return err
	}
	out := f.Because(err)
	out.Field = names[f.Field]
	return out
}

// sizeFor returns the smallest size with as many CPUs and as much memory; "" if nothing is asked for.
func sizeFor(sizes []sandbox.Size, cpus, memoryMB int) (string, error) {
	if cpus == 0 && memoryMB == 0 {
		return "", nil
	}
	if cpus < 0 || memoryMB < 0 {
		return "", fault.InvalidField("cpuCount", "and memoryMB must be positive")
	}
	var fits *sandbox.Size
	var most sandbox.Size
	for i, size := range sizes {
		if size.VCPUs > most.VCPUs || size.VCPUs == most.VCPUs && size.MemoryMB > most.MemoryMB {
			most = size
		}
		if size.VCPUs < cpus || size.MemoryMB < memoryMB {
			continue
		}
		if fits == nil || size.MemoryMB < fits.MemoryMB || size.MemoryMB == fits.MemoryMB && size.VCPUs < fits.VCPUs {
			fits = &sizes[i]
		}
	}
	if fits == nil {
		return "", fault.InvalidField("cpuCount",
			"no size of this server has %d CPUs and %d MiB of memory; its largest, %s, has %d and %d", cpus, memoryMB, most.Name,
			most.VCPUs, most.MemoryMB)
	}
	return fits.Name, nil
}

// buildBody is E2B's TemplateBuildStartV2.
type buildBody struct {
	FromImage         string        `json:"fromImage"`
	FromTemplate      string        `json:"fromTemplate"`
	FromImageRegistry *registryBody `json:"fromImageRegistry"`
	Steps             []stepBody    `json:"steps"`
	StartCmd          string        `json:"startCmd"`
	ReadyCmd          string        `json:"readyCmd"`
	Force             bool          `json:"force"`
}

// stepBody is a step, and what only the client acts on.
type stepBody struct {
	steps.Step
	ForceUpload     *bool `json:"forceUpload"`
	ResolveSymlinks *bool `json:"resolveSymlinks"`
	Gzip            *bool `json:"gzip"`
}

type registryBody struct {
	Type               string `json:"type"`
	Username           string `json:"username"`
	Password           string `json:"password"`
	ServiceAccountJSON string `json:"serviceAccountJson"`
	AWSAccessKeyID     string `json:"awsAccessKeyId"`
	AWSSecretAccessKey string `json:"awsSecretAccessKey"`
	AWSRegion          string `json:"awsRegion"`
}

// build answers POST /v2/templates/{ref}/builds/{build}. A step that cannot be built fails the build and
// not the call: of a build clients read the step, and point at its line in the program.
func (s *Handler) build(w http.ResponseWriter, r *http.Request) error {
	var in buildBody
	if err := read(w, r, &in); err != nil {
		return err
	}
	err := s.queue(r, in)
	var wrong *steps.Error
	switch {
	case errors.As(err, &wrong) && fault.Is(err, fault.Invalid):
		err = s.Templates.FailDraft(orgOf(r), r.PathValue("ref"), r.PathValue("build"), &template.BuildError{
			Step: wrong.Type, Line: wrong.Line, ExitCode: -1, Message: fault.As(wrong.Cause).Detail})
	case err != nil:
		return inOwnWords(err, map[string]string{"start_command": "startCmd", "ready.command": "readyCmd",
			"ready": "readyCmd"})
	}
	if err == nil {
		w.WriteHeader(http.StatusAccepted)
	}
	return err
}

// queue translates an announced build and queues it. The error of a step is a [steps.Error].
func (s *Handler) queue(r *http.Request, in buildBody) error {
	id := r.PathValue("build")
	if err := s.Templates.HasDraft(orgOf(r), r.PathValue("ref"), id); err != nil {
		return err
	}
	base, request, err := s.base(r.Context(), orgOf(r), in)
	if err != nil {
		return err
	}
	all := make([]steps.Step, len(in.Steps))
	for i, step := range in.Steps {
		all[i] = step.Step
	}
	recipe, err := steps.Translate(base, all, in.Force, id, func(upload, from string) (steps.Kind, error) {
		if !hashPattern.MatchString(upload) {
			return 0, badHash("filesHash")
		}
		mode, err := s.Templates.UploadKind(r.Context(), orgOf(r), upload, from)
		return map[fs.FileMode]steps.Kind{0: steps.File, fs.ModeSymlink: steps.Link}[mode], err
	})
	if err != nil {
		return err
	}
	request.BuildArgs = recipe.Args
	parts := make([]template.Part, len(recipe.Parts))
	for i, p := range recipe.Parts {
		parts[i] = template.Part{Upload: p.Upload, From: p.From, Dir: p.Dir, As: p.As, Step: p.Step}
	}
	_, err = s.Templates.BuildDraft(r.Context(), builderOf(r), r.PathValue("ref"), id, request, recipe.Dockerfile, parts)
	var broken *template.PartError
	if errors.As(err, &broken) {
		return &steps.Error{Line: recipe.Parts[broken.Part].Line, Type: "COPY", Cause: broken.Cause}
	}
	return err
}

// ownImage is the image that E2B's base template is made of, and the default of clients. It is made
// for E2B's machines; the template of that name is what programs expect of it.
const ownImage = "e2bdev/base"

// instead names the built-in templates that have the tools of well-known images, for a machine that
// reaches no registry.
var instead = map[string]string{"debian": "base", "ubuntu": "base", "python": "python", "node": "node", "golang": "go",
	"e2bdev/code-interpreter": "code-interpreter"}

// base returns what a build begins from, and the request for its template without the steps.
func (s *Handler) base(ctx context.Context, org string, in buildBody) (steps.Base, template.Request, error) {
	if (in.FromImage == "") == (in.FromTemplate == "") {
		return steps.Base{}, template.Request{}, fault.InvalidField("fromImage",
			"one of fromImage and fromTemplate is needed")
	}
	start := in.StartCmd
	ready, err := readyOf(in.ReadyCmd)
	if err != nil {
		return steps.Base{}, template.Request{}, err
	}
	request := template.Request{Definition: template.Definition{StartCommand: &start, Ready: ready}}
	if in.StartCmd == "" {
		request.Ready = nil // nothing runs whose readiness could be awaited
	}
	if image := repository(in.FromImage); in.FromImage != "" && image != ownImage {
		credentials, err := registryCredentials(in.FromImage, in.FromImageRegistry)
		if err != nil {
			return steps.Base{}, request, err
		}
		if err := template.CheckReference(in.FromImage); err != nil {
			return steps.Base{}, request, inOwnWords(err, map[string]string{"image": "fromImage"})
		}
		request.Credentials = credentials
		if other := instead[image]; other != "" {
			request.Instead = map[string]string{shortest(in.FromImage): other}
		}
		return steps.Base{Ref: in.FromImage, Account: true, Foreign: true}, request, nil
	}
	if in.FromImage != "" {
		in.FromTemplate = defaultTemplate
	}
	name, err := templateName(in.FromTemplate)
	if err != nil {
		return steps.Base{}, request, err
	}
	t, err := s.getTemplate(ctx, org, name)
	if err != nil {
		return steps.Base{}, request, inOwnWords(err, map[string]string{"": "fromTemplate"})
	}
	if in.StartCmd == "" && !t.Start.None() {
		request.StartCommand, request.Ready = nil, t.Start.Ready // the image carries the command
		if ready != nil {
			request.Ready = ready
		}
	}
	base := steps.Base{Ref: t.Name, User: t.User, Account: t.Builtin() && (t.User == "" || t.User == "root")}
	if template.CheckReference(base.Ref) != nil {
		base.Ref = t.ID // such as a__b_, which no FROM can name
	}
	return base, request, nil
}

// shortest returns a reference without the parts that are understood.
func shortest(ref string) string {
	for _, prefix := range []string{"docker.io/", "index.docker.io/", "library/"} {
		ref = strings.TrimPrefix(ref, prefix)
	}
	return ref
}

// repository returns the repository of a reference in its shortest form.
func repository(ref string) string {
	ref, _, _ = strings.Cut(shortest(ref), "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	return ref
}

// registryCredentials returns the credentials for the registry of an image; nil for none.
func registryCredentials(ref string, in *registryBody) (*template.Credentials, error) {
	if in == nil {
		return nil, nil
	}
	out := &template.Credentials{Registry: "docker.io", Username: in.Username, Password: in.Password}
	if host, _, ok := strings.Cut(ref, "/"); ok && (strings.ContainsAny(host, ".:") || host == "localhost") {
		out.Registry = host
	}
	switch in.Type {
	case "registry", "":
		return out, nil
	case "gcp": // how Google's registries take the key of a service account
		out.Username, out.Password = "_json_key", in.ServiceAccountJSON
		return out, nil
	}
	m := awsRegistry.FindStringSubmatch(out.Registry)
	switch {
	case in.Type != "aws":
		return nil, fault.InvalidField("fromImageRegistry.type", "must be registry, aws or gcp")
	case in.AWSAccessKeyID == "":
		return nil, fault.InvalidField("fromImageRegistry.awsAccessKeyId", "is needed")
	case in.AWSSecretAccessKey == "":
		return nil, fault.InvalidField("fromImageRegistry.awsSecretAccessKey", "is needed")
	case m == nil:
		return nil, fault.InvalidField("fromImage", "must be in a registry of AWS, such as "+
			"123456789012.dkr.ecr.us-east-1.amazonaws.com, to which alone its keys are sent")
	case m[1] != in.AWSRegion:
		return nil, fault.InvalidField("fromImageRegistry.awsRegion", "must be %s, the region of the image", m[1])
	}
	out.Username, out.Password, out.AWSRegion = in.AWSAccessKeyID, in.AWSSecretAccessKey, in.AWSRegion
	return out, nil
}

// awsRegistry matches the hosts of AWS's registries; the group is the region.
var awsRegistry = regexp.MustCompile(`^[0-9]{1,20}\.dkr\.ecr(?:-fips)?\.` +
	`([a-z]{2}(?:-[a-z]{1,20}){1,3}-[0-9]{1,2})\.amazonaws\.com(?:\.cn)?$`)

// Forms of the ready commands that clients make.
var (
	sleeps      = regexp.MustCompile(`^sleep ([0-9]{1,6}(?:\.[0-9]*)?)$`)
	waitsOfPort = regexp.MustCompile(`^(?:\[ -n "\$\(ss -Htuln sport = :([0-9]{1,5})\)" \]|` +
		`ss -tuln \| grep :([0-9]{1,5}))$`)
)

// maxSleep bounds the fixed time of a ready command, in seconds. It passes in every create, for which
// clients wait 60 s.
const maxSleep = 45

// readyOf translates a ready command. A port is looked at without a program of the image. A fixed
// time counts from the boot, which is a fraction of a second before the start command. It is no command
// that sleeps, since a try of the check has a limit of its own.
func readyOf(command string) (*sandbox.Ready, error) {
	if command == "" {
		return nil, nil
	}
	if m := sleeps.FindStringSubmatch(command); m != nil {
		seconds, err := strconv.ParseFloat(m[1], 64)
		if err != nil || seconds > maxSleep {
			return nil, fault.InvalidField("readyCmd", "waits for a fixed time, which passes in every new sandbox: "+
				"at most %d seconds; name what to wait for instead", maxSleep)
		}
		return &sandbox.Ready{Command: fmt.Sprintf(`read -r up rest </proc/uptime && [ "${up%%.*}" -ge %d ]`,
			int(math.Ceil(seconds))+1)}, nil
	}
	if m := waitsOfPort.FindStringSubmatch(command); m != nil {
		if port, err := strconv.Atoi(m[1] + m[2]); err == nil && port > 0 && port < 1<<16 {
			return &sandbox.Ready{Port: port}, nil
		}
	}
	return &sandbox.Ready{Command: command}, nil
}

// statusBody is E2B's TemplateBuildInfo.
type statusBody struct {
	TemplateID string       `json:"templateID"`
	BuildID    string       `json:"buildID"`
	Status     string       `json:"status"`
	Logs       []string     `json:"logs"`
	LogEntries []buildEntry `json:"logEntries"`
	Reason     *reasonBody  `json:"reason,omitempty"`
}

type buildEntry struct {
	Timestamp time.Time `json:"timestamp"`
	Level     string    `json:"level"`
	Message   string    `json:"message"`
	Step      string    `json:"step,omitempty"`
}

type reasonBody struct {
	Message    string       `json:"message"`
	Step       string       `json:"step,omitempty"`
	LogEntries []buildEntry `json:"logEntries"`
}

// logPage is the most entries of one answer, as in E2B.
const logPage = 100

// buildStatus answers GET /templates/{ref}/builds/{build}/status. logsOffset counts entries.
func (s *Handler) buildStatus(w http.ResponseWriter, r *http.Request) error {
	offset, limit := 0, logPage
	for name, to := range map[string]*int{"logsOffset": &offset, "limit": &limit} {
		if text := r.URL.Query().Get(name); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil || n < 0 {
				return fault.InvalidField(name, "must be a number from 0")
			}
			*to = n
		}
	}
	out := statusBody{TemplateID: r.PathValue("ref"), BuildID: r.PathValue("build"), Logs: []string{},
		LogEntries: []buildEntry{}}
	state, err := s.Templates.BuildState(r.Context(), orgOf(r), out.TemplateID, out.BuildID)
	if err != nil {
		return err
	}
	out.Status = statusOf(state.Status)
	if state.Template != "" {
		lines, err := s.TemplateRows.LogRest(r.Context(), state.Template, offset, min(limit, logPage))
		if err != nil {
			return err
		}
		for _, l := range lines {
			e := buildEntryOf(l, state.Error)
			if err := callOf(r).Account.Take(4 * int64(len(e.Message))); err != nil {
				return err
			}
			out.LogEntries, out.Logs = append(out.LogEntries, e), append(out.Logs, e.Message)
		}
	}
	if state.Error != nil && out.Status == statusError {
		out.Reason = reasonOf(*state.Error)
		if state.Template == "" && offset == 0 { // without a log the reason is all that is known
			out.LogEntries = append(out.LogEntries, buildEntry{Timestamp: time.Now().UTC(), Level: "error",
				Message: out.Reason.Message, Step: out.Reason.Step})
			out.Logs = append(out.Logs, out.Reason.Message)
		}
	}
	reply(w, r, http.StatusOK, out)
	return nil
}

// loads matches the headings of steps that no client asked for.
var loads = regexp.MustCompile(`^step [0-9]+: load `)

// buildEntryOf returns a line of a log, whose level follows from what it says.
func buildEntryOf(l template.LogLine, failure *template.BuildError) buildEntry {
	e := buildEntry{Timestamp: l.At.UTC(), Level: "info", Message: l.Text, Step: stepAt(l.Line)}
	if number, step, ok := strings.Cut(l.Text, ": "); ok && l.Heading {
		e.Message = number + ": " + steps.Shown(step)
	}
	switch {
	case failure != nil && l.Step == 0 && slices.Contains(strings.Split(failure.Error(), "\n"), l.Text):
		e.Level, e.Message, e.Step = "error", plainLine(l.Text, *failure), stepOf(*failure)
	case strings.HasPrefix(l.Text, "warning: "):
		e.Level = "warn"
	case l.Heading && loads.MatchString(l.Text):
		e.Level = "debug"
	}
	return e
}

// plainLine returns a line of an error without what only the Dockerfile's reader understands.
func plainLine(line string, e template.BuildError) string {
	if e.Step != "" && strings.HasPrefix(line, e.Step+": ") {
		line = steps.Shown(e.Step) + strings.TrimPrefix(line, e.Step)
	}
	if e.Line > 0 {
		line = strings.Replace(line, fmt.Sprintf(": line %d: ", e.Line), ": ", 1)
	}
	return line
}

// reasonOf tells why a build failed, with the step as clients number them: by it they find the line
// of the program that asked for it.
func reasonOf(e template.BuildError) *reasonBody {
	lines := strings.Split(e.Error(), "\n")
	lines[0] = plainLine(lines[0], e)
	out := &reasonBody{Message: strings.Join(lines, "\n"), LogEntries: []buildEntry{}}
	if out.Step = stepOf(e); steps.Of(e.Line) > 0 {
		out.Message = "step " + out.Step + ": " + out.Message
	}
	return out
}

// stepBase and stepFinalize stand for what comes before and after the steps of a template.
const (
	stepBase     = "base"
	stepFinalize = "finalize"
)

// stepAt returns the step at a line of the Dockerfile as clients number it; "" if the line is unknown.
func stepAt(line int) string {
	switch n := steps.Of(line); {
	case n > 0:
		return strconv.Itoa(n)
	case n == 0:
		return stepBase
	}
	return ""
}

// stepOf returns the step that failed as clients number it.
func stepOf(e template.BuildError) string {
	step := stepAt(e.Line)
	switch {
	case step != "":
		return step
	case strings.HasPrefix(e.Step, "FROM ") || strings.HasPrefix(e.Step, "pulling "):
		return stepBase
	}
	return stepFinalize
}

// deleteTemplate deletes a template, or the snapshot of that name. As in E2B, sandboxes of the template
// continue.
func (s *Handler) deleteTemplate(w http.ResponseWriter, r *http.Request) error {
	name, err := templateName(r.PathValue("ref"))
	if err != nil {
		return err
	}
	err = s.Sandboxes.DeleteSnapshot(r.Context(), orgOf(r), name)
	if fault.Is(err, fault.NotFound) {
		var t template.Template
		if t, err = s.getTemplate(r.Context(), orgOf(r), name); err == nil {
			err = may(r, auth.TemplatesWrite)
		}
		if err == nil {
			err = s.Templates.Delete(r.Context(), builderOf(r), t.ID, true)
		}
	}
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
