package throughput

import (
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/longhouse-go/longhouse/channel"
)

// counts are the counters of one member. They are called by its address, which
// stays when it restarts.
type counts struct {
	address             string
	sent, sentBytes     *channel.Counter
	failed              *channel.Counter
	received, recvBytes *channel.Counter
}

// names of the counters of a member, and the directions they are counted in.
var memberSeries = []struct{ name, help, direction string }{
	{"throughput_member_messages_total", "Messages to and from a member.", "sent"},
	{"throughput_member_bytes_total", "Bytes of bodies to and from a member.", "sent"},
	{"throughput_member_failures_total", "Messages to a member that failed at once.", "sent"},
	{"throughput_member_messages_total", "Messages to and from a member.", "received"},
	{"throughput_member_bytes_total", "Bytes of bodies to and from a member.", "received"},
}

// others is the address of those that are counted together.
const others = "other"

// members counts for each member. Its table is replaced when members come and
// go, and only read for messages.
type members struct {
	max     int
	metrics *channel.Metrics
	evicted *channel.Counter
	other   *counts
	table   atomic.Pointer[map[channel.UniqueID]*counts]

	mu sync.Mutex // guards what follows, and the replacing of table
	// series are all counters that exist, by address.
	series map[string]*counts
	// idle are the addresses of members that have gone, the longest gone first.
	idle []string
}

func (ms *members) init(max int, m *channel.Metrics) {
	ms.max, ms.metrics, ms.series = max, m, map[string]*counts{}
	ms.table.Store(&map[channel.UniqueID]*counts{})
	if max == 0 {
		return
	}
	ms.evicted = m.Counter("throughput_members_evicted_total", "Members that have gone and whose counters were removed to make room for others.")
	ms.other = ms.make(others)
}

func (ms *members) make(address string) *counts {
	var c [5]*channel.Counter
	for i, s := range memberSeries {
		c[i] = ms.metrics.Counter(s.name, s.help, "member", address, "direction", s.direction)
	}
	return &counts{address, c[0], c[1], c[2], c[3], c[4]}
}

// of returns the counters of a member; nil when nobody is counted.
func (ms *members) of(id channel.UniqueID) *counts {
	if c := (*ms.table.Load())[id]; c != nil {
		return c
	}
	return ms.other
}

// add counts a member from now on, if there is room.
func (ms *members) add(m channel.Member) {
	if ms.max == 0 {
		return
	}
	ms.mu.Lock()
	defer ms.mu.Unlock()
	address := m.Addr().String()
	table := *ms.table.Load()
	if c := table[m.ID]; c != nil && c.address == address {
		return
	}
	ms.leave(table[m.ID], m.ID)
	c := ms.series[address]
	if c == nil {
		if len(ms.series) >= ms.max && len(ms.idle) > 0 {
			ms.evict(ms.idle[0])
		}
		if len(ms.series) >= ms.max {
			return
		}
		c = ms.make(address)
		ms.series[address] = c
	}
	ms.idle = slices.DeleteFunc(ms.idle, func(a string) bool { return a == address })
	next := maps.Clone(*ms.table.Load())
	next[m.ID] = c
	ms.table.Store(&next)
}

// evict removes the counters of a member that has gone; ms.mu is held.
func (ms *members) evict(address string) {
	ms.idle = slices.DeleteFunc(ms.idle, func(a string) bool { return a == address })
	delete(ms.series, address)
	for _, s := range memberSeries {
		ms.metrics.Remove(s.name, "member", address, "direction", s.direction)
	}
	ms.evicted.Inc()
}

// remove notes that a member has gone. Its counters stay while there is room.
func (ms *members) remove(m channel.Member) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.leave((*ms.table.Load())[m.ID], m.ID)
}

// leave takes a member out of the table; ms.mu is held.
func (ms *members) leave(c *counts, id channel.UniqueID) {
	if c == nil {
		return
	}
	next := maps.Clone(*ms.table.Load())
	delete(next, id)
	ms.table.Store(&next)
	for _, other := range next {
		if other == c { // another incarnation
			return
		}
	}
	ms.idle = append(ms.idle, c.address)
}

func (ms *members) sent(to []channel.Member, size int64) {
	for i := range to {
		if c := ms.of(to[i].ID); c != nil {
			c.sent.Inc()
			c.sentBytes.Add(size)
		}
	}
}

func (ms *members) received(from channel.UniqueID, size int64) {
	if c := ms.of(from); c != nil {
		c.received.Inc()
		c.recvBytes.Add(size)
	}
}

// failed counts the members that an error names.
func (ms *members) failed(err error) {
	var se *channel.SendError
	if !errors.As(err, &se) {
		return
	}
	for _, f := range se.Faults {
		if c := ms.of(f.Member.ID); c != nil {
			c.failed.Inc()
		}
	}
}
