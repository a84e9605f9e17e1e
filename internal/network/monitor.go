package network

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// deletions returns a channel that receives when any process deletes the table or a part of it
// that is not an element. Several deletions may give one value. Its goroutines belong to wg and end
// with ctx; the channel is never closed.
func deletions(ctx context.Context, wg *sync.WaitGroup, table string) (<-chan struct{}, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("opening netfilter's notices: %w", err)
	}
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return nil, errors.Join(fmt.Errorf("joining nftables' notices: %w", err), c.Close())
	}
	out := make(chan struct{}, 1)
	wg.Go(func() {
		<-ctx.Done()
		// This ends the Receive below. The socket was only read from, so an error of Close does
		// not matter.
		_ = c.Close()
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			messages, err := c.Receive()
			switch {
			case err != nil && !errors.Is(err, unix.ENOBUFS):
				return
			// ENOBUFS: the kernel dropped notices.
			case err != nil || anyDeletes(messages, table):
				select {
				case out <- struct{}{}:
				default: // a value is waiting to be read
				}
			}
		}
	})
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
