package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// feedCommand returns the verb that prints the events of an organization.
func (a *app) feedCommand() *cobra.Command {
	var o cay.FeedOptions
	var types []string
	var limit int
	var follow bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Print what happened in the organization, oldest first",
		Long: `Print what happened in the organization, oldest first: what became of sandboxes,
snapshots, templates and API keys.

With --follow, print what happens from now on, or after the event given with
--after, until stopped. It goes on where it was when the server is started anew.`,
		Example: "  cay events --sandbox sbx_…\n" +
			"  cay events --follow --type sandbox.failed --type template.build_failed\n" +
			"  cay events --follow --json --after evt_…",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, t := range types {
				o.Types = append(o.Types, cay.FeedEventType(t))
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if follow {
				return quiet(a.followFeed(cmd.Context(), c, o, limit))
			}
			o.Limit = pageSize(limit)
			if a.json {
				all, err := collect(c.Feed(cmd.Context(), o), limit)
				if err != nil {
					return err
				}
				return a.printJSON(cay.FeedPage{Events: all})
			}
			n := 0
			for e, err := range c.Feed(cmd.Context(), o) {
				if err == nil {
					err = a.printFeedEvent(e)
				}
				if n++; err != nil || n == limit {
					return quiet(err)
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with new events; with --json a JSON object a line")
	f.StringVar(&o.After, "after", "", "begin after the event with this id")
	f.StringSliceVar(&types, "type", nil, "only events of this type, such as sandbox.failed (repeatable)")
	f.StringVar(&o.Sandbox, "sandbox", "", "only events of this sandbox, which may be gone")
	f.IntVar(&limit, "limit", 0, "print so many at most (default all)")
	return cmd
}

// errEnough ends the following after --limit events.
var errEnough = errors.New("enough events")

// followFeed prints events as they come.
func (a *app) followFeed(ctx context.Context, c *cay.Client, o cay.FeedOptions, limit int) error {
	n := 0
	err := followOn(ctx, o.After, func(last string, reached func(id string)) error {
		o.After = last
		return c.FollowFeed(ctx, o, func(id string, e *cay.FeedEvent) error {
			if e != nil {
				if err := a.printFeedEvent(*e); err != nil {
					return err
				}
				if n++; n == limit {
					return errEnough
				}
			}
			reached(id)
			return nil
		})
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// printFeedEvent prints an event as a line, which is a JSON object with --json.
func (a *app) printFeedEvent(e cay.FeedEvent) error {
	if a.json {
		return json.NewEncoder(a.out).Encode(e)
	}
	parts := []string{e.Time.Local().Format("2006-01-02 15:04:05.000"), e.ID, fmt.Sprintf("%-23s", e.Type)}
	for _, p := range []*string{e.SandboxID, e.SnapshotID, e.TemplateID, e.APIKeyID, e.WebhookID, e.Name} {
		if p != nil {
			parts = append(parts, *p)
		}
	}
	if e.Port != nil {
		parts = append(parts, fmt.Sprintf("port %d", *e.Port))
	}
	if text := strings.TrimSuffix(strings.TrimPrefix(deref(e.Reason)+": "+deref(e.Detail), ": "), ": "); text != "" {
		parts = append(parts, text)
	}
	_, err := fmt.Fprintln(a.out, printable(strings.Join(parts, "  ")))
	return err
}

const (
	// followPatience limits the time for which followOn tries to reach a server again. A restart takes a few seconds, and
	// with a patience as short as that it would end the verb. With more, the end of a server is noticed later.
	followPatience = time.Minute
	// followRetry is the time between two tries. With less, all followers together burden a server that starts.
	followRetry = time.Second
)

// followOn calls follow, and calls it again each time that its stream breaks off, as with a restart of the server.
// follow gets the id of the last entry that it has passed to reached, at first the given one.
func followOn(ctx context.Context, last string, follow func(last string, reached func(id string)) error) error {
	heard, begun := time.Now(), false
	for {
		err := follow(last, func(id string) { last, heard, begun = id, time.Now(), true })
		var conn *url.Error
		broken := errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &conn) || cay.HasCode(err, "stopping")
		if ctx.Err() != nil || !broken || !begun && conn != nil || conn != nil && time.Since(heard) > followPatience {
			return err
		}
		if conn == nil {
			heard = time.Now() // the server has answered
		}
		select {
		case <-time.After(followRetry):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
