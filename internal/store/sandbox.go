package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// onceFor limits how long an idempotency key is remembered. The API promises these 24 hours: with a
// shorter time a repeated request would create a second sandbox.
const onceFor = 24 * time.Hour

// sandboxColumns lists the columns of sandboxFields, in the same order. The columns of the shape that
// queries use stand before it. The column of FrontData is surface.
const sandboxColumns = `id, org_id, mode, state, run, template, template_id, template_version,
	image, vcpus, memory_mb, shape, metadata, timeout, idle_timeout, recovery_interval,
	created_at, started_at, expires_at, last_activity_at, suspended_at, destroyed_at, destroy_reason, error,
	source, origin, token, at_end, surface, kept, node_id, fence`

// sandboxFields returns s's columns, to scan into or to write.
func sandboxFields(s *sandbox.Sandbox) []any {
	return []any{&s.ID, &s.OrgID, &s.Mode, &s.State, &s.Run, &s.Template, &s.TemplateID, &s.TemplateVersion,
		&s.Image, &s.Size.VCPUs, &s.Size.MemoryMB, jsonColumn{&s.Shape}, jsonColumn{&s.Metadata},
		durationColumn{&s.Timeout}, durationColumn{&s.IdleTimeout}, durationColumn{&s.RecoveryInterval},
		timeColumn{&s.CreatedAt}, timeColumn{&s.StartedAt}, timeColumn{&s.ExpiresAt}, timeColumn{&s.LastActivityAt},
		timeColumn{&s.SuspendedAt}, timeColumn{&s.DestroyedAt}, &s.DestroyReason, &s.Error, &s.Source, &s.Origin,
		&s.Token, &s.AtEnd, &s.FrontData, &s.Kept, &s.Holder.Node, &s.Holder.Fence}
}

func scanSandbox(row scanner) (sandbox.Sandbox, error) {
	var s sandbox.Sandbox
	err := row.Scan(sandboxFields(&s)...)
	return s, err
}

func noSandbox(id sandbox.ID) error {
	return fault.New(fault.NotFound, fault.CodeSandboxNotFound, "there is no sandbox %s", id)
}

// querier runs queries. *sql.DB and *sql.Tx implement it.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

func getSandbox(ctx context.Context, q querier, id sandbox.ID) (sandbox.Sandbox, error) {
	return readSandbox(ctx, q, id, "")
}

// lockSandbox reads a sandbox, whose row stays the same until the transaction changes it or ends.
func (db *DB) lockSandbox(ctx context.Context, tx *sql.Tx, id sandbox.ID) (sandbox.Sandbox, error) {
	return readSandbox(ctx, tx, id, db.forUpdate())
}

// readSandbox reads a sandbox; lock is the end of the query.
func readSandbox(ctx context.Context, q querier, id sandbox.ID, lock string) (sandbox.Sandbox, error) {
	s, err := scanSandbox(q.QueryRowContext(ctx, "SELECT "+sandboxColumns+" FROM sandboxes WHERE id = $1"+lock, id))
	if errors.Is(err, sql.ErrNoRows) {
		return sandbox.Sandbox{}, noSandbox(id)
	}
	if err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("reading sandbox %s: %w", id, err)
	}
	return s, nil
}

// Insert implements [sandbox.Store].
func (db *DB) Insert(ctx context.Context, s sandbox.Sandbox, q sandbox.Quota,
	once sandbox.Once) (prior sandbox.Sandbox, found bool, err error) {
	defer db.took("insert", time.Now())
	if s.State != sandbox.Creating {
		return prior, false, fmt.Errorf("inserting sandbox %s in state %q", s.ID, s.State)
	}
	err = db.recordCounted(ctx, counts(s, q, once), func(tx *sql.Tx, out *outbox) error {
		if prior, found, err = db.admit(ctx, tx, s, q, once); err != nil || found {
			return err
		}
		return insertSandbox(ctx, tx, out, s, once)
	})
	if err != nil {
		return sandbox.Sandbox{}, false, fmt.Errorf("inserting sandbox %s: %w", s.ID, err)
	}
	return prior, found, nil
}

