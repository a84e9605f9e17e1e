package store

import (
	"database/sql/driver"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// The column types convert Go values to columns of the database and back. Each wraps a pointer to
// the value and serves both as a parameter and as a destination of Scan.

// timeColumn stores a time as microseconds since 1970, and the zero time as NULL.
type timeColumn struct{ t *time.Time }

func (c timeColumn) Value() (driver.Value, error) {
	if c.t.IsZero() {
		return nil, nil
	}
	return c.t.UnixMicro(), nil
}

func (c timeColumn) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*c.t = time.Time{}
	case int64:
		*c.t = time.UnixMicro(v).UTC()
	default:
		return fmt.Errorf("a time is stored as %T", v)
	}
	return nil
}

// at returns t as a parameter, for times that are written and not scanned.
func at(t time.Time) timeColumn { return timeColumn{&t} }

// durationColumn stores a duration as microseconds.
type durationColumn struct{ d *time.Duration }

func (c durationColumn) Value() (driver.Value, error) { return c.d.Microseconds(), nil }

func (c durationColumn) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("a duration is stored as %T", v)
	}
	*c.d = time.Duration(n) * time.Microsecond
	return nil
}

// jsonColumn stores a value of any type as JSON text.
type jsonColumn struct{ p any }

func (c jsonColumn) Value() (driver.Value, error) {
	text, err := json.Marshal(c.p)
	return string(text), err
}

func (c jsonColumn) Scan(v any) error {
	switch v := v.(type) {
	case string:
		return json.Unmarshal([]byte(v), c.p)
	case []byte:
		return json.Unmarshal(v, c.p)
	default:
		return fmt.Errorf("JSON is stored as %T", v)
	}
}

// params collects the parameters of a statement while its text is put together.
type params []any

// add appends a parameter and returns its placeholder.
func (p *params) add(v any) string {
	*p = append(*p, v)
	return "$" + strconv.Itoa(len(*p))
}

// placeholders returns "$1, $2, …" for n parameters.
func placeholders(n int) string {
	var b strings.Builder
	for i := 1; i <= n; i++ {
		if i > 1 {
			b.WriteString(", ")
		}
		b.WriteByte('$')
		b.WriteString(strconv.Itoa(i))
	}
	return b.String()
}

// scanner reads a row. *sql.Row and *sql.Rows implement it.
type scanner interface{ Scan(into ...any) error }
