package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// settingServed is the setting that says that a server has worked with the records. Its value has no meaning.
const settingServed = "served"

// Serve notes that a server works with these records, so that [CopyToPostgres] does not replace them any more.
func (db *DB) Serve(ctx context.Context) error {
	defer db.took("serve", time.Now())
	_, err := db.FirstSetting(ctx, settingServed, "yes")
	return err
}

// Copied counts the rows of one table that [CopyToPostgres] copied.
type Copied struct {
	Table string
	Rows  int64
	sum   uint64 // of the rows' digests, which does not depend on their order
}

// add adds a row.
func (c *Copied) add(values []any) {
	digest := sha256.New()
	for _, v := range values {
		fmt.Fprintf(digest, "%T %d %v\n", v, len(fmt.Sprint(v)), v)
	}
	c.Rows++
	c.sum += binary.BigEndian.Uint64(digest.Sum(nil))
}

// copyOrder has the tables whose rows others refer to. The others follow in any order.
var copyOrder = []string{"orgs", "templates", "sandboxes"}

// CopyToPostgres copies all records of a SQLite database to PostgreSQL, in one transaction: after an error PostgreSQL
// has what it had before. It compares the number and the digests of the rows before it commits. It replaces records
// that an earlier copy has made, and refuses those that a server has worked with. No server may use either database
// meanwhile.
func CopyToPostgres(ctx context.Context, from, to *DB) ([]Copied, error) {
	d, ok := to.dialect.(*postgresDialect)
	if _, isSQLite := from.dialect.(*sqliteDialect); !ok || !isSQLite {
		return nil, errors.New("records can be copied from SQLite to PostgreSQL only")
	}
	conn, err := d.pool.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("connecting to PostgreSQL: %w", err)
	}
	defer conn.Release()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("beginning the copy: %w", err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // does nothing after a commit
	tables, err := tablesOf(ctx, tx)
	if err != nil {
		return nil, fmt.Errorf("listing the tables of PostgreSQL: %w", err)
	}
	if err := empty(ctx, tx, tables); err != nil {
		return nil, err
	}
	var all []Copied
	for _, t := range tables {
		copied, err := t.copy(ctx, from.reader, tx)
		if err != nil {
			return nil, fmt.Errorf("copying table %s: %w", t.name, err)
		}
		all = append(all, copied)
	}
	if err := tx.Commit(ctx); err != nil {
		return nil, fmt.Errorf("committing the copy: %w", err)
	}
	d.mark.reset()
	return all, nil
}

// table is a table that both databases have.
type table struct {
	name    string
	columns []string
	types   []string // of PostgreSQL
}

// tablesOf returns the tables of the records in the order in which they can be filled.
func tablesOf(ctx context.Context, tx pgx.Tx) ([]table, error) {
	rows, err := tx.Query(ctx, `SELECT table_name::text, column_name::text, data_type::text FROM information_schema.columns
		WHERE table_schema = current_schema() AND table_name NOT LIKE 'goose%' AND table_name <> 'commits' AND is_identity = 'NO'
		ORDER BY table_name, ordinal_position`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var tables []table
	for rows.Next() {
		var name, column, kind string
		if err := rows.Scan(&name, &column, &kind); err != nil {
			return nil, err
		}
		if len(tables) == 0 || tables[len(tables)-1].name != name {
			tables = append(tables, table{name: name})
		}
		t := &tables[len(tables)-1]
		t.columns, t.types = append(t.columns, column), append(t.types, kind)
	}
	rank := func(t table) int {
		if i := slices.Index(copyOrder, t.name); i >= 0 {
			return i
		}
		return len(copyOrder)
	}
	slices.SortStableFunc(tables, func(a, b table) int { return rank(a) - rank(b) })
	return tables, rows.Err()
}

// empty removes the records of an earlier copy, and refuses others.
func empty(ctx context.Context, tx pgx.Tx, tables []table) error {
	var names []string
	for _, t := range tables {
		names = append(names, t.name)
	}
	// The lock keeps a server from starting with the records that are replaced.
	if _, err := tx.Exec(ctx, "LOCK TABLE "+strings.Join(names, ", ")+" IN ACCESS EXCLUSIVE MODE"); err != nil {
		return fmt.Errorf("locking the records in PostgreSQL: %w", err)
	}
	var served bool
	err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM settings WHERE name = $1)", settingServed).Scan(&served)
	if err != nil {
		return fmt.Errorf("reading the settings in PostgreSQL: %w", err)
	}
	if served {
		return errors.New("a server has worked with the records in PostgreSQL: copy into a new database")
	}
	if _, err := tx.Exec(ctx, "TRUNCATE "+strings.Join(names, ", ")); err != nil {
		return fmt.Errorf("removing the records of an earlier copy: %w", err)
	}
	return nil
}

// copy copies the rows of the table and checks that they arrived.
func (t table) copy(ctx context.Context, from *sql.DB, tx pgx.Tx) (Copied, error) {
	sent, got := Copied{Table: t.name}, Copied{Table: t.name}
	list := strings.Join(t.columns, ", ")
	query := "SELECT " + list + " FROM " + t.name
	if t.name == "events" {
		query += " ORDER BY seq"
	}
	rows, err := from.QueryContext(ctx, query)
	if err != nil {
		return sent, err
	}
	defer rows.Close()
	next, stop := iter.Pull2(t.values(rows))
	defer stop()
	_, err = tx.CopyFrom(ctx, pgx.Identifier{t.name}, t.columns, pgx.CopyFromFunc(func() ([]any, error) {
		values, err, more := next()
		if !more || err != nil {
			return nil, err
		}
		sent.add(values)
		return values, nil
	}))
	if err != nil {
		return sent, err
	}
	arrived, err := tx.Query(ctx, "SELECT "+list+" FROM "+t.name)
	if err != nil {
		return sent, err
	}
	defer arrived.Close()
	for arrived.Next() {
		values, err := arrived.Values()
		if err != nil {
			return sent, err
		}
		got.add(values)
	}
	if err := arrived.Err(); err != nil {
		return sent, err
	}
	if sent != got {
		return sent, fmt.Errorf("%d rows were sent and %d are there, or some differ", sent.Rows, got.Rows)
	}
	return sent, nil
}

// values yields the rows as PostgreSQL stores them.
func (t table) values(rows *sql.Rows) iter.Seq2[[]any, error] {
	return func(yield func([]any, error) bool) {
		for rows.Next() {
			values := make([]any, len(t.columns))
			into := make([]any, len(t.columns))
			for i := range values {
				into[i] = &values[i]
			}
			err := rows.Scan(into...)
			for i, v := range values {
				switch v := v.(type) {
				case string:
					values[i] = clean(v)
				case []byte:
					values[i] = clean(string(v))
				case int64:
					if t.types[i] == "boolean" {
						values[i] = v != 0
					}
				}
			}
			if !yield(values, err) || err != nil {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(nil, err)
		}
	}
}
