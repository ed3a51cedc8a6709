package rpc

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/internal/grouptest"
)

// percentiles reports the middle and the slow end of single operations.
func percentiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
}

// BenchmarkRoundTrip measures one caller that waits for each answer: over the
// RPC channel between two nodes of this process, and over a bare TCP connection
// with an echo behind it.
func BenchmarkRoundTrip(b *testing.B) {
	for _, size := range []int{128, 1 << 10} {
		b.Run(fmt.Sprintf("tcp/%d", size), func(b *testing.B) { benchEcho(b, size) })
		for name, o := range map[string]channel.Options{"none": channel.SendNone, "ack": channel.SendAck} {
			b.Run(fmt.Sprintf("rpc/%s/%d", name, size), func(b *testing.B) { benchCall(b, size, o) })
		}
	}
}

func benchEcho(b *testing.B, size int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, size)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { c.Close(); l.Close(); <-done }()
	buf := make([]byte, size)
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	percentiles(b, took)
}

func benchCall(b *testing.B, size int, o channel.Options) {
	book := new(grouptest.Book)
	from, to := book.JoinReal(b, "a"), book.JoinReal(b, "b")
	defer from.StopNode(b)
	defer to.StopNode(b)
	r := open(b, from, "x", nil)
	x := open(b, to, "x", func(_ context.Context, _ channel.Member, b Body) (Body, error) { return b, nil },
		func(c *Config) { c.ReplyOptions = o })
	defer shut(b, r, x)
	ctx, body, members := context.Background(), Bytes(make([]byte, size)), []channel.Member{to.Local()}
	met := make(chan struct{}, 16)
	cancel := from.Watch(func(v channel.View, _ channel.MemberEvent) {
		if v.Has(members[0]) {
			select {
			case met <- struct{}{}:
			default:
			}
		}
	})
	<-met
	cancel()
	b.ReportAllocs()
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		if _, err := r.Call(ctx, members, body, First, o); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	percentiles(b, took)
}
