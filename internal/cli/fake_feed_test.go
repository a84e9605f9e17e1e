package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// feedEvents returns the fake server's events. One has a name that would control a terminal.
func feedEvents() []cay.FeedEvent {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return []cay.FeedEvent{
		{ID: "evt_1", Time: at, Type: "org.created", Name: new("acme\x1b[2J")},
		{ID: "evt_2", Time: at.Add(time.Second), Type: "sandbox.destroyed", SandboxID: new("sbx_1"),
			From: new(cay.SandboxState("destroying")),
			To:   new(cay.SandboxState("destroyed")), Reason: new("expired"), Detail: new("at last")},
		{ID: "evt_3", Time: at.Add(time.Minute), Type: "sandbox.port_public", SandboxID: new("sbx_1"), Port: new(8080)},
	}
}

// feed answers with a page for each event, or with a stream that breaks off after each event, the first time with the
// error of a server that stops.
func (f *fakeAPI) feed(w http.ResponseWriter, r *http.Request, _ []byte) {
	after := max(r.URL.Query().Get("after"), r.URL.Query().Get("cursor"), r.Header.Get("Last-Event-ID"))
	all := feedEvents()
	for len(all) > 0 && all[0].ID <= after {
		all = all[1:]
	}
	switch {
	case after == "evt_0":
		refuse(w, 410, "events_gone", "", "events after this one have been dropped")
	case r.Header.Get("Accept") == "text/event-stream":
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, ":\n\nid: %s\nevent: ready\ndata: {}\n\n", after)
		if len(all) == 0 {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		b, _ := json.Marshal(all[0]) // a type of the client
		fmt.Fprintf(w, "id: %s\nevent: event\ndata: %s\n\n", all[0].ID, b)
		if after == "" {
			fmt.Fprint(w, "event: error\ndata: {\"status\":503,\"code\":\"stopping\",\"detail\":\"the server stops\"}\n\n")
		}
	case len(all) <= 1:
		answer(w, 200, cay.FeedPage{Events: all})
	default:
		answer(w, 200, cay.FeedPage{Events: all[:1], NextCursor: &all[0].ID})
	}
}
