package template

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Times of the background work.
const (
	// retryFirst to retryMost is the delay before a failed build of a built-in template is tried
	// again. It doubles each time: a mirror that is down for a minute costs little, and one that
	// is down for a day is not flooded.
	retryFirst = 30 * time.Second
	retryMost  = time.Hour
	// collectEvery is the interval at which unused images and contexts are removed and the images
	// of built-in templates checked. A longer one keeps replaced images on the disk longer.
	collectEvery = time.Hour
	// askedEvery is the interval at which a server that builds for others looks for what they ask for. A longer one delays
	// the first sandbox of a built-in template.
	askedEvery = time.Second
	// suspectsEvery is the interval at which a server that does not build looks after images that could not be used.
	suspectsEvery = 10 * time.Second
	// writeTimeout bounds recording a build's end while cay stops. If it is not recorded, the
	// next start finds out by itself.
	writeTimeout = 5 * time.Second
	// maxTries is the number of times that a build is started without any server finishing it.
	// With fewer, builds would be given up because a machine rebooted; with more, a build that
	// kills the server would keep the server from working.
	maxTries = 3
)

// Defaults of [Config].
const (
	DefaultContextLimit = 1 << 30
	DefaultContextTotal = 10 << 30
	DefaultTimeout      = 30 * time.Minute
)

// Config configures a Service.
type Config struct {
	Builtins []Definition // in the order they are built in; see [Builtins]
	// Prepare names the built-in templates that are built in the background. The others are built
	// when they are first requested.
	Prepare []string

	Sizes     []string // names of the available sizes
	MaxDiskMB int      // the most that a template may ask for

	MaxTemplates int           // per organization; 0 is no limit
	ContextLimit int64         // bytes; 0 is DefaultContextLimit
	ContextTotal int64         // bytes, of all contexts of one organization; 0 is DefaultContextTotal
	Concurrent   int           // builds at once; 0 is 1
	PerOrg       int           // builds of one organization at once; 0 is 1
	Timeout      time.Duration // per build; 0 is DefaultTimeout
	MaxDisk      int64         // bytes per build; 0 is the builder's own limit

	// Shared says that other servers use the same templates. Then the Service builds only between Register and the end of
	// Run, and Run looks for builds that the others have asked for.
	Shared bool

	// Observe, if not nil, is called with the result of each build ("ready", "failed",
	// "cancelled") and its duration.
	Observe func(result string, took time.Duration)
}

// Service manages templates and their builds.
type Service struct {
	*Reader
	cfg      Config
	store    Store
	builder  Builder
	contexts Contexts
	users    Users
	log      *slog.Logger

	budget  contextBudget
	uploads uploads
	drafts  drafts
	// assembling is held while a context is put together from uploads.
	assembling turns

	follows atomic.Bool // another server builds

	wake   chan struct{} // holds one token: the queue or the retries changed
	hangup chan struct{} // closed by Hangup
	once   sync.Once     // for closing hangup

	mu sync.Mutex
	// +checklocks:mu
	queue queue
	// +checklocks:mu
	runs map[string]*run // runs that can still be joined, by key
	// +checklocks:mu
	running map[string]int // runs by organization
	// +checklocks:mu
	parked map[string]parking // orders that wait for another template, by template
	// +checklocks:mu
	retry retries
	// +checklocks:mu
	secrets map[string]Credentials // by build ID, while it waits or runs
	// +checklocks:mu
	watched map[string]chan struct{} // closed at the next change, by template
	// +checklocks:mu
	suspect map[string]bool // images that could not be used
	// +checklocks:mu
	checking map[string]bool // images whose check is under way
}

// parking is an order that waits for a template to be ready.
type parking struct {
	order
	on string // ID
}

