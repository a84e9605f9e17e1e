package gate

import (
	"bytes"
	"errors"
	"io"
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

// maxLine bounds the first line of what may be HTTP, bytes.
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
			return speechOther, nil // neither a ClientHello nor a request is so short
		case err != nil:
			return 0, err
		}
	}
}

// classify tells what begins with b; not sure: more of it is needed. What could be TLS or
// HTTP to a lenient server is called that, and left to the strict readers of it to refuse.
func classify(b []byte) (s speech, sure bool) {
	switch {
	case len(b) == 0:
		return 0, false
	case isRecord(b[0]) && len(b) < 2, isSSL2(b[0]) && len(b) < 4:
		return 0, false
	case isRecord(b[0]) && b[1] == 3, isSSL2(b[0]) && b[2] == messageClientHello && (b[3] == 3 || b[3] == 0):
		return speechTLS, true
	case beginsLikeTLS(b[0]):
		return speechOther, true
	}
	line := bytes.TrimLeft(b, " \t\r\n")
	word := bytes.IndexFunc(line, func(r rune) bool { return !isMethod(r) })
	switch {
	case word < 0: // a part of a method, perhaps
		return speechHTTP, len(b) > maxLine
	case line[word] != ' ' && line[word] != '\t':
		return speechOther, true
	}
	end := bytes.IndexByte(line, '\n')
	if end < 0 {
		return speechHTTP, len(b) > maxLine
	}
	if bytes.Contains(bytes.ToUpper(line[word:end]), []byte("HTTP/")) {
		return speechHTTP, true
	}
	return speechOther, true
}

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
