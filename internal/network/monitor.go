package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// deletions tells of deletions of the table or of parts of it that are not
// elements, by whomever. Several may come as one. It ends with ctx; the channel
// is never closed.
func deletions(ctx context.Context, table string) (<-chan struct{}, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("opening netfilter's notices: %w", err)
	}
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return nil, errors.Join(fmt.Errorf("joining nftables' notices: %w", err), c.Close())
	}
	out := make(chan struct{}, 1)
	go func() {
		<-ctx.Done()
		// Ends the Receive below; an error of closing a socket that was only
		// read from says nothing.
		_ = c.Close()
	}()
	go func() {
		for ctx.Err() == nil {
			messages, err := c.Receive()
			switch {
			case err != nil && !errors.Is(err, unix.ENOBUFS):
				return
			// ENOBUFS: more happened than was told.
			case err != nil || anyDeletes(messages, table):
				select {
				case out <- struct{}{}:
				default: // one is waiting to be looked at
				}
			}
		}
	}()
	return out, nil
}

func anyDeletes(messages []netlink.Message, table string) bool {
	for _, m := range messages {
		switch m.Header.Type {
		case unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE,
			unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELCHAIN,
			unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELSET,
			unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELRULE:
		default:
			continue
		}
		if len(m.Data) < headerLength {
			continue
		}
		d, err := netlink.NewAttributeDecoder(m.Data[headerLength:])
		if err != nil {
			continue
		}
		for d.Next() {
			// The table's name is attribute 1 of all four.
			if d.Type() == unix.NFTA_TABLE_NAME && d.String() == table {
				return true
			}
		}
	}
	return false
}