// New returns a Service. Call Register before it is used, and Run to build.
func New(cfg Config, store Store, builder Builder, contexts Contexts, users Users, log *slog.Logger) *Service {
	if cfg.ContextLimit == 0 {
		cfg.ContextLimit = DefaultContextLimit
	}
	if cfg.ContextTotal == 0 {
		cfg.ContextTotal = DefaultContextTotal
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, time.Duration) {}
	}
	cfg.Concurrent, cfg.PerOrg = max(cfg.Concurrent, 1), max(cfg.PerOrg, 1)
	s := &Service{Reader: NewReader(store), cfg: cfg, store: store, builder: builder, contexts: contexts, users: users,
		log:     log,
		budget:  contextBudget{lately: map[string]map[string]int64{}, putting: map[string]int64{}},
		uploads: uploads{byOrg: map[string]map[string]*upload{}}, drafts: drafts{byOrg: map[string][]*draft{}},
		assembling: turns{taken: map[string]chan struct{}{}},
		wake:       make(chan struct{}, 1), hangup: make(chan struct{}),
		queue: queue{served: map[string]int{}}, runs: map[string]*run{}, running: map[string]int{}, parked: map[string]parking{},
		retry:   retries{due: map[string]retry{}, delay: map[string]time.Duration{}},
		secrets: map[string]Credentials{}, watched: map[string]chan struct{}{}, suspect: map[string]bool{},
		checking: map[string]bool{}}
	s.follows.Store(cfg.Shared)
	return s
}

// endLead leaves the builds to another server, and ends each Follow.
func (s *Service) endLead() {
	s.follows.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, changed := range s.watched {
		close(changed)
		delete(s.watched, id)
	}
}

// mayBuild returns Unavailable, code "not_ready", while another server builds the templates.
func (s *Service) mayBuild() error {
	if s.follows.Load() {
		return fault.New(fault.Unavailable, fault.CodeNotReady, "another server builds the templates now; try again").
			After(time.Second)
	}
	return nil
}

// Ready implements [sandbox.Templates]; a name may have a tag, as in "app:v1". It moves a template that
// is not ready to the front of the queue.
func (s *Service) Ready(ctx context.Context, orgID, ref string) (sandbox.TemplateVersion, error) {
	nameOrID, tag := cutTag(ref)
	t, err := s.store.GetTemplate(ctx, orgID, nameOrID)
	if err != nil {
		return sandbox.TemplateVersion{}, err
	}
	if tag != "" {
		return s.tagged(ctx, t, tag)
	}
	return s.newest(ctx, t)
}

// newest returns the default version of a template.
func (s *Service) newest(ctx context.Context, t Template) (sandbox.TemplateVersion, error) {
	if !t.usable() {
		t, err := s.prepare(ctx, t)
		if err != nil {
			return sandbox.TemplateVersion{}, err
		}
		return sandbox.TemplateVersion{}, notReady(t)
	}
	return t.version(), nil
}

func notReady(t Template) error {
	detail := fmt.Sprintf("template %q is %s", t.Name, t.Status)
	switch {
	case t.Status == Failed && t.BuildError != nil:
		detail += ": " + t.BuildError.Short()
	case t.Progress != "":
		detail += ": " + t.Progress
	}
	return fault.New(fault.Conflict, fault.CodeTemplateNotReady, "%s", detail)
}

// prepare queues the build of a built-in template that has not been requested yet, and moves a
// waiting template to the front.
func (s *Service) prepare(ctx context.Context, t Template) (Template, error) {
	if t.Builtin() && t.Status == Pending && s.definition(t.Name) != nil {
		var err error
		if t, err = s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
			if t.Status == Pending && t.QueuedAt.IsZero() {
				t.QueuedAt, t.Progress = now(), ""
			}
			return nil
		}); err != nil {
			return Template{}, fmt.Errorf("asking for template %s: %w", t.Name, err)
		}
		if s.follows.Load() {
			return t, nil // the server that builds finds the row
		}
		s.enqueue(ctx, builtinOrder(t))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue.prefer(t.ID)
	return t, nil
}

// definition returns the definition of a built-in template, or nil if there is none of the name.
func (s *Service) definition(name string) *Definition {
	for i := range s.cfg.Builtins {
		if s.cfg.Builtins[i].Name == name {
			return &s.cfg.Builtins[i]
		}
	}
	return nil
}

// Recheck makes Run soon check an image that could not be used. If it is gone, its tags are marked so,
// and its templates are built again, which also repairs their tags.
func (s *Service) Recheck(image string) {
	s.mu.Lock()
	s.suspect[image] = true
	s.mu.Unlock()
	s.stir()
}

// stir wakes Run to look at the queue.
func (s *Service) stir() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func builtinOrder(t Template) order {
	return order{template: t.ID, name: t.Name, key: "built-in " + t.Name}
}

