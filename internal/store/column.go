package store

import (
	"database/sql/driver"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// The column types own how a Go value looks in the database. Each wraps a
// pointer and goes both ways: it is scanned into and it is a parameter.

// timeColumn is a time as microseconds since 1970, the zero time as NULL.
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

// at is a parameter of a time that is not changed.
func at(t time.Time) timeColumn { return timeColumn{&t} }

// durationColumn is a duration as microseconds.
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

// jsonColumn is anything as JSON text.
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

// params collects the parameters of a statement that is put together.
type params []any

// add takes a parameter and returns its place holder.
func (p *params) add(v any) string {
	*p = append(*p, v)
	return "$" + strconv.Itoa(len(*p))
}

// placeholders is "$1, $2, …" for n parameters.
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

// scanner is a row to read from: sql.Row or sql.Rows.
type scanner interface{ Scan(into ...any) error }