// counts returns the organization of s if an admission of s counts the organization's rows or needs a
// key that is new there, and else "".
func counts(s sandbox.Sandbox, quota sandbox.Quota, once sandbox.Once) string {
	if once.Key != "" || quota != (sandbox.Quota{}) {
		return s.OrgID
	}
	return ""
}

// admit returns an error if s may not be inserted. If the key of once created a sandbox before, admit
// returns that sandbox and found true.
func (db *DB) admit(ctx context.Context, q querier, s sandbox.Sandbox, quota sandbox.Quota,
	once sandbox.Once) (prior sandbox.Sandbox, found bool, err error) {
	if once.Key != "" {
		if prior, found, err = db.first(ctx, q, s, once); err != nil || found {
			return prior, found, err
		}
	}
	return prior, false, checkQuota(ctx, q, s, quota)
}

// first returns the sandbox that the key of once created before, if there is one.
func (db *DB) first(ctx context.Context, tx querier, s sandbox.Sandbox,
	once sandbox.Once) (sandbox.Sandbox, bool, error) {
	var hash string
	var id sandbox.ID
	p := params{s.OrgID, once.Key}
	oldest := db.now(&p, s.CreatedAt) + " - " + p.add(onceFor.Microseconds())
	err := tx.QueryRowContext(ctx, "SELECT hash, sandbox_id FROM idempotency WHERE org_id = $1 AND name = $2"+
		" AND created_at > "+oldest, p...).Scan(&hash, &id)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return sandbox.Sandbox{}, false, nil
	case err != nil:
		return sandbox.Sandbox{}, false, fmt.Errorf("reading idempotency key: %w", err)
	case hash != once.Hash:
		return sandbox.Sandbox{}, false, fault.New(fault.Conflict, fault.CodeIdempotencyKeyReused,
			"this Idempotency-Key was used with another request within the last 24 hours")
	}
	prior, err := getSandbox(ctx, tx, id)
	return prior, err == nil, err
}

// checkQuota returns Exhausted if the organization of s would exceed q with s. It counts what the
// organization's sandboxes take in their states (see [sandbox.Charge]). A row of s itself does not
// count, so that a sandbox to be woken is counted like a new one.
func checkQuota(ctx context.Context, tx querier, s sandbox.Sandbox, q sandbox.Quota) error {
	if q == (sandbox.Quota{}) {
		return nil
	}
	var p params
	all := states(&p, sandbox.ChargeAll.Of())
	var have sandbox.Quota
	err := tx.QueryRowContext(ctx, `SELECT COUNT(*),
		COALESCE(SUM(CASE WHEN state IN (`+all+`) THEN vcpus ELSE 0 END), 0),
		COALESCE(SUM(CASE WHEN state IN (`+all+`) THEN memory_mb ELSE 0 END), 0)
		FROM sandboxes WHERE ended_at IS NULL AND org_id = `+p.add(s.OrgID)+` AND id <> `+p.add(s.ID)+
		` AND state IN (`+states(&p, sandbox.ChargeItself.Of())+`)`, p...).
		Scan(&have.Sandboxes, &have.VCPUs, &have.MemoryMB)
	if err != nil {
		return fmt.Errorf("counting the organization's sandboxes: %w", err)
	}
	for _, of := range []struct {
		limit, have, more int
		what              string
	}{
		{q.Sandboxes, have.Sandboxes, 1, "sandboxes"},
		{q.VCPUs, have.VCPUs, s.Size.VCPUs, "vCPUs"},
		{q.MemoryMB, have.MemoryMB, s.Size.MemoryMB, "MiB of memory"},
	} {
		if of.limit > 0 && of.have+of.more > of.limit {
			return fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
				"the organization may have %d %s at once, has %d and asks for %d more",
				of.limit, of.what, of.have, of.more)
		}
	}
	return nil
}

