package bench

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// Options are the kinds of sending that can be measured. The last two are a
// request and its reply: over the RPC channel, and as two messages with the
// option none.
var Options = []string{"none", "async", "ack", "sync-ack", "udp", "rpc", "echo"}

// Latencies are recorded in nanoseconds up to a minute, with two digits.
const (
	maxLatency = int64(time.Minute)
	digits     = 2
)

// stampEvery is how many messages are received between two looks at the clock.
const stampEvery = 32

// inbox counts what an agent receives.
type inbox struct{ messages, last atomic.Int64 }

func (b *inbox) add() {
	if b.messages.Add(1)%stampEvery == 0 {
		b.last.Store(time.Now().UnixNano())
	}
}

// subject is a node that is measured.
type subject interface {
	// record is how others find the node.
	record() channel.Member
	// join makes m a destination of what is sent.
	join(m channel.Member) error
	// sender returns what one sending goroutine calls for every message, and
	// what it calls at the end.
	sender(option string, size int) (send func() error, end func(), err error)
	received() *inbox
	close()
}

// serve answers the lines of in until it ends.
func serve(in io.Reader, out io.Writer, s subject) error {
	defer s.close()
	fmt.Fprintln(out, "ready", hex.EncodeToString(wire.AppendMember(nil, s.record())))
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		answer, err := obey(s, strings.Fields(lines.Text()))
		if err != nil {
			answer = "error " + strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		fmt.Fprintln(out, answer)
	}
	return lines.Err()
}

func obey(s subject, words []string) (string, error) {
	switch {
	case len(words) == 2 && words[0] == "join":
		b, err := hex.DecodeString(words[1])
		if err != nil {
			return "", err
		}
		m, _, err := wire.DecodeMember(b)
		if err != nil {
			return "", err
		}
		return "ok", s.join(m)
	case len(words) == 5 && words[0] == "run":
		var n [3]int
		for i := range n {
			v, err := strconv.Atoi(words[i+2])
			if err != nil {
				return "", err
			}
			n[i] = v
		}
		return measure(s, words[1], n[0], n[1], time.Duration(n[2])*time.Millisecond)
	case len(words) == 1 && words[0] == "count":
		b := s.received()
		return fmt.Sprintf("count %d %d", b.messages.Load(), b.last.Load()), nil
	case len(words) == 1 && words[0] == "reset":
		b := s.received()
		b.messages.Store(0)
		b.last.Store(0)
		return "ok", nil
	}
	return "", fmt.Errorf("unknown command %q", strings.Join(words, " "))
}

// sampleEvery returns of how many messages one is timed: looking at the clock
// would be a good part of sending where nobody waits.
func sampleEvery(option string) int {
	if option == "none" || option == "async" || option == "udp" {
		return 16
	}
	return 1
}

// measure sends from several goroutines, each one message after the other, for
// the given time.
func measure(s subject, option string, size, senders int, d time.Duration) (string, error) {
	type result struct {
		sent, failed int64
		hist         *hdrhistogram.Histogram
	}
	results := make([]result, senders)
	sends := make([]func() error, senders)
	for i := range sends {
		send, end, err := s.sender(option, size)
		if err != nil {
			return "", err
		}
		defer end()
		sends[i] = send
	}
	every := sampleEvery(option)
	var wg sync.WaitGroup
	start := time.Now()
	stop := start.Add(d)
	for i, send := range sends {
		r := &results[i]
		r.hist = hdrhistogram.New(1, maxLatency, digits)
		wg.Go(func() {
			for begin := time.Now(); ; begin = time.Now() {
				if r.sent+r.failed > 0 && begin.After(stop) { // once at least, however late it is
					return
				}
				err := send()
				if err == nil {
					_ = r.hist.RecordValue(min(int64(time.Since(begin)), maxLatency))
				}
				for n := 1; ; n++ {
					if err != nil {
						r.failed++
					} else {
						r.sent++
					}
					if n == every {
						break
					}
					err = send()
				}
			}
		})
	}
	wg.Wait()
	end := time.Now()
	all := hdrhistogram.New(1, maxLatency, digits)
	var sent, failed int64
	for _, r := range results {
		sent += r.sent
		failed += r.failed
		all.Merge(r.hist)
	}
	return fmt.Sprint("ran ", sent, " ", failed, " ", start.UnixNano(), " ", end.UnixNano(), " ",
		all.ValueAtQuantile(50), " ", all.ValueAtQuantile(90), " ", all.ValueAtQuantile(99), " ",
		all.ValueAtQuantile(99.9), " ", all.Max()), nil
}

// errOption says that a subject has no such way of sending.
var errOption = errors.New("not offered")
