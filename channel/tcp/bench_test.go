package tcp

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

// BenchmarkSend measures messages per second over the loopback interface, in one
// process, from as many goroutines as named: each sends one message after the
// other. An operation is one message; with none it ends when the last message
// has been delivered.
func BenchmarkSend(b *testing.B) {
	for option, o := range map[string]channel.Options{"none": channel.SendNone, "ack": channel.SendAck, "sync": channel.SendSyncAck} {
		for _, size := range []int{128, 1 << 10, 10 << 10} {
			for _, senders := range []int{1, 8, 64} {
				b.Run(fmt.Sprintf("pipe/%s/%d/%d", option, size, senders), func(b *testing.B) { benchSend(b, true, o, size, senders) })
			}
		}
	}
	b.Run("pool/ack/1024/64", func(b *testing.B) { benchSend(b, false, channel.SendAck, 1<<10, 64) })
}

func benchSend(b *testing.B, pipelined bool, o channel.Options, size, senders int) {
	n := realNet(b)
	var got atomic.Int64
	to := receive(b, n, "127.0.0.1", pipelined, func(context.Context, *channel.Message) error { got.Add(1); return nil })
	s := send(b, n)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	var next atomic.Int64
	for range senders {
		wg.Go(func() {
			m := s.message(o, "", to.member)
			m.Body = make([]byte, size)
			for next.Add(1) <= int64(b.N) {
				m.ID = channel.NewUniqueID()
				if err := s.Send(context.Background(), m); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	eventually(b, "all delivered", func() bool { return got.Load() >= int64(b.N) })
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

// end is a Completion that counts.
type end struct {
	left atomic.Int64
	done chan struct{}
	sem  chan struct{}
}

func (e *end) Complete(_ *channel.Message, err error) {
	if err != nil {
		panic(err)
	}
	<-e.sem
	if e.left.Add(-1) == 0 {
		close(e.done)
	}
}

// BenchmarkSendDone measures one goroutine that does not wait for
// acknowledgements, as a dispatching layer does.
func BenchmarkSendDone(b *testing.B) {
	for _, size := range []int{128, 1 << 10, 10 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			n := realNet(b)
			to := receive(b, n, "127.0.0.1", true, func(context.Context, *channel.Message) error { return nil })
			s := send(b, n)
			e := &end{done: make(chan struct{}), sem: make(chan struct{}, 2000)}
			// Messages belong to the sender until they end, which they do in
			// order: the semaphore is smaller than the number of messages.
			ring := make([]*channel.Message, 2001)
			for i := range ring {
				ring[i] = s.message(channel.SendAck, "", to.member)
				ring[i].Body, ring[i].Done = make([]byte, size), e
			}
			e.left.Store(int64(b.N))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				e.sem <- struct{}{}
				m := ring[i%len(ring)]
				m.ID = channel.NewUniqueID()
				if err := s.Send(context.Background(), m); err != nil {
					b.Fatal(err)
				}
			}
			<-e.done
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
		})
	}
}