// insertSandbox writes the row of a sandbox, its metadata, the event of its creation, those of more transitions and the
// key of once.
func insertSandbox(ctx context.Context, tx *sql.Tx, out *outbox, s sandbox.Sandbox, once sandbox.Once,
	more ...sandbox.Event) error {
	s.Holder = out.db.holder()
	if err := out.db.holds(s.Holder); err != nil {
		return err
	}
	fields := sandboxFields(&s)
	row := "INSERT INTO sandboxes (" + sandboxColumns + ") VALUES (" + placeholders(len(fields)) + ")"
	all := []statement{{row, fields}}
	for name, value := range s.Metadata {
		all = append(all, statement{`INSERT INTO sandbox_metadata (sandbox_id, org_id, name, value) VALUES ($1, $2, $3, $4)
			ON CONFLICT DO NOTHING`, // names that PostgreSQL cannot tell apart, see clean
			[]any{s.ID, s.OrgID, name, value}})
	}
	made := sandbox.Event{SandboxID: s.ID, At: s.CreatedAt, To: sandbox.Creating}
	if s.Origin != "" {
		made.Reason, made.Detail = string(s.Source), s.Origin
	}
	for _, e := range append([]sandbox.Event{made}, more...) {
		all = append(all, out.first(s.OrgID, e))
	}
	if once.Key != "" {
		p := params{s.OrgID, once.Key, once.Hash, s.ID}
		query := `INSERT INTO idempotency (org_id, name, hash, sandbox_id, created_at)
			VALUES ($1, $2, $3, $4, ` + out.db.now(&p, s.CreatedAt) + `) ON CONFLICT (org_id, name) DO UPDATE SET
			hash = excluded.hash, sandbox_id = excluded.sandbox_id, created_at = excluded.created_at`
		all = append(all, statement{query, p})
	}
	if err := out.db.execute(ctx, tx, all); err != nil {
		return fmt.Errorf("writing rows: %w", err)
	}
	return nil
}

// Forget implements [sandbox.Store].
func (db *DB) Forget(ctx context.Context, id sandbox.ID) error {
	defer db.took("forget", time.Now())
	p := params{id}
	if err := db.change(ctx, `DELETE FROM idempotency WHERE sandbox_id = $1
		AND EXISTS (SELECT 1 FROM sandboxes WHERE id = $1`+db.mine(&p)+")", p...); err != nil {
		return fmt.Errorf("forgetting the idempotency key of %s: %w", id, err)
	}
	return nil
}

// Get implements [sandbox.Store].
func (db *DB) Get(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	defer db.took("get", time.Now())
	if s, ok := db.takeExpected(ctx, id); ok {
		return s, nil
	}
	s, err := getSandbox(ctx, db.reader, id)
	return s, db.gone(ctx, err)
}

// gone returns err, the error of a read, unless err says that a row does not exist and an older state of the records
// was restored. Callers remove what has no row.
func (db *DB) gone(ctx context.Context, err error) error {
	if fault.Is(err, fault.NotFound) {
		if older := db.current(ctx); older != nil {
			return older
		}
	}
	return err
}

// List implements [sandbox.Store].
func (db *DB) List(ctx context.Context, f sandbox.Filter) ([]sandbox.Sandbox, string, error) {
	defer db.took("list", time.Now())
	query, args, err := listQuery(f)
	if err != nil {
		return nil, "", err
	}
	all, err := collect(ctx, db.reader, sandboxFields, query, args...)
	if err != nil {
		return nil, "", fmt.Errorf("listing sandboxes: %w", err)
	}
	all, next := cut(listingOf(f), all, f.Limit,
		func(s sandbox.Sandbox) (time.Time, string) { return s.CreatedAt, string(s.ID) })
	return all, next, nil
}

