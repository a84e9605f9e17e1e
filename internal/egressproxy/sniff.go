package egressproxy

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
)

// opening is what a client says first. All that was read is kept, so that it can be passed
// on after it was looked at.
type opening struct {
	r    io.Reader
	said []byte
	at   int // how much of said Read has given
}

// more waits for more, and reads what there is, up to 4 KiB.
func (o *opening) more() error {
	b := make([]byte, 4<<10)
	n, err := o.r.Read(b)
	o.said = append(o.said, b[:n]...)
	if n > 0 {
		return nil
	}
	return err
}

// Read reads from the beginning, and keeps what it reads.
func (o *opening) Read(b []byte) (int, error) {
	if o.at == len(o.said) {
		if err := o.more(); err != nil {
			return 0, err
		}
	}
	n := copy(b, o.said[o.at:])
	o.at += n
	return n, nil
}

// take is all that was read, for the last time.
func (o *opening) take() []byte {
	b := o.said
	o.said, o.at = nil, 0
	return b
}

// speech is what a client speaks, by its first bytes.
type speech int

const (
	speechOther speech = iota
	speechTLS
	speechHTTP
)

// maxLine bounds the first line of what may be HTTP, bytes. Servers take lines of 8 KiB,
// some of 16; a longer limit only lets a client keep more in memory.
const maxLine = 16 << 10

// sniff tells what the client speaks. It waits for no more bytes than it needs, since a
// client that speaks something else may wait for the server.
func sniff(o *opening) (speech, error) {
	for {
		if s, sure := classify(o.said); sure {
			return s, nil
		}
		switch err := o.more(); {
		case errors.Is(err, io.EOF):
			// A lenient server takes the end for the end of the line.
			s, sure := classify(append(slices.Clone(o.said), '\n'))
			if !sure {
				s = speechOther
			}
			return s, nil
		case err != nil:
			return 0, err
		}
	}
}

// proxyHeader begins version 2 of the PROXY protocol, which some servers take before HTTP
// or TLS; version 1 is a line that begins with the word.
const (
	proxyHeader = "\r\n\r\n\x00\r\nQUIT\n"
	proxyWord   = "PROXY "
)

// classify tells what begins with b; not sure: more of it is needed. What could be TLS or
// HTTP to a lenient server is called that, and left to the strict readers of it to refuse.
// What is called other may still turn out to be HTTP: see [firstLine].
func classify(b []byte) (s speech, sure bool) {
	switch {
	case len(b) == 0:
		return 0, false
	case isRecord(b[0]) && len(b) < 2, isSSL2(b[0]) && len(b) < 4:
		return 0, false
	case isRecord(b[0]) && b[1] == 3, isSSL2(b[0]) && b[2] == messageClientHello && (b[3] == 3 || b[3] == 0):
		return speechTLS, true
	}
	var line firstLine
	if line.read(b) {
		return speechHTTP, true
	}
	if beginsLikeTLS(b[0]) {
		return speechOther, true
	}
	// Only what may become a request is waited for.
	text := bytes.TrimLeft(b, " \t\r\n")
	word := bytes.IndexFunc(text, func(r rune) bool { return !isMethod(r) })
	switch {
	case strings.HasPrefix(proxyHeader, string(b)):
		return 0, false
	case line.ended, word >= 0 && text[word] != ' ' && text[word] != '\t':
		return speechOther, true
	}
	return speechHTTP, len(b) > maxLine
}

// firstLine looks for HTTP in the first line that says anything, byte by byte as it comes.
// Bytes that lenient servers pass over may stand before it: spaces, control characters,
// empty lines, a byte order mark.
type firstLine struct {
	ended bool // by a newline
	over  bool // nothing that follows is looked at

	head    []byte // of the line, from its first letter on
	matched int    // of httpWord, at the end of what was read
	total   int
}

const (
	httpWord = "HTTP/"
	maxHead  = 64 // bytes of a line that are kept: a method and the begin of a target
)

// read reads on in b, and reports whether the line is one of HTTP.
func (l *firstLine) read(b []byte) bool {
	for _, c := range b {
		if l.over {
			return false
		}
		if l.readByte(c) {
			return true
		}
	}
	return false
}

func (l *firstLine) readByte(c byte) bool {
	l.total++
	l.over = l.total > maxLine
	switch {
	case c == '\n':
		l.ended = len(l.head) > 0
		l.over = l.over || l.ended
		l.matched = 0
		// The second version's header has a word in a line of its own.
		return l.nameless() || l.total == len(proxyHeader) && string(l.head) == "QUIT"
	case len(l.head) > 0 || c > ' ' && c < 0x7f:
		if len(l.head) < maxHead {
			l.head = append(l.head, c)
		}
	}
	switch upper := c &^ 0x20; {
	case c == httpWord[l.matched], 'A' <= upper && upper <= 'Z' && upper == httpWord[l.matched]:
		l.matched++
	case upper == httpWord[0]:
		l.matched = 1
	default:
		l.matched = 0
	}
	return l.matched == len(httpWord)
}

// nameless reports whether a line that is over asks for a page without a version (HTTP/0.9,
// which servers have been seen to read headers behind), or announces a client's address.
func (l *firstLine) nameless() bool {
	line := bytes.ToUpper(l.head)
	if bytes.HasPrefix(line, []byte(proxyWord)) {
		return true
	}
	// A lenient server takes a carriage return, a form feed and other such bytes for the space between two words.
	words := bytes.FieldsFunc(line, func(r rune) bool { return r <= ' ' || r >= 0x7f })
	if len(words) < 2 {
		return false
	}
	target := words[1]
	return slices.Contains(methods, string(words[0])) &&
		(bytes.HasPrefix(target, []byte("/")) || bytes.HasPrefix(target, []byte("HTTP:")) || bytes.HasPrefix(target, []byte("HTTPS:")))
}

// methods are those of HTTP that servers know, RFC 9110 section 9 and RFC 5789.
var methods = []string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}

// isRecord reports whether a record of TLS may begin so. Any type of record counts: a
// server may pass over an alert before the ClientHello.
func isRecord(first byte) bool { return first >= 20 && first <= 24 }

// isSSL2 reports whether a ClientHello in the format of SSL 2 may begin so. Some servers
// still take it; it has no name.
func isSSL2(first byte) bool { return first&0x80 != 0 }

func beginsLikeTLS(first byte) bool { return isRecord(first) || isSSL2(first) }

// isMethod reports whether a method of HTTP may have the character, RFC 9110 section 5.6.2.
func isMethod(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' ||
		r < 0x80 && bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), byte(r)) >= 0
}
