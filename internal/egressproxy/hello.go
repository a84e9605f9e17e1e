package egressproxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// maxHello bounds a ClientHello, in bytes, with the headers of its records. Those with
// post-quantum keys and tickets have some 2 KiB; a lower limit would break newer clients, a
// higher one lets a client keep more in memory.
const maxHello = 16 << 10

const (
	recordHandshake    = 22
	recordHeader       = 5
	handshakeHeader    = 4
	messageClientHello = 1
)

var (
	errNoName  = errors.New("the ClientHello names no server")
	errTooLong = errors.New("the ClientHello is too long")
)

// readHello reads from r exactly the records of a ClientHello, and returns the server name in it
// as the client wrote it. It is stricter than servers are: it accepts handshake records only, and
// no empty ones. Of an encrypted ClientHello it returns the outer name.
func readHello(r io.Reader) (name string, err error) {
	var raw bytes.Buffer
	in := io.TeeReader(r, &raw)
	message, want := 0, handshakeHeader
	for known := false; message < want; {
		var header [recordHeader]byte
		if _, err := io.ReadFull(in, header[:]); err != nil {
			return "", fmt.Errorf("reading a record: %w", err)
		}
		n := int(binary.BigEndian.Uint16(header[3:]))
		if header[0] != recordHandshake || header[1] != 3 || n == 0 {
			return "", errors.New("not a handshake of TLS")
		}
		if raw.Len()+n > maxHello {
			return "", errTooLong
		}
		payload := raw.Len()
		if _, err := io.CopyN(io.Discard, in, int64(n)); err != nil {
			return "", fmt.Errorf("reading a record: %w", err)
		}
		message += n
		if !known && message >= handshakeHeader {
			b := handshakeBytes(raw.Bytes(), payload+n)
			if b[0] != messageClientHello {
				return "", errors.New("not a ClientHello")
			}
			want, known = handshakeHeader+int(b[1])<<16+int(b[2])<<8+int(b[3]), true
			if want > maxHello {
				return "", errTooLong
			}
		}
	}
	return serverName(raw.Bytes())
}

// handshakeBytes returns the header of the handshake message in the first n bytes of raw. The
// header may span records.
func handshakeBytes(raw []byte, n int) []byte {
	var b []byte
	for at := 0; at+recordHeader <= n && len(b) < handshakeHeader; {
		length := int(binary.BigEndian.Uint16(raw[at+3:]))
		b = append(b, raw[at+recordHeader:at+recordHeader+length]...)
		at += recordHeader + length
	}
	return b[:handshakeHeader]
}

// serverName returns the server name of the ClientHello in raw, as crypto/tls parses it.
func serverName(raw []byte) (string, error) {
	var hello *tls.ClientHelloInfo
	seen := errors.New("seen")
	err := tls.Server(replay{bytes.NewReader(raw)}, &tls.Config{
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			hello = h
			return nil, seen
		},
	}).HandshakeContext(context.Background())
	if hello == nil {
		return "", fmt.Errorf("parsing the ClientHello: %w", err)
	}
	if hello.ServerName == "" {
		return "", errNoName
	}
	return hello.ServerName, nil
}

// replay is a connection that returns given bytes and discards what is written.
type replay struct{ *bytes.Reader }

func (r replay) Read(b []byte) (int, error)     { return r.Reader.Read(b) }
func (replay) Write(b []byte) (int, error)      { return len(b), nil }
func (replay) Close() error                     { return nil }
func (replay) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (replay) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (replay) SetDeadline(time.Time) error      { return nil }
func (replay) SetReadDeadline(time.Time) error  { return nil }
func (replay) SetWriteDeadline(time.Time) error { return nil }