func listQuery(f sandbox.Filter) (string, params, error) {
	var p params
	q := "SELECT " + sandboxColumns + " FROM sandboxes WHERE org_id = " + p.add(f.OrgID)
	if len(f.States) > 0 {
		if !slices.ContainsFunc(f.States, sandbox.State.Over) {
			q += " AND ended_at IS NULL" // follows from the states; it allows SQLite to use the smaller index
		}
		q += " AND state IN (" + states(&p, f.States) + ")"
	}
	for name, value := range f.Metadata {
		q += " AND id IN (SELECT sandbox_id FROM sandbox_metadata WHERE org_id = " + p.add(f.OrgID) +
			" AND name = " + p.add(name) + " AND value = " + p.add(value) + ")"
	}
	if f.Template != "" {
		q += " AND (template_id = " + p.add(f.Template) + " OR template = " + p.add(f.Template) + ")"
	}
	if f.TemplateVersion != 0 {
		q += " AND template_version = " + p.add(f.TemplateVersion)
	}
	if !f.CreatedFrom.IsZero() {
		q += " AND created_at >= " + p.add(at(f.CreatedFrom))
	}
	end, err := pageIn(order{list: listingOf(f), ascending: f.OldestFirst}, f.Limit, f.Cursor, &p)
	return q + end, p, err
}

// listingOf returns the listing that cursors of the filter's order belong to.
func listingOf(f sandbox.Filter) byte {
	if f.OldestFirst {
		return listSandboxesUp
	}
	return listSandboxes
}

func states(p *params, all []sandbox.State) string {
	var marks []string
	for _, s := range all {
		marks = append(marks, p.add(s))
	}
	return strings.Join(marks, ", ")
}

// Transition implements [sandbox.Store].
func (db *DB) Transition(ctx context.Context, c sandbox.Change) (after sandbox.Sandbox, err error) {
	defer db.took("transition", time.Now())
	org := ""
	if c.Quota != nil {
		org = c.OrgID
	}
	move := func(tx *sql.Tx, out *outbox) error {
		before, err := db.lockSandbox(ctx, tx, c.ID)
		if err != nil {
			return err
		}
		after = before
		if err := db.holds(before.Holder); err != nil {
			return err
		}
		if !slices.Contains(c.From, before.State) {
			return fault.New(fault.Conflict, fault.CodeSandboxState, "the sandbox is %s", before.State)
		}
		if c.Run != "" && c.Run != before.Run {
			return fault.New(fault.Conflict, fault.CodeSandboxState, "the sandbox was started again in the meantime")
		}
		if c.Quota != nil {
			if before.OrgID != org {
				return fmt.Errorf("the sandbox belongs to organization %s, not %q", before.OrgID, org)
			}
			if err := db.lockOrg(ctx, tx, org); err != nil {
				return err
			}
			if err := checkQuota(ctx, tx, before, *c.Quota); err != nil {
				return err
			}
		}
		moved, err := out.move(ctx, c, before)
		if err == nil {
			after = moved
		}
		return err
	}
	err = db.inTurn(ctx, org, func() error { return db.record(ctx, move) })
	if err != nil {
		return after, fmt.Errorf("moving sandbox %s to %s: %w", c.ID, c.To, err)
	}
	return after, nil
}