// key returns the key that equal builds share: what is built, for whom and with which
// credentials.
func (s *Service) key(orgID, buildID string, b Build) string {
	s.mu.Lock()
	secret := s.secrets[buildID]
	s.mu.Unlock()
	return digest(orgID, b.Definition.fileInputs(b.Context, b.Refresh), secret)
}

// enqueue adds an order to a run with the same inputs, or to the end of the queue, unless its
// template already waits or runs.
func (s *Service) enqueue(ctx context.Context, o order) {
	s.mu.Lock()
	_, waits := s.retry.due[o.template]
	for _, r := range s.runs {
		waits = waits || r.member(o.template, o.build) != nil
	}
	if waits {
		s.mu.Unlock()
		return
	}
	r := s.runs[o.key]
	if r == nil {
		s.queue.add(o)
		s.stir()
		s.mu.Unlock()
		return
	}
	m := &member{order: o}
	r.members = append(slices.Clip(r.members), m)
	running := r.cancel != nil // otherwise the run begins it with the others
	if running {
		r.joining.Add(1)
		defer r.joining.Done()
	}
	s.mu.Unlock()
	if running {
		s.begin(ctx, r, m)
	}
}

// end changes the row for a build that has ended.
func (t *Template) end(status Status, why *BuildError) {
	t.Status, t.BuildError, t.Progress, t.Tries, t.QueuedAt, t.UpdatedAt = status, why, "", 0, time.Time{}, now()
}

// Run builds until ctx ends, as many at once as configured. It tries failed builds of built-in
// templates again, and removes unused images and contexts. It returns nil when no build runs any
// more.
func (s *Service) Run(ctx context.Context) error {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	var asked <-chan time.Time
	if s.cfg.Shared {
		look := time.NewTicker(askedEvery)
		defer look.Stop()
		asked = look.C
		defer s.endLead()
	}
	strays := map[string]time.Time{}
	var wg sync.WaitGroup
	defer wg.Wait()
	collected := false
	for ctx.Err() == nil {
		s.checkSuspects(ctx, &wg)
		r, due := s.next()
		if r != nil {
			wg.Go(func() {
				s.perform(ctx, r)
				s.stir()
			})
			continue
		}
		if !collected && s.idle() { // leftovers of the last server, once nothing waits to be built
			collected = true
			s.collect(ctx)
		}
		var retry <-chan time.Time
		if !due.IsZero() {
			retry = time.After(time.Until(due))
		}
		select {
		case <-ctx.Done():
		case <-s.wake:
		case <-retry:
		case <-asked:
			s.takeAsked(ctx, strays)
		case <-tick.C:
			s.lookAfter(ctx)
			s.collect(ctx)
		}
	}
	return nil
}

// next makes a run of the first orders in the queue, if one more may run. Built-in templates
// whose retry is due are added to the queue before. If there is no run, it returns the time of
// the next retry, or the zero time.
func (s *Service) next() (r *run, due time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.retry.take() {
		s.queue.add(o)
	}
	due = s.retry.next()
	total, full := 0, map[string]bool{}
	for org, n := range s.running {
		total += n
		full[org] = n >= s.cfg.PerOrg
	}
	if total >= s.cfg.Concurrent {
		return nil, due
	}
	// An order that was put back while a run with the same inputs is open waits for its end: two of them
	// could not be told apart.
	open := s.runs
	orders := s.queue.next(func(o order) bool { return !full[o.org] && open[o.key] == nil })
	if orders == nil {
		return nil, due
	}
	r = &run{id: newID("run_"), org: orders[0].org, key: orders[0].key}
	for _, o := range orders {
		r.members = append(r.members, &member{order: o})
	}
	s.runs[r.key] = r
	s.running[r.org]++
	return r, time.Time{}
}

func (s *Service) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.running) == 0 && len(s.queue.orders) == 0
}

// errSettled ends an update of a row that a newer build has changed.
var errSettled = errors.New("the build is no longer the newest")

// begin changes the row for a requested build.
func (t *Template) begin(buildID string) {
	t.BuildID, t.Status, t.Progress, t.BuildError, t.Tries, t.QueuedAt, t.UpdatedAt = buildID, Pending, "", nil, 0, now(),
		now()
}

func now() time.Time { return time.Now().UTC() }

// newID returns an ID with 100 random bits.
func newID(prefix string) string {
	var b [13]byte
	rand.Read(b[:])
	return prefix + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))[:20]
}
