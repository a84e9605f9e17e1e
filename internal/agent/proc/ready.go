package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

const (
	// firstPause and longestPause are the shortest and the longest pause between two checks
	// of a start command. The first is short, since a create waits for it; the pauses stay
	// short beside the time that the command has taken. A check with a command takes the
	// sandbox 20 ms of CPU, so that shorter pauses slow the start command down.
	firstPause   = 10 * time.Millisecond
	longestPause = 250 * time.Millisecond

	// checkTimeout limits one check. A server that accepts connections before it can answer
	// is asked again after it; a check that needs longer never succeeds.
	checkTimeout = 10 * time.Second

	maxAnswer = 64 << 10 // limit of an answer's head, in bytes; a longer one fails the check
)

// readyCheck checks whether a start command is ready.
type readyCheck struct {
	processes *Processes
	ready     *agentapi.Ready
	own       *net.TCPAddr // the sandbox's address; nil if not known
	user      string       // user of the check's command; "" means the sandbox's default
}

// do checks once. The error describes what the check found.
func (r readyCheck) do(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	switch {
	case r.ready.HTTP != nil:
		return r.get(ctx, r.ready.HTTP.Port, r.ready.HTTP.Path)
	case r.ready.Command != "":
		return r.run(ctx, r.ready.Command)
	}
	conn, err := r.dial(ctx, r.ready.Port)
	if err != nil {
		return err
	}
	return conn.Close()
}

// dial connects to a port inside, on the loopback or else on the sandbox's own address.
func (r readyCheck) dial(ctx context.Context, port int) (net.Conn, error) {
	hosts := []string{"127.0.0.1"}
	if r.own != nil {
		hosts = append(hosts, r.own.IP.String())
	}
	var dialer net.Dialer
	for _, host := range hosts {
		conn, err := dialer.DialContext(ctx, "tcp4", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return conn, nil
		}
	}
	return nil, fmt.Errorf("nothing listens on port %d", port)
}

// get requests a path over HTTP. It follows no redirect. It does not use http.Client,
// which would make the agent of every sandbox half a megabyte larger.
func (r readyCheck) get(ctx context.Context, port int, path string) error {
	address := fmt.Sprintf("http://127.0.0.1:%d%s", port, path)
	status, err := r.ask(ctx, port, address)
	if err != nil {
		return fmt.Errorf("GET %s: %w", address, err)
	}
	if status/100 != 2 && status/100 != 3 {
		return fmt.Errorf("GET %s answered %d %s", address, status, http.StatusText(status))
	}
	return nil
}

func (r readyCheck) ask(ctx context.Context, port int, address string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return 0, err
	}
	req.Close = true
	conn, err := r.dial(ctx, port)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := req.Write(conn); err != nil {
		return 0, err
	}
	body := bufio.NewReader(io.LimitReader(conn, maxAnswer))
	for status/100 < 2 { // 1xx responses may come before the answer
		resp, err := http.ReadResponse(body, req)
		if ctx.Err() != nil {
			return 0, errors.New("no answer")
		}
		if err != nil {
			return 0, fmt.Errorf("no answer: %w", err)
		}
		status = resp.StatusCode // the body may never end; closing the connection discards it
	}
	return status, nil
}

// run executes a command as the user of the start command. It kills the command when ctx ends.
func (r readyCheck) run(ctx context.Context, line string) error {
	p := r.processes
	who, err := p.userOf(nil, r.user)
	if err != nil {
		return err
	}
	opts := &process.ExecuteOptions{CloseStdin: true}
	l, err := p.prepare(&process.StartRequest{Process: shell(line), Execute: opts}, who)
	if err != nil {
		return err
	}
	c, streams, err := p.launch(l)
	if err != nil {
		return fmt.Errorf("running its check: %w", startProblem(l, err))
	}
	p.run(c, streams, opts)
	if err := p.follow(ctx, c, nil, 0, opts); err != nil {
		return errors.New("its check did not end")
	}
	if end := c.ending(); !end.GetExited() || end.GetExitCode() != 0 {
		return errors.New("its check " + howEnded(end))
	}
	return nil
}