// move makes a transition of a row that the transaction has locked, with its event.
func (o *outbox) move(ctx context.Context, c sandbox.Change, before sandbox.Sandbox) (sandbox.Sandbox, error) {
	query, args := updateQuery(c, before)
	moved, err := scanSandbox(o.tx.QueryRowContext(ctx, query, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return before, fault.New(fault.Conflict, fault.CodeSandboxState, "the sandbox is no longer %s", before.State)
	}
	if err != nil {
		return before, fmt.Errorf("writing row: %w", err)
	}
	return moved, o.transition(ctx, before.OrgID,
		sandbox.Event{SandboxID: c.ID, At: c.At, From: before.State, To: c.To, Reason: c.Reason, Detail: c.Detail})
}

// updateQuery returns the conditional update that makes a transition. The update changes the row only
// if the row still has the state and the run of before.
func updateQuery(c sandbox.Change, before sandbox.Sandbox) (string, params) {
	var p params
	set := []string{"state = " + p.add(c.To)}
	add := func(column string, v any) { set = append(set, column+" = "+p.add(v)) }
	ended := timeColumn{&time.Time{}}
	if c.To.Over() {
		ended = at(c.At)
		// The row loses its secrets. Its weight is the number of rows that it counts for in [DB.Purge].
		public := before.Shape.Public()
		shape := p.add(jsonColumn{&public})
		set = append(set, "shape = "+shape, "surface = ''", "token = ''",
			"weight = 1 + (2 * LENGTH(metadata) + LENGTH("+shape+") + LENGTH(error)) / 4096")
	}
	add("ended_at", ended)
	if c.NewRun != nil {
		add("run", *c.NewRun)
	}
	if c.StartedAt != nil {
		add("started_at", at(*c.StartedAt))
	}
	if c.Timeout != nil {
		add("timeout", durationColumn{c.Timeout})
	}
	if c.ExpiresAt != nil {
		add("expires_at", at(*c.ExpiresAt))
	}
	if c.SuspendedAt != nil {
		add("suspended_at", at(*c.SuspendedAt))
	}
	if c.Kept != nil {
		add("kept", *c.Kept)
	}
	if c.LastActivityAt != nil {
		add("last_activity_at", at(*c.LastActivityAt))
	}
	if c.DestroyedAt != nil {
		add("destroyed_at", at(*c.DestroyedAt))
	}
	if c.DestroyReason != nil {
		add("destroy_reason", *c.DestroyReason)
	}
	if c.Error != nil {
		add("error", *c.Error)
	}
	if c.Token != nil {
		add("token", *c.Token)
	}
	return "UPDATE sandboxes SET " + strings.Join(set, ", ") +
		" WHERE id = " + p.add(c.ID) + " AND state = " + p.add(before.State) + " AND run = " + p.add(before.Run) +
		" RETURNING " + sandboxColumns, p
}

// SetExpiry implements [sandbox.Store].
func (db *DB) SetExpiry(ctx context.Context, id sandbox.ID, expiresAt time.Time, timeout time.Duration,
	later bool) (s sandbox.Sandbox, err error) {
	defer db.took("set_expiry", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		p := params{at(expiresAt), durationColumn{&timeout}, id, sandbox.Running}
		query := "UPDATE sandboxes SET expires_at = $1, timeout = $2 WHERE id = $3 AND state = $4" + db.mine(&p)
		if later {
			query += " AND expires_at < $1"
		}
		s, err = scanSandbox(tx.QueryRowContext(ctx, query+" RETURNING "+sandboxColumns, p...))
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if s, err = db.heldSandbox(ctx, tx, id); err != nil || later && s.State == sandbox.Running {
			return err
		}
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "the sandbox is %s", s.State)
	})
	if err != nil {
		return s, fmt.Errorf("setting the expiry of sandbox %s: %w", id, err)
	}
	return s, nil
}

// SetEgress implements [sandbox.Store].
func (db *DB) SetEgress(ctx context.Context, id sandbox.ID, e sandbox.Egress,
	note sandbox.Event) (s sandbox.Sandbox, err error) {
	defer db.took("set_egress", time.Now())
	err = db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		if s, err = db.lockSandbox(ctx, tx, id); err != nil {
			return err
		}
		s.Egress = e
		if s, err = db.setLiving(ctx, tx, id, "shape", jsonColumn{&s.Shape}); err != nil {
			return err
		}
		note.SandboxID = id
		_, err = out.note(ctx, event.SandboxEgressChanged, note, event.About{})
		return err
	})
	if err != nil {
		return s, fmt.Errorf("changing the policy of sandbox %s: %w", id, err)
	}
	return s, nil
}

// SetFrontData implements [sandbox.Store].
func (db *DB) SetFrontData(ctx context.Context, id sandbox.ID, data string) (s sandbox.Sandbox, err error) {
	defer db.took("set_front_data", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		s, err = db.setLiving(ctx, tx, id, "surface", data)
		return err
	})
	if err != nil {
		return s, fmt.Errorf("writing the front data of sandbox %s: %w", id, err)
	}
	return s, nil
}

