package store

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// cursor marks the place after the last row of a page by the pair of columns that listings are
// ordered by. The next page therefore neither repeats nor skips a row when other rows are added or
// removed before it is read. The text of a cursor is opaque to users but not secret.
type cursor struct {
	list byte  // the listing that it belongs to
	at   int64 // created_at in microseconds, or the number or seq of an event
	id   string
}

// These bytes name the listings in cursors. Never change one: users hold cursors that contain them.
const (
	listSandboxes byte = 's'
	listEvents    byte = 'e'
	listTemplates byte = 't'
	listOrgs      byte = 'o'
	listKeys      byte = 'k'
	listSnapshots byte = 'n'
	listWebhooks  byte = 'w'
	// The deliveries of a webhook are ordered by the seq of their events.
	listDeliveries byte = 'd'

	listSandboxesUp byte = 'u' // oldest first
)

const (
	cursorVersion = 1
	// maxCursorID limits the id in a cursor, in bytes. Today's ids have 24: a limit below that would
	// refuse valid cursors, and room for longer ids costs nothing.
	maxCursorID = 64
)

// String returns the base64url encoding of version, list, at (8 bytes) and id.
func (c cursor) String() string {
	b := []byte{cursorVersion, c.list}
	b = binary.BigEndian.AppendUint64(b, uint64(c.at))
	return base64.RawURLEncoding.EncodeToString(append(b, c.id...))
}

func parseCursor(list byte, text string) (cursor, error) {
	bad := fault.InvalidField("cursor", "is not a next_cursor of this listing")
	if len(text) > base64.RawURLEncoding.EncodedLen(2+8+maxCursorID) {
		return cursor{}, bad
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(b) <= 2+8 || b[0] != cursorVersion || b[1] != list {
		return cursor{}, bad
	}
	c := cursor{list: list, at: int64(binary.BigEndian.Uint64(b[2:])), id: string(b[10:])}
	for _, r := range c.id {
		if r != '_' && (r < 'a' || r > 'z') && (r < '0' || r > '9') {
			return cursor{}, bad
		}
	}
	// DecodeString skips line breaks, so without this check two texts could be the same cursor.
	if c.String() != text {
		return cursor{}, bad
	}
	return c, nil
}

// page returns the end of a listing's query. It selects the rows after the cursor, in order, and
// one row more than the limit, which shows whether there is a next page.
func page(list byte, limit int, after string, p *params) (string, error) {
	return pageIn(order{list: list}, limit, after, p)
}

// order describes the order of a listing: newest first, or oldest first if ascending.
type order struct {
	list      byte
	ascending bool
}

func pageIn(o order, limit int, after string, p *params) (string, error) {
	if limit < 1 {
		return "", fmt.Errorf("listing with limit %d", limit)
	}
	beyond, down := "<", " DESC"
	if o.ascending {
		beyond, down = ">", ""
	}
	var where string
	if after != "" {
		c, err := parseCursor(o.list, after)
		if err != nil {
			return "", err
		}
		where = " AND (created_at, id) " + beyond + " (" + p.add(c.at) + ", " + p.add(c.id) + ")"
	}
	return where + " ORDER BY created_at" + down + ", id" + down + " LIMIT " + p.add(limit+1), nil
}

// cut removes the row beyond the limit and returns the cursor of the next page. It returns "" if
// there is no such row.
func cut[T any](list byte, rows []T, limit int, key func(T) (time.Time, string)) ([]T, string) {
	if len(rows) <= limit {
		return rows, ""
	}
	rows = rows[:limit]
	at, id := key(rows[limit-1])
	return rows, cursor{list, at.UnixMicro(), id}.String()
}
