package e2e

import "testing"

// churn opens and closes a hundred connections a second. Eight seconds later a timer of the
// sandbox's kernel removes each, also while the sandbox is being saved.
const churn = `
import socket, time
l = socket.socket()
l.bind(("127.0.0.1", 0))
l.listen(1024)
kept = []
while True:
    c = socket.socket()
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 8)
    c.connect(l.getsockname())
    kept.append(l.accept()[0])
    c.close()
    if len(kept) > 1000:
        kept.pop(0).close()
    time.sleep(0.008)
`

// TestSavesUnderChurn saves a sandbox again and again while connections in it come and go.
func TestSavesUnderChurn(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.persistent(nil)
	defer s.destroy(id)
	s.want(id, "cat > /tmp/churn.py; nohup python3 /tmp/churn.py >/tmp/churn.log 2>&1 & sleep 10", object{"stdin": churn})
	for i := range 4 {
		if _, err := s.api().Checkpoint(t.Context(), id); err != nil {
			t.Errorf("save %d: %v", i, err)
		}
	}
	s.want(id, "cat /tmp/churn.log; test ! -s /tmp/churn.log")
	s.runs(id, "python3 /tmp/churn.py", 1)
}