// setLiving writes one column of a sandbox that is not over.
func (db *DB) setLiving(ctx context.Context, tx *sql.Tx, id sandbox.ID, column string,
	value any) (sandbox.Sandbox, error) {
	p := params{value, id}
	s, err := scanSandbox(tx.QueryRowContext(ctx, "UPDATE sandboxes SET "+column+
		" = $1 WHERE id = $2 AND ended_at IS NULL"+db.mine(&p)+" RETURNING "+sandboxColumns, p...))
	if !errors.Is(err, sql.ErrNoRows) {
		return s, err
	}
	if s, err = db.heldSandbox(ctx, tx, id); err != nil {
		return s, err
	}
	return s, fault.New(fault.Conflict, fault.CodeSandboxState, "the sandbox is %s", s.State)
}

// SetActivity implements [sandbox.Store].
func (db *DB) SetActivity(ctx context.Context, last map[sandbox.ID]time.Time) error {
	defer db.took("set_activity", time.Now())
	if len(last) == 0 {
		return nil
	}
	err := db.write(ctx, func(tx *sql.Tx) error { return db.setActivity(ctx, tx, last) })
	if err != nil {
		return fmt.Errorf("writing the last activity of %d sandboxes: %w", len(last), err)
	}
	return nil
}

// Unfinished implements [sandbox.Store].
func (db *DB) Unfinished(ctx context.Context) ([]sandbox.Sandbox, error) {
	defer db.took("unfinished", time.Now())
	// The caller removes from the machine what has no row. An older state has no rows of the newest sandboxes.
	if err := db.current(ctx); err != nil {
		return nil, fmt.Errorf("listing unfinished sandboxes: %w", err)
	}
	all, err := collect(ctx, db.reader, sandboxFields,
		"SELECT "+sandboxColumns+" FROM sandboxes WHERE node_id = $1 AND ended_at IS NULL ORDER BY created_at, id",
		db.holder().Node)
	if err != nil {
		return nil, fmt.Errorf("listing unfinished sandboxes: %w", err)
	}
	return all, nil
}

// Living implements [sandbox.Store].
func (db *DB) Living(ctx context.Context) ([]sandbox.ID, error) {
	defer db.took("living", time.Now())
	texts, err := db.texts(ctx, "listing living sandboxes", "SELECT id FROM sandboxes WHERE ended_at IS NULL")
	ids := make([]sandbox.ID, len(texts))
	for i, id := range texts {
		ids[i] = sandbox.ID(id)
	}
	return ids, err
}

// Images implements [sandbox.Store].
func (db *DB) Images(ctx context.Context) ([]string, error) {
	defer db.took("images", time.Now())
	return db.texts(ctx, "listing images of sandboxes",
		"SELECT image FROM sandboxes WHERE ended_at IS NULL AND image <> '' UNION "+
			"SELECT image FROM pool UNION SELECT image FROM snapshots ORDER BY image")
}

// texts returns the rows of a query for one column of text. It puts doing before the text of an
// error. Callers remove what is not among the rows, so texts fails if the records are an older state.
func (db *DB) texts(ctx context.Context, doing, query string, args ...any) ([]string, error) {
	err := db.current(ctx)
	var all []string
	if err == nil {
		all, err = texts(ctx, db.reader, query, args...)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	return all, nil
}

// texts returns the rows of a query for one column of text. q is a *sql.DB or a *sql.Tx.
func texts(ctx context.Context, q querier, query string, args ...any) ([]string, error) {
	return collect(ctx, q, func(text *string) []any { return []any{text} }, query, args...)
}

// collect returns all rows of a query; fields returns where to scan the columns of one to.
func collect[T any](ctx context.Context, q querier, fields func(*T) []any, query string, args ...any) ([]T, error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []T
	for rows.Next() {
		var one T
		if err := rows.Scan(fields(&one)...); err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, rows.Err()
}
