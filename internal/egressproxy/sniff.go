package egressproxy

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
)

// opening holds the first bytes of a client, so that they can be passed on after they were
// checked.
type opening struct {
	r    io.Reader
	said []byte
	at   int // how many bytes of said Read has returned
}

// more waits for more bytes and reads what there is, up to 4 KiB.
func (o *opening) more() error {
	b := make([]byte, 4<<10)
	n, err := o.r.Read(b)
	o.said = append(o.said, b[:n]...)
	if n > 0 {
		return nil
	}
	return err
}

// Read reads from the beginning, and keeps the bytes.
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

// take returns all bytes read and forgets them.
func (o *opening) take() []byte {
	b := o.said
	o.said, o.at = nil, 0
	return b
}

// protocol is the protocol that a client's first bytes belong to.
type protocol int

const (
	protocolOther protocol = iota
	protocolTLS
	protocolHTTP
)

// maxLine bounds the first line of what may be HTTP, in bytes. Servers accept lines of 8 KiB,
// some of 16; a longer limit only lets a client keep more in memory.
const maxLine = 16 << 10

// sniff returns the client's protocol. It reads no more bytes than it needs, since a client of
// another protocol may wait for the server.
func sniff(o *opening) (protocol, error) {
	for {
		if s, sure := classify(o.said); sure {
			return s, nil
		}
		switch err := o.more(); {
		case errors.Is(err, io.EOF):
			// A lenient server takes the end of the stream for the end of the line.
			s, sure := classify(append(slices.Clone(o.said), '\n'))
			if !sure {
				s = protocolOther
			}
			return s, nil
		case err != nil:
			return 0, err
		}
	}
}

// proxyHeader begins version 2 of the PROXY protocol, which some servers accept before HTTP or
// TLS. Version 1 is a line that begins with proxyWord.
const (
	proxyHeader = "\r\n\r\n\x00\r\nQUIT\n"
	proxyWord   = "PROXY "
)

// classify returns the protocol that begins with b, or not sure if it needs more bytes. It
// reports TLS or HTTP for all that a lenient server could take for it; their strict readers then
// refuse it. What it reports as other may still turn out to be HTTP: see [firstLine].
func classify(b []byte) (s protocol, sure bool) {
	switch {
	case len(b) == 0:
		return 0, false
	case isRecord(b[0]) && len(b) < 2, isSSL2(b[0]) && len(b) < 4:
		return 0, false
	case isRecord(b[0]) && b[1] == 3, isSSL2(b[0]) && b[2] == messageClientHello && (b[3] == 3 || b[3] == 0):
		return protocolTLS, true
	}
	var line firstLine
	if line.read(b) {
		return protocolHTTP, true
	}
	if beginsLikeTLS(b[0]) {
		return protocolOther, true
	}
	// Wait for more only if it may become a request.
	text := bytes.TrimLeft(b, " \t\r\n")
	word := bytes.IndexFunc(text, func(r rune) bool { return !isMethod(r) })
	switch {
	case strings.HasPrefix(proxyHeader, string(b)):
		return 0, false
	case line.ended, word >= 0 && text[word] != ' ' && text[word] != '\t':
		return protocolOther, true
	}
	return protocolHTTP, len(b) > maxLine
}

// firstLine looks for HTTP in the first line that is not empty, byte by byte. Lenient servers
// ignore some bytes before it: spaces, control characters, empty lines, a byte order mark.
type firstLine struct {
	ended bool // by a newline
	over  bool // the following bytes do not matter

	head    []byte // the begin of the line, from its first letter on
	matched int    // length of the prefix of httpWord that ends here
	total   int
}

const (
	httpWord = "HTTP/"
	maxHead  = 64 // bytes of a line that are kept: a method and the begin of a target
)

// read continues with b, and reports whether the line is one of HTTP.
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
		// The header of version 2 has a word in a line of its own.
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

// nameless reports whether a complete line is a request without a version (HTTP/0.9; some servers
// read headers after it), or a PROXY line, which announces a client's address.
func (l *firstLine) nameless() bool {
	line := bytes.ToUpper(l.head)
	if bytes.HasPrefix(line, []byte(proxyWord)) {
		return true
	}
	// A lenient server takes a carriage return, a form feed and other such bytes for a space.
	words := bytes.FieldsFunc(line, func(r rune) bool { return r <= ' ' || r >= 0x7f })
	if len(words) < 2 {
		return false
	}
	target := words[1]
	return slices.Contains(methods, string(words[0])) &&
		(bytes.HasPrefix(target, []byte("/")) || bytes.HasPrefix(target, []byte("HTTP:")) ||
			bytes.HasPrefix(target, []byte("HTTPS:")))
}

// methods are the HTTP methods that servers know, RFC 9110 section 9 and RFC 5789.
var methods = []string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}

// isRecord reports whether a TLS record may begin with the byte. It accepts any record type,
// since a server may ignore an alert before the ClientHello.
func isRecord(first byte) bool { return first >= 20 && first <= 24 }

// isSSL2 reports whether a ClientHello in the format of SSL 2 may begin with the byte. Some
// servers still accept it; it has no server name.
func isSSL2(first byte) bool { return first&0x80 != 0 }

func beginsLikeTLS(first byte) bool { return isRecord(first) || isSSL2(first) }

// isMethod reports whether an HTTP method may contain the character, RFC 9110 section 5.6.2.
func isMethod(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' ||
		r < 0x80 && bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), byte(r)) >= 0
}
