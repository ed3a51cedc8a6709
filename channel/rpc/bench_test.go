package rpc

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// serverEnv makes the test program the other process of BenchmarkRoundTrip.
const serverEnv = "LONGHOUSE_RPC_BENCH_SERVER"

// panics is a testing.TB of a process that runs no test.
type panics struct{ testing.TB }

func (panics) Helper()                   { /* nothing to help */ }
func (panics) Fatal(args ...any)         { panic(fmt.Sprint(args...)) }
func (panics) Error(args ...any)         { panic(fmt.Sprint(args...)) }
func (panics) Errorf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

// benchServer prints the addresses of an echo over bare TCP and of a node with
// RPCs that echo, and serves until its input ends.
func benchServer() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 64<<10)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	n := new(grouptest.Book).JoinReal(panics{}, "server")
	answer := func(_ context.Context, _ channel.Member, b Body) (Body, error) { return b, nil }
	open(panics{}, n, "none", answer)
	open(panics{}, n, "quick", answer, func(c *Config) { c.Quick = true })
	open(panics{}, n, "ack", answer, func(c *Config) { c.ReplyOptions = channel.SendAck })
	fmt.Printf("%s %x\n", l.Addr(), wire.AppendMember(nil, n.Local()))
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// percentiles reports the middle and the slow end of single operations.
func percentiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
}

// BenchmarkRoundTrip measures one caller that waits for each answer of another
// process on this machine: over the RPC channel, and over a bare TCP connection
// with an echo behind it.
func BenchmarkRoundTrip(b *testing.B) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	addr, record, _ := strings.Cut(strings.TrimSpace(line), " ")
	raw, err := hex.DecodeString(record)
	if err != nil {
		b.Fatal(err)
	}
	server, _, err := wire.DecodeMember(raw)
	if err != nil {
		b.Fatal(err)
	}
	for _, size := range []int{128, 1 << 10} {
		b.Run(fmt.Sprintf("tcp/%d", size), func(b *testing.B) { benchEcho(b, addr, size) })
		b.Run(fmt.Sprintf("rpc/%d", size), func(b *testing.B) { benchCall(b, server, size, "none", channel.SendNone) })
		b.Run(fmt.Sprintf("quick/%d", size), func(b *testing.B) { benchCall(b, server, size, "quick", channel.SendNone) })
		b.Run(fmt.Sprintf("ack/%d", size), func(b *testing.B) { benchCall(b, server, size, "ack", channel.SendAck) })
	}
}

func benchEcho(b *testing.B, addr string, size int) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
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

func benchCall(b *testing.B, server channel.Member, size int, name string, o channel.Options) {
	from := new(grouptest.Book).JoinReal(b, "a")
	defer from.StopNode(b)
	from.See(server)
	r := open(b, from, name, nil)
	defer shut(b, r)
	ctx, body, members := context.Background(), Bytes(make([]byte, size)), []channel.Member{server}
	met := make(chan struct{}, 1)
	cancel := from.Watch(func(v channel.View, _ channel.MemberEvent) {
		if v.Has(server) {
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
